"""Binomial likelihood of a psychometric function, maximised for many data sets at once.

ψ(α) = γ + (1 − γ − λ)·F(β·(ln α − ln α50)), F logistic. The parameters are θ = (ln α50, ln β, γ, λ), each inside a
box; a box of width 0 fixes a parameter. A bootstrap needs thousands of fits of the same design with other counts, so
the iteration runs on all of them together: Gauss–Newton steps on the likelihood with Levenberg–Marquardt damping
inside the box, each data set with its own damping, leaving when its next step promises nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynprobe.metrics.statistics._crossing import Array

__all__ = ["Box", "Fits", "box", "fit_many", "log_likelihood", "psi"]

STEEPEST, FLATTEST = 200.0, 0.05
EDGE = 1e-4
TINY = 1e-12


class Box(NamedTuple):
    """Lower and upper bounds of θ."""

    low: Array
    high: Array


class Fits(NamedTuple):
    """Maximum-likelihood fits.

    Args:
        theta: Parameters [fit, 4].
        loglik: Log-likelihood without the binomial coefficients [fit].
        low: Lower bound of ln α50 the data allow; equal to the estimate where it is identified [fit].
        high: Upper bound, likewise [fit].
        case: 0 identified, 1 separated, 2 below the range, 3 above it, 4 flat [fit].
        converged: The iteration came to rest [fit].
    """

    theta: Array
    loglik: Array
    low: Array
    high: Array
    case: NDArray[np.int64]
    converged: NDArray[np.bool_]


def box(log_alpha: Array, gamma: tuple[float, float], lapse: tuple[float, float]) -> Box:
    """Bounds of θ for a design: α50 within one range beyond the doses, β between 0.05 and 200."""
    doses = log_alpha[np.isfinite(log_alpha)]
    reach = float(np.ptp(doses)) + 3.0
    low = [doses.min() - reach, np.log(FLATTEST), gamma[0], lapse[0]]
    return Box(np.array(low), np.array([doses.max() + reach, np.log(STEEPEST), gamma[1], lapse[1]]))


def psi(theta: Array, log_alpha: Array) -> tuple[Array, Array, Array]:
    """ψ, F and u = β(ln α − ln α50) for parameters [fit, 4] and doses [dose]; a dose of 0 has F = 0."""
    with np.errstate(over="ignore"):
        u = np.exp(theta[:, 1:2]) * (log_alpha - theta[:, :1])
        f = 1.0 / (1.0 + np.exp(-u))
    gamma, lapse = theta[:, 2:3], theta[:, 3:4]
    return np.clip(gamma + (1 - gamma - lapse) * f, TINY, 1 - TINY), f, u


def log_likelihood(theta: Array, log_alpha: Array, k: Array, n: Array) -> Array:
    """Σ k ln ψ + (n − k) ln(1 − ψ) per fit."""
    p = psi(theta, log_alpha)[0]
    return np.asarray((k * np.log(p) + (n - k) * np.log1p(-p)).sum(axis=1))


def _derivatives(theta: Array, log_alpha: Array, k: Array, n: Array) -> tuple[Array, Array]:
    p, f, u = psi(theta, log_alpha)
    rest = 1 - theta[:, 2:3] - theta[:, 3:4]
    bell = rest * f * (1 - f)
    lean = np.where(np.isfinite(u), u, 0.0)
    jac = np.stack([-bell * np.exp(theta[:, 1:2]), bell * lean, 1 - f, -f], axis=1)
    score = np.einsum("bij,bj->bi", jac, (k - n * p) / (p * (1 - p)))
    weight = k / p**2 + (n - k) / (1 - p) ** 2
    return score, np.einsum("bij,bkj->bik", jac * weight[:, None, :], jac)


def _step(t: Array, g: Array, h: Array, damping: Array, bounds: Box) -> tuple[Array, Array]:
    """Damped step inside the box, and what it promises; a parameter that hits a side stays there."""
    fixed = ((t <= bounds.low) & (g <= 0)) | ((t >= bounds.high) & (g >= 0))
    step: Array = np.zeros_like(t)
    for _ in range(t.shape[1] + 1):
        free = ~fixed
        pull = np.where(free, g - np.einsum("bij,bj->bi", h, np.where(fixed, step, 0.0)), step)
        matrix = h * free[:, :, None] * free[:, None, :]
        diagonal = np.einsum("bii->bi", h)
        ridge = np.where(free, damping[:, None] * diagonal + 1e-9, 1.0)
        step = np.linalg.solve(matrix + ridge[:, :, None] * np.eye(t.shape[1]), pull[..., None])[..., 0].astype(
            np.float64
        )
        step = np.asarray(np.where(free, np.clip(step, -2.0, 2.0), step), dtype=np.float64)
        out = free & ((t + step < bounds.low) | (t + step > bounds.high))
        if not out.any():
            break
        step = np.where(out, np.clip(t + step, *bounds) - t, step)
        fixed |= out
    return step, (g * step).sum(axis=1)


def fit_many(
    log_alpha: Array, k: Array, n: Array, bounds: Box, start: Array, *, rest: float = 1e-7, iterations: int = 300
) -> Fits:
    """Maximise the likelihood of many data sets.

    Args:
        log_alpha: ln α per dose, −inf for sham [dose].
        k: Responses [fit, dose]; resampled counts.
        n: Trials [fit, dose].
        bounds: The box.
        start: Starting parameters [fit, 4] or [4].
        rest: A fit has converged when its next step promises less log-likelihood than this.
        iterations: Most steps.

    Returns:
        The fits, with what the data say about ln α50 where they do not identify it.
    """
    theta = np.clip(np.broadcast_to(start, (len(k), 4)), *bounds).copy()
    best = log_likelihood(theta, log_alpha, k, n)
    damping = np.full(len(k), 1e-3)
    open_ = np.arange(len(k))
    for _ in range(iterations):
        if not len(open_):
            break
        t = theta[open_]
        g, h = _derivatives(t, log_alpha, k[open_], n[open_])
        step, promise = _step(t, g, h, damping[open_], bounds)
        new = np.clip(t + step, *bounds)
        value = log_likelihood(new, log_alpha, k[open_], n[open_])
        better = value >= best[open_]
        theta[open_[better]] = new[better]
        best[open_[better]] = value[better]
        damping[open_] = np.clip(np.where(better, damping[open_] / 10, damping[open_] * 8), 1e-9, 1e9)
        open_ = open_[~((promise < rest) | (damping[open_] >= 1e8))]
    converged = np.ones(len(k), bool)
    converged[open_] = False
    return Fits(theta, best, *_identified(theta, log_alpha, n, bounds), converged)


def _identified(theta: Array, log_alpha: Array, n: Array, bounds: Box) -> tuple[Array, Array, NDArray[np.int64]]:
    doses = np.isfinite(log_alpha)
    x = log_alpha[doses]
    seen = n[:, doses] > 0
    f = psi(theta, x)[1]
    m = theta[:, 0]
    inside = seen & (f > EDGE) & (f < 1 - EDGE)
    steep = theta[:, 1] >= bounds.high[1] - 1e-6
    split = (inside.sum(axis=1) < 2) | (steep & (bounds.high[1] > bounds.low[1]))
    top = np.where(seen, x, -np.inf).max(axis=1)
    bottom = np.where(seen, x, np.inf).min(axis=1)
    below = np.where(seen & (f <= EDGE), x, -np.inf).max(axis=1)
    above = np.where(seen & (f >= 1 - EDGE), x, np.inf).min(axis=1)
    flat = (theta[:, 1] <= bounds.low[1] + 1e-6) & (bounds.high[1] > bounds.low[1])
    cases = [flat, m > top, m < bottom, split]
    case = np.select(cases, [4, 3, 2, 1], 0)
    low = np.select(cases, [np.full_like(m, -np.inf), top, np.full_like(m, -np.inf), below], m)
    high = np.select(cases, [np.full_like(m, np.inf), np.full_like(m, np.inf), bottom, above], m)
    return low, high, case
