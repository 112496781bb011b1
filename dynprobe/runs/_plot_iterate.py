"""What more iterations buy: loss, Δ, κ and energy (or accuracy) against the number of iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.runs._canvas import BLUE, GREY, RED, canvas, tidy
from dynprobe.runs._curves import ITERATED, iteration_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["iterations_figure"]

_ARMS = (("clean", BLUE), ("perturbed", RED))


def iterations_figure(run: Run) -> Figure:
    """Return the figure of an ``iterate`` run.

    Raises:
        RunFolderError: The run is of another protocol.
        UsageError: Matplotlib is missing.
    """
    numbers = iteration_numbers(run)
    samples = run.samples
    shown = list(dict.fromkeys(numbers["measure"]))
    rows = (len(shown) + 1) // 2
    figure = canvas(7.6, 2.7 * rows)
    panels = np.atleast_1d(figure.subplots(rows, 2, sharex=True)).ravel()
    for panel, measure in zip(panels, shown, strict=False):
        words, unit, log = ITERATED[measure]
        for arm, colour in _ARMS:
            _draw(panel, numbers[(numbers["measure"] == measure) & (numbers["arm"] == arm)], colour, arm)
        panel.set_ylabel(f"{words}\n({unit})" if unit else words)
        panel.set_xlabel("iterations T")
        if log:
            panel.set_yscale("log")
        trained = samples["trained_iterations"].dropna()
        if len(trained):
            panel.axvline(float(trained.iloc[0]), color=GREY, linewidth=0.8, linestyle=":", label="trained depth")
        tidy(panel)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    n = samples["prompt_id"].nunique()
    figure.suptitle(f"{run.manifest.model_name}: {n} prompts, bands are 95 % over prompts", fontsize=10)
    return figure


def _draw(panel: Any, rows: Any, colour: str, label: str) -> None:
    if rows.empty:
        return
    panel.plot(rows["iterations"], rows["mean"], color=colour, marker="o", markersize=3, label=label)
    panel.fill_between(rows["iterations"], rows["low"], rows["high"], color=colour, alpha=0.2, linewidth=0)
