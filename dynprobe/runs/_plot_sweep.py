"""Pictures of a response against the strength of a perturbation.

Every prompt is a thin line, their mean a thick one with its 95 % interval over prompts. In a search no two
prompts saw the same strengths; there is no mean to draw then, and each trial is a point. The threshold of the run's own
fit stands there as a line with its interval, never one that was read off the picture. Prompts that are censored point
out of the tested range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError
from dynprobe.metrics.statistics import first_crossing
from dynprobe.runs._canvas import BLUE, GREY, RED
from dynprobe.runs._grid_data import chosen, in_order, mean_responses, on_a_grid, responses
from dynprobe.runs._plot_axes import (
    DECADES,
    SMALL,
    dress,
    ends,
    legend,
    log_axis,
    note,
    plain,
    spread,
    title,
    wrapped_panels,
)
from dynprobe.runs._quantity import (
    Quantity,
    alpha_label,
    caption,
    is_threshold,
    level_of,
    prompts_text,
    quantity,
    write_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["CONTROLS", "response_blocks", "response_figure"]

_MOST_LAYERS = 6
#: Okabe–Ito colours, and strokes that differ as well.
_STROKES = {
    "sign-flip": ("#CC79A7", "--", "sign flipped"),
    "energy-matched": ("#009E73", "-.", "same energy, other depth"),
    "twin": ("#E69F00", (0, (5, 1, 1, 1, 1, 1)), "random weights"),
    "scrambled": ("#000000", (0, (1, 1)), "scrambled tokens"),
}
#: Controls and how they are called.
CONTROLS = {name: label for name, (_, _, label) in _STROKES.items()}


def response_figure(
    run: Run, column: str | None = None, layer: int | Sequence[int] | None = None, scale: str | None = None
) -> Figure:
    """Return the response against α, one panel per criterion, scale and layer.

    Args:
        run: A sweep or a threshold run.
        column: What answers; None takes the KL, or all criteria of a threshold run.
        layer: Layer or layers; None takes all, or six of them (of several criteria three), evenly chosen.
        scale: Noise scale; None takes all.

    Raises:
        RunFolderError: The run has no response to draw.
        UsageError: There is no such column, layer or scale, or matplotlib is missing.
    """
    blocks, lacking = response_blocks(run, column, scale)
    several = len(blocks) > 1
    layers = sorted(set(blocks[0][1]["layer"]))
    wanted = _layers(run, layers, layer, _MOST_LAYERS // 2 if several else _MOST_LAYERS)
    blocks = [(what, rows[rows["layer"].isin(wanted)]) for what, rows in blocks]
    rows = pd.concat([rows for _, rows in blocks])
    writes = in_order(run, rows["write"])
    figure, panels = wrapped_panels([len(wanted)] * len(writes) * len(blocks), 3, 2.3)
    pairs = [(what, own, write) for what, own in blocks for write in writes]
    for (what, answers, write), row in zip(pairs, panels, strict=True):
        level = level_of(run, what)
        y_ends = _y_ends(answers, what, level)
        own = answers[answers["write"] == write]
        x_ends = ends(own["alpha"].to_numpy(), log=True)
        at_level = f", ≥ {what.with_unit(level)}" if several and math.isfinite(level) else ""
        for number, (at, panel) in enumerate(zip(wanted, row, strict=True)):
            dress(panel, f"layer {at}" + (f", {write}" if len(writes) > 1 else "") + at_level)
            log_axis(panel, "x", *x_ends)
            log_axis(panel, "y", *y_ends) if what.log else panel.set_ylim(*y_ends)
            line = "level of the criterion" if several else f"criterion: {what.with_unit(level)}"
            _panel(panel, own[own["layer"] == at], run, what, level, own["alpha"].to_numpy(), line)
            if number % 3 == 0:
                panel.set_ylabel(what.label, fontsize=SMALL)
            else:
                panel.tick_params(labelleft=False)
            if number + 3 >= len(wanted):
                plain(panel.set_xlabel(_short(alpha_label(write, run=run), len(wanted)), fontsize=SMALL))
    everything = [panel for row in panels for panel in row]
    legend(figure, everything, 2 if len(wanted) == 1 else 3)
    n = rows["prompt_id"].nunique()
    some = f"{len(wanted)} of {len(layers)} layers" if layer is None and len(wanted) < len(layers) else ""
    controls = "controls: means" if set(rows["series"]) & set(_STROKES) else ""
    facts = ["scale " + ", ".join(writes), prompts_text(n), some, controls, *lacking]
    words = "responses of each criterion" if several else blocks[0][0].words
    title(figure, caption(run, f"{words} against α", facts, 56 if len(wanted) == 1 else 110))
    return figure


def response_blocks(
    run: Run, column: str | None = None, scale: str | None = None
) -> tuple[list[tuple[Quantity, pd.DataFrame]], list[str]]:
    """Return what is drawn, each with its rows, and a remark on each criterion that nothing is known of."""
    searched = [str(name) for name in run.manifest.config.get("criterion") or ()] if is_threshold(run) else []
    if column is not None or len(searched) < 2:
        what = quantity(run, column)
        return [(what, chosen(responses(run, what), run, scale))], []
    found: list[tuple[Quantity, pd.DataFrame]] = []
    lacking: list[str] = []
    for number, name in enumerate(searched):
        what = quantity(run, name)
        try:
            found.append((what, chosen(responses(run, what), run, scale)))
        except RunFolderError:
            if number + 1 == len(searched) and not found:
                raise
            lacking.append(f"no {what.words}")
    return found, lacking


def _layers(run: Run, known: list[int], layer: int | Sequence[int] | None, most: int) -> list[int]:
    if layer is None:
        return spread(known, most)
    wanted = [int(item) for item in np.atleast_1d(layer)]
    unknown = [item for item in wanted if item not in known]
    if unknown or not wanted:
        raise UsageError(f"{run.path} wrote at layers {', '.join(map(str, known))}, not at {unknown or wanted}")
    return wanted


def _short(label: str, n: int) -> str:
    """A label that fits under a panel: beside others the unit goes to a second line."""
    return label if n < 3 or len(label) < 30 else label.replace(" (", "\n(")


def _y_ends(rows: pd.DataFrame, what: Quantity, level: float) -> tuple[float, float]:
    if what.share:
        return -0.03, 1.03
    values = rows[rows["series"] != "sham"]["value"].to_numpy()
    low, high = ends(np.append(values, level), what.log)
    return (max(low, high / 10**DECADES), high) if what.log else (low, high)


def _panel(
    panel: Any, rows: pd.DataFrame, run: Run, what: Quantity, level: float, alphas: np.ndarray, line: str
) -> None:
    own = rows[rows["series"] == "perturbed"]
    if what.criterion is None or on_a_grid(run):
        _curves(panel, own)
    else:
        _trials(panel, own)
    for name, (colour, stroke, label) in _STROKES.items():
        control = rows[rows["series"] == name].groupby("alpha")["value"].mean()
        if control.notna().any():
            panel.plot(control.index, control, color=colour, linestyle=stroke, linewidth=1.2, label=label)
    _sham(panel, rows[rows["series"] == "sham"]["value"].to_numpy(), what)
    if what.signed:
        panel.axhline(0, color=GREY, linewidth=0.5)
    if math.isfinite(level):
        panel.axhline(level, color="black", linewidth=0.8, linestyle="--", label=line)
    if what.criterion is not None and not own.empty:
        _fit(panel, own, run, what, alphas)


def _curves(panel: Any, rows: pd.DataFrame) -> None:
    """Every prompt, their mean and its interval."""
    table = rows.pivot_table(index="curve", columns="alpha", values="value", dropna=False)
    alpha, values = table.columns.to_numpy(np.float64), table.to_numpy(np.float64)
    mean = mean_responses(rows)
    for number, curve in enumerate(values):
        panel.plot(
            alpha,
            curve,
            color=BLUE,
            alpha=0.3,
            linewidth=0.6,
            gid="prompt",
            label="each prompt" if not number else None,
        )
    if mean["low"].notna().any():
        panel.fill_between(
            mean["alpha"], mean["low"], mean["high"], color=BLUE, alpha=0.25, linewidth=0,
            label="95 % interval of the mean",
        )  # fmt: skip
    panel.plot(
        mean["alpha"], mean["mean"], color=BLUE, linewidth=1.6, marker="o", markersize=3, gid="mean",
        label="mean over prompts",
    )  # fmt: skip


def _trials(panel: Any, rows: pd.DataFrame) -> None:
    """Every trial of a search, joined inside its prompt."""
    for number, (_, curve) in enumerate(rows.groupby("curve")):
        ordered = curve.sort_values("alpha")
        panel.plot(
            ordered["alpha"], ordered["value"], color=BLUE, alpha=0.55, linewidth=0.5, marker="o", markersize=2.2,
            markeredgewidth=0, gid="prompt", label="trials of each prompt" if not number else None,
        )  # fmt: skip


def _sham(panel: Any, values: np.ndarray, what: Quantity) -> None:
    """What is read where nothing was written: a line, or a remark where it lies below the axis."""
    values = values[np.isfinite(values)]
    if not len(values):
        return
    size = float(np.abs(values).max())
    if not what.log or size > panel.get_ylim()[0]:
        at = size if what.log else float(values.mean())
        panel.axhline(at, color=GREY, linewidth=1.0, linestyle=":", label="sham (nothing written)")
    else:
        note(panel, 0.98, 0.02, "sham: 0" if size == 0 else f"sham: ≤ {size:.0e}", ha="right")


def _fit(panel: Any, rows: pd.DataFrame, run: Run, what: Quantity, alphas: np.ndarray) -> None:
    """The threshold of the run, its interval, and where each prompt crossed or points."""
    write, layer = rows["write"].iloc[0], rows["layer"].iloc[0]
    fits = run.table("fits") if "fits" in run.manifest.rows() else pd.DataFrame({"headline": [], "criterion": []})
    fits = fits[fits["headline"].astype(bool) & (fits["criterion"].astype(str) == what.criterion)]
    fits = fits[[write_name(f["scale"], f["kind"]) == write and f["layer"] == layer for _, f in fits.iterrows()]]
    left, right = panel.get_xlim()
    if len(fits):
        fit = fits.iloc[0]
        low, high = float(fit["low"]), float(fit["high"])
        if not (math.isnan(low) or math.isnan(high)):
            panel.axvspan(
                max(low, left), min(high, right), color=RED, alpha=0.18, linewidth=0, gid="interval",
                label=f"{100 * float(fit['confidence']):g} % interval of α50",
            )  # fmt: skip
        if math.isfinite(fit["alpha50"]):
            panel.axvline(
                fit["alpha50"],
                color=RED,
                linewidth=1.0,
                gid="alpha50",
                label="α50 (median over prompts)"
                if str(fit["estimator"]).startswith("threshold.prompt")
                else "α50 (mean response)",
            )
        note(panel, 0.02, 0.98, _in_words(fit, alphas), va="top", color=RED)
    if what.criterion == "task":
        return
    _marks(panel, rows, run, what)


def _in_words(fit: Any, alphas: np.ndarray) -> str:
    """The threshold as a text: a number, or the side of it that is known (a median is bound by its neighbours)."""
    tested = alphas[alphas > 0]
    if str(fit["status"]) == "right-censored":
        return f"α50 > {fit['low'] if math.isfinite(fit['low']) else tested.max():.3g}"
    if str(fit["status"]) == "left-censored":
        return f"α50 < {fit['high'] if math.isfinite(fit['high']) else tested.min():.3g}"
    if not math.isfinite(fit["alpha50"]):
        return f"α50: {fit['status']}"
    if math.isnan(fit["low"]) or math.isnan(fit["high"]):
        return f"α50 = {fit['alpha50']:.3g}"
    low = f"{fit['low']:.3g}" if math.isfinite(fit["low"]) else f"< {tested.min():.3g}"
    high = f"{fit['high']:.3g}" if math.isfinite(fit["high"]) else f"> {tested.max():.3g}"
    return f"α50 = {fit['alpha50']:.3g} [{low}, {high}]"


def _marks(panel: Any, rows: pd.DataFrame, run: Run, what: Quantity) -> None:
    """A tick where a prompt crossed; an arrow out of the range where it did not."""
    trials = run.table("trials", columns=["criterion", "scale", "kind", "layer", "level", "floor"])
    own = trials[(trials["criterion"].astype(str) == what.criterion) & (trials["layer"] == rows["layer"].iloc[0])]
    own = own[[write_name(s, k) == rows["write"].iloc[0] for s, k in zip(own["scale"], own["kind"], strict=True)]]
    level, floor = float(own["level"].iloc[0]), float(own["floor"].max())
    if not math.isfinite(level):
        return
    at, (left, right) = [], panel.get_xlim()
    for _, curve in rows.groupby("curve"):
        found = first_crossing(curve["alpha"].to_numpy(), curve["value"].to_numpy(), level, floor=floor)
        if found.status == "resolved":
            at.append(found.value)
        if found.status not in ("left-censored", "right-censored"):
            continue
        ordered = curve[curve["value"].notna()].sort_values("alpha")
        last = ordered.iloc[0 if found.status == "left-censored" else -1]
        to = left if found.status == "left-censored" else right
        panel.scatter(
            [to], [last["value"]], marker="<" if found.status == "left-censored" else ">", s=22, color=RED, zorder=4,
            clip_on=False, linewidth=0, gid=found.status, label="prompt that is censored",
        )  # fmt: skip
    if at:
        panel.plot(
            at, [level] * len(at), linestyle="none", marker="|", markersize=6, markeredgewidth=0.8, color="black",
            gid="crossings", label="first crossing of a prompt",
        )  # fmt: skip
