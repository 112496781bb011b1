"""One static figure of a run: where along the depth a perturbation is felt.

Three panels over the same depth axis: κ by step for every forced arm, its paired change, and the angle between the
perturbed and the clean state. Bands are 95 % bootstrap intervals of the mean over prompts.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import RunFolderError
from dynprobe.runs._canvas import BLUE, GREY, RED, canvas, save_figure, tidy
from dynprobe.runs._curves import curve, perturbed_depth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["depth_figure", "draw_run", "short"]


def depth_figure(run: Run) -> Figure:
    """Return the figure of a run with a perturbed arm.

    Raises:
        RunFolderError: If the run has no perturbed arm to draw.
        UsageError: If matplotlib is missing.
    """
    conditions = set(run.samples["condition_id"].astype(str))
    if not {"clean", "perturbed.forced"} <= conditions:
        raise RunFolderError(f"{run.path} has no perturbed arm; the figure compares one with the clean arm")
    figure = canvas(7.2, 7.4)
    clean, pushed = (perturbed_depth(run, "angle", c) / np.pi for c in ("clean", "perturbed.forced"))
    angle = perturbed_depth(run, "diverge_angle", "perturbed.forced")
    n = len(clean)
    panels = figure.subplots(3, 1, sharex=True)
    _draw(panels[0], clean, BLUE, "clean")
    _draw(panels[0], pushed, RED, "perturbed, forced", stroke=(0, (3, 2)))  # the clean line shows through
    panels[0].set_ylabel("κ phase per step\n(half-turns)")
    panels[0].legend(frameon=False)
    _draw(panels[1], pushed - clean, RED, "paired change")
    panels[1].axhline(0, color=GREY, linewidth=0.8)
    panels[1].set_ylabel("Δκ, paired\n(half-turns)")
    _draw(panels[2], angle, RED, "angle to clean")
    panels[2].set_ylabel("angle to the clean\nstate (half-turns)")
    panels[2].set_xlabel("depth (state entering block d)")
    for panel in panels:
        tidy(panel)
    specs = ", ".join(str(s) for s in run.manifest.config.get("perturb") or ())
    figure.suptitle(f"{run.manifest.model_name}: {n} prompts, mean and 95 % interval\n{short(specs)}", fontsize=10)
    return figure


def draw_run(run: Run, target: str | Path) -> Path:
    """Draw the figure of a run with a perturbed arm.

    Args:
        run: A run with the conditions ``clean`` and ``perturbed.forced``.
        target: File to write; its ending (``.png``, ``.svg``, ``.pdf``) chooses the format.

    Returns:
        The file.

    Raises:
        RunFolderError: If the run has no perturbed arm to draw.
        UsageError: If matplotlib is missing or cannot write this format.
    """
    return save_figure(depth_figure(run), target)


def _draw(panel: Any, table: Any, colour: str, label: str, stroke: Any = "-") -> None:
    own = curve(table)
    panel.plot(own["x"], own["mean"], color=colour, label=label, linewidth=1.6, linestyle=stroke)
    panel.fill_between(own["x"], own["low"], own["high"], color=colour, alpha=0.2, linewidth=0)


def short(spec: str) -> str:
    """Return a spec in two lines at most."""
    return "\n".join(textwrap.wrap(spec.replace(",", ", "), 90)[:2])
