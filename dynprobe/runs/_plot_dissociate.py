"""The picture of a study of dissociation: what a dose costs the task and the dynamics, and what came back of each.

Left, accuracy and the dynamic metric against the strength of the noise, both with 95 % intervals, with the chance level
and the dose that recovery was judged at. Right, RF_dyn against RF_sem of every mode and timing: the cloud is the joint
bootstrap over items, the cross its two 95 % intervals. The grey band is where RF_sem is next to nothing; a verdict of
dissociation needs a cross inside it and right of 0.5. Hollow points are the same energy in random directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.metrics.statistics import dissociation
from dynprobe.runs._canvas import BLUE, GREY, RED, canvas
from dynprobe.runs._plot_axes import PAGE, SMALL, TICK, dress, legend, note, title
from dynprobe.runs._protocol import protocol_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["dissociation_figure"]

#: Okabe–Ito, one for each mode and timing.
_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#000000")
_SAID = {"right": "accuracy", "nll_right": "NLL of the right answer", "choice_margin": "margin of the right answer"}
_SIDES = ("rf_dyn", "rf_sem")
#: Fall of accuracy that makes a dose.
_DROP = 0.2
_MOST_DRAWS = 400
#: Ends that the axes of fractions never pass, whatever an interval does.
_FAR = (-1.6, 1.9)


def dissociation_figure(run: Run) -> Figure:
    """Return the figure of a ``dissociate`` run.

    Raises:
        RunFolderError: The run is of another protocol, or not finished.
        UsageError: Matplotlib is missing.
    """
    config = run.manifest.config
    if protocol_of(config) != "dissociate" or not run.manifest.rows().get("fits"):
        raise RunFolderError(f"{run.path} is no finished study of dissociation; see dynprobe dissociate")
    fits, conditions = run.table("fits"), run.conditions
    doses = conditions.loc[conditions["arm"] == "recovered", "alpha"].dropna()
    dose = float(doses.iloc[0]) if len(doses) else None
    noise = conditions[conditions["arm"] == "perturbed"].iloc[0]
    figure = canvas(PAGE, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1.0))
    _responses(left, run, fits, dose, str(config["dynamic"]), str(noise["scale"]))
    _fractions(right, run, fits, dose, str(config["dynamic"]), str(config["semantic"]))
    legend(figure, [left, right], 4)
    how = "given" if config.get("fixed") else f"chosen: the smallest that costs {_DROP:g} of accuracy"
    said = "no strength is a dose" if dose is None else f"dose α = {dose:g} ({how})"
    n = run.samples["prompt_id"].nunique()
    said += "; bars: 95 % intervals, clouds: bootstrap over items"
    title(figure, f"{run.manifest.model_name}: {n} items, noise at {noise['where']}\n{said}")
    return figure


def _responses(panel: Any, run: Run, fits: pd.DataFrame, dose: float | None, dynamic: str, scale: str) -> None:
    """Accuracy on the left axis, the dynamic metric on the right one."""
    items, samples = run.table("items"), run.samples
    clean = samples.loc[samples["condition_id"] == "clean", "right"].mean()
    _curve(panel, fits, "right", BLUE, "o", "accuracy")
    panel.axhline((1.0 / items["n_choices"]).mean(), color=GREY, linewidth=0.8, linestyle=":", label="chance")
    panel.axhline(clean - _DROP, color=BLUE, linewidth=0.6, linestyle="--", label=f"clean − {_DROP:g}")
    panel.set_ylim(-0.02, 1.04)
    panel.set_xlabel(f"α ({scale})", fontsize=SMALL)
    panel.set_ylabel("share of right answers", fontsize=SMALL, color=BLUE)
    if dose is not None:
        panel.axvline(dose, color="#999999", linewidth=5, alpha=0.35, label="dose", zorder=0)
    other = panel.twinx()
    _curve(other, fits, dynamic, RED, "s", dynamic)
    other.set_ylabel(dynamic, fontsize=SMALL, color=RED)
    dress(panel, "what a dose costs")
    panel.margins(x=0.04)
    other.tick_params(labelsize=TICK)
    other.spines["top"].set_visible(False)
    low, high = other.get_ylim()
    other.set_ylim(min(0.0, low), high)
    panel.plot([], [], color=RED, marker="s", markersize=4, linewidth=1.4, label=dynamic)


def _curve(panel: Any, fits: pd.DataFrame, metric: str, colour: str, marker: str, label: str) -> None:
    rows = fits[(fits["estimator"] == "mean") & (fits["metric"] == metric)].sort_values("alpha")
    value, low, high = (rows[name].to_numpy(float) for name in ("value", "low", "high"))
    spread = np.nan_to_num(np.maximum([value - low, high - value], 0), nan=0.0, posinf=0.0)
    panel.errorbar(
        rows["alpha"].to_numpy(float), value, yerr=spread, color=colour, marker=marker, markersize=4, linewidth=1.4,
        capsize=2, label=label,
    )  # fmt: skip


def _fractions(
    panel: Any, run: Run, fits: pd.DataFrame, dose: float | None, dynamic: str, semantic: str
) -> None:  # fmt: skip
    """One point with its cloud and its intervals for each mode and timing."""
    panel.axhspan(-0.1, 0.1, color="#999999", alpha=0.2, linewidth=0)
    panel.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    for at in (0.0, 1.0):
        panel.axhline(at, color="#cccccc", linewidth=0.6, zorder=0)
        panel.axvline(at, color="#cccccc", linewidth=0.6, zorder=0)
    dress(panel, "what came back")
    panel.set_xlabel(f"RF_dyn ({dynamic})", fontsize=SMALL)
    panel.set_ylabel(f"RF_sem ({_SAID.get(semantic, semantic)})", fontsize=SMALL)
    rows = fits[fits["verdict"].notna() & (fits["metric"] == semantic)] if "verdict" in fits else fits.iloc[:0]
    known = rows[np.isfinite(rows["rf_dyn"]) & np.isfinite(rows["rf_sem"])] if len(rows) else rows
    if not len(known) or dose is None:
        why = "no dose" if not len(rows) else ", ".join(dict.fromkeys(rows["reason"].dropna().astype(str)))
        note(panel, 0.5, 0.5, f"no fractions: {why}", ha="center")
        return
    names = list(dict.fromkeys(_mode_of(row) for _, row in known.iterrows()))
    reach = []
    for _, row in known.iterrows():
        colour = _COLOURS[names.index(_mode_of(row)) % len(_COLOURS)]
        if not _is_control(row):
            draws = _draws(run, row, dose)
            panel.scatter(draws[:, 0], draws[:, 1], s=3, color=colour, alpha=0.18, linewidths=0)
        reach.append(_cross(panel, row, colour))
    ends = np.clip(np.array(reach), *_FAR)
    panel.set_xlim(min(-0.25, ends[:, 0].min() - 0.06), max(1.12, ends[:, 1].max() + 0.06))
    panel.set_ylim(min(-0.25, ends[:, 2].min() - 0.06), max(1.12, ends[:, 3].max() + 0.06))


def _is_control(row: pd.Series) -> bool:
    return "random:" in str(row["condition_id"])


def _mode_of(row: pd.Series) -> str:
    return str(row["condition_id"]).removeprefix("perturbed+").replace("random:", "")


def _cross(panel: Any, row: pd.Series, colour: str) -> list[float]:
    """The point of one mode with its two intervals; returns their ends. Open ends leave the picture."""
    control = _is_control(row)
    ends = [
        float(np.clip(row[f"{side}_{end}"], _FAR[0] - 1, _FAR[1] + 1)) for side in _SIDES for end in ("low", "high")
    ]
    x, y = (float(row[side]) for side in _SIDES)
    label = str(row["condition_id"]).removeprefix("perturbed+") + ("" if control else f": {row['verdict']}")
    across, along = ([[x - ends[0]], [ends[1] - x]], [[y - ends[2]], [ends[3] - y]])
    panel.errorbar(
        [x], [y], xerr=np.maximum(across, 0), yerr=np.maximum(along, 0),
        color=colour, marker="o", markersize=5, markerfacecolor="white" if control else colour, capsize=2,
        linewidth=0.8 if control else 1.3, linestyle="none", label=label, alpha=0.75 if control else 1.0,
    )  # fmt: skip
    return ends


def _draws(run: Run, row: pd.Series, dose: float) -> np.ndarray:
    """Joint bootstrap of both fractions, the same that gave the verdict."""
    samples = run.samples
    condition, prompts = samples["condition_id"].astype(str), samples["prompt_id"].astype(str)
    arms = [
        samples[condition == name].set_index(prompts[condition == name])
        for name in ("clean", f"perturbed@{dose:.12g}", str(row["condition_id"]))
    ]

    def triple(name: str) -> list[np.ndarray]:
        return [arm[name].reindex(arms[0].index).to_numpy(float) for arm in arms]

    found = dissociation(triple(str(row["dynamic"])), triple(str(row["metric"])), list(arms[0].index)).draws
    return found[np.isfinite(found).all(axis=1)][:_MOST_DRAWS]
