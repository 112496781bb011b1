"""What a page is made of: frames of numbers, pictures that point into them, tables, and text.

A picture holds no numbers of its own. Its traces name columns of a frame, and the script of the page fills them in; so
what is seen, what the table under it says and what its button downloads are the same numbers. Python says *which* rows
and columns make a line, never their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

__all__ = [
    "Chart", "Figure", "Frame", "Report", "Section", "Table", "axis", "axis_of", "band", "bars", "column", "diamonds",
    "faded", "grid", "line", "points",
]  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Numbers that are embedded.

    Attributes:
        key: Name, unique in the page; downloads are called so.
        rows: The numbers.
        facts: Column → ``(words, unit, metric id)``; columns that are not named are called by their own name.
        total: Rows there are, where not all are embedded.
    """

    key: str
    rows: pd.DataFrame
    facts: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    total: int | None = None


@dataclass(frozen=True)
class Chart:
    """One set of axes.

    Attributes:
        traces: What is drawn, see :func:`line`, :func:`band`, :func:`points`, :func:`bars`, :func:`grid`.
        layout: Plotly's layout.
        title: Words above it; empty where the picture has one chart.
        height: Pixels.
    """

    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    title: str = ""
    height: int = 340


@dataclass(frozen=True)
class Figure:
    """A picture: charts, what can be chosen, words, and the frames it is drawn from.

    Attributes:
        key: Name, unique in the page.
        title: Heading.
        caption: What is seen, which metric ids, and what an interval is.
        alt: What a person who cannot see it should know.
        frames: The first is the one that traces read from unless they say otherwise.
        charts: Charts.
        choose: ``{"label": …, "column": …}`` shows the rows of one value; ``{"label": …, "measures": [columns]}`` says
            which column traces that ask for the measure show.
        notes: ``(heading, lines)`` that are folded away under the caption.
    """

    key: str
    title: str
    caption: str
    alt: str
    frames: Sequence[Frame]
    charts: Sequence[Chart]
    choose: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[tuple[str, Sequence[str]]] = ()


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and filtered.

    Attributes:
        title: Heading.
        frame: Its rows.
        caption: What they are.
        filters: Columns with a menu of their values.
        open: Whether it is unfolded at first.
    """

    title: str
    frame: Frame
    caption: str = ""
    filters: Sequence[str] = ()
    open: bool = False

    @property
    def size(self) -> str:
        """How many rows there are, in words."""
        n = len(self.frame.rows) if self.frame.total is None else self.frame.total
        return f"{n:,} row{'s' if n != 1 else ''}"


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own: a run, or a comparison.

    Attributes:
        key: Anchor.
        title: Heading.
        facts: ``(name, text)`` under it.
        figures: Pictures.
        tables: Tables.
        missing: ``(picture, why it is not drawn)``.
        warnings: What a reader must know before believing any of it, the grave first.
        n_grave: How many of them are grave: those are never folded away.
        several: For a warning that stands for several, the several.
        provenance: ``(name, text)`` at the end.
        blocks: ``(heading, text)`` shown as they are, at the end.
        closing: Tables at the end: self-tests, columns.
        open: Whether it is unfolded at first.
    """

    key: str
    title: str
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    n_grave: int = 0
    several: Mapping[str, Sequence[str]] = field(default_factory=dict)
    provenance: Sequence[tuple[str, str]] = ()
    blocks: Sequence[tuple[str, str]] = ()
    closing: Sequence[Table] = ()
    open: bool = True

    @property
    def content(self) -> str:
        """What is in it, in words, for a reader who sees it folded."""
        held = [f"{len(x)} {word}{'s' if len(x) != 1 else ''}" for x, word in
                ((self.warnings, "warning"), (self.figures, "picture"), (self.tables, "table")) if x]  # fmt: skip
        return ", ".join(held)


@dataclass(frozen=True)
class Report:
    """A page."""

    title: str
    lead: str
    sections: Sequence[Section]


def column(name: str) -> dict[str, str]:
    """Return a pointer to a column, for any value of a trace."""
    return {"$": name}


def line(x: str, y: str, name: str, colour: str, *, dash: str = "solid", **more: Any) -> dict[str, Any]:
    """Return a line through the rows, in their order."""
    where, width, marker = more.pop("where", {}), more.pop("width", 2), more.pop("marker", 5)
    return {
        "type": "scatter", "mode": "lines+markers" if marker else "lines", "name": name, "x": column(x),
        "y": column(y), "line": {"color": colour, "width": width, "dash": dash},
        "marker": {"color": colour, "size": marker or 1}, "$where": where, **more,
    }  # fmt: skip


def band(
    x: str, low: str, high: str, colour: str, *, where: Mapping[str, Any], group: str, dash: str = "solid"
) -> dict[str, Any]:
    """Return the area between two columns, with an edge in the stroke of its line; rows without both ends are left out.

    Where areas lie on each other their colours mix, so it is the edges that tell whose area reaches how far.
    """
    return {
        "type": "scatter", "$band": {"x": x, "low": low, "high": high}, "fill": "toself",
        "fillcolor": faded(colour, 0.13), "line": {"width": 1, "color": faded(colour, 0.6), "dash": dash},
        "mode": "lines", "hoverinfo": "skip", "showlegend": False, "legendgroup": group, "$where": where,
    }  # fmt: skip


def faded(colour: str, part: float) -> str:
    """Return a colour that lets through what is behind it.

    Example:
        >>> faded("#0072B2", 0.5)
        'rgba(0,114,178,0.5)'
    """
    return f"rgba({','.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))},{part:g})"


def points(x: str, y: str, name: str, colour: str, **more: Any) -> dict[str, Any]:
    """Return markers; ``low``/``high`` name columns of a vertical interval, ``left``/``right`` of a horizontal one."""
    where, marker = more.pop("where", {}), more.pop("marker", {})
    ends = {}
    for key, (low, high) in {"error_y": ("low", "high"), "error_x": ("left", "right")}.items():
        if low in more:
            ends[key] = {
                "type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 3,
                "array": {"$minus": [more.pop(high), y if key == "error_y" else x]},
                "arrayminus": {"$minus": [y if key == "error_y" else x, more.pop(low)]},
            }  # fmt: skip
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": column(x), "y": column(y),
        "marker": {"color": colour, "size": 8, **marker}, "$where": where, **ends, **more,
    }  # fmt: skip


def bars(x: str, y: str, name: str, colour: str, shape: str = "", **more: Any) -> dict[str, Any]:
    """Return horizontal bars; a shape tells them apart without colour."""
    where = more.pop("where", {})
    return {
        "type": "bar", "orientation": "h", "name": name, "x": column(x), "y": column(y), "$where": where,
        "marker": {
            "color": colour,
            "pattern": {"shape": shape, "fgcolor": "var:paper", "size": 6, "fillmode": "overlay"},
        },
        **more,
    }  # fmt: skip


def grid(
    x: str, y: str, z: str, *, log: bool | str = False, title: str = "", why: str = "", trim: bool = False, **more: Any
) -> dict[str, Any]:
    """Return a map with one cell per value of x and y.

    Args:
        x: Column.
        y: Column.
        z: Column of the colour; ``@measure`` is the chosen one.
        log: Whether colours are logarithmic; ``@measure`` asks the chosen measure.
        title: Of the colour bar; empty takes that of the measure.
        why: Column that says why a cell has no value; shown where one points at it.
        trim: Whether rows that have no value of the measure anywhere in the frame are left out.
        **more: Further settings; ``colorscale`` replaces Viridis.
    """
    return {
        "type": "heatmap", "$grid": {"x": x, "y": y, "z": z, "log": log, "title": title, "why": why, "trim": trim},
        "colorscale": more.pop("colorscale", "Viridis"), "hoverongaps": True, "$where": more.pop("where", {}), **more,
    }  # fmt: skip


def axis(title: str, *, whole: bool = False, **more: Any) -> dict[str, Any]:
    """Return an axis with a title, which says where the axis is logarithmic.

    Args:
        title: Words, with the unit in brackets where there is one.
        whole: Whether it counts something, so that there is nothing between two whole numbers to put a tick at.
        **more: Further settings.

    Example:
        >>> axis("α50 (relnorm)", type="log")["title"]["text"], axis("Δ", type="log")["title"]["text"]
        ('α50 (relnorm, log scale)', 'Δ (log scale)')
    """
    if more.get("type") == "log":
        title = f"{title[:-1]}, log scale)" if title.endswith(")") else f"{title} (log scale)"
    return {"title": {"text": title}, "automargin": True, **({"$whole": True} if whole else {}), **more}


def axis_of(choice: str, titles: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Return an axis whose title is that of what is chosen.

    Args:
        choice: Column that is chosen from.
        titles: Title of each of its values.
        **more: Further settings.
    """
    return {"automargin": True, "$title": {"column": choice, "texts": dict(titles)}, **more}


def diamonds(name: str) -> str:
    """Return a name that stays one word in a legend: a long condition is cut in its middle."""
    return name if len(name) <= 40 else f"{name[:24]}…{name[-14:]}"
