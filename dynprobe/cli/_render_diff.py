"""What ``diff`` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.runs import Difference

__all__ = ["difference"]

_ROWS = 24


def difference(found: Difference, written: Sequence[Path]) -> None:
    """Print a difference."""
    console = new_console()
    console.print(f"a  {found.a}", soft_wrap=True, markup=False)
    console.print(f"b  {found.b}", soft_wrap=True, markup=False)
    console.print(f"verdict: {found.verdict}", soft_wrap=True, markup=False)
    said = {"states": "measured on hidden states", "metrics": "lower bounds from stored metrics", "none": "tokens only"}
    console.print(f"differences {said[found.basis]}; noise floor {found.floor}", soft_wrap=True, markup=False)
    console.print(_conditions(found))
    parting = found.samples[found.samples["verdict"].str.startswith("part")]
    if len(parting):
        console.print(_samples(found, parting))
        if len(parting) > _ROWS:
            console.print(f"… {len(parting) - _ROWS} more samples part: --out FILE.json", soft_wrap=True)
        _texts(console, parting)
    if len(found.facts):
        table = Table(title="what differs in the manifests")
        for name in ("fact", "a", "b"):
            table.add_column(name, overflow="fold")
        for row in found.facts.head(_ROWS).to_dict("records"):
            table.add_row(str(row["fact"]), str(row["a"]), str(row["b"]))
        console.print(table)
        if len(found.facts) > _ROWS:
            console.print(f"… {len(found.facts) - _ROWS} more facts: --out FILE.json", soft_wrap=True)
    for name, only in (("a", found.only_a), ("b", found.only_b)):
        if only:
            more = f" and {len(only) - 8} more" if len(only) > 8 else ""
            console.print(f"only in {name}: {', '.join(only[:8])}{more}", soft_wrap=True, markup=False)
    for text in found.warnings:
        console.print(f"warning: {text}", soft_wrap=True, markup=False)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True, markup=False)


def _conditions(found: Difference) -> Table:
    table = Table(title="by condition: first in the order of depth")
    table.add_column("condition")
    table.add_column("verdict")
    for name in (
        "samples",
        "bit for bit",
        "part",
        "largest",
        "× per depth",
        "texts differ",
        "top-1 flips",
        "ΔNLL/nats",
    ):
        table.add_column(name, justify="right")
    tracks = _growing(found)
    for row in found.conditions.to_dict("records"):
        flips = f"{row['top1_flips']}" + (f" ({row['top1_unknown']} undecided)" if row["top1_unknown"] else "")
        table.add_row(
            str(row["condition_id"]), str(row["verdict"]), str(row["n"]), str(row["n_equal"]), str(row["n_part"]),
            _number(row["max_rel"]), _number(row["growth"], 3) + tracks.get(str(row["condition_id"]), ""),
            str(row["n_texts_differ"]), flips,
            _number(row["nll_max"]),
        )  # fmt: skip
    return table


def _growing(found: Difference) -> dict[str, str]:
    """Condition → the tracks on which its samples grow most, where a run has several: ``" on z_H"``."""
    known = found.samples.dropna(subset=["growth_track"])
    if found.depths["track"].nunique() < 2:
        return {}
    said = {}
    for condition, own in known.groupby("condition_id", observed=True, sort=False):
        counts = own["growth_track"].astype(str).value_counts()
        several = len(counts) > 1
        said[str(condition)] = " on " + ", ".join(f"{t} ({n})" if several else str(t) for t, n in counts.items())
    return said


def _samples(found: Difference, parting: pd.DataFrame) -> Table:
    from dynprobe.runs import difference_place

    table = Table(
        title="samples that part",
        caption="in the order of tokens: what a reader of the text meets first; of depth: the lowest that differs",
    )  # fmt: skip
    for name in ("condition", "prompt", "first token that differs", "first depth that differs"):
        table.add_column(name)
    for name in ("there", "floor", "cells beyond"):
        table.add_column(name, justify="right")
    for row in parting.head(_ROWS).to_dict("records"):
        if row["n_beyond"]:
            cells = [difference_place(row, "token_"), difference_place(row, "depth_"), _number(row["depth_rel"])]
            cells += [_number(row["depth_floor"]), f"{row['n_beyond']} of {row['n_cells']}"]
        else:
            cells = [str(row["verdict"]), "–", "–", "–", f"0 of {row['n_cells']}"]
        table.add_row(str(row["condition_id"]), str(row["prompt_id"]), *cells)
    return table


def _texts(console: Any, parting: pd.DataFrame) -> None:
    """Show where the texts part, for the first few."""
    rows = parting[parting["differs_at"].notna()].head(4)
    for row in rows.to_dict("records"):
        a, b = row["text_a"], row["text_b"]
        if not (isinstance(a, str) and isinstance(b, str)):
            continue
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = max(0, same - 24)
        console.print(
            f"{row['condition_id']}, {row['prompt_id']}: texts part at token {row['differs_at']}: "
            f"…{a[start:same]!r} + {a[same : same + 24]!r} | {b[same : same + 24]!r}",
            soft_wrap=True, markup=False,
        )  # fmt: skip


def _number(value: Any, digits: int = 2) -> str:
    if value is None or pd.isna(value):
        return "–"
    return f"{value:.{digits}g}" if value else "0"
