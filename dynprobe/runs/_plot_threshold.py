"""Pictures of thresholds: along the layers, and as a map over the tokens of one prompt.

Only the headline estimate of each curve is drawn, as the run fitted it. A threshold that lies outside the tested range
is an arrow at the end of the range and no point; an interval that is open runs to that end and ends in an arrow. Where
there is no number nothing is drawn, and in the map the cell says why by its hatching.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._canvas import BLUE, GREY, RED, canvas
from dynprobe.runs._grid_data import chosen, in_order
from dynprobe.runs._plot_axes import (
    COLUMN,
    PAGE,
    SMALL,
    TICK,
    dress,
    ends,
    legend,
    log_axis,
    plain,
    spread,
    title,
    wrapped_panels,
)
from dynprobe.runs._quantity import (
    alpha_label,
    caption,
    is_threshold,
    per_position,
    prompts_text,
    quantity,
    write_name,
)
from dynprobe.runs._tokens import labels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["fragility_figure", "headline", "open_ends", "thresholds_figure"]

_LINES = ((BLUE, "o"), (RED, "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
_HATCHES = {
    "right-censored": ("////", "tested_high", "above the tested range (α50 > {:.3g})"),
    "left-censored": ("....", "tested_low", "below the tested range (α50 < {:.3g})"),
}
_MOST_TOKENS = 80
_BEYOND = "beyond the tested range (filled: only the interval)"
_EMPTY = "#e0e0e0"


def thresholds_figure(run: Run, scale: str | None = None) -> Figure:
    """Return α50 with its interval against the layer, one line per scale, one panel per criterion.

    Args:
        run: A threshold run.
        scale: Noise scale; None takes all.

    Raises:
        RunFolderError: The run has no thresholds of whole texts.
        UsageError: There is no such scale, or matplotlib is missing.
    """
    if is_threshold(run) and per_position(run):
        raise RunFolderError(
            f"{run.path} has one threshold per position; draw run.plot.fragility(), or run dynprobe threshold without "
            "--each-position"
        )
    fits = chosen(open_ends(headline(run)), run, scale)
    criteria = list(dict.fromkeys(fits["criterion"].astype(str)))
    writes = in_order(run, fits["write"])
    figure, rows = wrapped_panels([len(criteria)], 2, 2.8)
    for criterion, panel in zip(criteria, rows[0], strict=True):
        own = fits[fits["criterion"].astype(str) == criterion]
        what = quantity(run, criterion)
        levels = own["level"].unique()
        at_level = f" ≥ {what.with_unit(float(levels[0]))}" if len(levels) == 1 else ", level by layer"
        dress(panel, f"{what.words}{at_level}")
        _forest(panel, own, writes)
        panel.set_xlabel("layer written (block)", fontsize=SMALL)
        panel.margins(x=0.08)
    rows[0][0].set_ylabel("α50, in units of its scale", fontsize=SMALL)
    legend(figure, rows[0], 1 if len(criteria) == 1 else 2)
    confidence = 100 * float(fits["confidence"].iloc[0])
    median = str(fits["estimator"].iloc[0]).startswith("threshold.prompt")
    estimate = "median over prompts" if median else "crossing of the mean response"
    n = int(fits["n"].max())
    known = fits[["low", "high"]].notna().any(axis=None)
    interval = f"{confidence:g} % interval over prompts" if known else "too few prompts for an interval"
    facts = [prompts_text(n), f"{estimate}, {interval}"]
    title(figure, caption(run, "thresholds by layer", facts, 56 if len(criteria) == 1 else 90))
    return figure


def headline(run: Run) -> pd.DataFrame:
    """Return the headline fits, with the name of their write and the range that was tested."""
    if not is_threshold(run) or "fits" not in run.manifest.rows():
        why = "is not finished" if is_threshold(run) else "is no threshold run"
        raise RunFolderError(f"{run.path} {why}, so it has no α50. Type dynprobe threshold --model … --layers all")
    fits = run.table("fits")
    fits = fits[fits["headline"].astype(bool)].reset_index(drop=True)
    trials = run.table("trials", columns=["write", "criterion", "alpha"])
    tested = trials[trials["alpha"] > 0].groupby(["write", "criterion"], observed=True)["alpha"].agg(["min", "max"])
    keys = pd.MultiIndex.from_frame(fits[["write", "criterion"]].astype(str))
    tested.index = pd.MultiIndex.from_tuples([(str(a), str(b)) for a, b in tested.index])
    found = tested.reindex(keys)
    return fits.assign(
        tested_low=found["min"].to_numpy(), tested_high=found["max"].to_numpy(),
        write=[write_name(s, k) for s, k in zip(fits["scale"], fits["kind"], strict=True)],
    )  # fmt: skip


def _forest(panel: Any, fits: pd.DataFrame, writes: list[str]) -> None:
    layers = np.sort(fits["layer"].unique())
    step = float(np.diff(layers).min()) if len(layers) > 1 else 1.0
    shown: list[float] = []
    for number, write in enumerate(writes):
        own = fits[fits["write"] == write].sort_values("layer")
        if own.empty:
            continue
        colour, marker = _LINES[number % len(_LINES)]
        x = own["layer"].to_numpy(np.float64) + (number - (len(writes) - 1) / 2) * min(0.16 * step, 0.5)
        panel.plot(
            x, own["alpha50"], color=colour, linewidth=1.0, marker=marker, markersize=4, gid="alpha50",
            label=alpha_label(write, "α50"),
        )  # fmt: skip
        for at, (_, fit) in zip(x, own.iterrows(), strict=True):
            shown += _interval(panel, at, fit, colour)
    if by := [c for c in panel.collections if str(c.get_gid()).endswith("-censored")]:
        panel.scatter([], [], marker=by[0].get_paths()[0], s=30, facecolor="white", edgecolor=GREY, label=_BEYOND)
    panel.set_xticks(spread([int(layer) for layer in layers], 12))
    known = np.array([*shown, *fits["alpha50"]], dtype=np.float64)
    if not np.isfinite(known).any():
        return
    log_axis(panel, "y", *ends(known, log=True, air=0.12))


def open_ends(fits: pd.DataFrame) -> pd.DataFrame:
    """Return fits with what is drawn of their intervals.

    An interval that is open runs to the end of the tested range; a threshold beyond that range, or an open end, gets an
    arrow there.

    Returns:
        The fits with ``shown_low, shown_high`` (NaN without an interval) and ``arrow_low, arrow_high`` (NaN without).
    """
    low, high, bottom, top = (fits[k].to_numpy(np.float64) for k in ("low", "high", "tested_low", "tested_high"))
    status = fits["status"].astype(str).to_numpy()
    from_, to = np.where(np.isinf(low), bottom, low), np.where(np.isinf(high), top, high)
    none = np.isnan(from_) | np.isnan(to)
    above = (np.isinf(high) | (status == "right-censored")) & np.isfinite(top)
    below = (np.isinf(low) | (status == "left-censored")) & np.isfinite(bottom)
    return fits.assign(
        shown_low=np.where(none, np.nan, from_), shown_high=np.where(none, np.nan, to),
        arrow_low=np.where(below, bottom, np.nan), arrow_high=np.where(above, top, np.nan),
    )  # fmt: skip


def _interval(panel: Any, x: float, fit: Any, colour: str) -> list[float]:
    """Draw an interval or an arrow out of the tested range; return what the axis must show."""
    from_, to, status = float(fit["shown_low"]), float(fit["shown_high"]), str(fit["status"])
    found = []
    if not math.isnan(from_):
        panel.vlines(x, from_, to, color=colour, linewidth=1.2, gid="interval")
        found += [from_, to]
    for at, mark in ((float(fit["arrow_high"]), "^"), (float(fit["arrow_low"]), "v")):
        if math.isfinite(at):
            face = "white" if status.endswith("-censored") and not math.isfinite(fit["alpha50"]) else colour
            panel.scatter(
                [x], [at], marker=mark, s=30, facecolor=face, edgecolor=colour, linewidth=1.0, zorder=4,
                gid="right-censored" if mark == "^" else "left-censored",
            )  # fmt: skip
            found.append(at)
    return found


def fragility_figure(run: Run, prompt: str | None = None, scale: str | None = None) -> Figure:
    """Return the map of thresholds over token × layer of one prompt, one panel per scale.

    Args:
        run: A threshold run with ``each_position``.
        prompt: Name of the prompt; None takes the first.
        scale: Noise scale; None takes all.

    Raises:
        RunFolderError: The run has no thresholds per position.
        UsageError: There is no such prompt or scale, or matplotlib is missing.
    """
    if not (is_threshold(run) and per_position(run)):
        raise RunFolderError(
            f"{run.path} has no thresholds per position. Type dynprobe threshold --model … --each-position "
            "--layers all --limit 1"
        )
    fits = chosen(headline(run), run, scale)
    order = [str(p) for p in run.prompts["prompt_id"] if str(p) in set(fits["prompt_id"].astype(str))]
    if prompt is None:
        prompt = order[0]
    elif prompt not in order:
        raise UsageError(f"{run.path} has no thresholds of prompt {prompt!r}.{did_you_mean(prompt, order)}")
    fits = fits[fits["prompt_id"].astype(str) == prompt]
    what = quantity(run, None)
    fits = fits[fits["criterion"].astype(str) == what.criterion]
    writes = in_order(run, fits["write"])
    figure = canvas(PAGE, COLUMN)
    tokens, text = labels_of(run, prompt)
    layers = np.sort(fits["layer"].unique())
    figure.set_size_inches(
        float(np.clip(1.6 + 0.16 * len(tokens), COLUMN, 14.0)),
        len(writes) * (float(np.clip(0.19 * len(layers), 0.8, 5.5)) + 0.9) + 0.9,
    )
    panels = np.atleast_1d(figure.subplots(len(writes), 1, squeeze=False)[:, 0])
    for write, panel in zip(writes, panels, strict=True):
        own = fits[fits["write"] == write]
        dress(panel, write if len(writes) > 1 else "")
        _cells(figure, panel, own, layers, len(tokens), write)
        _token_ticks(panel, tokens)
        panel.set_ylabel("layer written\n(block)", fontsize=SMALL)
    panels[-1].set_xlabel("token written, alone", fontsize=SMALL)
    legend(figure, list(panels), 3 if figure.get_figwidth() > 6 else 2 if figure.get_figwidth() > 5 else 1)
    which = f"prompt {prompt}" + (f" (of {len(order)})" if len(order) > 1 else "")
    level = float(fits["level"].iloc[0])
    over = ", mean from the token on" if what.criterion in ("kl", "flip") else ""
    reached = f"threshold: {what.words} ≥ {what.with_unit(level)}{over}"
    width = int(figure.get_figwidth() * 16)
    heading = caption(run, "threshold of every token and layer", ["scale " + ", ".join(writes), which, reached], width)
    title(figure, heading + ("\n" + "\n".join(textwrap.wrap(f"“{text}”", width)[:2]) if text else ""))
    return figure


def _cells(figure: Any, panel: Any, fits: pd.DataFrame, layers: np.ndarray, n_tokens: int, write: str) -> None:
    """Colour where there is a number, hatching where it lies outside the range, grey where there is none."""
    from matplotlib.colors import LogNorm

    grid = np.full((len(layers), n_tokens), np.nan)
    rows, columns = np.searchsorted(layers, fits["layer"]), fits["pos"].to_numpy(np.int64)
    grid[rows, columns] = fits["alpha50"]
    panel.set_facecolor(_EMPTY)
    panel.set_xlim(-0.5, n_tokens - 0.5)
    panel.set_ylim(-0.5, len(layers) - 0.5)
    low, high = ends(grid.ravel(), log=True, air=0.0)
    mesh = panel.pcolormesh(
        np.arange(n_tokens + 1) - 0.5, np.arange(len(layers) + 1) - 0.5, np.ma.masked_invalid(grid),
        norm=LogNorm(low, max(high, low * 1.01)), cmap="viridis_r", rasterized=True,
    )  # fmt: skip
    if np.isfinite(grid).any():
        bar = figure.colorbar(mesh, ax=panel, pad=0.01, aspect=12)
        bar.set_label(alpha_label(write, "α50").replace(" (", "\n("), fontsize=TICK)
        bar.ax.tick_params(which="both", labelsize=TICK)
        log_axis(bar.ax, "y", low, max(high, low * 1.01))
    status = fits["status"].astype(str).to_numpy()
    for name, (hatch, end, label) in _HATCHES.items():
        hit = status == name
        label = label.format(fits[end].iloc[0])
        for number, (row, column) in enumerate(zip(rows[hit], columns[hit], strict=True)):
            panel.add_patch(_box(column, row, hatch, facecolor="white", gid=name, label=label if not number else None))
    known = set(zip(rows[np.isfinite(fits["alpha50"])], columns[np.isfinite(fits["alpha50"])], strict=True))
    hatched = {(r, c) for r, c, s in zip(rows, columns, status, strict=True) if s in _HATCHES}
    if len(known | hatched) < grid.size:
        panel.plot([], [], linestyle="none", marker="s", markersize=7, color=_EMPTY, label="no threshold")
    labels = spread(list(range(len(layers))), 12)
    panel.set_yticks(labels, [str(int(layers[i])) for i in labels])


def _box(column: int, row: int, hatch: str, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, hatch=hatch, edgecolor=GREY, linewidth=0, **options)


def _token_ticks(panel: Any, tokens: list[str]) -> None:
    shown = spread(list(range(len(tokens))), _MOST_TOKENS)
    panel.set_xticks(shown, [tokens[i] for i in shown], rotation=90, fontsize=TICK - 0.5)
    for label in panel.get_xticklabels():
        plain(label)
