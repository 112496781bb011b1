"""How well a detector tells perturbed runs from clean ones, before anything is made of what it did.

No signal works everywhere, so its power is measured and reported first: the area under the ROC curve of a score per
run, the share of runs in which it fires, how long it takes, and how often it fires when nothing is wrong. A mode whose
detector does not act on perturbed runs, or acts on clean ones as much, cannot be judged at all
(:func:`detector_blind`).

The score that belongs to a detector which asks for m steps in a row is :func:`sustained_max`: the largest level that m
consecutive values exceed. The detector fires at a level exactly if the score lies above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._auc import Auc, auc
from dynprobe.metrics.statistics._clusters import column
from dynprobe.metrics.statistics._crossing import Array
from dynprobe.metrics.statistics._nonparametric import Proportion, proportion_interval
from dynprobe.metrics.statistics._rates import EventRate, event_rate
from dynprobe.metrics.statistics._survival import KaplanMeier, kaplan_meier

__all__ = ["DetectorPower", "detector_blind", "detector_power", "onsets", "sustained_max"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class DetectorPower:
    """Power of a detector on held-out clean and perturbed runs.

    Args:
        auc: Area under the ROC curve of the scores.
        fire_clean: Share of clean runs in which it fired, exact interval.
        fire_pert: Share of perturbed runs in which it fired after the perturbation began.
        latency: Tokens from the beginning of the perturbation to the first fire; runs without one are censored.
        false_fires: Fires per 1,000 clean tokens, exact Poisson interval.
        n_before: Perturbed runs in which it fired before the perturbation began.
    """

    auc: Auc
    fire_clean: Proportion
    fire_pert: Proportion
    latency: KaplanMeier
    false_fires: EventRate
    n_before: int


def onsets(active: Any) -> tuple[int, ...]:
    """Steps at which a detector becomes active, from whether it is [step]; active from the first step on counts.

    Example:
        >>> onsets([False, True, True, False, True])
        (1, 4)
    """
    flags = (active.detach().cpu().numpy() if hasattr(active, "detach") else np.asarray(active)).astype(bool)
    if flags.ndim != 1:
        raise MetricError(f"active is one flag per step, found shape {list(flags.shape)}.")
    return tuple(int(t) for t in np.flatnonzero(flags & ~np.concatenate([[False], flags[:-1]])))


def sustained_max(signal: Any, m: int = 3) -> float:
    """Largest level that m consecutive values all reach, max_t min(q_t, …, q_{t+m−1}).

    A detector that fires on q > q_hi for m steps in a row fires exactly if this exceeds q_hi.

    Args:
        signal: Values of one run [token]; one that is not a number ends a run of m.
        m: Steps in a row.

    Returns:
        The level; NaN when there are no m known values in a row.

    Example:
        >>> sustained_max([0.1, 0.9, 0.8, 0.7, 0.2])
        0.7
    """
    q = column(signal, "signal")
    if m < 1:
        raise MetricError(f"m is 1 or more steps, found {m!r}.")
    if len(q) < m:
        return NAN
    lowest = np.lib.stride_tricks.sliding_window_view(q, m).min(axis=1)  # NaN inside makes the window NaN
    known = lowest[~np.isnan(lowest)]
    return float(known.max()) if len(known) else NAN


def detector_power(
    clean_scores: Any,
    pert_scores: Any,
    *,
    clean_fires: Sequence[Sequence[int]],
    pert_fires: Sequence[Sequence[int]],
    clean_tokens: Any,
    pert_tokens: Any,
    start: Any = 0,
    prompts_clean: Sequence[Any] | None = None,
    prompts_pert: Sequence[Any] | None = None,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> DetectorPower:
    """AUC, fire rates, latency and false fires of a detector on held-out runs.

    Args:
        clean_scores: Score of each clean run, such as :func:`sustained_max` of its signal.
        pert_scores: Score of each perturbed run.
        clean_fires: Steps at which the detector fired in each clean run, such as :func:`onsets`.
        pert_fires: The same of each perturbed run.
        clean_tokens: Tokens the detector watched in each clean run.
        pert_tokens: Tokens it watched in each perturbed run.
        start: Token at which the perturbation began, one for all or one per perturbed run; 0 for a perturbation that
            is there from the first watched token on.
        prompts_clean: Prompt of each clean run.
        prompts_pert: Prompt of each perturbed run.
        confidence: Nominal coverage of all intervals.
        n_boot: Replicates for the AUC.
        seed: Seed of the resampling.

    Returns:
        The five numbers. A perturbed run in which the detector fired before the perturbation counts in ``n_before``;
        only what it did afterwards counts as a fire.

    Raises:
        MetricError: Lengths differ, or a fire lies outside its run.

    Example:
        >>> p = detector_power([1, 2], [5, 6], clean_fires=[[], []], pert_fires=[[3], [5, 8]], clean_tokens=[50, 50],
        ...     pert_tokens=[50, 50], start=2)
        >>> p.auc.value, p.fire_pert.value, p.latency.median, round(p.false_fires.high, 2)
        (1.0, 1.0, 2.0, 36.89)
    """
    a, b = column(clean_scores, "clean_scores"), column(pert_scores, "pert_scores")
    watched_a = _lengths(clean_tokens, clean_fires, len(a), "clean")
    watched_b = _lengths(pert_tokens, pert_fires, len(b), "pert")
    begin = np.broadcast_to(np.asarray(start, dtype=np.int64), (len(b),))
    if ((begin < 0) | (begin > watched_b)).any():
        raise MetricError("start lies inside each perturbed run.")
    first = [min((t for t in fires if t >= s), default=None) for fires, s in zip(pert_fires, begin, strict=True)]
    times = [n - s if t is None else t - s for t, n, s in zip(first, watched_b, begin, strict=True)]
    came = [t is not None for t in first]
    return DetectorPower(
        auc(a, b, prompts_clean, prompts_pert, confidence=confidence, n_boot=n_boot, seed=seed),
        proportion_interval(sum(len(f) > 0 for f in clean_fires), len(a), confidence=confidence, method="exact"),
        proportion_interval(sum(came), len(b), confidence=confidence, method="exact"),
        kaplan_meier(times, came),
        event_rate(sum(len(f) for f in clean_fires), float(watched_a.sum()), per=1000, confidence=confidence),
        sum(any(t < s for t in fires) for fires, s in zip(pert_fires, begin, strict=True)),
    )


def _lengths(tokens: Any, fires: Sequence[Sequence[int]], n: int, name: str) -> Array:
    watched = column(tokens, f"{name}_tokens")
    if len(watched) != n or len(fires) != n:
        raise MetricError(
            f"{name}: one score, one list of fires and one number of tokens per run, found {n}, {len(fires)} and "
            f"{len(watched)}."
        )
    if any(t < 0 or t >= total for f, total in zip(fires, watched, strict=True) for t in f):
        raise MetricError(f"{name}_fires lie inside their run, between 0 and its number of tokens.")
    return watched


def detector_blind(duty_pert: float, duty_clean: float, *, least: float = 0.05) -> str | None:
    """``"DETECTOR_BLIND"`` when the mode did not act where it should, else None.

    Args:
        duty_pert: Share of tokens of perturbed runs on which the mode was active.
        duty_clean: The same of clean runs.
        least: Least share on perturbed runs.

    Returns:
        The reason to hand to :func:`recovery_fraction`: below ``least`` on perturbed runs, or not above that on clean
        ones; also where a share is not known.

    Source:
        Reference §8.2.

    Example:
        >>> detector_blind(0.04, 0.0), detector_blind(0.2, 0.2), detector_blind(0.2, 0.01)
        ('DETECTOR_BLIND', 'DETECTOR_BLIND', None)
    """
    return None if duty_pert >= least and duty_pert > duty_clean else "DETECTOR_BLIND"
