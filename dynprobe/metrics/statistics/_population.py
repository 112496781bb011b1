"""Thresholds of a population of prompts, with intervals.

Two estimands, two ids. ``threshold.prompt/1`` is the **median of α*** over prompts: half of the prompts are
destabilised at this strength. ``threshold.mean/1`` is the strength at which the **mean response** reaches the level;
a few fragile prompts can carry it. They differ by tens of per cent on the same data, so the id travels with the
number.

Each prompt enters as an interval in ln α: a point when resolved, (−∞, α_min) when left-censored, (α_max, ∞) when
right-censored. The median of the lower ends and the median of the upper ends bound the population median; where the
two agree it is resolved, which with one common grid means: fewer than half of the prompts are censored on either
side. Replicates (seeds, directions) are reduced inside their prompt first, by the same median.

Two intervals for the median. ``order`` interpolates between the two binomial order-statistic intervals around the
wanted confidence (Hettmansperger & Sheather 1986); it assumes nothing about the spread over prompts and is the one
to quote. ``bootstrap`` resamples prompts, then replicates inside each (expanded percentiles); it is reported beside
it and is the only road for means and ratios. Measured coverage of nominal 95 % intervals stands at
:func:`prompt_threshold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, interval, outward, resample
from dynprobe.metrics.statistics._crossing import Array, Crossing, Status
from dynprobe.metrics.statistics._prompts import gather, median_bounds, median_draws, medians

__all__ = ["Threshold", "point", "prompt_threshold"]

Method: TypeAlias = Literal["order", "bootstrap"]
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Threshold:
    """A population threshold with its interval. Open ends are infinite: −inf reads "< α_min", +inf "> α_max".

    Args:
        value: α50, or NaN unless ``status`` is ``resolved``.
        low: Lower end of the interval.
        high: Upper end of the interval.
        status: ``resolved``, ``left-censored``, ``right-censored``, ``not-resolved`` or ``missing``.
        reason: Why there is no value, or a remark beside one.
        metric_id: ``threshold.prompt/1`` or ``threshold.mean/1``.
        bounds: What the data say about the point itself: (value, value) when resolved, the known side when censored.
        method: Which interval ``low`` and ``high`` are, ``order`` or ``bootstrap``.
        confidence: Its nominal coverage.
        boot_low: Lower end of the cluster-bootstrap interval.
        boot_high: Upper end of the cluster-bootstrap interval.
        n_boot: Replicates behind it.
        seed: Seed of the resampling.
        spread: Standard deviation (ddof 1) of ln α* over prompts; NaN when a prompt is censored.
        n: Prompts that took part.
        n_replicates: Replicates that took part, all prompts together.
        n_left: Prompts whose α* lies below the range.
        n_right: Prompts whose α* lies above the range.
        n_notresolved: Prompts left out because the level lies in the noise.
        n_missing: Prompts left out because nothing finite was measured.
        n_nonmonotone: Prompts with a response that falls somewhere (in any replicate).
        n_recrossing: Prompts with a response that passes the level more than once.
        reason_interval: Why an end of the interval is NaN.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None
    metric_id: str
    bounds: tuple[float, float] = (NAN, NAN)
    method: str = "order"
    confidence: float = 0.95
    boot_low: float = NAN
    boot_high: float = NAN
    n_boot: int = 0
    seed: int = 0
    spread: float = NAN
    n: int = 0
    n_replicates: int = 0
    n_left: int = 0
    n_right: int = 0
    n_notresolved: int = 0
    n_missing: int = 0
    n_nonmonotone: int = 0
    n_recrossing: int = 0
    reason_interval: str | None = None

    @property
    def low_censored(self) -> bool:
        """True when the interval reaches below the tested range."""
        return bool(np.isneginf(self.low))

    @property
    def high_censored(self) -> bool:
        """True when the interval reaches above the tested range."""
        return bool(np.isposinf(self.high))


def prompt_threshold(
    alpha_stars: Sequence[Crossing] | Sequence[Sequence[Crossing]] | Any,
    *,
    prompts: Sequence[Any] | None = None,
    status: Any = None,
    method: Method = "order",
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Threshold:
    """Median of α* over prompts, ``threshold.prompt/1``.

    ln α50 = med_p med_s ln α*_{p,s}, replicates s inside prompt p first. Censored values are ranks: they move the
    median, they never enter as numbers.

    Measured coverage of nominal 95 % intervals (2,000 experiments; spread of ln α* over prompts normal /
    right-skewed):

    ======== =================== ===================
    prompts  ``order``           ``bootstrap``
    ======== =================== ===================
    6        0.950 / 0.949       0.969 / 0.964
    12       0.941 / 0.951       0.959 / 0.963
    24       0.952 / 0.945       0.961 / 0.957
    60       0.949 / 0.953       0.951 / 0.955
    ======== =================== ===================

    Plain percentiles would cover 0.90 at 8 prompts. With several noisy seeds per prompt, resampling both prompts and
    seeds counts the seeds' noise twice: ``bootstrap`` then covers 0.97–0.99, ``order`` 0.93–0.95 (the noise shifts
    the median of a skewed spread).

    Args:
        alpha_stars: Crossings, one per prompt, or per prompt a sequence of replicates. Or an array of α*, [prompt] or
            [prompt, seed], where 0 or −inf stands for left-censored, +inf for right-censored, NaN for missing.
        prompts: Prompt of each entry of a flat sequence; equal entries are replicates. Default: all different.
        status: With an array: the status of each entry, same shape. A censored entry's number is then its limit.
        method: Which interval to put into ``low`` and ``high``.
        n_boot: Bootstrap replicates; 0 for none.
        seed: Seed of the resampling.
        confidence: Nominal coverage of the intervals.

    Returns:
        The threshold; NaN with a reason when it is not resolved.

    Raises:
        MetricError: Shapes differ, a status is unknown, or a setting is out of range.

    Source:
        Reference §7.4, §10.4; Hettmansperger & Sheather, Stat. Probab. Lett. 4:75 (1986).

    Example:
        >>> t = prompt_threshold([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, np.inf])
        >>> round(t.value, 12), t.status, t.n, t.n_right, t.high_censored
        (0.5, 'resolved', 7, 1, True)
    """
    check_bootstrap(n_boot, confidence)
    if method not in ("order", "bootstrap"):
        raise MetricError(f"method is 'order' or 'bootstrap', found {method!r}.")
    p = gather(alpha_stars, prompts, status)
    fields = p.counts() | {"metric_id": "threshold.prompt/1", "method": method, "confidence": confidence, "seed": seed}
    refused = p.refusal()
    if refused is not None:
        return Threshold(NAN, NAN, NAN, refused[0], refused[1], **fields)
    low, high = median_bounds(p.low, p.high)
    a, b = float(medians(low, -np.inf)), float(medians(high, np.inf))
    boot = (NAN, NAN)
    if n_boot and p.n >= 2:
        boot = interval(*median_draws(p, resample(p.n, n_boot, seed), seed), confidence, p.n)
    order = _order_interval(low, high, confidence)
    ends = order if method == "order" else boot
    why = None
    if np.isnan(ends[0]) and method == "order":
        why = f"prompts<{_fewest(confidence)}"
    elif np.isnan(ends[0]):
        why = "prompts<2" if p.n < 2 else "n_boot=0"
    return Threshold(
        *point(a, b, ends),
        bounds=(outward(a), outward(b)),
        boot_low=outward(boot[0]),
        boot_high=outward(boot[1]),
        n_boot=n_boot,
        spread=_spread(low, high),
        reason_interval=why,
        **fields,
    )


def point(a: float, b: float, ends: tuple[float, float]) -> tuple[float, float, float, Status, str | None]:
    """Value, ends, status and reason of a threshold known in ln α between a and b."""
    low, high = outward(ends[0]), outward(ends[1])
    if a == b and np.isfinite(a):
        return outward(a), low, high, "resolved", None
    if np.isposinf(b) and not np.isneginf(a):
        return NAN, low, high, "right-censored", "half of the prompts lie above the range"
    if np.isneginf(a) and not np.isposinf(b):
        return NAN, low, high, "left-censored", "half of the prompts lie below the range"
    return NAN, low, high, "not-resolved", "the censored prompts leave the median undetermined"


def _spread(low: Array, high: Array) -> float:
    points = len(low) > 1 and bool((low == high).all()) and bool(np.isfinite(low).all())
    return float(np.std(low, ddof=1)) if points else NAN


def _fewest(confidence: float) -> int:
    return int(np.ceil(1 - np.log2(1 - confidence)))


def _order_interval(low: Array, high: Array, confidence: float) -> tuple[float, float]:
    from scipy.special import bdtr

    n = len(low)
    if n < _fewest(confidence):
        return NAN, NAN
    cover = 1 - 2 * np.r_[0.0, bdtr(np.arange(n // 2, dtype=float), n, 0.5)]
    k = int(np.flatnonzero(cover >= confidence)[-1])
    inner = float(cover[k + 1]) if k < n // 2 else float("nan")
    share = 0.0 if np.isnan(inner) else (cover[k] - confidence) / (cover[k] - inner)
    w = (n - k) * share / (k + (n - 2 * k) * share)
    up, down = np.sort(low), np.sort(high)[::-1]
    return tuple(_mix(x[k - 1], x[min(k, n - 1)], float(w)) for x in (up, down))  # type: ignore[return-value]


def _mix(a: float, b: float, w: float) -> float:
    return float(a) if w == 0 or np.isinf(a) else float((1 - w) * a + w * b)
