"""Pictures of a response against the strength of a perturbation: curves, and a map over layers.

Curves: every prompt is a thin line, their mean a thick one with its 95 % bootstrap interval over prompts. In a search
no two prompts saw the same strengths; there is no mean to draw then, and each trial is a point. The threshold of the
run's own fit stands there as a line with its interval, never one that was read off the picture. Prompts that are
censored point out of the tested range.

The map: mean response at layer × strength, and the line at which the mean first reaches the criterion, row by row.
Between layers that were not tested nothing is interpolated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError
from dynprobe.metrics.statistics import first_crossing
from dynprobe.runs._canvas import BLUE, GREY, RED, bootstrap
from dynprobe.runs._grid_data import (
    LEVELS,
    Quantity,
    alpha_label,
    caption,
    chosen,
    in_order,
    is_threshold,
    on_a_grid,
    prompts_text,
    quantity,
    responses,
    write_name,
)
from dynprobe.runs._plot_axes import SMALL, dress, ends, legend, log_axis, note, plain, spread, title, wrapped_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["heatmap_figure", "response_figure"]

_MOST_LAYERS = 6
_DECADES = 8
_ON_ANY_COLOUR = ((2.8, "black"), (1.2, "white"))
#: Okabe–Ito colours, and strokes that differ as well.
_CONTROLS = {
    "sign-flip": ("#CC79A7", "--", "sign flipped"),
    "energy-matched": ("#009E73", "-.", "same energy, other depth"),
    "twin": ("#E69F00", (0, (5, 1, 1, 1, 1, 1)), "random weights"),
    "scrambled": ("#000000", (0, (1, 1)), "scrambled tokens"),
}


def response_figure(
    run: Run, column: str | None = None, layer: int | Sequence[int] | None = None, scale: str | None = None
) -> Figure:
    """Return the response against α, one panel per scale and layer.

    Args:
        run: A sweep or a threshold run.
        column: What answers; None takes the KL, or the first criterion of a threshold run.
        layer: Layer or layers; None takes all, or six of them, evenly chosen.
        scale: Noise scale; None takes all.

    Raises:
        RunFolderError: The run has no response to draw.
        UsageError: There is no such column, layer or scale, or matplotlib is missing.
    """
    what = quantity(run, column)
    rows = chosen(responses(run, what), run, scale)
    layers = sorted(set(rows["layer"]))
    wanted = _layers(run, layers, layer)
    rows = rows[rows["layer"].isin(wanted)]
    writes = in_order(run, rows["write"])
    figure, panels = wrapped_panels([len(wanted)] * len(writes), 3, 2.3)
    level = _level(run, what)
    y_ends = _y_ends(rows, what, level)
    for write, row in zip(writes, panels, strict=True):
        own = rows[rows["write"] == write]
        x_ends = ends(own["alpha"].to_numpy(), log=True)
        for number, (at, panel) in enumerate(zip(wanted, row, strict=True)):
            dress(panel, f"layer {at}" + (f", {write}" if len(writes) > 1 else ""))
            log_axis(panel, "x", *x_ends)
            log_axis(panel, "y", *y_ends) if what.log else panel.set_ylim(*y_ends)
            _panel(panel, own[own["layer"] == at], run, what, level, own["alpha"].to_numpy())
            if number % 3 == 0:
                panel.set_ylabel(what.label, fontsize=SMALL)
            else:
                panel.tick_params(labelleft=False)
            if number + 3 >= len(wanted):
                plain(panel.set_xlabel(_short(alpha_label(write), len(wanted)), fontsize=SMALL))
    everything = [panel for row in panels for panel in row]
    legend(figure, everything, 2 if len(wanted) == 1 else 3)
    n = rows["prompt_id"].nunique()
    some = f"{len(wanted)} of {len(layers)} layers" if layer is None and len(wanted) < len(layers) else ""
    controls = "controls: means" if set(rows["series"]) & set(_CONTROLS) else ""
    facts = ["scale " + ", ".join(writes), prompts_text(n), some, controls]
    title(figure, caption(run, f"{what.words} against α", facts, 56 if len(wanted) == 1 else 110))
    return figure


def _layers(run: Run, known: list[int], layer: int | Sequence[int] | None) -> list[int]:
    if layer is None:
        return spread(known, _MOST_LAYERS)
    wanted = [int(item) for item in np.atleast_1d(layer)]
    unknown = [item for item in wanted if item not in known]
    if unknown or not wanted:
        raise UsageError(f"{run.path} wrote at layers {', '.join(map(str, known))}, not at {unknown or wanted}")
    return wanted


def _short(label: str, n: int) -> str:
    """A label that fits under a panel: beside others the unit goes to a second line."""
    return label if n < 3 or len(label) < 30 else label.replace(" (", "\n(")


def _level(run: Run, what: Quantity) -> float:
    """Level of the criterion, where it is one for all layers; NaN where it is not."""
    if not is_threshold(run):
        return LEVELS.get(what.column, math.nan)
    trials = run.table("trials", columns=["criterion", "level"])
    found = trials[trials["criterion"].astype(str) == what.criterion]["level"].unique()
    return float(found[0]) if len(found) == 1 else math.nan


def _y_ends(rows: pd.DataFrame, what: Quantity, level: float) -> tuple[float, float]:
    if what.share:
        return -0.03, 1.03
    values = rows[rows["series"] != "sham"]["value"].to_numpy()
    low, high = ends(np.append(values, level), what.log)
    return (max(low, high / 10**_DECADES), high) if what.log else (low, high)


def _panel(panel: Any, rows: pd.DataFrame, run: Run, what: Quantity, level: float, alphas: np.ndarray) -> None:
    own = rows[rows["series"] == "perturbed"]
    if what.criterion is None or on_a_grid(run):
        _curves(panel, own)
    else:
        _trials(panel, own)
    for name, (colour, stroke, label) in _CONTROLS.items():
        control = rows[rows["series"] == name].groupby("alpha")["value"].mean()
        if control.notna().any():
            panel.plot(control.index, control, color=colour, linestyle=stroke, linewidth=1.2, label=label)
    _sham(panel, rows[rows["series"] == "sham"]["value"].to_numpy(), what)
    if what.signed:
        panel.axhline(0, color=GREY, linewidth=0.5)
    if math.isfinite(level):
        panel.axhline(level, color="black", linewidth=0.8, linestyle="--", label=f"criterion: {what.with_unit(level)}")
    if what.criterion is not None and not own.empty:
        _fit(panel, own, run, what, alphas)


def _curves(panel: Any, rows: pd.DataFrame) -> None:
    """Every prompt, their mean and its interval."""
    table = rows.pivot_table(index="curve", columns="alpha", values="value", dropna=False)
    alpha, values = table.columns.to_numpy(np.float64), table.to_numpy(np.float64)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a strength without any response has no mean
        mean, (low, high) = np.nanmean(values, axis=0), bootstrap(values, np.nanmean)
    few = np.isfinite(values).sum(axis=0) < 3
    if not few.all():
        panel.fill_between(
            alpha, np.where(few, np.nan, low), np.where(few, np.nan, high), color=BLUE, alpha=0.25, linewidth=0,
            label="95 % interval of the mean",
        )  # fmt: skip
    panel.plot(alpha, mean, color=BLUE, linewidth=1.6, marker="o", markersize=3, gid="mean", label="mean over prompts")


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
    """The threshold as a text: a number, or where it is not."""
    tested = alphas[alphas > 0]
    if str(fit["status"]) == "right-censored":
        return f"α50 > {tested.max():.3g}"
    if str(fit["status"]) == "left-censored":
        return f"α50 < {tested.min():.3g}"
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
            f"{run.path} searched other strengths for every prompt, so there is no map over strengths. Run dynprobe sweep "
            "--layers all, or dynprobe threshold --alphas 0.01:10:32"
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
    level = _level(run, what)
    mesh = None
    for number, (write, panel) in enumerate(zip(writes, panels[0], strict=True)):
        dress(panel, write if len(writes) > 1 else "")
        mesh = _map(panel, means[write], norm, colours, level, what)
        plain(panel.set_xlabel(alpha_label(write), fontsize=SMALL))
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
        return LogNorm(max(low, high / 10**_DECADES), high * (1 + 1e-9)), "viridis"
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
