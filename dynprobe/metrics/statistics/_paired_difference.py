"""Differences between two sides that read the same prompts.

Two models that read the same prompts differ by less noise than two models that read different ones, because what makes
a prompt unusual is often the same for both. Everything here is therefore a mean of differences inside prompts:

* its interval is a cluster bootstrap over prompts (expanded percentiles, see :mod:`._bootstrap`);
* its effect size is Cohen's d of the differences, d_z = mean(δ)/SD(δ) with ddof = 1;
* its p comes from flipped signs (:mod:`._sign_flips`): four prompts cannot say more than p = 0.125, however clear the
  difference.

A profile along depth is one statement and not a hundred: :func:`profile_difference` compares the largest |t| of the
profile with the largest |t| of each flipped one, so that the error over the whole profile is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap
from dynprobe.metrics.statistics._clusters import column
from dynprobe.metrics.statistics._crossing import Array, Status
from dynprobe.metrics.statistics._prompt_means import (
    bootstrap_ends,
    draw_weights,
    per_prompt,
    profile_interval,
    quantile_ends,
    same_prompts,
)
from dynprobe.metrics.statistics._sign_flips import flip_p, flip_p_max

__all__ = [
    "PairedDifference",
    "ProfileDifference",
    "paired_difference",
    "paired_differences",
    "profile_difference",
]

NAN = float("nan")
#: A spread this small against the differences is rounding.
_TIE = 1e-9


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of a − b over prompts.

    Args:
        value: Mean difference, or NaN.
        low: Lower end.
        high: Upper end.
        effect: d_z = mean/SD of the differences; NaN where all are equal.
        effect_low: Lower end of the effect size.
        effect_high: Upper end of the effect size.
        p: Two-sided p of the sign-flip test.
        equivalent: Whether the interval of confidence 1 − 2·(1 − confidence) lies inside ±margin (two one-sided
            tests); None without a margin or interval.
        status: ``resolved`` or ``missing``.
        reason: ``empty`` or ``coverage``.
        n: Prompts with both sides.
        n_asked: Prompts.
        confidence: Nominal coverage.
        n_boot: Replicates.
        reason_interval: Why there is no interval.
    """

    value: float
    low: float
    high: float
    effect: float
    effect_low: float
    effect_high: float
    p: float
    equivalent: bool | None
    status: Status
    reason: str | None
    n: int = 0
    n_asked: int = 0
    confidence: float = 0.95
    n_boot: int = 0
    reason_interval: str | None = None


@dataclass(frozen=True, slots=True)
class ProfileDifference:
    """A difference of profiles, tested as a whole.

    Args:
        value: Mean difference at each point [point].
        low: Lower end of the pointwise interval [point].
        high: Upper end of the pointwise interval [point].
        p_max: p of each point, adjusted for all points by the maximum statistic [point].
        n: Prompts.
    """

    value: Array
    low: Array
    high: Array
    p_max: Array
    n: int


def paired_difference(
    a: Any,
    b: Any,
    prompts: Sequence[Any] | None = None,
    *,
    margin: float | None = None,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Mean of a − b over prompts, with interval, effect size and sign-flip p.

    δ_p = mean over the rows of prompt p of (a − b), rows with both sides only; value = mean_p δ_p;
    d_z = value/SD(δ); p = share of sign patterns s with |mean(s·δ)| ≥ |mean(δ)|.

    Args:
        a: One number per row.
        b: The other side of the same rows.
        prompts: Prompt of each row; default each its own.
        margin: Differences below this size do not matter, declared before the data; tested by two one-sided tests.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        The difference; NaN where fewer than half of the prompts have both sides.

    Raises:
        MetricError: Lengths differ, or the margin is not positive.

    Source:
        Reference §10.4; sign flips: Fisher 1935.

    Example:
        >>> found = paired_difference([1.0, 2.0, 4.0], [0.0, 0.0, 1.0])
        >>> found.value, found.effect, found.p
        (2.0, 2.0, 0.25)
    """
    left, right = column(a, "a"), column(b, "b")
    if len(left) != len(right):
        raise MetricError(f"a and b are two sides of the same rows, found {len(left)} and {len(right)}.")
    with np.errstate(invalid="ignore"):
        delta = per_prompt(left - right, prompts)
    boot: dict[str, Any] = {"confidence": confidence, "n_boot": n_boot, "seed": seed}
    return paired_differences(delta[:, None], [margin], **boot)[0]


def paired_differences(
    delta: Any,
    margins: Sequence[float | None] | None = None,
    *,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[PairedDifference]:
    """:func:`paired_difference` of every column of differences ``[prompt, column]`` at once, on one set of draws.

    Args:
        delta: a − b, NaN where a side is missing.
        margins: Margin of each column, or None.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Example:
        >>> [d.p for d in paired_differences([[1.0, -1.0], [2.0, 1.0], [4.0, 0.5]])]
        [0.25, 1.0]
    """
    check_bootstrap(n_boot, confidence)
    values = np.atleast_2d(np.asarray(delta, dtype=np.float64))
    n_asked, width = values.shape
    bounds = [None] * width if margins is None else list(margins)
    for bound in bounds:
        if bound is not None and not (bound > 0 and np.isfinite(bound)):
            raise MetricError(f"margin is the largest difference that does not matter, > 0; found {bound!r}.")
    found: list[PairedDifference | None] = [None] * width
    for rows, columns in same_prompts(values):
        n = int(rows.sum())
        counts: dict[str, Any] = {"n": n, "n_asked": n_asked, "confidence": confidence, "n_boot": n_boot}
        why = "empty" if not n else "coverage" if 2 * n < n_asked else None
        if why:
            for c in columns:
                found[c] = PairedDifference(
                    NAN, NAN, NAN, NAN, NAN, NAN, NAN, None, "missing", why, **counts, reason_interval=why
                )
            continue
        kept = values[np.ix_(rows, columns)]
        low, high, no = bootstrap_ends(kept, confidence, n_boot, seed)
        effect, effect_low, effect_high = _effect(kept, confidence, n_boot, seed)
        p = flip_p(kept) if n > 1 else np.full(len(columns), NAN)
        inner = (low, high)
        if no is None and any(bounds[c] is not None for c in columns):
            inner = bootstrap_ends(kept, 2 * confidence - 1, n_boot, seed)[:2]
        for i, c in enumerate(columns):
            bound = bounds[c]
            equal = None if bound is None or no else bool(-bound < inner[0][i] and inner[1][i] < bound)
            found[c] = PairedDifference(
                float(kept[:, i].mean()), float(low[i]), float(high[i]), float(effect[i]), float(effect_low[i]),
                float(effect_high[i]), float(p[i]), equal, "resolved", None, **counts, reason_interval=no,
            )  # fmt: skip
    return [one for one in found if one is not None]


def profile_difference(
    a: Any, b: Any, *, confidence: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> ProfileDifference:
    """Difference of two sets of profiles of the same prompts, with p adjusted over the whole profile.

    t(s) = mean_p δ_p(s)/(SD_p δ_p(s)/√n); p_max(s) = share of sign patterns, one sign per prompt, whose max_s |t| is at
    least |t(s)|; 1,999 drawn patterns above 13 prompts. Only points that every prompt has on both sides are tested.

    Args:
        a: Profiles [prompt, point].
        b: The other side.
        confidence: Nominal coverage of the pointwise intervals.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Raises:
        MetricError: Shapes differ.

    Source:
        Reference §10.4 (maximum statistic); Nichols and Holmes 2002.

    Example:
        >>> found = profile_difference([[1.0, 5.0], [1.2, 5.2], [0.8, 5.4]], [[1.1, 0.0], [1.0, 0.1], [0.9, 0.0]])
        >>> found.p_max.tolist()
        [1.0, 0.25]
    """
    x, y = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (a, b))
    if x.shape != y.shape:
        raise MetricError(f"a and b are profiles of the same prompts, found {list(x.shape)} and {list(y.shape)}.")
    delta = x - y
    mean, low, high = profile_interval(delta, confidence=confidence, n_boot=n_boot, seed=seed)
    whole = np.isfinite(delta).all(0)
    p = np.full(delta.shape[1], NAN)
    if len(delta) > 1 and whole.any():
        p[whole] = flip_p_max(delta[:, whole])
    return ProfileDifference(mean, low, high, p, len(delta))


def _effect(delta: Array, confidence: float, n_boot: int, seed: int) -> tuple[Array, Array, Array]:
    """d_z and its interval; a replicate of one prompt over and over has an effect of any size."""
    n, width = delta.shape
    effect, low, high = np.full((3, width), NAN)
    if n < 2:
        return effect, low, high
    sd, size = np.std(delta, axis=0, ddof=1), np.abs(delta).max(0)
    live = sd > _TIE * size
    effect[live] = delta[:, live].mean(0) / sd[live]
    if n < 3 or not n_boot or not live.any():
        return effect, low, high
    weights, kept = draw_weights(n, n_boot, seed), delta[:, live]
    means = weights @ kept / n
    # About the mean, so that the square of a large mean does not swallow the spread.
    centred = kept - kept.mean(0)
    spread = np.sqrt(np.maximum(weights @ centred**2 / n - (weights @ centred / n) ** 2, 0) * n / (n - 1))
    flat = spread <= _TIE * size[live]
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(flat, np.sign(means) * np.inf, means / spread)
    low[live], high[live] = quantile_ends(np.sort(np.where(np.isnan(draws), 0.0, draws), axis=0), confidence, n)
    return effect, low, high
