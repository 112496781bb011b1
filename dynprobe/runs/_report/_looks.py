"""Colours, strokes and words that all pictures of a page share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynprobe.runs._canvas import BLUE, RED

if TYPE_CHECKING:
    import pandas as pd

    from dynprobe.runs._run import Run

__all__ = [
    "COLOURS",
    "DASHES",
    "INK",
    "MOST_BANDS",
    "MUTED",
    "SHAPES",
    "bands_said",
    "curves",
    "facts_for",
    "id_notes",
    "ids_of",
    "in_order",
    "metrics_said",
    "row_of",
    "style_of",
]

#: Okabe–Ito without black and yellow, which are lost on one of the two backgrounds.
COLOURS = (BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
#: Lines of one chart that have their bands; more of them would be one grey area.
MOST_BANDS = 6
SHAPES = ("", "/", "x", "-", ".", "|", "+", "\\")
#: Metric ids that a caption names; more of them are listed under it.
_SAID = 3
#: Replaced by the page with a colour of its theme.
INK, MUTED = "var:ink", "var:muted"

#: Words of columns that are made for pictures or stand in most tables.
_WORDS = {
    "mean": "mean", "low": "lower end", "high": "upper end", "n": "prompts", "prompt_id": "prompt",
    "condition_id": "condition", "pos": "position", "sample_id": "sample", "decode_mode": "decode mode",
}  # fmt: skip


def style_of(number: int) -> tuple[str, str]:
    """Return colour and stroke of the n-th line; neighbours differ in both, so that lines on top of each other show.

    The first 24 are all different: six colours and four strokes would repeat after twelve, so strokes move on there.

    Example:
        >>> style_of(0), style_of(12), len({style_of(n) for n in range(24)})
        (('#0072B2', 'solid'), ('#0072B2', 'dash'), 24)
    """
    return COLOURS[number % len(COLOURS)], DASHES[(number + number // 12) % len(DASHES)]


def curves(x: str, names: Mapping[str, Mapping[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Return a line with its band for each name → which rows are its own; of more than :data:`MOST_BANDS` no band."""
    from dynprobe.runs._report._parts import band, line

    found = []
    for number, (name, where) in enumerate(names.items()):
        colour, dash = style_of(number)
        if len(names) <= MOST_BANDS:
            found.append(band(x, "low", "high", colour, where=where, group=name, dash=dash))
        found.append(line(x, "mean", name, colour, dash=dash, where=where, legendgroup=name, **more))
    return found


def bands_said(interval: str, lines: int) -> str:
    """Return what a caption says of the bands of a chart with so many lines.

    Example:
        >>> bands_said("95 % interval", 2), bands_said("95 % interval", 9)
        ('bands: 95 % interval', 'bands are drawn for up to 6 lines; the numbers have the ends: 95 % interval')
    """
    if lines <= MOST_BANDS:
        return f"bands: {interval}"
    return f"bands are drawn for up to {MOST_BANDS} lines; the numbers have the ends: {interval}"


def facts_for(run: Run, table: str, columns: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Return words, unit and metric id of columns of a table, as the run's own files say."""
    facts = run.columns()
    own = facts[facts["table"] == table].set_index("column")
    found = {}
    for name in columns:
        unit, metric = ("", "") if name not in own.index else (str(own["unit"][name]), str(own["id"][name]))
        found[name] = (_WORDS.get(name, name), "" if unit == "1" else unit, metric)
    return found


def metrics_said(ids: Sequence[str]) -> str:
    """Return the sentence of a caption that names metric ids; more than three of them stand in its notes.

    Example:
        >>> metrics_said(["kappa.phase/1", "output.nll/1"]), metrics_said([f"a.b/{n}" for n in range(4)])
        (' Metrics: kappa.phase/1, output.nll/1.', '')
    """
    return f" Metrics: {', '.join(ids)}." if 0 < len(ids) <= _SAID else ""


def id_notes(ids: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Return the note that lists metric ids where a caption does not."""
    return [(f"{len(ids)} metric ids", list(ids))] if len(ids) > _SAID else []


def ids_of(facts: Mapping[str, tuple[str, str, str]], columns: Sequence[str]) -> list[str]:
    """Return the metric ids of columns, each once."""
    return list(dict.fromkeys(facts[c][2] for c in columns if c in facts and facts[c][2]))


def in_order(values: Any) -> list[str]:
    """Return the distinct values as texts, in the order in which they come."""
    return [str(v) for v in dict.fromkeys(values)]


def row_of(rows: pd.DataFrame, place: Any) -> pd.Series:
    """Return the row at a place, as argmin and argmax of one of its columns give it."""
    return rows.iloc[int(place)]
