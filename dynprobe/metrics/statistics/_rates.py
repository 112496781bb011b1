"""Counts of rare things: how often per so many tokens, and in what share of runs, with exact intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap
from dynprobe.metrics.statistics._clusters import column
from dynprobe.metrics.statistics._crossing import Status
from dynprobe.metrics.statistics._nonparametric import Proportion, proportion_interval

__all__ = ["EventRate", "event_rate", "iatrogenic_rate"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class EventRate:
    """k events in an exposure, as a rate with its exact Poisson interval.

    Args:
        value: Events per ``per`` units of exposure, or NaN.
        low: Lower end.
        high: Upper end.
        k: Events.
        exposure: Exposure, such as tokens.
        per: Unit of the rate.
        confidence: Nominal coverage.
        status: ``resolved`` or ``missing``.
        reason: ``empty`` for no exposure.
    """

    value: float
    low: float
    high: float
    k: int
    exposure: float
    per: float
    confidence: float
    status: Status
    reason: str | None


def event_rate(k: int, exposure: float, *, per: float = 1000.0, confidence: float = 0.95) -> EventRate:
    """Rate of events with the exact Poisson interval, χ²_{2k}(a/2)/2 … χ²_{2k+2}(1 − a/2)/2 over the exposure.

    It takes events for independent; fires that come in bursts make it too narrow.

    Args:
        k: Events.
        exposure: Exposure ≥ 0, such as tokens.
        per: Unit of the rate.
        confidence: Nominal coverage.

    Returns:
        The rate; NaN with reason ``"empty"`` for no exposure.

    Raises:
        MetricError: A count or exposure is impossible.

    Source:
        Garwood 1936.

    Example:
        >>> found = event_rate(0, 1000)
        >>> found.value, round(found.high, 4)
        (0.0, 3.6889)
    """
    check_bootstrap(0, confidence)
    if k < 0 or int(k) != k or not exposure >= 0 or np.isinf(exposure) or not per > 0:
        raise MetricError(f"k is a count and exposure ≥ 0, found k={k!r}, exposure={exposure!r}, per={per!r}.")
    if exposure == 0:
        if k:
            raise MetricError(f"{k} events without exposure.")
        return EventRate(NAN, NAN, NAN, 0, 0.0, per, confidence, "missing", "empty")
    from scipy.stats import chi2

    tail = (1 - confidence) / 2
    low = float(chi2.ppf(tail, 2 * k) / 2) if k else 0.0
    high = float(chi2.ppf(1 - tail, 2 * k + 2) / 2)
    unit = per / exposure
    return EventRate(k * unit, low * unit, high * unit, int(k), float(exposure), per, confidence, "resolved", None)


def iatrogenic_rate(
    clean_nll: Any,
    mode_nll: Any,
    noise: float,
    *,
    clean_answers: Sequence[Any] | None = None,
    mode_answers: Sequence[Any] | None = None,
    confidence: float = 0.95,
) -> Proportion:
    """Share of clean runs made worse by a mode that had nothing to recover, with the exact (Clopper–Pearson) interval.

    Worse: NLL of the held-out continuation rises by more than 3·noise, or the answer to a task item is another one.

    Args:
        clean_nll: NLL of each clean run [run].
        mode_nll: NLL of the same run with the mode.
        noise: Noise floor of the NLL, in the same unit.
        clean_answers: Answer of each clean run, where the runs are task items.
        mode_answers: Answer of the same run with the mode.
        confidence: Nominal coverage.

    Returns:
        The proportion over the runs whose NLL is known on both sides; ``coverage`` when that is fewer than half.

    Raises:
        MetricError: The runs are not paired, or the noise floor is no number.

    Source:
        Reference §8.2; the interval: 0 of 44 has an upper end of 8.0 %.

    Example:
        >>> found = iatrogenic_rate([2.0] * 44, [2.0] * 44, noise=1e-4)
        >>> found.value, round(found.high, 3)
        (0.0, 0.08)
    """
    a, b = column(clean_nll, "clean_nll"), column(mode_nll, "mode_nll")
    if len(a) != len(b):
        raise MetricError(f"clean_nll and mode_nll are of the same runs, found {len(a)} and {len(b)}.")
    if not (noise >= 0 and np.isfinite(noise)):
        raise MetricError(f"noise is the noise floor of the NLL, ≥ 0; found {noise!r}.")
    if (clean_answers is None) != (mode_answers is None):
        raise MetricError("Give the answers with and without the mode, or neither.")
    other = np.zeros(len(a), bool)
    if clean_answers is not None and mode_answers is not None:
        if len(clean_answers) != len(a) or len(mode_answers) != len(a):
            raise MetricError(f"One answer per run is needed, {len(a)}.")
        other = np.array([x != y for x, y in zip(clean_answers, mode_answers, strict=True)], dtype=bool)
    known = np.isfinite(a) & np.isfinite(b)
    if 2 * int(known.sum()) < len(a):
        k, n = int((known & other).sum()), int(known.sum())
        return Proportion(NAN, NAN, NAN, k, n, "clopper-pearson", "missing", "coverage")
    worse = known & (other | (b - a > 3 * noise))
    return proportion_interval(int(worse.sum()), int(known.sum()), confidence=confidence, method="exact")
