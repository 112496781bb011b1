"""What ``diff`` does: one call, then printing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynprobe.cli._commands import print_json
from dynprobe.errors import DynprobeError, UsageError

__all__ = ["diff_command"]


def diff_command(
    a: Path, b: Path, out: Path | None, figure: Path | None, check: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """``dynprobe diff``."""
    from dynprobe.cli import _render_diff
    from dynprobe.runs import diff

    for target, flag, endings in (
        (out, "--out", (".json", ".csv", ".parquet")),
        (figure, "--figure", (".png", ".svg", ".pdf")),
    ):
        if target is not None and target.suffix not in endings:
            raise UsageError(f"{flag} {target}: it ends in {', '.join(endings)}")
        if target is not None and not target.parent.is_dir():
            raise UsageError(f"{flag} {target}: there is no folder {target.parent}")
    found = diff(a, b, **options)
    written = [found.save(out)] if out is not None else []
    written += [found.draw(figure)] if figure is not None else []
    if as_json:
        print_json(found.to_dict())
    elif not quiet:
        _render_diff.difference(found, written)
    if check and (found.parts or not found.compared):
        raise DynprobeError(f"the runs {found.verdict}" if found.parts else found.verdict)
