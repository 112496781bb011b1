"""Thresholds without a formula for the curve, and intervals of plain proportions.

Isotonic regression is the best curve that never falls; read backwards it gives a strength for a level. The
Spearman–Kärber mean is the mean of the tolerance distribution and needs a response that goes all the way from 0 to 1.
Neither knows a slope or a lapse rate, and neither means anything when the response falls with the dose; ask
:func:`~dynprobe.metrics.statistics.monotonicity_test` first. Isotonic regression is scipy's; intervals of
proportions and corrections for multiplicity are statsmodels' (``multipletests`` needs no wrapper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap
from dynprobe.metrics.statistics._crossing import Array, Status
from dynprobe.metrics.statistics._trend import isotonic

__all__ = [
    "IsotonicFit", "Proportion", "SpearmanKarber", "isotonic_threshold", "proportion_interval", "spearman_karber",
]  # fmt: skip

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class IsotonicFit:
    """Isotonic fit read backwards.

    Args:
        value: Strength at which the fit reaches the level, or NaN.
        low: Largest tested strength below it; −inf when there is none.
        high: Smallest tested strength at or above it; +inf when there is none.
        status: ``resolved``, ``left-censored``, ``right-censored`` or ``missing``.
        reason: Why there is no value.
        alphas: Strengths, ascending.
        fitted: Fitted response at each.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None
    alphas: tuple[float, ...] = ()
    fitted: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SpearmanKarber:
    """Spearman–Kärber mean on the axis it was given; ``se`` is NaN without counts."""

    value: float
    se: float
    status: Status
    reason: str | None
    fitted: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Proportion:
    """k of n with its interval: Wilson or Clopper–Pearson, whichever ``method`` names."""

    value: float
    low: float
    high: float
    k: int
    n: int
    method: str
    status: Status
    reason: str | None


def isotonic_threshold(alphas: Any, responses: Any, n: Any = None, *, level: float = 0.5) -> IsotonicFit:
    """Strength at which the isotonic fit reaches a level, linear in ln α between strengths.

    Args:
        alphas: Strengths [alpha] > 0.
        responses: Mean response or proportion at each.
        n: Weights, such as trials; default equal.
        level: Level to reach.

    Returns:
        The fit; NaN with a status when the fit starts at or above the level or never reaches it.

    Raises:
        MetricError: Lengths differ, a strength is not positive or occurs twice, or a weight is not positive.

    Source:
        Reference §10.2.

    Example:
        >>> isotonic_threshold([0.1, 0.2, 0.4, 0.8], [0.0, 0.5, 0.25, 1.0]).fitted
        (0.0, 0.375, 0.375, 1.0)
    """
    a, y, w = _points(alphas, responses, n)
    if not (a > 0).all():
        raise MetricError("Strengths are positive on a log axis; leave the sham out.")
    if not len(a):
        return IsotonicFit(NAN, NAN, NAN, "missing", "empty")
    fit = isotonic(y, w)
    shown = {"alphas": tuple(a.tolist()), "fitted": tuple(fit.tolist())}
    k = int(np.searchsorted(fit, level, side="left"))
    if k == 0:
        return IsotonicFit(NAN, -np.inf, float(a[0]), "left-censored", f"α*<{a[0]:.4g}", **shown)
    if k == len(a):
        return IsotonicFit(NAN, float(a[-1]), np.inf, "right-censored", f"α*>{a[-1]:.4g}", **shown)
    part = (level - fit[k - 1]) / (fit[k] - fit[k - 1])
    value = float(np.exp(np.log(a[k - 1]) + part * np.log(a[k] / a[k - 1])))
    return IsotonicFit(value, float(a[k - 1]), float(a[k]), "resolved", None, **shown)


def spearman_karber(x: Any, p: Any, n: Any = None) -> SpearmanKarber:
    """Mean of the tolerance distribution, Σ (p_{i+1} − p_i)·(x_i + x_{i+1})/2, p made monotone first.

    Variance with n_i trials: Σ_{inner i} p_i(1 − p_i)/(n_i − 1)·((x_{i+1} − x_{i−1})/2)².

    Args:
        x: Doses on the axis the mean is wanted on; hand in ln α for strengths, and take exp of the value.
        p: Proportion of responses at each.
        n: Trials at each, for the monotone fit and the standard error.

    Returns:
        The mean; NaN with a reason when p does not go from 0 to 1.

    Raises:
        MetricError: Lengths differ or p is no proportion.

    Source:
        Reference §10.2 and vector sk-1; Finney, Statistical Method in Biological Assay, ch. 20.

    Example:
        >>> spearman_karber([0, 1, 2, 3], [0, 0.25, 0.75, 1]).value
        1.5
    """
    a, y, w = _points(x, p, n)
    if ((y < 0) | (y > 1)).any():
        raise MetricError("p is a proportion in [0, 1].")
    if not len(a):
        return SpearmanKarber(NAN, NAN, "missing", "empty")
    fit = isotonic(y, w)
    shown = tuple(fit.tolist())
    if fit[0] > 0 or fit[-1] < 1:
        ends = [
            text for bad, text in ((fit[0] > 0, "p does not start at 0"), (fit[-1] < 1, "p does not reach 1")) if bad
        ]
        return SpearmanKarber(NAN, NAN, "not-resolved", "; ".join(ends), shown)
    value = float((np.diff(fit) * (a[1:] + a[:-1]) / 2).sum())
    se = NAN
    if n is not None and (w[1:-1] > 1).all():
        inner = fit[1:-1]
        se = float(np.sqrt((inner * (1 - inner) / (w[1:-1] - 1) * ((a[2:] - a[:-2]) / 2) ** 2).sum()))
    return SpearmanKarber(value, se, "resolved", None, shown)


def proportion_interval(k: int, n: int, *, confidence: float = 0.95, method: str = "wilson") -> Proportion:
    """Interval of a proportion of independent trials (statsmodels).

    Args:
        k: Responses.
        n: Trials.
        confidence: Nominal coverage.
        method: ``wilson`` (Clopper–Pearson at 0 and n) or ``exact`` (Clopper–Pearson everywhere).

    Returns:
        The proportion; NaN with reason ``"empty"`` for no trials.

    Raises:
        MetricError: Counts are impossible, or the method is unknown.

    Source:
        Reference §2.3 and §10.4.

    Example:
        >>> p = proportion_interval(8, 8)
        >>> round(p.low, 3), p.method
        (0.631, 'clopper-pearson')
    """
    check_bootstrap(0, confidence)
    if not 0 <= k <= n:
        raise MetricError(f"0 ≤ k ≤ n is needed, found k={k!r}, n={n!r}.")
    if method not in ("wilson", "exact"):
        raise MetricError(f"method is 'wilson' or 'exact', found {method!r}.")
    if n == 0:
        name = "clopper-pearson" if method == "exact" else "wilson"
        return Proportion(NAN, NAN, NAN, 0, 0, name, "missing", "empty")
    from statsmodels.stats.proportion import proportion_confint

    exact = method == "exact" or k in (0, n)
    low, high = proportion_confint(k, n, alpha=1 - confidence, method="beta" if exact else "wilson")
    name = "clopper-pearson" if exact else "wilson"
    return Proportion(k / n, float(low), float(high), int(k), int(n), name, "resolved", None)


def _points(x: Any, y: Any, n: Any) -> tuple[Array, Array, Array]:
    a, r = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    w = np.ones(r.shape) if n is None else np.asarray(n, dtype=np.float64)
    if a.ndim != 1 or not a.shape == r.shape == w.shape:
        raise MetricError(f"One response and weight per dose, found {list(a.shape)}, {list(r.shape)}, {list(w.shape)}.")
    ok = np.isfinite(a) & np.isfinite(r)
    a, r, w = a[ok], r[ok], w[ok]
    order = np.argsort(a, kind="stable")
    a, r, w = a[order], r[order], w[order]
    if (np.diff(a) == 0).any():
        raise MetricError("Each dose stands once; add up its trials first.")
    if not (w > 0).all():
        raise MetricError("Weights are positive; leave doses without trials out.")
    return a, r, w
