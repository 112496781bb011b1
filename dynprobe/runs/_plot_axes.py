"""Axes of pictures over strengths: sizes of text, logarithmic ticks that can be read, and a layout of panels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.runs._canvas import GREY, canvas, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLUMN", "DECADES", "PAGE", "SMALL", "TICK", "dress", "ends", "legend", "log_axis", "note", "plain", "spread",
    "title", "wrapped_panels",
]  # fmt: skip

#: Widths in inches of one column and of a page's text.
COLUMN, PAGE = 3.5, 7.2
SMALL, TICK = 8, 7
#: Decades that a logarithmic axis or colour shows at most.
DECADES = 8


def dress(panel: Any, heading: str = "") -> None:
    """Give a panel the looks that all share."""
    tidy(panel)
    panel.tick_params(which="both", labelsize=TICK)
    if heading:
        plain(panel.set_title(heading, fontsize=SMALL, loc="left"))


def plain(text: Any) -> Any:
    """Take a text as it is: a dollar sign of a prompt is no formula."""
    text.set_parse_math(False)
    return text


def title(figure: Any, text: str) -> None:
    """Set the title: what is seen, and under it how it was made."""
    plain(figure.suptitle(text, fontsize=SMALL, x=0.01, ha="left"))


def log_axis(panel: Any, axis: str, low: float, high: float) -> None:
    """Make an axis logarithmic from low to high, with ticks between the decades where these alone are too few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    getattr(panel, f"set_{axis}scale")("log")
    getattr(panel, f"set_{axis}lim")(low, high)
    decades = math.log10(high / low)
    if decades > 4.5:
        return
    subs = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 2.8 else (1.0,)
    at = getattr(panel, f"{axis}axis")
    at.set_major_locator(LogLocator(subs=subs, numticks=20) if decades > 0.7 else MaxNLocator(5))
    at.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if decades < 2.8:
        at.set_minor_locator(NullLocator())


def ends(values: np.ndarray, log: bool, air: float = 0.04) -> tuple[float, float]:
    """Return the ends of an axis that shows all finite values (the positive ones where it is logarithmic)."""
    kept = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(kept):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(kept.min()), float(kept.max())
    if log:
        wide = max(math.log(high / low), 0.2) * air
        return low * math.exp(-wide), high * math.exp(wide)
    wide = (high - low or abs(high) or 1.0) * air
    return low - wide, high + wide


def spread(items: list[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def wrapped_panels(groups: list[int], columns: int, height: float) -> tuple[Figure, list[list[Any]]]:
    """Return a figure with so many panels per group; each group begins a row.

    Args:
        groups: Number of panels of each group.
        columns: Panels beside each other, at most.
        height: Height of one row in inches.
    """
    columns = min(columns, max(groups))
    rows = [math.ceil(n / columns) for n in groups]
    width = {1: COLUMN, 2: 5.6}.get(columns, PAGE)
    figure = canvas(width, height * sum(rows) + 0.9)
    grid = figure.add_gridspec(sum(rows), columns)
    found: list[list[Any]] = []
    for g, n in enumerate(groups):
        first = sum(rows[:g])
        found.append([figure.add_subplot(grid[first + i // columns, i % columns]) for i in range(n)])
    return figure, found


def legend(figure: Any, panels: list[Any], columns: int) -> None:
    """Put one legend under all panels, each label once, in at most so many columns, and only as many as fit."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return
    asked = min(columns, len(handles))
    while columns > 1 and _legend_width(list(handles), columns) > figure.get_figwidth() - 0.15:
        columns -= 1
    more = math.ceil(len(handles) / columns) - math.ceil(len(handles) / asked)
    figure.set_figheight(figure.get_figheight() + max(0, more) * _LINE * TICK / 72)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=TICK, frameon=False,
        labelcolor="#333333", handlelength=_HANDLE, handletextpad=_PAD, columnspacing=_SPACE,
    )  # fmt: skip


#: Lengths in a legend, in sizes of its font: handle, between handle and text, between columns, one line.
_HANDLE, _PAD, _SPACE, _LINE = 2.0, 0.6, 1.0, 1.6


def _legend_width(labels: list[str], columns: int) -> float:
    """Width in inches of a legend that is filled column by column."""
    from matplotlib.textpath import TextPath

    def width(label: str) -> float:
        return float(TextPath((0, 0), label, size=TICK).get_extents().width)

    parts = [[labels[i] for i in part] for part in np.array_split(np.arange(len(labels)), columns) if len(part)]
    texts = sum(max(width(label) for label in part) for part in parts)
    return (texts + TICK * (len(parts) * (_HANDLE + _PAD) + (len(parts) - 1) * _SPACE)) / 72


def note(panel: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Write a small grey remark in axes coordinates."""
    options = {"ha": "left", "va": "bottom", "color": GREY, **options}
    plain(panel.text(x, y, text, transform=panel.transAxes, fontsize=TICK - 0.5, **options))
