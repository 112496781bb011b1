"""The numbers that are read off one series in a delay diagnosis, and where a number stands among its surrogates.

Every number is computed by the same function from the data and from each surrogate, with the lag and Theiler window of
the data, so nothing but the series differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynprobe.metrics._delay import AXES, DelayPca, axis_similarity, delay_pca, lag_autocorrelation, mirror_symmetry
from dynprobe.metrics._false_neighbours import FalseNeighbours, false_neighbours
from dynprobe.metrics._result import Array

__all__ = ["COMPONENTS", "Key", "Number", "Place", "Settings", "numbers", "place", "remark_of"]

NAN = float("nan")
#: Principal axes that are looked at, the first ones.
COMPONENTS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """How a series is embedded.

    Attributes:
        dims: Embedding dimensions, ascending.
        lag: Steps between coordinates.
        theiler: Only pairs |i − j| ≥ theiler may be neighbours.
        rtol: First criterion of false neighbours.
        atol: Second criterion.
        accept: Share of false neighbours below which a dimension counts as enough.
    """

    dims: tuple[int, ...]
    lag: int
    theiler: int
    rtol: float
    atol: float
    accept: float


class Key(NamedTuple):
    """Which number: the statistic, the embedding dimension, and the number of the axis; 0 where it has none."""

    statistic: str
    dim: int
    component: int


class Number(NamedTuple):
    """A number, or NaN and why; from how many points; a remark that stands beside it."""

    value: float
    reason: str | None
    n_points: int
    match: int = -1


class Place(NamedTuple):
    """Where a value stands among surrogates.

    Attributes:
        n: Surrogates on which the number is defined.
        low: 2.5 % quantile of them (type 7).
        median: Their median.
        high: 97.5 % quantile.
        p: min(1, 2·min(p_less, p_greater)).
        p_less: (1 + #{surrogates ≤ value})/(1 + n).
        p_greater: (1 + #{surrogates ≥ value})/(1 + n).
        reason: Why p is NaN.
    """

    n: int
    low: float
    median: float
    high: float
    p: float
    p_less: float
    p_greater: float
    reason: str | None


def numbers(x: Array, s: Settings) -> tuple[dict[Key, Number], dict[int, DelayPca]]:
    """Return every number of one series, and its principal axes per dimension."""
    out: dict[Key, Number] = {}
    r1 = lag_autocorrelation(x)
    out[Key("r1", 0, 0)] = Number(r1, _why_no_r1(x, r1), max(len(x) - 1, 0))
    found = false_neighbours(x, s.dims, s.lag, s.theiler, rtol=s.rtol, atol=s.atol)
    for f in found:
        for name, value in (("fnn", f.share), ("fnn_distance", f.by_distance), ("fnn_size", f.by_size)):
            out[Key(name, f.dim, 0)] = Number(value, f.reason, f.n_points)
    out[Key("fnn_dimension", 0, 0)] = _enough(found, s.accept)
    axes = {dim: delay_pca(x, dim, s.lag) for dim in s.dims if dim > 1}
    for dim, pca in axes.items():
        out |= _of_axes(dim, pca)
    return out, axes


def _why_no_r1(x: Array, r1: float) -> str | None:
    if not np.isnan(r1):
        return None
    return "nonfinite" if not np.isfinite(x).all() else "constant" if len(x) > 2 else "steps<3"


def _enough(found: Sequence[FalseNeighbours], accept: float) -> Number:
    """The smallest dimension with few enough false neighbours, where all smaller ones are known."""
    tried = 0
    for f in found:
        if f.reason is not None:
            return Number(NAN, f.reason if not tried else f"none<{accept:g} up to {tried}", f.n_points)
        if f.share < accept:
            return Number(float(f.dim), None, f.n_points)
        tried = f.dim
    return Number(NAN, f"none<{accept:g} up to {tried}", found[-1].n_points)


def _of_axes(dim: int, pca: DelayPca) -> dict[Key, Number]:
    out: dict[Key, Number] = {}
    likeness = {kind: axis_similarity(pca.axes, kind) for kind in AXES}
    mirror = mirror_symmetry(pca.axes)
    for k in range(min(dim, COMPONENTS)):
        out[Key("pc_share", dim, k + 1)] = Number(float(pca.shares[k]), pca.reason, pca.n_windows)
        why = pca.reason or ("degenerate" if pca.degenerate[k] else None)
        for kind in AXES:
            value, match = likeness[kind]
            out[Key(f"pc_{kind}", dim, k + 1)] = Number(float(value[k]), why, pca.n_windows, int(match[k]))
        out[Key("pc_mirror", dim, k + 1)] = Number(float(mirror[k]), why, pca.n_windows)
    return out


def remark_of(key: Key) -> str:
    """What a reader must know of a number whatever its value."""
    if key.statistic == "pc_share" and key.dim == 2:
        return "identity: (1 ± |r|)/2, r the autocorrelation at the lag"
    if key.statistic.startswith("pc_") and key.statistic != "pc_share":
        if key.dim == 2:
            return "identity: 1 for every series"
        if key.statistic == "pc_mirror":
            return "near 1 for every long stationary series, white noise too"
    return ""


def place(key: Key, value: float, among: Array, least: int) -> Place:
    """Return the band of the surrogates and the rank of the value among them.

    Args:
        key: Which number.
        value: Its value on the data.
        among: Its value on each surrogate, NaN where undefined.
        least: Fewest defined surrogates that a band and a rank are given for.
    """
    if key.statistic == "fnn_dimension":
        # not reached is further than any that was reached
        among = np.where(np.isnan(among), np.inf, among)
    kept = np.sort(among[~np.isnan(among)])
    n = len(kept)
    if n < least:
        return Place(n, NAN, NAN, NAN, NAN, NAN, NAN, f"surrogates<{least}")
    low, median, high = (_quantile(kept, q) for q in (0.025, 0.5, 0.975))
    if np.isnan(value):
        return Place(n, low, median, high, NAN, NAN, NAN, "value")
    # what is equal up to rounding is equal: identities would otherwise be ranked by their last digit
    slack = 1e-9 * max(1.0, abs(value))
    less = (1 + int((kept <= value + slack).sum())) / (1 + n)
    greater = (1 + int((kept >= value - slack).sum())) / (1 + n)
    return Place(n, low, median, high, min(1.0, 2 * min(less, greater)), less, greater, None)


def _quantile(ordered: Array, q: float) -> float:
    at = q * (len(ordered) - 1)
    a, b = ordered[int(np.floor(at))], ordered[int(np.ceil(at))]
    return float(a) if a == b else float(a + (b - a) * (at - np.floor(at)))
