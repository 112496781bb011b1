"""Resampling of clusters, and the interval that comes out of it.

The unit of resampling is the prompt: seeds, strengths and trials of one prompt share its difficulty, so they come and
go together. Plain percentile intervals are too narrow for few clusters (the resampled variance lacks a factor
n/(n − 1), and normal quantiles stand where t quantiles belong). The **expanded percentile** interval repairs both: it
takes the quantiles Φ(∓√(n/(n − 1))·t_{n−1}) of the replicates (Hesterberg, The American Statistician 69:371, 2015).
Differences of medians need no such widening: resampled medians of few values scatter too much as it is.

A replicate may be known only to lie between two bounds, because it is censored or separated. Every function here
takes a lower and an upper draw; the lower end of the interval comes from the lower ones and the upper end from the
upper ones, so what is not known widens the interval and never shifts it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._crossing import Array

__all__ = ["check_bootstrap", "expanded_level", "interval", "multiplicity", "outward", "resample"]


def check_bootstrap(n_boot: int, confidence: float) -> None:
    """Refuse settings that give no interval."""
    if not 0 < confidence < 1:
        raise MetricError(f"confidence lies between 0 and 1, found {confidence!r}; write 0.95 for 95 %.")
    if n_boot < 0 or int(n_boot) != n_boot:
        raise MetricError(f"n_boot is a whole number of replicates, found {n_boot!r}; 2000 is usual.")


def resample(n: int, n_boot: int, seed: int) -> NDArray[np.int64]:
    """Draw indices of n clusters with replacement, [n_boot, n]."""
    return np.random.default_rng(seed).integers(0, n, (n_boot, n))


def multiplicity(pick: NDArray[np.int64], n: int) -> Array:
    """How often each of n clusters was drawn, [n_boot, n]."""
    flat = np.bincount((np.arange(len(pick))[:, None] * n + pick).ravel(), minlength=len(pick) * n)
    return flat.reshape(len(pick), n).astype(np.float64)


def expanded_level(confidence: float, n: int) -> float:
    """Lower tail probability whose percentile ends an expanded interval for n clusters.

    Example:
        >>> round(expanded_level(0.95, 12), 4), round(expanded_level(0.95, 100000), 4)
        (0.0108, 0.025)
    """
    from scipy.special import ndtr, stdtrit

    return float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - confidence) / 2)))


def interval(low: Array, high: Array, confidence: float, n: int, *, expand: bool = True) -> tuple[float, float]:
    """Percentile interval of replicates known between ``low`` and ``high``; NaN when any is undefined."""
    if n < 2 or not len(low) or np.isnan(low).any() or np.isnan(high).any():
        return float("nan"), float("nan")
    tail = expanded_level(confidence, n) if expand else (1 - confidence) / 2
    return (
        float(np.quantile(low, tail, method="lower")),
        float(np.quantile(high, 1 - tail, method="higher")),
    )


def outward(x: float) -> float:
    """From ln α to α; an end that is open below is −inf, not the 0 that exp would make of it."""
    return float("-inf") if np.isneginf(x) else float(np.exp(x))
