"""Overdispersed counts: the beta-binomial with one intra-class correlation ρ.

k ~ BetaBinomial(n, a = ψ(1 − ρ)/ρ, b = (1 − ψ)(1 − ρ)/ρ) has mean nψ and variance nψ(1 − ψ)(1 + (n − 1)ρ). ρ = 0 is
the binomial; prompts of different fragility at one strength make ρ > 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.metrics.statistics._crossing import Array
from dynprobe.metrics.statistics._likelihood import Box, psi

__all__ = ["beta_binomial_fit", "draw_beta_binomial"]

RHO_RANGE = (1e-6, 0.95)


def beta_binomial_fit(x: Array, k: Array, n: Array, bounds: Box, start: Array) -> tuple[Array, float]:
    """Fit ψ and ρ to rows of counts by maximum likelihood, started at the binomial fit.

    Args:
        x: ln α per row [row].
        k: Responses.
        n: Trials.
        bounds: The box of θ.
        start: θ of the binomial fit.

    Returns:
        θ and ρ; ρ is 0 when the rows are no more dispersed than binomial ones.
    """
    from scipy.optimize import minimize
    from scipy.special import betaln

    def loss(v: Array) -> float:
        p = psi(v[None, :4], x)[0][0]
        scale = 1 / v[4] - 1
        a, b = p * scale, (1 - p) * scale
        return -float((betaln(k + a, n - k + b) - betaln(a, b)).sum())

    limits = [*zip(bounds.low, bounds.high, strict=True), RHO_RANGE]
    tries = [minimize(loss, [*start, rho], method="L-BFGS-B", bounds=limits) for rho in (0.02, 0.2)]
    best = min(tries, key=lambda t: float(t.fun))
    rho = float(best.x[4])
    return (np.asarray(start), 0.0) if rho <= 2 * RHO_RANGE[0] else (np.asarray(best.x[:4]), rho)


def draw_beta_binomial(rng: np.random.Generator, rate: Array, rho: float, n: Array, size: int) -> Any:
    """Draw counts [size, row]."""
    if rho <= 0:
        return rng.binomial(n.astype(np.int64), rate, (size, len(rate)))
    scale = 1 / rho - 1
    return rng.binomial(n.astype(np.int64), rng.beta(rate * scale, (1 - rate) * scale, (size, len(rate))))
