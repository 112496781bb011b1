"""What ``delay`` does: read the series, one call, then printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe._ranges import whole_numbers
from dynprobe.cli._commands import print_json
from dynprobe.errors import UsageError

__all__ = ["delay_command"]


def delay_command(
    run: Path,
    column: str,
    where: Mapping[str, Any],
    labels: Sequence[str],
    limit: int | None,
    texts: Mapping[str, str],
    options: Mapping[str, Any],
    series: str | None,
    out: Path | None,
    figure: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """``dynprobe delay``."""
    from dynprobe.cli import _render_delay
    from dynprobe.protocols import delay_diagnostics
    from dynprobe.runs import run_series
    from dynprobe.runs._canvas import save_figure

    for target, flag, endings in ((out, "--out", (".csv", ".json")), (figure, "--figure", (".png", ".svg", ".pdf"))):
        if target is not None and target.suffix not in endings:
            raise UsageError(f"{flag} {target}: it ends in {', '.join(endings)}")
        if target is not None and not target.parent.is_dir():
            raise UsageError(f"{flag} {target}: there is no folder {target.parent}")
    dims, lag, theiler = _dims(texts["dims"]), _whole("--lag", texts["lag"]), _whole("--theiler", texts["theiler"])
    found = run_series(run, column, at=dict(_label(text) for text in labels), **where)
    if limit is not None:
        if limit < 1:
            raise UsageError(f"--limit {limit}; it keeps at least 1 series")
        found = dict(list(found.items())[:limit])
    if series is not None and series not in found:
        raise UsageError(f"--series {series!r}; there are {', '.join(list(found)[:8])}{' …' if len(found) > 8 else ''}")
    kinds: Any = [part.strip() for part in texts["surrogates"].split(",") if part.strip()]
    result = delay_diagnostics(found, dims, lag, theiler, surrogates=kinds, **options)
    written = [result.save(out)] if out is not None else []
    if figure is not None:
        written.append(save_figure(result.figure(series), figure))
    if as_json:
        print_json({"column": column, **result.to_dict()})
    elif not quiet:
        _render_delay.delay(result, column, written)


def _whole(flag: str, text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} {text!r}; it is auto or a whole number of at least 1") from None


def _dims(text: str) -> list[int]:
    try:
        return list(whole_numbers(text, closed=True))
    except ValueError:
        raise UsageError(f"--dims {text!r}; write 1:6 (both ends) or 2,3,8") from None


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UsageError(f"--at {text!r}; it is LABEL=VALUE such as slot=0")
    return name.strip(), value.strip()
