"""Does a response rise with the strength, and does it ever fall? The questions before a threshold is quoted.

Mann–Kendall asks whether there is a trend at all. :func:`monotonicity_test` asks whether the falls of the mean
response are more than prompts differing: it compares the means with their isotonic regression, and resamples prompts
around that. Isotonic regression and Kendall's τ are scipy's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, multiplicity, resample
from dynprobe.metrics.statistics._crossing import Array, Status

__all__ = ["Monotonicity", "Trend", "isotonic", "mann_kendall", "monotonicity_test"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Trend:
    """Mann–Kendall trend: Kendall's τ_b of response against strength and its one-sided p-value (rising)."""

    tau: float
    p_value: float
    n: int
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class Monotonicity:
    """Isotonic against unrestricted.

    Args:
        statistic: Σ_α w_α·(mean − isotonic mean)².
        p_value: Bootstrap p; small means the response does fall somewhere.
        largest_fall: Largest fall of the mean response below an earlier one.
        n: Prompts.
        n_boot: Replicates.
        status: ``resolved`` or ``missing``.
        reason: Why there is no value.
    """

    statistic: float
    p_value: float
    largest_fall: float
    n: int
    n_boot: int
    status: Status
    reason: str | None


def isotonic(y: Array, weights: Array) -> Array:
    """Weighted least-squares fit that never falls."""
    from scipy.optimize import isotonic_regression

    return np.asarray(isotonic_regression(y, weights=weights).x)


def mann_kendall(alphas: Any, responses: Any) -> Trend:
    """Does the response rise with the strength? Kendall's τ_b, one-sided (scipy; exact p without ties).

    Args:
        alphas: Strengths [alpha].
        responses: Responses; entries that are not finite are left out.

    Returns:
        τ_b and p; NaN with a reason for fewer than 3 strengths or a constant response.

    Raises:
        MetricError: Lengths differ.

    Source:
        Mann, Econometrica 13:245 (1945); reference §10.2.

    Example:
        >>> t = mann_kendall([0.1, 0.2, 0.4, 0.8, 1.6], [0.0, 0.1, 0.5, 0.9, 2.0])
        >>> round(t.tau, 6), round(t.p_value, 6)
        (1.0, 0.008333)
    """
    from scipy.stats import kendalltau

    a, y = np.asarray(alphas, dtype=np.float64), np.asarray(responses, dtype=np.float64)
    if a.ndim != 1 or a.shape != y.shape:
        raise MetricError(f"One response per strength is needed, found {list(a.shape)} and {list(y.shape)}.")
    ok = np.isfinite(a) & np.isfinite(y)
    a, y = a[ok], y[ok]
    if len(a) < 3:
        return Trend(NAN, NAN, len(a), "missing", "strengths<3")
    if np.ptp(y) == 0 or np.ptp(a) == 0:
        return Trend(NAN, NAN, len(a), "missing", "zero-denominator")
    out = kendalltau(a, y, alternative="greater")
    return Trend(float(out.statistic), float(out.pvalue), len(a), "resolved", None)


def monotonicity_test(alphas: Any, responses: Any, *, n_boot: int = 2000, seed: int = 0) -> Monotonicity:
    """Does the mean response fall anywhere by more than the prompts' differences explain?

    T = Σ_α w_α·(ȳ_α − iso_α)², w_α = P/var_p(y_{p,α}). Null: prompts' deviations resampled around the isotonic fit,
    so that the dependence between strengths of one prompt stays. p = (1 + #{T* ≥ T})/(1 + B).

    Args:
        alphas: Strengths [alpha].
        responses: Responses [prompt, alpha], proportions or continuous; prompts with a gap are left out.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        Statistic and p; p near 1 where the mean never falls.

    Raises:
        MetricError: Shapes do not fit.

    Source:
        Reference §10.2 (isotonic against unrestricted), cluster bootstrap as §10.4.

    Example:
        >>> y = np.array([[0.0, 0.3, 0.7, 1.0], [0.1, 0.2, 0.8, 0.9], [0.0, 0.4, 0.6, 1.0]])
        >>> monotonicity_test([0.1, 0.2, 0.4, 0.8], y).p_value
        1.0
    """
    check_bootstrap(n_boot, 0.95)
    a, y = np.asarray(alphas, dtype=np.float64), np.asarray(responses, dtype=np.float64)
    if y.ndim != 2 or a.shape != y.shape[1:]:
        raise MetricError(f"responses is [prompt, alpha], found {list(y.shape)} for {list(a.shape)} strengths.")
    y = y[:, np.argsort(a, kind="stable")]
    y = y[np.isfinite(y).all(axis=1)]
    if len(y) < 3 or y.shape[1] < 2:
        return Monotonicity(NAN, NAN, NAN, len(y), n_boot, "missing", "prompts<3" if len(y) < 3 else "strengths<2")
    mean, var = y.mean(axis=0), y.var(axis=0, ddof=1)
    var = np.maximum(var, 1e-9 * var.mean()) if var.any() else np.ones_like(var)
    weight = len(y) / var
    iso = isotonic(mean, weight)
    statistic = _distance(mean, iso, weight)
    moved = multiplicity(resample(len(y), n_boot, seed), len(y)) @ (y - mean) / len(y)
    draws = np.array([_distance(iso + d, isotonic(iso + d, weight), weight) for d in moved])
    count = int((draws >= statistic - 1e-12).sum())
    fall = float((np.maximum.accumulate(mean) - mean).max())
    return Monotonicity(statistic, (1 + count) / (1 + n_boot), fall, len(y), n_boot, "resolved", None)


def _distance(mean: Array, iso: Array, weight: Array) -> float:
    return float((weight * (mean - iso) ** 2).sum())
