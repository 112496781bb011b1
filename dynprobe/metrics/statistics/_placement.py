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

import numpy as np

from dynprobe.metrics.statistics._crossing import Array

__all__ = ["divide", "doubt", "place", "root"]

PRIOR_SLOPE = 2.0
SPREAD = 0.5
LEAST = 0.04


def divide(low: float, high: float, k: int) -> Array:
    """K points that divide an interval evenly."""
    return np.linspace(low, high, k + 2)[1:-1]


def root(x: Array, z: Array, i: int) -> tuple[float, float]:
    """Guess where z crosses 0 between x[i] and x[i + 1], and how far the guesses disagree.

    Args:
        x: ln α, ascending.
        z: ln(response/level); NaN where the response has no logarithm.
        i: z[i] < 0 ≤ z[i + 1], or z[i] is NaN.

    Returns:
        Guess and disagreement in ln α; the disagreement is infinite when there is nothing to guess from.
    """
    a, b = float(x[i]), float(x[i + 1])
    below, above = float(z[i]), float(z[i + 1])
    if np.isnan(below):
        guess = b - above / PRIOR_SLOPE
        return (guess, (b - a) / 4) if a < guess < b else ((a + b) / 2, np.inf)
    chord = a - below * (b - a) / (above - below)
    lines = []
    left = _slope(x, z, i - 1) if i > 0 else PRIOR_SLOPE
    if left > 0:
        lines.append(a - below / left)
    if i + 2 < len(x):
        right = _slope(x, z, i + 1)
        if right > 0:
            lines.append(b - above / right)
    inside = [float(np.clip(p, a, b)) for p in lines]
    guess = _cubic_root(x, z, i)
    return guess, max([abs(guess - chord), *(abs(guess - p) for p in inside)])


def doubt(x: Array, z: Array, i: int) -> float:
    """Disagreement of the answers through the nearer end of the bracket: chord, cubic, and the line beyond it."""
    below, above = float(z[i]), float(z[i + 1])
    if np.isnan(below):
        return np.inf
    a, b = float(x[i]), float(x[i + 1])
    chord = a - below * (b - a) / (above - below)
    guesses = [chord, _cubic_root(x, z, i)]
    if -below < above:
        slope = _slope(x, z, i - 1) if i > 0 else PRIOR_SLOPE
        guesses.append(a - below / slope if slope > 0 else b)
    elif i + 2 < len(x):
        slope = _slope(x, z, i + 1)
        guesses.append(b - above / slope if slope > 0 else a)
    inside = np.clip(guesses, a, b)
    return float(inside.max() - inside.min())


def place(x: Array, z: Array, i: int, k: int, tolerance: float, *, even: bool = False) -> Array:
    """Choose k strengths inside the bracket.

    Args:
        x: ln α, ascending.
        z: ln(response/level), NaN where there is none.
        i: Index of the lower end of the bracket.
        k: How many.
        tolerance: Wanted half width of the bracket in ln α.
        even: Divide the bracket evenly instead of guessing.

    Returns:
        ln α of the strengths, ascending, strictly inside the bracket.
    """
    a, b = float(x[i]), float(x[i + 1])
    guess, apart = root(x, z, i)
    if even or not np.isfinite(apart):
        return divide(a, b, k)
    delta = max(0.9 * tolerance, SPREAD * apart, LEAST * (b - a))
    margin = 0.02 * (b - a)
    guess = float(np.clip(guess, a + margin, b - margin))
    if k == 1:
        if (b - a) / 2 <= 2 * tolerance and apart < tolerance:
            far = b if b - guess > guess - a else a
            return np.array([guess + np.copysign(min(delta, abs(far - guess) / 2), far - guess)])
        return np.array([guess])
    low, high = guess - delta, guess + delta
    if low <= a + margin and high >= b - margin:
        return divide(a, b, k)
    if low <= a + margin:
        return np.sort(np.r_[high, guess if k > 1 and guess > a + margin else (a + high) / 2, divide(high, b, k - 2)])
    if high >= b - margin:
        return np.sort(np.r_[low, guess if guess < b - margin else (low + b) / 2, divide(a, low, k - 2)])
    return np.sort(np.r_[low, high, divide(low, high, k - 2)])


def _slope(x: Array, z: Array, i: int) -> float:
    slope = float((z[i + 1] - z[i]) / (x[i + 1] - x[i]))
    return slope if np.isfinite(slope) else PRIOR_SLOPE


def _cubic_root(x: Array, z: Array, i: int) -> float:
    from scipy.interpolate import PchipInterpolator

    keep = np.isfinite(z)
    j = int(keep[:i].sum())
    curve = PchipInterpolator(x[keep], z[keep])
    c = curve.c[:, j]
    roots = np.roots(c)
    a, b = float(x[i]), float(x[i + 1])
    real = roots[np.abs(roots.imag) < 1e-9 * (1 + np.abs(roots))].real
    real = real[(real >= -1e-9) & (real <= b - a + 1e-9)]
    return a + float(np.clip(real.min(), 0.0, b - a)) if len(real) else (a + b) / 2
