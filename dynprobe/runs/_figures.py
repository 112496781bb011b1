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
from dynprobe.runs._canvas import BLUE, GREY, RED, bootstrap, canvas, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["depth_figure", "draw_run", "short"]


def _by_prompt(run: Run, column: str, condition: str) -> tuple[np.ndarray, np.ndarray]:
    """Depths and ``[prompt, depth]`` means over tokens after position 0."""
    rows = run.table("depths", columns=["sample_id", "pos", "track", "depth", column])
    labels = run.samples[["sample_id", "prompt_id", "condition_id"]]
    rows = rows[(rows["pos"] >= 1) & ~rows["track"].isin(["attn_out", "mlp_out"])]
    rows = rows.merge(labels[labels["condition_id"] == condition], on="sample_id")
    table = rows.groupby(["prompt_id", "depth"], observed=True)[column].mean().unstack("depth")
    table = table.dropna(axis=1, how="all")
    return table.columns.to_numpy(), table.to_numpy(np.float64)


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
    depth, clean = _by_prompt(run, "angle", "clean")
    _, pushed = _by_prompt(run, "angle", "perturbed.forced")
    at, angle = _by_prompt(run, "diverge_angle", "perturbed.forced")
    n = len(clean)
    panels = figure.subplots(3, 1, sharex=True)
    _draw(panels[0], depth, clean / np.pi, BLUE, "clean")
    _draw(panels[0], depth, pushed / np.pi, RED, "perturbed, forced")
    panels[0].set_ylabel("κ phase per step\n(half-turns)")
    panels[0].legend(frameon=False)
    _draw(panels[1], depth, (pushed - clean) / np.pi, RED, "paired change")
    panels[1].axhline(0, color=GREY, linewidth=0.8)
    panels[1].set_ylabel("Δκ, paired\n(half-turns)")
    _draw(panels[2], at, angle, RED, "angle to clean")
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


def _draw(panel: Any, depth: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    mean, (low, high) = np.nanmean(values, axis=0), bootstrap(values, np.nanmean)
    panel.plot(depth, mean, color=colour, label=label, linewidth=1.6)
    panel.fill_between(depth, low, high, color=colour, alpha=0.2, linewidth=0)


def short(spec: str) -> str:
    """Return a spec in two lines at most."""
    return "\n".join(textwrap.wrap(spec.replace(",", ", "), 90)[:2])
