"""Where to look next inside a bracket: safeguarded interpolation on log–log axes.

The logarithm of a KL is close to a straight line in ln α with slope 2 while the model answers linearly, and bends
down where the output saturates. So the crossing can be guessed from few points, far better than bisection does.
Several guesses are made: the chord across the bracket, the straight lines through the two points on its left and on
its right, and the monotone cubic through all points. Their disagreement is the uncertainty δ of the guess, and the
next strengths are placed at guess ± δ, which closes the bracket around the crossing when the guesses were right to
within δ.

When they were not, nothing is lost but speed: a round that shrank the bracket by less than bisection would have done
is followed by one that divides it evenly. Placement only decides where to look; the answer is always read off the
measured bracket.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from dynprobe.metrics.statistics._crossing import Array

__all__ = ["Guess", "divide", "guess", "place"]

PRIOR_SLOPE = 2.0
SPREAD = 0.5
LEAST = 0.04


class Guess(NamedTuple):
    """Where the crossing is thought to be.

    Args:
        at: ln α of the crossing.
        apart: Largest distance of the other guesses from it; infinite when there is nothing to guess from.
        doubt: Disagreement of the guesses that go through the nearer end of the bracket.
    """

    at: float
    apart: float
    doubt: float


def divide(low: float, high: float, k: int) -> Array:
    """K points that divide an interval evenly."""
    return np.linspace(low, high, k + 2)[1:-1]


def guess(x: Array, z: Array, i: int) -> Guess:
    """Guess where z crosses 0 between x[i] and x[i + 1].

    Args:
        x: ln α, ascending.
        z: ln(response/level); NaN where the response has no logarithm.
        i: z[i] < 0 ≤ z[i + 1], or z[i] is NaN.
    """
    a, b = float(x[i]), float(x[i + 1])
    below, above = float(z[i]), float(z[i + 1])
    if np.isnan(below):
        back = b - above / PRIOR_SLOPE
        return Guess(back, (b - a) / 4, np.inf) if a < back < b else Guess((a + b) / 2, np.inf, np.inf)
    chord = a - below * (b - a) / (above - below)
    cubic = _cubic_root(x, z, i)
    left, right = _slope(x, z, i - 1) if i > 0 else PRIOR_SLOPE, _slope(x, z, i + 1) if i + 2 < len(x) else np.nan
    from_left = a - below / left if left > 0 else b
    from_right = b - above / right if right > 0 else a
    others = [chord, *([from_left] if left > 0 else []), *([from_right] if right > 0 else [])]
    near = [chord, cubic]
    if -below < above:
        near.append(from_left)
    elif not np.isnan(right):
        near.append(from_right)
    near = np.clip(near, a, b).tolist()
    return Guess(cubic, float(np.abs(np.clip(others, a, b) - cubic).max()), max(near) - min(near))


def place(x: Array, i: int, g: Guess, k: int, tolerance: float) -> Array:
    """Choose k strengths inside the bracket.

    Args:
        x: ln α, ascending.
        i: Index of the lower end of the bracket.
        g: Where the crossing is thought to be.
        k: How many.
        tolerance: Wanted half width of the bracket in ln α.

    Returns:
        ln α of the strengths, ascending, strictly inside the bracket.
    """
    a, b = float(x[i]), float(x[i + 1])
    if not np.isfinite(g.apart):
        return divide(a, b, k)
    delta, margin = max(0.9 * tolerance, SPREAD * g.apart, LEAST * (b - a)), 0.02 * (b - a)
    at = float(np.clip(g.at, a + margin, b - margin))
    if k == 1:
        if (b - a) / 2 <= 2 * tolerance and g.apart < tolerance:
            far = b if b - at > at - a else a
            return np.array([at + np.copysign(min(delta, abs(far - at) / 2), far - at)])
        return np.array([at])
    low, high = at - delta, at + delta
    if low <= a + margin and high >= b - margin:
        return divide(a, b, k)
    if low <= a + margin:
        return np.sort(np.r_[high, at if at > a + margin else (a + high) / 2, divide(high, b, k - 2)])
    if high >= b - margin:
        return np.sort(np.r_[low, at if at < b - margin else (low + b) / 2, divide(a, low, k - 2)])
    return np.sort(np.r_[low, high, divide(low, high, k - 2)])


def _slope(x: Array, z: Array, i: int) -> float:
    slope = float((z[i + 1] - z[i]) / (x[i + 1] - x[i]))
    return slope if np.isfinite(slope) else PRIOR_SLOPE


def _cubic_root(x: Array, z: Array, i: int) -> float:
    """Root inside the bracket of the monotone cubic (Fritsch–Carlson slopes, as scipy's PCHIP) through all points."""
    keep = np.isfinite(z)
    j, xs, zs = int(keep[:i].sum()), x[keep].tolist(), z[keep].tolist()
    h = [b - a for a, b in pairwise(xs)]
    s = [(b - a) / w for a, b, w in zip(zs, zs[1:], h, strict=False)]
    p, q = (_pchip_slope(h, s, k) for k in (j, j + 1))
    width, low, high = h[j], zs[j], zs[j + 1]

    def cubic(t: float) -> float:
        u = 1 - t
        return u * u * ((1 + 2 * t) * low + t * width * p) + t * t * ((3 - 2 * t) * high - u * width * q)

    return xs[j] + width * float(brentq(cubic, 0.0, 1.0, xtol=1e-9)) if low < 0 < high else xs[j + (high <= 0)]


def _pchip_slope(h: list[float], s: list[float], k: int) -> float:
    if len(s) == 1:
        return s[0]
    if 0 < k < len(s):
        if s[k - 1] * s[k] <= 0:
            return 0.0
        w, v = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
        return (w + v) / (w / s[k - 1] + v / s[k])
    (a, b), (m, n) = ((h[0], h[1]), (s[0], s[1])) if k == 0 else ((h[-1], h[-2]), (s[-1], s[-2]))
    end = ((2 * a + b) * m - a * n) / (a + b)
    if end * m <= 0:
        return 0.0
    return 3 * m if m * n <= 0 and abs(end) > 3 * abs(m) else end
