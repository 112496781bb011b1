"""False nearest neighbours: points that are near only because too few coordinates were looked at.

Of each delay vector in m coordinates the nearest other one is found, and then the coordinate m + 1 of both is looked at
(Kennel, Brown & Abarbanel 1992). With R the distance in m coordinates and δ the difference in the next one the
neighbour is false if

- **distance**: δ/R > rtol (15). R = 0 < δ is false, R = δ = 0 is not: equal points stayed equal;
- **size**: √(R² + δ²)/σ > atol (2), σ² = Σ(x − x̄)²/n: nearest, and yet as far apart as any two points.

Noise passes the first criterion once all neighbours are far anyway, and is caught by the second alone; on a short or
strongly correlated series it passes both. A share below 5 % in two or three coordinates is what AR(1) noise and random
walks of a few hundred points give. The number is therefore no evidence by itself: :func:`dynprobe.delay_diagnostics`
gives it with its surrogates.

A Theiler window w lets only pairs |i − j| ≥ w be neighbours (w = 1: all others). Refused: fewer points than 10^{m/2}
with a neighbour outside the window, and never fewer than 20. A set of N points cannot show a dimension above 2·log₁₀ N
(Eckmann & Ruelle 1992); below that count the share is decided by the number of points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._delay import LEAST_POINTS, check_embedding, constant, one_series
from dynprobe.metrics._result import Array

__all__ = ["FalseNeighbours", "false_neighbours", "points_needed"]

#: Rows of the distance matrix that are held at once take about this many numbers.
_HELD: Final = 4_000_000


class FalseNeighbours(NamedTuple):
    """False nearest neighbours in m coordinates.

    Attributes:
        dim: m.
        share: Share of points whose neighbour is false by either criterion; NaN where ``reason`` is given.
        by_distance: Share by the first criterion.
        by_size: Share by the second.
        n_points: Points that have a neighbour outside the Theiler window and a coordinate m + 1.
        n_equal: Of these, points whose neighbour is equal in all m coordinates.
        reason: Why there is no number.
    """

    dim: int
    share: float
    by_distance: float
    by_size: float
    n_points: int
    n_equal: int
    reason: str | None


def points_needed(dim: int) -> int:
    """Return the fewest points from which a share in ``dim`` coordinates is given, max(20, ⌈10^{dim/2}⌉).

    Example:
        >>> [points_needed(m) for m in (1, 2, 3, 4, 5, 6)]
        [20, 20, 32, 100, 317, 1000]
    """
    return max(LEAST_POINTS, math.ceil(10 ** (dim / 2) - 1e-9))


def false_neighbours(
    x: Any, dims: Sequence[int] = (1, 2, 3, 4, 5, 6), lag: int = 1, theiler: int = 1, *, rtol: float = 15.0,
    atol: float = 2.0,
) -> list[FalseNeighbours]:  # fmt: skip
    """Return the share of false nearest neighbours for each embedding dimension.

    Args:
        x: Series [step].
        dims: Embedding dimensions m, each at least 1.
        lag: Steps between coordinates, τ. Points are i = 0 … n − 1 − m·τ, those with a coordinate m + 1.
        theiler: Only pairs |i − j| ≥ theiler may be neighbours. Of equally near ones the earliest counts.
        rtol: Limit of the first criterion.
        atol: Limit of the second.

    Returns:
        One entry per dimension, in the order asked. Reasons: ``nonfinite``, ``constant``, ``points<k``.

    Raises:
        MetricError: The series has another shape, or a setting has no meaning.

    Source: Kennel, Brown & Abarbanel 1992, Phys. Rev. A 45, 3403.

    Example:
        >>> turns = np.arange(400) * (np.sqrt(5) - 1) * np.pi
        >>> [round(f.share, 3) for f in false_neighbours(np.sin(turns), dims=(1, 2))]
        [1.0, 0.0]
        >>> false_neighbours(np.sin(turns[:60]), dims=(5,))[0].reason
        'points<317'
    """
    values = one_series(x, "false_neighbours")
    wanted = [int(m) for m in dims]
    for m in dims:
        check_embedding(m, lag, theiler)
    if not wanted or not rtol > 0 or not atol > 0:
        raise MetricError(
            f"false_neighbours needs dimensions, and rtol and atol above 0; found {dims}, {rtol}, {atol}."
        )
    reason = "nonfinite" if not np.isfinite(values).all() else "constant" if constant(values) else None
    found: dict[int, FalseNeighbours] = {}
    for m in sorted(set(wanted)):
        n = max(len(values) - m * lag, 0)
        i = np.arange(n)
        usable = int(((i >= theiler) | (n - 1 - i >= theiler)).sum())
        short = f"points<{points_needed(m)}" if usable < points_needed(m) else None
        if reason or short:
            nan = float("nan")
            found[m] = FalseNeighbours(m, nan, nan, nan, usable, 0, reason or short)
        else:
            found[m] = _shares(values, m, lag, theiler, rtol, atol)
    return [found[m] for m in wanted]


def _shares(x: Array, m: int, lag: int, theiler: int, rtol: float, atol: float) -> FalseNeighbours:
    scaled = (x - x.mean()) / np.abs(x - x.mean()).max()
    sigma = float(np.sqrt((scaled**2).mean()))
    n = len(x) - m * lag
    columns = [scaled[k * lag : k * lag + n] for k in range(m + 1)]
    place = np.arange(n)
    by_distance, by_size, equal, counted = [], [], 0, 0
    chunk = max(1, _HELD // n)
    for first in range(0, n, chunk):
        rows = slice(first, min(first + chunk, n))
        squared = np.zeros((rows.stop - rows.start, n))
        for column in columns[:m]:
            squared += (column[rows, None] - column) ** 2
        squared[np.abs(place[rows, None] - place) < theiler] = np.inf
        near = squared.argmin(1)
        r2 = squared[np.arange(len(near)), near]
        some = np.isfinite(r2)
        near, r2 = near[some], r2[some]
        step = np.abs(columns[m][rows][some] - columns[m][near])
        # δ > rtol·R is δ/R > rtol, and says what is meant where R = 0
        by_distance.append(step > rtol * np.sqrt(r2))
        by_size.append(np.sqrt(r2 + step**2) > atol * sigma)
        equal += int((r2 == 0).sum())
        counted += len(near)
    one, two = np.concatenate(by_distance), np.concatenate(by_size)
    return FalseNeighbours(
        m, float((one | two).mean()), float(one.mean()), float(two.mean()), counted, equal, None
    )  # fmt: skip
