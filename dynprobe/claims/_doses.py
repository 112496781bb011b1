"""Numbers of strengths: thresholds, their ratios, and whether a response has a kink."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from dynprobe.claims._intervals import N_BOOT, SEED, Sides, estimate_of, nothing, one
from dynprobe.claims._parts import Nonlinear, Ratio, Threshold
from dynprobe.claims._sides import Side
from dynprobe.claims._verdict import Estimate
from dynprobe.errors import UsageError
from dynprobe.metrics.statistics import first_crossing, nonlinear, prompt_threshold, ratio_threshold

__all__ = ["nonlinearity", "ratio", "threshold"]


def _fit(side: Side, criterion: str, scale: str) -> pd.Series:
    fits = side.rows("fits", {"criterion": criterion, "scale": scale}, ("alpha50", "estimator", "write", "level"))
    fits = fits[fits["estimator"] == "threshold.prompt/1"]
    if len(fits) != 1:
        raise UsageError(
            f"{side.name} has {len(fits)} thresholds of criterion {criterion} under {scale}; a claim is about one "
            "(run it at one layer and with one kind of noise)"
        )
    return fits.iloc[0]


def _crossings(side: Side, criterion: str, scale: str) -> tuple[list[Any], list[str]]:
    fit = _fit(side, criterion, scale)
    trials = side.rows("trials", {"criterion": criterion, "write": fit["write"]}, ("response", "alpha", "seed"))
    trials = trials[trials["alpha"] > 0]
    found, names = [], []
    for (prompt, _), rows in trials.groupby([trials["prompt_id"].astype(str), "seed"], sort=True):
        found.append(
            first_crossing(rows["alpha"].to_numpy(), rows["response"].to_numpy(), fit["level"], floor=fit["floor"])
        )
        names.append(str(prompt))
    return found, names


def ratio(part: Ratio, sides: Sides, k: int = 1) -> list[Estimate]:
    a, b = one(sides, part.of), one(sides, part.to)
    (left, names_a), (right, names_b) = (_crossings(s, part.criterion, part.scale) for s in (a, b))
    by = 1.0
    if part.relative_to is not None:
        by = a.facts.get(part.relative_to, math.nan) / b.facts.get(part.relative_to, math.nan)

    def ends(confidence: float) -> tuple[float, float, float, int, str | None]:
        r = ratio_threshold(
            left, right, prompts_a=names_a, prompts_b=names_b, confidence=confidence, n_boot=N_BOOT, seed=SEED
        )
        # Of a ratio of censored thresholds the interval is known although the point is not.
        value = r.value if math.isfinite(r.value) else math.sqrt(max(r.low, 0.0) * r.high)
        return value / by, r.low / by, r.high / by, min(r.n_a, r.n_b), r.reason

    return [estimate_of(ends, part.label or f"α50 {part.of}/{part.to}, {part.scale}", k)]


def threshold(part: Threshold, sides: Sides, k: int = 1) -> list[Estimate]:
    found, names = _crossings(one(sides, part.role), part.criterion, part.scale)

    def ends(confidence: float) -> tuple[float, float, float, int, str | None]:
        t = prompt_threshold(found, prompts=names, confidence=confidence)
        return t.value, t.low, t.high, len(set(names)), t.reason

    return [estimate_of(ends, part.label or f"α50, {part.scale}", k)]


def nonlinearity(part: Nonlinear, sides: Sides, k: int = 1) -> list[Estimate]:
    frame = one(sides, part.role).rows("samples", part.where, (part.value, "alpha", "prompt_id"))
    frame = frame[pd.to_numeric(frame["alpha"], errors="coerce") > 0]
    numbers = pd.to_numeric(frame[part.value], errors="coerce").astype(float)
    table = numbers.groupby([frame["prompt_id"].astype(str), frame["alpha"].astype(float)]).mean().unstack().dropna()
    if table.shape[1] < 2:
        return [nothing("strengths<2", part.label)]
    f = nonlinear(table.columns.to_numpy(), table.to_numpy(), floor=float(table.to_numpy().min()) * 1e-9)
    if f.status == "missing":
        return [nothing(f.reason or "missing", part.label)]
    if not f.error_power > 0:
        return [nothing("zero-denominator", part.label)]
    if f.slope_above <= f.slope_below and f.gain_low > 0:
        return [nothing("better, but by a kink that flattens", part.label)]
    # As shares of the power law's error; the bound below is that of the paired test, mirrored above the gain.
    gain, low = f.gain / f.error_power, f.gain_low / f.error_power
    both = (low, 2 * gain - low)
    return [Estimate(gain, *both, both, both, f.n, part.label, f.reason)]
