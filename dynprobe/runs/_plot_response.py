"""Pictures of the function generator: a Bode plot along the depth, and the map of an impulse response.

The Bode plot takes the lock-in of a ``kind=sine`` run. Gains are averaged over prompts in dB and phases on the circle;
phases are unwrapped along the depth for the eye only. A point is hollow where the response does not stand out of the
neighbouring frequencies (Fisher's combination of the prompts' p-values, 5 %): its gain is an upper limit and its phase
is noise. Over all directions, where no law of the noise is known, it is hollow below twice the neighbours' power.

The map takes the relative response of a ``kind=impulse`` run, as the median over prompts, aligned at the written
position. What is exactly 0 (before the write, in depth and in time) is grey and not the lowest colour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.metrics.statistics import interval_words, profile_interval
from dynprobe.metrics.statistics._prompt_means import draw_weights, quantile_ends
from dynprobe.runs._canvas import BLUE, GREY, RED, canvas, tidy
from dynprobe.runs._figures import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.runs._run import Run

__all__ = ["bode_figure", "impulse_figure"]

_LIMIT = 0.05
_TWICE = 2.0
_DECADES = 6
_BEFORE = 3


def bode_figure(run: Run, condition: str = "perturbed.forced") -> Figure:
    """Return gain in dB and phase by depth of a run with ``kind=sine``.

    Args:
        run: The run.
        condition: The driven condition.

    Raises:
        RunFolderError: The run has no lock-in to draw, or no row was long enough for one.
        UsageError: Matplotlib is missing.
    """
    if "lockin_gain" not in set(run.columns().query("table == 'profiles'")["column"]):
        raise RunFolderError(f"{run.path} has no lock-in read-out; run with --perturb 'alpha=…,kind=sine,period=8'.")
    columns = ["lockin_gain", "lockin_phase", "lockin_total", "lockin_p", "lockin_snr_total"]
    rows = _of_condition(run, "profiles", ["sample_id", "depth", *columns], condition)
    rows = rows[rows["lockin_total"] > 0]  # below the written depth the response is exactly 0, and has no dB
    if not len(rows):
        raise RunFolderError(
            f"{run.path} holds no lock-in of {condition}: the strength is 0, or no text has two periods of driven "
            "tokens. Take longer prompts, --max-new-tokens, or a shorter period."
        )
    with np.errstate(divide="ignore"):
        rows["gain"], rows["total"] = 20 * np.log10(rows["lockin_gain"]), 20 * np.log10(rows["lockin_total"])
    gain, total = _table(rows, "gain"), _table(rows, "total")
    phase = _table(rows.assign(phase=np.exp(1j * rows["lockin_phase"].to_numpy(np.float64))), "phase")
    depth, n = gain.columns.to_numpy(), len(gain)
    seen = _combined(_table(rows, "lockin_p").to_numpy()) < _LIMIT
    above = _table(rows, "lockin_snr_total").to_numpy(np.float64)  # missing where the neighbours are exactly silent
    loud = np.nanmedian(np.where(np.isnan(above), np.inf, above), axis=0) >= _TWICE
    figure = canvas(7.2, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for values, colour, label, marks in (
        (total, GREY, "all directions", loud), (gain, BLUE, "along the drive", seen),
    ):  # fmt: skip
        y = values.to_numpy(np.float64)
        _curve(upper, depth, np.nanmean(y, axis=0), profile_interval(y)[1:], colour, marks, label)
    upper.axhline(0, color=GREY, linewidth=0.6, linestyle=":")
    upper.set_ylabel("gain (dB)")
    upper.legend(frameon=False)
    z = phase.to_numpy(np.complex128)
    centre = _circular_mean(z, axis=0)
    low, high = _phase_interval(z, centre)
    turns = _unwrapped(centre)
    band = (np.degrees(turns + low - centre), np.degrees(turns + high - centre))
    _curve(lower, depth, np.degrees(turns), band, BLUE, seen, "along the drive")
    lower.axhline(0, color=GREY, linewidth=0.6, linestyle=":")
    lower.set_ylabel("phase (degrees)")
    lower.set_xlabel("depth (state entering block d)")
    for panel in (upper, lower):
        tidy(panel)
        panel.margins(x=0.03)
    hollow = "" if seen.all() and loud.all() else "; hollow: not above its neighbours in frequency"
    _title(figure, run, f"{_prompts(n)}, mean and {interval_words()}{hollow}")
    return figure


def _curve(
    panel: Any, x: np.ndarray, y: np.ndarray, band: tuple[np.ndarray, np.ndarray], colour: str,
    seen: np.ndarray, label: str,
) -> None:  # fmt: skip
    panel.plot(x, y, color=colour, linewidth=1.4, label=label)
    panel.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)
    for chosen, face in ((seen, colour), (~seen, "white")):
        panel.scatter(x[chosen], y[chosen], s=22, facecolor=face, edgecolor=colour, linewidth=1.2, zorder=3)


def impulse_figure(run: Run, prompt: str | None = None, condition: str = "perturbed.forced") -> Figure:
    """Return the map of the relative response over depth and position of a run with ``kind=impulse``.

    Args:
        run: The run.
        prompt: Name of one prompt; None takes the median over all.
        condition: The perturbed condition.

    Raises:
        RunFolderError: The run has no impulse to draw.
        UsageError: There is no such prompt, or matplotlib is missing.
    """
    specs = [str(s) for s in run.manifest.config.get("perturb") or ()]
    if len(specs) != 1 or "kind=impulse" not in specs[0]:
        raise RunFolderError(f"{run.path} has no single impulse; run with --perturb 'alpha=…,kind=impulse'.")
    rows = _of_condition(run, "depths", ["sample_id", "pos", "track", "depth", "response_rel"], condition)
    rows = rows[rows["track"] == "resid"]
    if prompt is not None:
        known = sorted(rows["prompt_id"].astype(str).unique())
        if prompt not in known:
            raise UsageError(f"prompt {prompt!r} is not in {run.path}.{did_you_mean(prompt, known)}")
        rows = rows[rows["prompt_id"].astype(str) == prompt]
    moved = rows[rows["response_rel"] > 0]
    if not len(moved):
        raise RunFolderError(f"{run.path}: nothing responded in {condition}; the strength is 0 or nothing was written.")
    written = int(moved["depth"].min())
    origin = moved[moved["depth"] == written].groupby("sample_id", observed=True)["pos"].min()
    rows = rows[rows["sample_id"].isin(origin.index) & (rows["depth"] >= written - _BEFORE)]
    lag = rows["pos"] - rows["sample_id"].map(origin).astype(np.int64)
    one_place = origin.nunique() == 1
    cells = rows.assign(lag=lag + (int(origin.iloc[0]) if one_place else 0)).groupby(["depth", "lag"])["response_rel"]
    first = int(origin.iloc[0]) if one_place else 0
    counts = cells.count().unstack("lag")
    lags = counts.columns.to_numpy(np.int64)
    kept = lags[(counts.max().to_numpy() * 2 >= len(origin)) & (lags >= first - _BEFORE)]
    grid = cells.median().unstack("lag")[kept]
    figure = canvas(7.6, 5.2)
    panel = figure.subplots()
    _map(figure, panel, grid, "‖h′ − h‖ / ‖h‖" + (", median over prompts" if len(origin) > 1 else ""))
    panel.plot(first, written, marker="s", markersize=9, markerfacecolor="none", markeredgecolor=RED, markeredgewidth=2)
    panel.set_xlabel("position (tokens)" if one_place else "tokens after the impulse")
    panel.set_ylabel("depth (state entering block d)")
    _title(figure, run, f"{_prompts(len(origin))}; square: the write; grey: exactly 0{_rates(run, condition, prompt)}")
    return figure


def _map(figure: Any, panel: Any, grid: pd.DataFrame, label: str) -> None:
    from matplotlib.colors import LogNorm

    values = np.ma.masked_less_equal(np.ma.masked_invalid(grid.to_numpy(np.float64)), 0)
    top, bottom = float(values.max()), float(values.min())
    bottom = max(bottom, top / 10**_DECADES)
    if bottom >= top:  # one cell, or all alike: a colour bar needs two ends
        bottom = top / 10
    panel.set_facecolor("#dddddd")
    mesh = panel.pcolormesh(
        grid.columns.to_numpy(), grid.index.to_numpy(), values, norm=LogNorm(bottom, top), cmap="viridis",
        shading="nearest", rasterized=True,
    )  # fmt: skip
    figure.colorbar(mesh, ax=panel, label=label)


def _rates(run: Run, condition: str, prompt: str | None) -> str:
    """Mean relaxation rates of the condition as a line of the title."""
    samples = run.samples
    samples = samples[samples["condition_id"].astype(str) == condition]
    if prompt is not None:
        samples = samples[samples["prompt_id"].astype(str) == prompt]
    found = []
    for axis in ("depth", "token"):
        values = samples.get(f"relax_{axis}", pd.Series(dtype=float)).dropna()
        if len(values):
            found.append(f"{values.mean():+.3f} per {axis} (r² {samples[f'relax_{axis}_r2'].median():.2f})")
    return "\nrelaxation rate " + ", ".join(found) if found else ""


def _of_condition(run: Run, table: str, columns: list[str], condition: str) -> pd.DataFrame:
    labels = run.samples[["sample_id", "prompt_id", "condition_id"]]
    known = sorted(labels["condition_id"].astype(str).unique())
    if condition not in known:
        raise RunFolderError(f"{run.path} has no condition {condition!r}.{did_you_mean(condition, known)}")
    rows = run.table(table, columns=columns)
    return rows.merge(labels[labels["condition_id"].astype(str) == condition], on="sample_id")


def _table(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """``[prompt, depth]``; replicates of one prompt are averaged."""
    return rows.groupby(["prompt_id", "depth"], observed=True)[column].mean().unstack("depth")


def _combined(p: np.ndarray) -> np.ndarray:
    """Fisher's combination over prompts ``[prompt, depth]``; 1 where there is none."""
    from scipy.stats import chi2

    p = p.astype(np.float64)
    known = np.isfinite(p)
    statistic = -2 * np.log(np.clip(np.where(known, p, 1.0), 1e-300, 1.0)).sum(axis=0)
    return np.where(known.any(axis=0), chi2.sf(statistic, np.maximum(2 * known.sum(axis=0), 1)), 1.0)


def _circular_mean(z: np.ndarray, axis: int) -> np.ndarray:
    return np.angle(np.nanmean(z, axis=axis))


def _phase_interval(z: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the circular mean of ``[prompt, depth]`` around it, on the draws and with the quantiles of a mean."""
    n, known = len(z), np.isfinite(z)
    if n < 3:
        return np.full(z.shape[1], np.nan), np.full(z.shape[1], np.nan)
    weights = draw_weights(n, 2000, 0)
    found = np.angle(weights @ np.where(known, z, 0))
    found[weights @ known == 0] = np.nan  # a replicate that drew no prompt with this depth
    return quantile_ends(np.sort(centre + np.angle(np.exp(1j * (found - centre))), axis=0), 0.95, n)


def _unwrapped(phase: np.ndarray) -> np.ndarray:
    """Unwrap over the finite entries."""
    out, known = phase.copy(), np.isfinite(phase)
    out[known] = np.unwrap(phase[known])
    return out


def _prompts(n: int) -> str:
    return f"{n} prompt{'s' if n != 1 else ''}"


def _title(figure: Any, run: Run, line: str) -> None:
    specs = ", ".join(str(s) for s in run.manifest.config.get("perturb") or ())
    figure.suptitle(f"{run.manifest.model_name}: {line}\n{short(specs)}", fontsize=9)
