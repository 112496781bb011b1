"""What ``compare`` does: one call, then printing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynprobe.cli._commands import print_json
from dynprobe.errors import UsageError

__all__ = ["compare_command"]


def compare_command(
    runs: Sequence[Path],
    margins: Sequence[str],
    out: Path | None,
    figure: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """``dynprobe compare``."""
    from dynprobe.cli import _render_compare
    from dynprobe.runs import compare

    for target, flag, endings in (
        (out, "--out", (".json", ".csv", ".md")),
        (figure, "--figure", (".png", ".svg", ".pdf")),
    ):
        if target is not None and (target.suffix not in endings or not target.parent.is_dir()):
            why = (
                f"there is no folder {target.parent}"
                if target.suffix in endings
                else f"it ends in {', '.join(endings)}"
            )
            raise UsageError(f"{flag} {target}: {why}")
    found = compare(runs, margin=dict(_margin(text) for text in margins), **options)
    written = [found.save(out)] if out is not None else []
    if figure is not None:
        along = list(found.profiles["metric"].unique()) if len(found.profiles) else []
        wanted = [m for m in options["metric"] if m in along]
        written.append(found.draw(figure, wanted[0] if wanted else None))
    if as_json:
        print_json(found.to_dict())
    elif not quiet:
        _render_compare.comparison(found, options["metric"], written)


def _margin(text: str) -> tuple[str, float]:
    name, separator, value = text.partition("=")
    try:
        size = float(value)
    except ValueError:
        size = 0.0
    if not separator or not name or not size > 0:
        raise UsageError(f"--margin {text!r}; it is METRIC=VALUE with a value above 0, such as kappa_phase=0.005")
    return name.strip(), size
