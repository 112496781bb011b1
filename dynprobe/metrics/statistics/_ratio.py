"""The ratio of two thresholds, which is never quoted without an interval.

Ratios are differences in ln α: ln ρ = ln α50(a) − ln α50(b), each α50 a median over prompts. Where both sides were
measured on the same prompts, a replicate draws the same prompts for both, so that what makes a prompt fragile for
either side cancels. Both sides have to be strengths of one noise scale, or the ratio has no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.metrics.statistics._bootstrap import check_bootstrap, interval, outward, resample
from dynprobe.metrics.statistics._crossing import Array, Status
from dynprobe.metrics.statistics._prompts import Prompts, gather, median_bounds, median_draws

__all__ = ["Ratio", "ratio_threshold"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Ratio:
    """α50(a)/α50(b) with its interval; open ends are −inf and +inf.

    Args:
        value: The ratio, or NaN unless both sides are resolved.
        low: Lower end of the interval.
        high: Upper end of the interval.
        status: ``resolved``, ``left-censored`` (only an upper bound is known), ``right-censored`` (only a lower one),
            ``not-resolved`` or ``missing``.
        reason: Why there is no value.
        bounds: What the data say about the point itself.
        paired: True when the same prompts were drawn for both sides.
        confidence: Nominal coverage.
        n_boot: Bootstrap replicates.
        seed: Seed of the resampling.
        n_a: Prompts of the first side.
        n_b: Prompts of the second side.
        n_common: Prompts they share.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None
    bounds: tuple[float, float] = (NAN, NAN)
    paired: bool = False
    confidence: float = 0.95
    n_boot: int = 0
    seed: int = 0
    n_a: int = 0
    n_b: int = 0
    n_common: int = 0


def ratio_threshold(
    a: Any,
    b: Any,
    *,
    prompts_a: Sequence[Any] | None = None,
    prompts_b: Sequence[Any] | None = None,
    paired: bool | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Ratio:
    """Ratio of two population thresholds, exp(ln α50(a) − ln α50(b)).

    Measured coverage of nominal 95 % intervals (1,000 experiments), ln α* normal with σ = 0.5 over prompts,
    correlation 0.7 between the sides when paired: 0.949, 0.973, 0.987, 0.974 at 6, 12, 24, 60 prompts; unpaired
    0.960, 0.968, 0.966, 0.967. Resampled medians scatter a little more than medians do, so the interval errs on the
    wide side.

    Args:
        a: Thresholds of the first side, as :func:`prompt_threshold` takes them.
        b: Thresholds of the second side.
        prompts_a: Prompt of each entry of ``a``. Default: their numbers.
        prompts_b: Prompt of each entry of ``b``.
        paired: True uses the common prompts only and draws them together; False draws the sides independently.
            Default: paired when both sides name their prompts, or have equally many unnamed ones, and all are common.
        n_boot: Bootstrap replicates.
        seed: Seed of the resampling.
        confidence: Nominal coverage of the interval.

    Returns:
        The ratio with a cluster-bootstrap interval (percentiles).

    Raises:
        MetricError: As :func:`prompt_threshold`.

    Source:
        Reference §10.4.

    Example:
        >>> b = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
        >>> r = ratio_threshold([2 * x for x in b], b)
        >>> round(r.value, 12), round(r.low, 12), round(r.high, 12), r.paired
        (2.0, 2.0, 2.0, True)
    """
    check_bootstrap(n_boot, confidence)
    p, q = gather(a, prompts_a), gather(b, prompts_b)
    common = [k for k in p.keys if k in set(q.keys)]
    named = (prompts_a is None) == (prompts_b is None)
    together = named and len(common) == p.n == q.n if paired is None else paired
    sizes = {"n_a": p.n, "n_b": q.n, "n_common": len(common), "paired": together}
    fields: dict[str, Any] = sizes | {"confidence": confidence, "n_boot": n_boot, "seed": seed}
    for side in (p, q):
        refused = side.refusal()
        if refused is not None:
            return Ratio(NAN, NAN, NAN, *refused, **fields)
    if together:
        if not common:
            return Ratio(NAN, NAN, NAN, "missing", "no common prompt", **fields)
        p, q = _only(p, common), _only(q, common)
    low, high = _difference(_medians(p), _medians(q))
    ends = (NAN, NAN)
    if n_boot and min(p.n, q.n) >= 2:
        pick = resample(p.n, n_boot, seed)
        other = pick if together else np.random.default_rng([seed, 2]).integers(0, q.n, (n_boot, q.n))
        draws = _difference(median_draws(p, pick, seed), median_draws(q, other, seed + (not together)))
        ends = interval(*draws, confidence, min(p.n, q.n), expand=False)
    x, y = float(low), float(high)
    status: Status = "resolved"
    if x != y or np.isinf(x):
        status = "not-resolved" if np.isinf(x) == np.isinf(y) else "left-censored" if np.isinf(x) else "right-censored"
    reason = None if status == "resolved" else "a side is censored"
    value = float(np.exp(x)) if status == "resolved" else NAN
    return Ratio(value, outward(ends[0]), outward(ends[1]), status, reason, bounds=(outward(x), outward(y)), **fields)


def _only(p: Prompts, keys: list[Any]) -> Prompts:
    rows = [p.keys.index(k) for k in keys]
    return Prompts(tuple(keys), p.low[rows], p.high[rows], p.n_seeds[rows], p.tally)


def _medians(p: Prompts) -> tuple[Array, Array]:
    return median_bounds(*median_bounds(p.low, p.high))


def _difference(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    with np.errstate(invalid="ignore"):
        low, high = a[0] - b[1], a[1] - b[0]
    return np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
