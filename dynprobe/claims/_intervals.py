"""How a number gets the intervals that a verdict reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from dynprobe.claims._sides import Side
from dynprobe.claims._verdict import Estimate, confidence_of
from dynprobe.errors import UsageError
from dynprobe.metrics.statistics import cluster_mean

__all__ = ["CONFIDENCE", "N_BOOT", "SEED", "Ends", "Sides", "estimate_of", "mean_of", "nothing", "one"]

#: Of every interval, unless a verdict asks for another.
CONFIDENCE, INNER = 0.95, 0.90
N_BOOT, SEED = 2000, 0
#: Bootstrap of a number at a confidence: value, low, high, n, reason.
Ends = Callable[[float], tuple[float, float, float, int, str | None]]
Sides = Mapping[str, Sequence[Side]]


def estimate_of(ends: Ends, label: str, k: int = 1) -> Estimate:
    """Return an estimate with all intervals that a verdict may read; ``k`` numbers share the error."""
    value, low, high, n, reason = ends(CONFIDENCE)
    inner = ends(INNER)[1:3]
    outer = (low, high) if k == 1 else ends(confidence_of(k))[1:3]
    return Estimate(value, low, high, inner, outer, n, label, reason)


def mean_of(values: pd.Series, label: str, k: int = 1) -> Estimate:
    def ends(confidence: float) -> tuple[float, float, float, int, str | None]:
        m = cluster_mean(values.to_numpy(float), confidence=confidence, n_boot=N_BOOT, seed=SEED)
        return m.value, m.low, m.high, m.n, m.reason or m.reason_interval

    if not len(values):
        return nothing("no prompt that every side has", label)
    return estimate_of(ends, label, k)


def nothing(reason: str, label: str) -> Estimate:
    nan = math.nan
    return Estimate(nan, nan, nan, (nan, nan), (nan, nan), 0, label, reason)


def one(sides: Sides, role: str) -> Side:
    found = sides.get(role, ())
    if len(found) != 1:
        raise UsageError(f"role {role} is one model; found {len(found)}")
    return found[0]
