"""What is printed of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynprobe.cli._console import console as new_console
from dynprobe.runs._export_card import main_table

if TYPE_CHECKING:
    from dynprobe.runs import Export

__all__ = ["exported"]


def exported(done: Export) -> None:
    """Print what was written, what was taken out, and how to read it."""
    console = new_console()
    rows = " · ".join(f"{name} {n:,}" for name, n in done.rows.items())
    console.print(f"{done.path}: {done.to}, {done.bytes / 1e6:.1f} MB", soft_wrap=True)
    console.print(f"  tables    {rows}", soft_wrap=True)
    for line in done.removed:
        console.print(f"  removed   {line}", soft_wrap=True)
    for line in done.remarks:
        console.print(f"  remark    {line}", soft_wrap=True)
    if done.address is not None:
        console.print(f"  pushed    {done.address}", soft_wrap=True)
    main = main_table(done.rows)
    if done.to == "hf" and main is not None:
        console.print(f"  read      datasets.load_dataset({str(done.path)!r}, {main!r})", soft_wrap=True)
    console.print(f"  again     dynprobe import {done.path}", soft_wrap=True)
