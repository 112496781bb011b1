"""Reopening of many texts: how often a collapse is followed by rivalry, and how long that takes.

The rate pools all COLLAPSE runs of all texts that have a next labelled run, and texts (or prompts) are resampled as
wholes. Where all or none reopened, resampling cannot leave that end; the exact interval over texts stands in. The
Kaplan–Meier curve uses the runs that the rate leaves out too: each is known not to have reopened for as long as it was
seen, up to the next COLLAPSE run or the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.metrics._cycles import Cycles
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, interval, multiplicity, resample
from dynprobe.metrics.statistics._clusters import cluster_index, cluster_sums
from dynprobe.metrics.statistics._crossing import Status
from dynprobe.metrics.statistics._nonparametric import proportion_interval
from dynprobe.metrics.statistics._survival import KaplanMeier, kaplan_meier

__all__ = ["Reopening", "reopening"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Reopening:
    """Reopening over many texts.

    Args:
        rate: Reopened over uncensored COLLAPSE runs, all texts together.
        low: Lower end of the interval.
        high: Upper end.
        method: ``bootstrap`` over clusters, or ``clopper-pearson`` over clusters where all or no runs reopened.
        status: ``resolved`` or ``missing``.
        reason: ``empty``, or ``zero-denominator`` without an uncensored COLLAPSE run.
        n: Clusters (prompts, or texts).
        n_collapse: COLLAPSE runs.
        n_reopened: Of them, followed by RIVALRY.
        n_censored: Of them, followed by nothing.
        curve: Kaplan–Meier curve of the time to reopening, in tokens; censored at the next COLLAPSE run or the end.
        confidence: Nominal coverage.
        n_boot: Replicates.
        reason_interval: Why there is no interval.
    """

    rate: float
    low: float
    high: float
    method: str
    status: Status
    reason: str | None
    n: int
    n_collapse: int
    n_reopened: int
    n_censored: int
    curve: KaplanMeier
    confidence: float = 0.95
    n_boot: int = 0
    reason_interval: str | None = None


def reopening(
    cycles: Sequence[Cycles],
    prompts: Sequence[Any] | None = None,
    *,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Reopening:
    """Reopening rate of many texts with its interval, and the time to reopening.

    Args:
        cycles: Cycles of each text.
        prompts: Prompt of each text, drawn together; default each text its own.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        Rate over all COLLAPSE runs that are not censored, cluster-bootstrap interval, Kaplan–Meier curve.

    Raises:
        MetricError: There is not one prompt per text.

    Example:
        >>> from dynprobe.metrics import cycles_margin
        >>> texts = [cycles_margin([1, 1, 1, 0, 0, 0, 1, 1, 1]), cycles_margin([1, 1, 1, 0.5, 1, 1, 1])]
        >>> found = reopening(texts)
        >>> found.rate, found.n_collapse, found.curve.survival
        (0.5, 4, (0.75,))
    """
    check_bootstrap(n_boot, confidence)
    index, names = cluster_index(prompts, len(cycles))
    opened = np.array([c.n_reopened for c in cycles], dtype=np.float64)
    closed = np.array([c.n_collapse - c.n_censored for c in cycles], dtype=np.float64)
    k, n = cluster_sums(opened, index, len(names)), cluster_sums(closed, index, len(names))
    curve = kaplan_meier([t for c in cycles for t in c.times], [e for c in cycles for e in c.reopened])
    why = "empty" if not len(cycles) else "zero-denominator" if not n.sum() else None
    rate = NAN if why else float(k.sum() / n.sum())
    low, high, method, no_interval = NAN, NAN, "bootstrap", why
    n_boot_used = n_boot
    if why is None and rate in (0.0, 1.0):
        # Resampling cannot leave an end it never saw; the exact interval over clusters can.
        with_one = int((n > 0).sum())
        p = proportion_interval(with_one if rate else 0, with_one, confidence=confidence, method="exact")
        low, high, method, n_boot_used = p.low, p.high, p.method, 0
    elif why is None:
        no_interval = "prompts<2" if len(names) < 2 else None if n_boot else "n_boot=0"
        if no_interval is None:
            weights = multiplicity(resample(len(names), n_boot, seed), len(names))
            total = weights @ n
            none = total == 0
            draws = (weights @ k) / np.where(none, 1.0, total)
            low, high = interval(np.where(none, 0.0, draws), np.where(none, 1.0, draws), confidence, len(names))
    return Reopening(
        rate, low, high, method, "resolved" if why is None else "missing", why, len(names),
        sum(c.n_collapse for c in cycles), int(opened.sum()), sum(c.n_censored for c in cycles), curve, confidence,
        n_boot_used, no_interval,
    )  # fmt: skip
