"""Dissociation: did the dynamics recover while the meaning did not?

Both recovery fractions are taken on the same runs and resampled together. Three verdicts, and what each needs:

- ``COUPLED``: both 95 % intervals lie above 0.1.
- ``DISSOCIATED``: the interval of RF_dyn lies above 0.5 **and** RF_sem is *shown* to be next to nothing: two one-sided
  tests at 5 %, which is the 90 % interval inside ±0.1.
- ``INDETERMINATE``: everything else. An RF_sem that merely fails to differ from 0 is not dissociation.

RF_dyn is read on a metric that the controller does not act on; where it acts on κ, a recovered κ is arithmetic.
RF_sem is refused where there was no semantic breakdown to recover from: on a task, clean − perturbed below 0.2 or
clean − chance below 0.3 (:func:`semantic_refusal`, which also names the dose that would do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, interval, multiplicity, resample
from dynprobe.metrics.statistics._clusters import column
from dynprobe.metrics.statistics._crossing import Array, Crossing, first_crossing
from dynprobe.metrics.statistics._recovery import (
    RecoveryFraction,
    check_delta_min,
    fraction,
    fraction_draws,
    triples,
)

__all__ = ["Dissociation", "Refusal", "Verdict", "dissociation", "dissociation_verdict", "semantic_refusal"]

NAN = float("nan")
Verdict: TypeAlias = Literal["COUPLED", "DISSOCIATED", "INDETERMINATE", "DETECTOR_BLIND"]
_SLACK = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Dissociation:
    """Verdict ``dissoc.rf2/1`` with everything behind it.

    Args:
        verdict: ``COUPLED``, ``DISSOCIATED``, ``INDETERMINATE``, or ``DETECTOR_BLIND``.
        reason: Why nothing could be decided, where a recovery fraction is missing.
        dynamic: RF_dyn with its 95 % interval.
        semantic: RF_sem with its 95 % interval.
        tost: 90 % interval of RF_sem, the two one-sided tests.
        equivalent: Whether it lies inside ±margin.
        margin: Margin of equivalence.
        draws: Joint bootstrap of (RF_dyn, RF_sem) [replicate, 2]; NaN where a replicate had no effect.
        n: Prompts.
        n_pairs: Runs.
        metric_id: ``dissoc.rf2/1``.
    """

    verdict: Verdict
    reason: str | None
    dynamic: RecoveryFraction
    semantic: RecoveryFraction
    tost: tuple[float, float]
    equivalent: bool
    margin: float
    draws: Array
    n: int
    n_pairs: int
    metric_id: str = "dissoc.rf2/1"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a semantic recovery fraction is refused, and the strength at which it would not be.

    Args:
        reason: ``clean-perturbed<0.2``, ``clean-chance<0.3``, or ``coverage`` when an accuracy is missing.
        dose: First strength whose accuracy lies 0.2 below clean; None without a dose–response.
    """

    reason: str
    dose: Crossing | None = None


def dissociation_verdict(
    dynamic: tuple[float, float],
    semantic: tuple[float, float],
    semantic_90: tuple[float, float] | None = None,
    *,
    margin: float = 0.1,
    coupled: float = 0.1,
    recovered: float = 0.5,
) -> Verdict:
    """Verdict of two intervals.

    Args:
        dynamic: 95 % interval of RF_dyn.
        semantic: 95 % interval of RF_sem.
        semantic_90: 90 % interval of RF_sem; without it the 95 % one stands in, which asks for more.
        margin: RF_sem counts as nothing inside ±margin.
        coupled: Both intervals above this: coupled.
        recovered: RF_dyn above this: the dynamics recovered.

    Returns:
        ``COUPLED``, ``DISSOCIATED`` or ``INDETERMINATE``; the last for any missing end.

    Raises:
        MetricError: An interval is upside down.

    Source:
        Reference §8.4.

    Example:
        >>> dissociation_verdict((0.6, 0.9), (-0.05, 0.08)), dissociation_verdict((0.6, 0.9), (-0.3, 0.4))
        ('DISSOCIATED', 'INDETERMINATE')
    """
    narrow = semantic if semantic_90 is None else semantic_90
    for low, high in (dynamic, semantic, narrow):
        if low > high:
            raise MetricError(f"An interval is (low, high), found ({low}, {high}).")
    if dynamic[0] > coupled and semantic[0] > coupled:
        return "COUPLED"
    if dynamic[0] > recovered and -margin < narrow[0] and narrow[1] < margin:
        return "DISSOCIATED"
    return "INDETERMINATE"


def semantic_refusal(
    clean: float,
    perturbed: float,
    chance: float,
    *,
    alphas: Any = None,
    accuracies: Any = None,
    drop: float = 0.2,
    above_chance: float = 0.3,
) -> Refusal | None:
    """Is there a semantic breakdown to recover from? None when there is.

    Args:
        clean: Accuracy of the clean runs.
        perturbed: Accuracy of the perturbed ones.
        chance: Accuracy of guessing.
        alphas: Strengths of the task's own dose–response, to name the dose that would do.
        accuracies: Accuracy at each.
        drop: Fall of accuracy that counts as breakdown.
        above_chance: Least distance of the clean accuracy from chance.

    Returns:
        None, or the refusal with the dose.

    Raises:
        MetricError: An accuracy is no proportion.

    Source:
        Reference §8.4.

    Example:
        >>> found = semantic_refusal(1.0, 0.91, 0.25, alphas=[0.25, 0.5, 1.0, 2.0], accuracies=[1.0, 0.91, 0.57, 0.34])
        >>> found.reason, round(found.dose.value, 2)
        ('clean-perturbed<0.2', 0.71)
    """
    for value, name in ((clean, "clean"), (perturbed, "perturbed"), (chance, "chance")):
        if value < 0 or value > 1:
            raise MetricError(f"{name} is an accuracy in [0, 1], found {value!r}.")
    dose = None
    if alphas is not None and accuracies is not None:
        dose = first_crossing(alphas, clean - column(accuracies, "accuracies"), drop)
    if not all(np.isfinite((clean, perturbed, chance))):
        return Refusal("coverage", dose)
    if clean - chance < above_chance - _SLACK:
        return Refusal(f"clean-chance<{above_chance:g}", dose)
    if clean - perturbed < drop - _SLACK:
        return Refusal(f"clean-perturbed<{drop:g}", dose)
    return None


def dissociation(
    dynamic: Sequence[Any],
    semantic: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    *,
    delta_min: tuple[float, float] = (0.0, 0.0),
    chance: float | None = None,
    reason: str | None = None,
    reason_semantic: str | None = None,
    margin: float = 0.1,
    n_boot: int = 2000,
    seed: int = 0,
) -> Dissociation:
    """Verdict on paired runs by a joint bootstrap over prompts, ``dissoc.rf2/1``.

    Args:
        dynamic: (clean, pert, rec) of a metric that the controller does not act on, [run] each.
        semantic: (clean, pert, rec) of NLL, KL to clean, or accuracy (1 and 0) of the same runs. A run that lacks any
            of the six numbers is left out of both.
        prompts: Prompt of each run; default each its own.
        delta_min: Smallest effect of the dynamic and of the semantic metric.
        chance: Accuracy of guessing, when ``semantic`` is accuracy: RF_sem is then refused without a breakdown.
        reason: Why neither number would mean anything, such as ``"DETECTOR_BLIND"``.
        reason_semantic: Why RF_sem alone is refused.
        margin: Margin of equivalence.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        The verdict, both fractions, the 90 % interval and the joint draws.

    Raises:
        MetricError: The runs are not paired, or a setting has no meaning.

    Source:
        Reference §8.4 and §14.1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> noise = lambda: 0.02 * rng.normal(size=40)
        >>> kappa, nll = (noise(), 1 + noise(), 0.2 + noise()), (noise(), 1 + noise(), 1 + noise())
        >>> dissociation(kappa, nll).verdict
        'DISSOCIATED'
    """
    check_bootstrap(n_boot, 0.95)
    for smallest in delta_min:
        check_delta_min(smallest)
    if len(dynamic) != 3 or len(semantic) != 3:
        raise MetricError("dissociation takes (clean, pert, rec) of the dynamic and of the semantic metric.")
    table = [column(x, "each of clean, pert, rec") for x in (*dynamic, *semantic)]
    if len({len(x) for x in table}) != 1:
        raise MetricError(f"The six series are of the same runs, found {', '.join(str(len(x)) for x in table)}.")
    known = np.logical_and.reduce(np.isfinite(np.stack(table)), axis=0)
    dyn, sem = triples(table[:3], prompts, known), triples(table[3:], prompts, known)
    if reason is None and reason_semantic is None and chance is not None and sem.n_pairs:
        clean, pert, _ = sem.means
        refusal = semantic_refusal(clean, pert, chance)
        reason_semantic = None if refusal is None else refusal.reason
    points = [fraction(dyn, delta_min[0], reason), fraction(sem, delta_min[1], reason or reason_semantic)]
    weights = multiplicity(resample(dyn.n, n_boot, seed), dyn.n) if dyn.n > 1 else np.zeros((0, dyn.n))
    out, joint, ninety = [], [], (NAN, NAN)
    for which, (t, smallest, (value, status, why)) in enumerate(zip((dyn, sem), delta_min, points, strict=True)):
        low, high, lost, blank = NAN, NAN, 0, np.full(len(weights), NAN)
        no_interval = why or ("prompts<2" if t.n < 2 else None if n_boot else "n_boot=0")
        if no_interval is None:
            lower, upper, lost = fraction_draws(t, weights, smallest)
            low, high = interval(lower, upper, 0.95, t.n)
            if which:
                ninety = interval(lower, upper, 0.90, t.n)
            blank = np.where(lower == upper, lower, NAN)
        joint.append(blank)
        out.append(
            RecoveryFraction(
                value, low, high, status, why, *t.means, float(smallest), t.n, t.n_pairs, t.n_missing, lost, 0.95,
                n_boot, seed, no_interval,
            )
        )  # fmt: skip
    missing = out[0].reason or out[1].reason or out[0].reason_interval
    if missing == "DETECTOR_BLIND":
        verdict: Verdict = "DETECTOR_BLIND"
    elif missing is not None:
        verdict = "INDETERMINATE"
    else:
        verdict = dissociation_verdict((out[0].low, out[0].high), (out[1].low, out[1].high), ninety, margin=margin)
    equivalent = bool(-margin < ninety[0] and ninety[1] < margin)
    return Dissociation(
        verdict, missing, out[0], out[1], ninety, equivalent, margin, np.stack(joint, axis=1), dyn.n,
        dyn.n_pairs,
    )  # fmt: skip
