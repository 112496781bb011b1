"""The picture of a study of dissociation: what a dose costs the task and the dynamics, and what came back of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dynprobe.errors import RunFolderError
from dynprobe.runs._protocol import protocol_of
from dynprobe.runs._report._looks import COLOURS, MUTED, facts_for, in_order
from dynprobe.runs._report._parts import Chart, Figure, Frame, axis, band, diamonds, line, points

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["dissociation_figure"]


def dissociation_figure(run: Run, key: str) -> Figure:
    """Return accuracy and the dynamic metric against α, and RF_dyn against RF_sem."""
    config = run.manifest.config
    if protocol_of(config) != "dissociate" or not run.manifest.rows().get("fits"):
        raise RunFolderError("it is no finished study of dissociation (dynprobe dissociate)")
    fits = run.table("fits")
    dynamic, semantic = str(config["dynamic"]), str(config["semantic"])
    means = fits[(fits["estimator"] == "mean") & fits["metric"].isin(["right", dynamic])].sort_values(
        ["metric", "alpha"]
    )
    means = means[["metric", "alpha", "value", "low", "high", "n"]].astype({"metric": str}).reset_index(drop=True)
    charts = []
    for number, metric in enumerate(("right", dynamic)):
        traces = [
            band("alpha", "low", "high", COLOURS[number], where={"metric": metric}, group=metric),
            line(
                "alpha",
                "value",
                "accuracy" if metric == "right" else metric,
                COLOURS[number],
                where={"metric": metric},
                legendgroup=metric,
            ),
        ]
        label = "share of right answers" if metric == "right" else metric
        charts.append(Chart(traces, {"xaxis": axis("α"), "yaxis": axis(label)}, f"{label} against α"))
    frames = [Frame(f"{key}-dissociation", means)]
    verdicts = fits[fits["verdict"].notna() & (fits["metric"] == semantic)] if "verdict" in fits else fits.iloc[:0]
    verdicts = verdicts.astype({"condition_id": str, "verdict": str})
    if len(verdicts):
        columns = [
            "condition_id",
            "verdict",
            "rf_dyn",
            "rf_dyn_low",
            "rf_dyn_high",
            "rf_sem",
            "rf_sem_low",
            "rf_sem_high",
            "reason",
        ]
        cut = {f"{c}_shown": np.clip(verdicts[c], -1.6, 1.9) for c in columns[2:8]}
        verdicts = verdicts[columns].assign(**cut).reset_index(drop=True)
        frames.append(Frame(f"{key}-verdicts", verdicts, facts_for(run, "fits", ["condition_id"])))
        traces = []
        for i, condition in enumerate(in_order(verdicts["condition_id"])):
            colour = MUTED if "random:" in condition else COLOURS[i % len(COLOURS)]
            trace = points(
                "rf_dyn_shown",
                "rf_sem_shown",
                diamonds(condition.removeprefix("perturbed+")),
                colour,
                where={"condition_id": condition},
                left="rf_dyn_low_shown",
                right="rf_dyn_high_shown",
                marker={"symbol": i % 8, "size": 10},
            )
            trace["error_y"] = {**trace["error_x"], "array": {"$minus": ["rf_sem_high_shown", "rf_sem_shown"]},
                                "arrayminus": {"$minus": ["rf_sem_shown", "rf_sem_low_shown"]}}  # fmt: skip
            traces.append({**trace, "$frame": f"{key}-verdicts"})
        shapes = [
            {
                "type": "rect",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": -0.1,
                "y1": 0.1,
                "fillcolor": MUTED,
                "opacity": 0.15,
                "line": {"width": 0},
            }
        ]
        layout = {"xaxis": axis(f"RF_dyn ({dynamic})"), "yaxis": axis(f"RF_sem ({semantic})"), "shapes": shapes}
        charts.append(Chart(traces, layout, "what came back", 400))
    told = means[means["metric"] == "right"]
    ends = (
        f"Accuracy is {told['value'].iloc[0]:.0%} at α {told['alpha'].iloc[0]:g} and {told['value'].iloc[-1]:.0%} "
        f"at α {told['alpha'].iloc[-1]:g}."
        if len(told)
        else ""
    )
    said = "; ".join(
        f"{c}: {v}" for c, v in zip(verdicts.get("condition_id", []), verdicts.get("verdict", []), strict=True)
    )
    caption = (
        "Left, means over items with 95 % intervals. Right, recovery fractions of dynamics and meaning with their 95 % "
        f"intervals (cut at −1.6 and 1.9); the grey band is where RF_sem is next to nothing. {said}"
    )
    return Figure(
        f"{key}-dissociation",
        "Dissociation of dynamics and meaning",
        caption,
        ends or "Dose and fractions.",
        frames,
        charts,
    )
