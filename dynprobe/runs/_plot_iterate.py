"""What more iterations buy: loss, Δ, κ and energy (or accuracy) against the number of iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import RunFolderError
from dynprobe.runs._canvas import BLUE, GREY, RED, bootstrap, canvas, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["iterations_figure"]

_PANELS = (
    ("nll", "loss\n(nats per token)", False),
    ("delta_last", "Δ of the last update\n(‖h′−h‖/‖h‖)", True),
    ("kappa_phase", "κ phase over all updates\n(half-turns)", False),
    ("energy_last", "energy of the last state", False),
    ("right", "share of right answers", False),
)
_ARMS = (("clean", "", BLUE), ("perturbed", "|perturbed", RED))


def iterations_figure(run: Run) -> Figure:
    """Return the figure of an ``iterate`` run.

    Raises:
        RunFolderError: The run is of another protocol.
        UsageError: Matplotlib is missing.
    """
    if run.summary.get("protocol") != "iterate" and "iterations" not in run.samples:
        raise RunFolderError(f"{run.path} was not read at several numbers of iterations; see dynprobe iterate")
    samples = run.samples
    shown = [panel for panel in _PANELS if panel[0] in samples and samples[panel[0]].notna().any()]
    rows = (len(shown) + 1) // 2
    figure = canvas(7.6, 2.7 * rows)
    panels = np.atleast_1d(figure.subplots(rows, 2, sharex=True)).ravel()
    for panel, (column, label, log) in zip(panels, shown, strict=False):
        for arm, ending, colour in _ARMS:
            _draw(panel, samples, column, ending, colour, arm)
        panel.set_ylabel(label)
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


def _draw(panel: Any, samples: Any, column: str, ending: str, colour: str, label: str) -> None:
    ids = samples["condition_id"].astype(str)
    mine = samples[ids == "T" + samples["iterations"].astype(str) + ending]
    table = mine.pivot_table(index="prompt_id", columns="iterations", values=column, observed=True)
    if table.empty:
        return
    values, at = table.to_numpy(np.float64), table.columns.to_numpy()
    panel.plot(at, np.nanmean(values, axis=0), color=colour, marker="o", markersize=3, label=label)
    low, high = bootstrap(values, np.nanmean)
    panel.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
