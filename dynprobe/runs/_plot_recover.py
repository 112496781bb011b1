"""Pictures of a recovery study: what the detector saw and when the mode acted, and what came back.

The first picture is the loop at work: the detector's signal over the new tokens of clean, perturbed and recovered
texts with the band it was judged by, and below each the share of texts in which the mode was acting. The second is the
result: a recovery fraction with its interval for each mode and timing, beside the same energy in random directions.
A metric that the controller acts on is hollow there: it recovers by construction and is no evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.runs._canvas import BLUE, GREY, RED, canvas, tidy
from dynprobe.runs._curves import curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["METRICS", "ROADS", "SIGNALS", "fraction_numbers", "recovery_figure", "signal_figure", "signal_numbers"]

GREEN = "#009E73"
ROADS = {"forced": "given text", "free": "own text"}
_MOST_MODES = 6
SIGNALS = {
    "kappa_phase_zmax": "worst κ step\n(calibration SDs)", "kappa_phase": "κ phase\n(half-turns)",
    "kappa_phase_z": "κ excess\n(calibration SDs)", "norm_step_zmax": "worst norm step\n(calibration SDs)",
    "entropy": "entropy\n(nats)", "limen_ct": "LIMEN ct\n(half-turns)",
}  # fmt: skip
#: Metric → its name in a picture; those that stand for what the text says first.
METRICS = {
    "nll": "NLL of the\ngiven text", "nll_bare": "NLL of the own text,\nbare model", "kl_clean_pert": "KL to clean",
    "repetition": "repetition", "entropy": "entropy", "kappa_geom": "κ geom", "kappa_phase": "κ phase",
}  # fmt: skip
_LEFT, _RIGHT = -1.0, 2.0
#: What a mode is put on: perturbed texts, or clean ones where nothing was perturbed.
_BASES = ("perturbed", "clean")


def signal_figure(run: Run) -> Figure:
    """Return the signal over tokens, one row of panels per mode, one column per way of reading.

    Raises:
        RunFolderError: The run is of another protocol, or no arm watched a signal.
        UsageError: Matplotlib is missing.
    """
    actions, conditions = _actions(run), _conditions(run)
    roads = [road for road in ROADS if f"clean.{road}" in set(conditions["condition_id"])]
    modes: list[str | None] = [*_modes(run, conditions, roads)] or [None]
    band = (run.manifest.model_extra or {}).get("detector_band") or {}
    figure = canvas(3.9 * len(roads) + 0.6, 2.5 * len(modes) + 0.9)
    panels = figure.subplots(len(modes), len(roads), sharex="col", squeeze=False)
    for line, mode in zip(panels, modes, strict=True):
        for panel, road in zip(line, roads, strict=True):
            _draw_signals(panel, actions, mode, road)
            _draw_band(panel, band)
            panel.set_title(f"{'no mode' if mode is None else mode} · {ROADS[road]}", fontsize=9, loc="left")
            tidy(panel)
        line[0].set_ylabel(SIGNALS.get(str(band.get("signal")), str(band.get("signal"))))
    for panel in panels[-1]:
        panel.set_xlabel("new token")
    handles: dict[str, Any] = {}
    for panel in panels.ravel():
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8
    )
    n = run.samples["prompt_id"].nunique()
    figure.suptitle(f"{run.manifest.model_name}: {n} prompts, mean and 95 % interval over them", fontsize=10)
    return figure


def _actions(run: Run) -> pd.DataFrame:
    if not run.manifest.rows().get("actions"):
        raise RunFolderError(f"{run.path} holds no recovery study; see dynprobe recover")
    labels = run.samples[["sample_id", "prompt_id", "condition_id", "n_prompt", "n_watched"]]
    table = run.table("actions").merge(labels, on="sample_id")
    table["token"] = table["pos"] - table["n_prompt"]
    table = table[(table["token"] >= 0) & (table["token"] < table["n_watched"])]
    table["condition_id"], table["prompt_id"] = table["condition_id"].astype(str), table["prompt_id"].astype(str)
    table["acting"] = table["active"] | (table["energy"] > 0)
    keys = ["condition_id", "prompt_id", "token"]
    return table.groupby(keys, as_index=False).agg({"signal": "first", "acting": "any"})


def _conditions(run: Run) -> pd.DataFrame:
    return run.conditions.astype({"condition_id": str})


def _modes(run: Run, conditions: pd.DataFrame, roads: Sequence[str]) -> list[str]:
    """Modes that have an arm of their own, timed by the detector; sham and passive only where there is nothing else."""
    there = set(conditions["condition_id"])
    named = [str(mode) for mode in run.manifest.config.get("mode") or ()]
    found = [mode for mode in named if any(f"{base}+{mode}.{r}" in there for base in _BASES for r in roads)]
    telling = [mode for mode in found if mode not in ("sham", "passive")]
    return (telling or found)[:_MOST_MODES]


def _draw_signals(panel: Any, actions: pd.DataFrame, mode: str | None, road: str) -> None:
    arms = [("clean", BLUE, "clean", "-"), ("perturbed", RED, "perturbed", "-")]
    with_mode = next((f"{base}+{mode}" for base in _BASES if _has(actions, f"{base}+{mode}.{road}")), None)
    if mode is not None and with_mode is not None:
        arms.append((with_mode, GREEN, f"{with_mode.partition('+')[0]} + mode", "--"))
    for name, colour, label, stroke in arms:
        mine = actions[actions["condition_id"] == f"{name}.{road}"]
        if mine.empty:
            continue
        own = _signal_curve(mine)
        panel.plot(own["x"], own["mean"], color=colour, linestyle=stroke, linewidth=1.4, label=label)
        panel.fill_between(own["x"], own["low"], own["high"], color=colour, alpha=0.15, linewidth=0)
    if mode is not None and with_mode is not None:
        mine = actions[actions["condition_id"] == f"{with_mode}.{road}"]
        share = mine.groupby("token")["acting"].mean()
        beside = panel.twinx()
        beside.fill_between(share.index, share, step="mid", color=GREEN, alpha=0.25, linewidth=0)
        beside.set_ylim(0, 4)  # all texts acting fills the lowest quarter
        beside.set_yticks([0, 1], ["0", "all"], fontsize=7, color=GREEN)
        beside.tick_params(length=2, color=GREEN)
        beside.spines[["top", "left"]].set_visible(False)
        beside.spines["right"].set_bounds(0, 1)
        beside.spines["right"].set_color(GREEN)
        panel.fill_between([], [], [], color=GREEN, alpha=0.25, linewidth=0, label="share acting (right)")
        low, high = panel.get_ylim()
        panel.set_ylim(low - 0.35 * (high - low), high)  # room for it below the lines


def _signal_curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean signal over prompts at every new token of one condition, with its interval."""
    return curve(rows.pivot(index="prompt_id", columns="token", values="signal"))


def signal_numbers(run: Run) -> pd.DataFrame:
    """Return what the detector saw in every condition: ``road, condition, token, mean, low, high, n, acting``.

    Raises:
        RunFolderError: The run is of another protocol, or no arm watched a signal.
    """
    actions = _actions(run)
    frames = []
    for condition in run.conditions["condition_id"].astype(str):
        own = actions[actions["condition_id"] == condition]
        if own.empty:
            continue
        share = own.groupby("token")["acting"].mean()
        found = _signal_curve(own).rename(columns={"x": "token"})
        road = condition.rpartition(".")[2]
        frames.append(found.assign(road=road, condition=condition, acting=share.reindex(found["token"]).to_numpy()))
    if not frames:
        raise RunFolderError(f"{run.path} watched no signal")
    found = pd.concat(frames, ignore_index=True)
    return found[["road", "condition", "token", "mean", "low", "high", "n", "acting"]]


def fraction_numbers(run: Run) -> pd.DataFrame:
    """Return the recovery fractions with what is drawn of them.

    Returns:
        ``road, metric, line, kind`` (``mode`` or ``same energy, random directions``), ``rf, low, high, shown`` (inside
        the axis), ``left, right`` (interval inside the axis), ``open``, ``beyond``, ``acted_on``, ``reason``, ``n``.

    Raises:
        RunFolderError: The run holds no recovery fractions.
    """
    fits = _fits(run)
    frames = []
    for road in ROADS:
        mine = fits[fits["decode_mode"] == road]
        for label, condition, control in _lines(mine):
            for kind, name in (("mode", condition), ("same energy, random directions", control)):
                own = mine[(mine["condition_id"] == name) & mine["metric"].isin(list(METRICS))]
                frames.append(own.assign(road=road, line=label, kind=kind))
    found = pd.concat(frames, ignore_index=True)
    rf, low, high = (found[name].to_numpy(np.float64) for name in ("rf", "low", "high"))
    none = np.isnan(low) | np.isnan(rf)
    found = found.assign(
        shown=np.clip(rf, _LEFT, _RIGHT), left=np.where(none, np.nan, np.clip(low, _LEFT, _RIGHT)),
        right=np.where(none, np.nan, np.clip(high, _LEFT, _RIGHT)), open=np.isinf(low) | np.isinf(high),
        beyond=(rf < _LEFT) | (rf > _RIGHT),
    )  # fmt: skip
    columns = ["road", "metric", "line", "kind", "rf", "low", "high", "shown", "left", "right", "open", "beyond",
               "acted_on", "reason", "n", "estimator", "condition_id"]  # fmt: skip
    return found[[c for c in columns if c in found]]


def _fits(run: Run) -> pd.DataFrame:
    fits = run.table("fits") if run.manifest.rows().get("fits") else pd.DataFrame()
    if "rf" not in fits:
        raise RunFolderError(f"{run.path} holds no recovery fractions; they need a perturbation and a mode")
    return fits.astype(dict.fromkeys(("condition_id", "metric", "mode", "decode_mode", "timing"), str))


def _has(actions: pd.DataFrame, condition: str) -> bool:
    return bool((actions["condition_id"] == condition).any())


def _draw_band(panel: Any, band: Mapping[str, Any]) -> None:
    for key, name, stroke in (("q_hi", "upper", "--"), ("q_lo", "lower", ":")):
        if key in band:
            label = f"q{100 * band[name]:g} of clean text"
            panel.axhline(band[key], color=GREY, linestyle=stroke, linewidth=0.9, label=label)


def recovery_figure(run: Run) -> Figure:
    """Return the recovery fractions, one panel per metric and way of reading, one line per mode and timing.

    Raises:
        RunFolderError: The run holds no recovery fractions.
        UsageError: Matplotlib is missing.
    """
    fits = _fits(run)
    roads = [road for road in ROADS if (fits["decode_mode"] == road).any()]
    lines = {road: _lines(fits[fits["decode_mode"] == road]) for road in roads}
    shown = {
        road: [m for m in METRICS if ((fits["decode_mode"] == road) & (fits["metric"] == m)).any()] for road in roads
    }
    columns = max(len(names) for names in shown.values())
    heights = [len(lines[road]) + 1.6 for road in roads]
    figure = canvas(1.75 * columns + 1.9, 0.30 * sum(heights) + 1.3)
    panels = figure.subplots(len(roads), columns, squeeze=False, sharex=True, height_ratios=heights)
    for row, road in zip(panels, roads, strict=True):
        mine = fits[fits["decode_mode"] == road]
        for number, (panel, metric) in enumerate(zip(row, shown[road], strict=False)):
            _draw_fractions(panel, mine[mine["metric"] == metric], lines[road])
            acts = mine.loc[mine["metric"] == metric, "acted_on"].astype(bool)
            said = "\n(acted on)" if acts.all() else "\n(hollow: acted on)" if acts.any() else ""
            panel.set_title(METRICS[metric] + said, fontsize=8)
            labels = [label for label, _, _ in lines[road]] if not number else []
            panel.set_yticks(range(len(lines[road])), labels or [""] * len(lines[road]), fontsize=8)
            if not number:
                panel.set_ylabel(ROADS[road])
        for panel in row[len(shown[road]) :]:
            panel.set_visible(False)
    panels[-1][columns // 2].set_xlabel("recovery fraction: 0 as perturbed, 1 as clean, below 0 harm", fontsize=9)
    _explain(figure, bool(fits["acted_on"].any()))
    n = run.samples["prompt_id"].nunique()
    figure.suptitle(f"{run.manifest.model_name}: {n} prompts, 95 % intervals over them", fontsize=10)
    return figure


def _lines(fits: pd.DataFrame) -> list[tuple[str, str, str | None]]:
    """Label, condition of the mode, and that of its random control, in the order in which they were run."""
    found = []
    there = list(dict.fromkeys(fits["condition_id"]))
    for condition in there:
        if "+random:" in condition:
            continue
        row = fits[fits["condition_id"] == condition].iloc[0]
        control = condition.replace("+", "+random:", 1)
        timing = "" if row["timing"] == "detector" else f", {row['timing']}"
        found.append((f"{row['mode']}{timing}", condition, control if control in there else None))
    return found


def _draw_fractions(panel: Any, fits: pd.DataFrame, lines: Sequence[tuple[str, str, str | None]]) -> None:
    by_arm = {str(row["condition_id"]): row for _, row in fits.iterrows()}
    for x, stroke in ((0.0, "-"), (1.0, ":")):
        panel.axvline(x, color=GREY, linewidth=0.7, linestyle=stroke, zorder=0)
    for y, (_, condition, control) in enumerate(lines):
        for name, shift, colour, size in ((condition, -0.14, BLUE, 5.0), (control, 0.2, GREY, 3.5)):
            if name in by_arm:
                _dot(panel, by_arm[name], y + shift, colour, size)
    panel.set_xlim(_LEFT, _RIGHT)
    panel.set_xticks([-1, 0, 1, 2])
    panel.set_ylim(len(lines) - 0.4, -0.6)
    panel.tick_params(labelsize=8)
    tidy(panel)
    panel.set_xlim(_LEFT, _RIGHT)


def _dot(panel: Any, row: pd.Series, y: float, colour: str, size: float) -> None:
    value, low, high = float(row["rf"]), float(row["low"]), float(row["high"])
    if not np.isfinite(value):
        if colour == BLUE:
            said = str(row["reason"] or "missing").replace("DETECTOR_BLIND", "blind")
            panel.text(0.5, y + 0.14, said, color=GREY, fontsize=6.5, ha="center", va="center", style="italic")
        return
    if np.isnan(low):
        low = high = value
    inside = float(np.clip(value, _LEFT, _RIGHT))
    stroke = "-" if np.isfinite(high - low) else (0, (1, 2))  # an open end: some replicates have no effect at all
    ends = np.clip([low, high], _LEFT, _RIGHT)
    panel.plot(ends, [y, y], color=colour, linewidth=1.1, linestyle=stroke, solid_capstyle="butt")
    beyond = "o" if inside == value else "<" if value < _LEFT else ">"
    face = "white" if bool(row["acted_on"]) else colour
    panel.plot([inside], [y], beyond, color=colour, markerfacecolor=face, markersize=size, clip_on=False, zorder=3)


def _explain(figure: Figure, hollow: bool) -> None:
    from matplotlib.lines import Line2D

    blank: dict[str, Any] = {"linestyle": "-", "linewidth": 1.1}
    handles = [
        Line2D([], [], marker="o", markersize=5, color=BLUE, label="mode", **blank),
        Line2D([], [], marker="o", markersize=3.5, color=GREY, label="same energy, random directions", **blank),
    ]
    if hollow:
        handles.append(Line2D([], [], marker="o", markersize=5, color=BLUE, markerfacecolor="white", linestyle="",
                              label="acted on: recovers by construction"))  # fmt: skip
    handles.append(Line2D([], [], color=GREY, linewidth=1.1, linestyle=(0, (1, 2)), label="open interval"))
    handles.append(Line2D([], [], marker=">", markersize=4, color=BLUE, linestyle="", label="outside the axis"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
