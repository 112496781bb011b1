"""The map of a response over layer × strength.

A cell is the mean over prompts. A line runs where the mean of each row first reaches the criterion, row by row: between
layers that were not tested nothing is interpolated. Rows are of equal height, whatever lies between their layers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.metrics.statistics import first_crossing
from dynprobe.runs._grid_data import chosen, in_order, on_a_grid, responses
from dynprobe.runs._plot_axes import DECADES, SMALL, dress, ends, log_axis, note, plain, spread, title, wrapped_panels
from dynprobe.runs._quantity import Quantity, alpha_label, caption, level_of, prompts_text, quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["heatmap_figure"]

_ON_ANY_COLOUR = ((2.8, "black"), (1.2, "white"))


def heatmap_figure(run: Run, column: str | None = None, scale: str | None = None) -> Figure:
    """Return the mean response over layer × α, one panel per scale, and the line at which it reaches the criterion.

    Args:
        run: A sweep, or a threshold run with fixed strengths.
        column: What answers; None takes the KL, or the first criterion.
        scale: Noise scale; None takes all.

    Raises:
        RunFolderError: The run has no strengths that all layers and prompts share.
        UsageError: There is no such column or scale, or matplotlib is missing.
    """
    what = quantity(run, column)
    if what.criterion is not None and not on_a_grid(run):
        raise RunFolderError(
            f"{run.path} searched other strengths for every prompt, so there is no map over strengths. Run dynprobe "
            "sweep --layers all, or dynprobe threshold --alphas 0.01:10:32"
        )
    rows = chosen(responses(run, what), run, scale)
    rows = rows[rows["series"] == "perturbed"]
    writes = in_order(run, rows["write"])
    n_layers = rows["layer"].nunique()
    figure, panels = wrapped_panels([len(writes)], 2, min(max(2.0, 0.16 * n_layers + 0.6), 5.5))
    means = {
        write: rows[rows["write"] == write].pivot_table(index="layer", columns="alpha", values="value", dropna=False)
        for write in writes
    }
    norm, colours = _colours(np.concatenate([m.to_numpy().ravel() for m in means.values()]), what)
    level = level_of(run, what)
    mesh: Any = None
    for number, (write, panel) in enumerate(zip(writes, panels[0], strict=True)):
        dress(panel, write if len(writes) > 1 else "")
        mesh = _map(panel, means[write], norm, colours, level, what)
        plain(panel.set_xlabel(alpha_label(write, run=run), fontsize=SMALL))
        if number % 2 == 0:
            panel.set_ylabel("layer written (block)", fontsize=SMALL)
    bar = figure.colorbar(mesh, ax=panels[0], pad=0.02, aspect=30)
    bar.set_label(f"mean {what.label}", fontsize=SMALL - 1)
    bar.ax.tick_params(labelsize=SMALL - 1)
    if math.isfinite(level) and norm.vmin < level < norm.vmax:
        for width, colour in _ON_ANY_COLOUR:
            bar.ax.axhline(level, color=colour, linewidth=width)
    line = f"line: the mean first reaches {what.with_unit(level)}" if math.isfinite(level) else ""
    facts = ["scale " + ", ".join(writes), prompts_text(rows["prompt_id"].nunique()), line]
    title(figure, caption(run, f"{what.words} by layer and α", facts, 56 if len(writes) == 1 else 90))
    return figure


def _colours(values: np.ndarray, what: Quantity) -> tuple[Any, str]:
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    if what.log:
        low, high = ends(finite, log=True, air=0.0)
        return LogNorm(max(low, high / 10**DECADES), high * (1 + 1e-9)), "viridis"
    if what.signed:
        most = float(np.abs(finite).max()) or 1.0
        return Normalize(-most, most), "RdBu_r"
    return (Normalize(0, 1) if what.share else Normalize(float(finite.min()), float(finite.max()))), "viridis"


def _map(panel: Any, means: pd.DataFrame, norm: Any, colours: str, level: float, what: Quantity) -> Any:
    """Draw the cells; a row for every layer that was tested, at equal height."""
    alpha, values = means.columns.to_numpy(np.float64), means.to_numpy(np.float64)
    steps = np.diff(np.log(alpha)) if len(alpha) > 1 else np.array([0.2])
    middle = np.log(alpha[:-1]) + steps / 2 if len(alpha) > 1 else np.array([])
    edges = np.exp([np.log(alpha[0]) - steps[0] / 2, *middle, np.log(alpha[-1]) + steps[-1] / 2])
    rows = np.arange(len(means) + 1) - 0.5
    log_axis(panel, "x", float(edges[0]), float(edges[-1]))
    panel.set_ylim(rows[0], rows[-1])
    shown = np.ma.masked_invalid(values)
    if what.log:
        shown = np.ma.masked_less_equal(shown, 0)
    if np.ma.getmaskarray(shown).any():
        panel.set_facecolor("#d9d9d9")
        note(panel, 1.0, 1.01, "grey: no value", ha="right")
    mesh = panel.pcolormesh(edges, rows, shown, norm=norm, cmap=colours, rasterized=True)
    labels = spread(list(range(len(means))), 16)
    panel.set_yticks(labels, [str(means.index[i]) for i in labels])
    if math.isfinite(level):
        _line(panel, alpha, values, level)
    return mesh


def _line(panel: Any, alpha: np.ndarray, values: np.ndarray, level: float) -> None:
    """The strength at which each layer's mean first reaches the level, as steps; a gap where it does not."""
    at = np.array([first_crossing(alpha, row, level).value for row in values])
    if not np.isfinite(at).any():
        return
    x, y = np.repeat(at, 2), np.repeat(np.arange(len(at)), 2) + np.tile([-0.5, 0.5], len(at))
    for width, colour in _ON_ANY_COLOUR:
        panel.plot(x, y, color=colour, linewidth=width, solid_capstyle="butt", gid="level")
