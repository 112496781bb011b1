"""ICC(1): how alike the values of one group are, such as those of one model over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.metrics.statistics._clusters import cluster_index, column

__all__ = ["Icc", "icc1"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Icc:
    """An intraclass correlation.

    Attributes:
        value: ICC(1), from −1/(k₀ − 1) to 1.
        low: Lower end, exact for Gaussian values; NaN where groups differ in size.
        high: Upper end.
        ms_between: Mean square between groups.
        ms_within: Mean square inside groups.
        k0: Values per group, k where all have as many.
        n: Values.
        groups: Groups.
        reason: ``empty``, ``groups<2``, ``df<1`` (no group has two values), ``zero-denominator``.
        reason_interval: Why there is no interval.
    """

    value: float
    low: float
    high: float
    ms_between: float
    ms_within: float
    k0: float
    n: int
    groups: int
    reason: str | None = None
    reason_interval: str | None = None


def icc1(y: Any, group: Sequence[Any], *, confidence: float = 0.95) -> Icc:
    """One-way intraclass correlation.

    ICC(1) = (MS_b − MS_w)/(MS_b + (k − 1)·MS_w); with groups of unequal size k is k₀ = (N − Σn_i²/N)/(n − 1).

    Args:
        y: One value per row; rows without a value are left out.
        group: Group of each row.
        confidence: Coverage of the interval.

    Source:
        Reference §9.1, §14.1; Shrout and Fleiss 1979; interval McGraw and Wong 1996.

    Example:
        >>> round(icc1([0, 1, 2, 3], ["a", "a", "b", "b"]).value, 6)
        0.777778
    """
    values = column(y, "y")
    index, _ = cluster_index(group, len(values), "group")
    ok = np.isfinite(values)
    values, index = values[ok], np.unique(index[ok], return_inverse=True)[1]
    n, size = len(values), np.bincount(index)
    a = len(size) if n else 0
    why = "empty" if not n else "groups<2" if a < 2 else "df<1" if n <= a else None
    if why:
        return Icc(NAN, NAN, NAN, NAN, NAN, NAN, n, a, why, why)
    mean = np.bincount(index, weights=values) / size
    between = float((size * (mean - values.mean()) ** 2).sum()) / (a - 1)
    within = float(((values - mean[index]) ** 2).sum()) / (n - a)
    k0 = (n - float((size.astype(np.float64) ** 2).sum()) / n) / (a - 1)
    below = between + (k0 - 1) * within
    if not below > (16 * np.finfo(np.float64).eps * float(np.abs(values).max())) ** 2:
        return Icc(NAN, NAN, NAN, between, within, k0, n, a, "zero-denominator", "zero-denominator")
    value = (between - within) / below
    if size.min() != size.max() or not within > 0:
        no = "unequal-groups" if size.min() != size.max() else "zero-denominator"
        return Icc(value, NAN, NAN, between, within, k0, n, a, None, no)
    from scipy.special import fdtri

    k, ratio, tail = int(size[0]), between / within, (1 - confidence) / 2
    low = ratio / float(fdtri(a - 1, n - a, 1 - tail))
    high = ratio * float(fdtri(n - a, a - 1, 1 - tail))
    return Icc(value, (low - 1) / (low + k - 1), (high - 1) / (high + k - 1), between, within, k0, n, a)
