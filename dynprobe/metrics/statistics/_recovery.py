"""Recovery fraction: how much of what a perturbation did a recovery mode undid.

RF = (Σ m_pert − Σ m_rec)/(Σ m_pert − Σ m_clean) over paired runs: 1 is full recovery, 0 none, below 0 harm, above 1
overshoot. It is a **ratio of means**, not a mean of ratios: single runs that the perturbation hardly touched would
otherwise divide by next to nothing and carry the result.

Where the perturbation did less than δ_min there is nothing to recover from (``"no-effect"``). δ_min is three standard
deviations of the difference between two clean runs; 0 means that only an exactly zero effect is none. A caller who
knows beforehand that the number would mean nothing hands in why (``reason="DETECTOR_BLIND"``): the value is NaN with
that reason, never 0.

The interval resamples prompts, all runs of one together. A replicate whose effect is below δ_min, or of the other sign,
says nothing about RF; it opens both ends of the interval instead of entering with an arbitrary quotient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, interval, multiplicity, resample
from dynprobe.metrics.statistics._clusters import cluster_index, cluster_sums, column
from dynprobe.metrics.statistics._crossing import Array, Status

__all__ = ["RecoveryFraction", "Triples", "delta_min", "fraction", "fraction_draws", "recovery_fraction", "triples"]

NAN = float("nan")
_ROUNDING = 16 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class RecoveryFraction:
    """A recovery fraction with its interval; open ends are −inf and +inf.

    Args:
        value: RF, or NaN.
        low: Lower end of the interval.
        high: Upper end.
        status: ``resolved``, ``not-resolved`` (no effect to recover from) or ``missing``.
        reason: Why there is no value: ``empty``, ``coverage``, ``no-effect``, or what the caller handed in.
        clean: Mean of the metric over the clean runs that took part.
        pert: Mean over the perturbed ones.
        rec: Mean over the recovered ones.
        delta_min: Smallest effect that counts as one.
        n: Prompts.
        n_pairs: Triples of runs that took part.
        n_missing: Triples left out because a number was missing.
        n_undetermined: Replicates without an effect.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.
        reason_interval: Why there is no interval.
        metric_id: ``recovery.fraction/1``.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None
    clean: float = NAN
    pert: float = NAN
    rec: float = NAN
    delta_min: float = 0.0
    n: int = 0
    n_pairs: int = 0
    n_missing: int = 0
    n_undetermined: int = 0
    confidence: float = 0.95
    n_boot: int = 0
    seed: int = 0
    reason_interval: str | None = None
    metric_id: str = "recovery.fraction/1"


@dataclass(frozen=True, slots=True)
class Triples:
    """Sums per prompt of the triples that took part: clean, perturbed, recovered [3, prompt], and their number."""

    sums: Array
    count: Array
    n_missing: int

    @property
    def n(self) -> int:
        """Prompts."""
        return len(self.count)

    @property
    def n_pairs(self) -> int:
        """Triples."""
        return int(self.count.sum())

    @property
    def means(self) -> tuple[float, float, float]:
        """Means over triples, NaN for none."""
        total = self.count.sum()
        clean, pert, rec = (float(s / total) if total else NAN for s in self.sums.sum(axis=1))
        return clean, pert, rec


def delta_min(clean_clean: Any) -> float:
    """Smallest effect worth dividing by: 3 × SD (ddof 1) of the difference between two clean runs.

    Args:
        clean_clean: Differences of the metric between two runs of the same prompt that differ by nothing that matters
            (batching, seed of what is not used); entries that are not finite are left out.

    Returns:
        δ_min ≥ 0; NaN for fewer than two differences.

    Example:
        >>> round(delta_min([0.01, -0.01, 0.0]), 12)
        0.03
    """
    d = column(clean_clean, "clean_clean")
    d = d[np.isfinite(d)]
    return 3.0 * float(d.std(ddof=1)) if len(d) > 1 else NAN


def triples(series: Sequence[Any], prompts: Sequence[Any] | None, known: NDArray[np.bool_] | None = None) -> Triples:
    """Gather paired runs (clean, pert, rec) by prompt; those with a missing number, or not ``known``, are left out."""
    table = [column(x, name) for x, name in zip(series, ("clean", "pert", "rec"), strict=True)]
    if len({len(x) for x in table}) != 1:
        raise MetricError(f"clean, pert and rec are paired runs, found {', '.join(str(len(x)) for x in table)}.")
    x = np.stack(table)
    ok = np.isfinite(x).all(axis=0)
    if known is not None:
        ok &= known
    index, names = cluster_index(prompts, x.shape[1])
    used = np.unique(index[ok])
    new = np.full(len(names), -1)
    new[used] = np.arange(len(used))
    inside = new[index[ok]]
    sums = np.stack([cluster_sums(row[ok], inside, len(used)) for row in x])
    return Triples(sums, cluster_sums(np.ones(int(ok.sum())), inside, len(used)), int((~ok).sum()))


def fraction_draws(t: Triples, weights: Array, smallest: float) -> tuple[Array, Array, int]:
    """Lower and upper draws of RF for prompt weights [n_boot, prompt]; without an effect they are −inf and +inf."""
    total = weights @ t.count
    clean, pert, rec = (weights @ row / total for row in t.sums)
    effect, sign = pert - clean, np.sign(t.sums[1].sum() - t.sums[0].sum())
    lost = (sign * effect <= 0) | _none(effect, clean, pert, smallest)
    value = (pert - rec) / np.where(lost, 1.0, effect)
    return np.where(lost, -np.inf, value), np.where(lost, np.inf, value), int(lost.sum())


def _none(effect: Any, clean: Any, pert: Any, smallest: float) -> Any:
    return (np.abs(effect) < smallest) | (np.abs(effect) <= _ROUNDING * np.maximum(np.abs(clean), np.abs(pert)))


def fraction(t: Triples, smallest: float, reason: str | None) -> tuple[float, Status, str | None]:
    """Value, status and reason of the point."""
    if not t.n_pairs + t.n_missing:
        return NAN, "missing", "empty"
    if reason is not None:
        return NAN, "missing", reason
    if 2 * t.n_pairs < t.n_pairs + t.n_missing:
        return NAN, "missing", "coverage"
    clean, pert, rec = t.means
    if _none(pert - clean, clean, pert, smallest):
        return NAN, "not-resolved", "no-effect"
    return (pert - rec) / (pert - clean), "resolved", None


def recovery_fraction(
    clean: Any,
    pert: Any,
    rec: Any,
    prompts: Sequence[Any] | None = None,
    *,
    delta_min: float = 0.0,
    reason: str | None = None,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> RecoveryFraction:
    """Recovery fraction of paired runs, ``recovery.fraction/1``.

    RF = (Σ m_pert − Σ m_rec)/(Σ m_pert − Σ m_clean). Adding a constant to the metric or multiplying it by one, negative
    ones too, changes nothing.

    Args:
        clean: Metric of each clean run [run].
        pert: Of the same run perturbed.
        rec: Of the same run perturbed and recovered.
        prompts: Prompt of each run; default each its own. Seeds and strengths of one prompt are drawn together.
        delta_min: Smallest |mean(pert) − mean(clean)| that counts as an effect; :func:`delta_min` gives it.
        reason: Why the number would mean nothing, such as ``"DETECTOR_BLIND"``; the value is then NaN.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        RF with its interval (expanded percentiles over prompts).

    Raises:
        MetricError: The runs are not paired, or a setting has no meaning.

    Source:
        Reference §8.3 and §14.1, vector rf-1.

    Example:
        >>> rf = recovery_fraction([0.2, 0.2], [0.6, 0.6], [0.3, 0.3])
        >>> round(rf.value, 12)
        0.75
    """
    check_bootstrap(n_boot, confidence)
    check_delta_min(delta_min)
    t = triples((clean, pert, rec), prompts)
    value, status, why = fraction(t, delta_min, reason)
    low, high, lost, no_interval = NAN, NAN, 0, why
    if why is None:
        no_interval = "prompts<2" if t.n < 2 else None if n_boot else "n_boot=0"
        if no_interval is None:
            draws = fraction_draws(t, multiplicity(resample(t.n, n_boot, seed), t.n), delta_min)
            lost = draws[2]
            low, high = interval(draws[0], draws[1], confidence, t.n)
    means = t.means
    return RecoveryFraction(
        value, low, high, status, why, *means, float(delta_min), t.n, t.n_pairs, t.n_missing, lost, confidence, n_boot,
        seed, no_interval,
    )  # fmt: skip


def check_delta_min(smallest: float) -> None:
    """Refuse a smallest effect that is none."""
    if not (smallest >= 0 and np.isfinite(smallest)):
        raise MetricError(
            f"delta_min is 0 or larger, found {smallest!r}; dynprobe.metrics.statistics.delta_min(clean–clean "
            "differences) gives it."
        )
