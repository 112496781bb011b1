"""Rank correlation of two responses over runs, with an interval that respects prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, interval, multiplicity, resample
from dynprobe.metrics.statistics._clusters import cluster_index, column
from dynprobe.metrics.statistics._crossing import Array, Status

__all__ = ["Correlation", "spearman_interval"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Correlation:
    """Spearman's ρ with its interval.

    Args:
        value: ρ, or NaN.
        low: Lower end.
        high: Upper end.
        status: ``resolved`` or ``missing``.
        reason: ``empty``, ``coverage``, ``runs<3``, or ``zero-denominator`` for a constant side.
        n: Prompts.
        n_runs: Runs that took part.
        confidence: Nominal coverage.
        n_boot: Replicates.
        reason_interval: Why there is no interval.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None
    n: int = 0
    n_runs: int = 0
    confidence: float = 0.95
    n_boot: int = 0
    reason_interval: str | None = None


def spearman_interval(
    x: Any,
    y: Any,
    prompts: Sequence[Any] | None = None,
    *,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Spearman's ρ over runs, such as of Δκ and ΔNLL, with a cluster bootstrap over prompts.

    ρ is Pearson's correlation of mid-ranks. A replicate in which one side is constant has no ρ and opens both ends.

    Args:
        x: One number per run.
        y: Another.
        prompts: Prompt of each run; default each its own.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        ρ with its interval, inside [−1, 1].

    Raises:
        MetricError: Lengths differ.

    Source:
        Reference §8.4 and §10.4.

    Example:
        >>> spearman_interval([1, 2, 3, 4], [1, 4, 9, 16]).value
        1.0
    """
    check_bootstrap(n_boot, confidence)
    a, b = column(x, "x"), column(y, "y")
    if len(a) != len(b):
        raise MetricError(f"x and y are of the same runs, found {len(a)} and {len(b)}.")
    ok = np.isfinite(a) & np.isfinite(b)
    index, names = cluster_index(prompts, len(a))
    n_all, a, b, index = len(a), a[ok], b[ok], index[ok]
    counts: dict[str, Any] = {"n": len(set(index.tolist())), "n_runs": len(a), "confidence": confidence}
    why = None
    if not n_all:
        why = "empty"
    elif 2 * len(a) < n_all:
        why = "coverage"
    elif len(a) < 3:
        why = "runs<3"
    elif np.ptp(a) == 0 or np.ptp(b) == 0:
        why = "zero-denominator"
    if why is not None:
        return Correlation(NAN, NAN, NAN, "missing", why, **counts, n_boot=n_boot, reason_interval=why)
    value = float(_weighted(a, b, np.ones((1, len(a))))[0])
    used = np.unique(index)
    no_interval = "prompts<3" if len(used) < 3 else None if n_boot else "n_boot=0"
    low = high = NAN
    if no_interval is None:
        place = np.full(len(names), -1)
        place[used] = np.arange(len(used))
        weights = multiplicity(resample(len(used), n_boot, seed), len(used))[:, place[index]]
        draws = _weighted(a, b, weights)
        lost = np.isnan(draws)
        low, high = interval(np.where(lost, -1.0, draws), np.where(lost, 1.0, draws), confidence, len(used))
    return Correlation(value, low, high, "resolved", None, **counts, n_boot=n_boot, reason_interval=no_interval)


def _ranks(x: Array, weights: Array) -> Array:
    """Mid-ranks of every entry when entry i occurs weights[b, i] times, [n_boot, n]."""
    _, level, counts = np.unique(x, return_inverse=True, return_counts=True)
    size = np.add.reduceat(weights[:, np.argsort(level, kind="stable")], np.cumsum(counts) - counts, axis=1)
    return (np.cumsum(size, axis=1) - size / 2)[:, level]


def _weighted(x: Array, y: Array, weights: Array) -> Array:
    total = weights.sum(axis=1, keepdims=True)
    a, b = _ranks(x, weights), _ranks(y, weights)
    a, b = a - (weights * a).sum(1, keepdims=True) / total, b - (weights * b).sum(1, keepdims=True) / total
    va, vb = (weights * a * a).sum(1), (weights * b * b).sum(1)
    flat = (va <= 1e-9) | (vb <= 1e-9)
    out: Array = np.where(flat, NAN, (weights * a * b).sum(1) / np.sqrt(np.where(flat, 1.0, va * vb)))
    return np.clip(out, -1.0, 1.0)
