"""Area under the ROC curve: how often a perturbed run scores above a clean one.

The interval resamples prompts. Where the two sides do not overlap at all every replicate says 1, and an interval made
of that would claim certainty from a dozen runs; there is none then (``"separated"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, interval, multiplicity, resample
from dynprobe.metrics.statistics._clusters import cluster_index, column
from dynprobe.metrics.statistics._crossing import Array, Status

__all__ = ["Auc", "auc"]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Auc:
    """Area under the ROC curve with its interval.

    Args:
        value: P(perturbed > clean) + ½·P(equal), or NaN.
        low: Lower end.
        high: Upper end.
        status: ``resolved`` or ``missing``.
        reason: ``empty`` or ``coverage``.
        n_clean: Clean scores.
        n_pert: Perturbed scores.
        n_missing: Scores left out because they are no numbers.
        paired: True when the same prompts were drawn for both sides.
        confidence: Nominal coverage.
        n_boot: Replicates.
        reason_interval: Why there is no interval; ``separated`` when the sides do not overlap at all, which resampling
            cannot put an end to.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None
    n_clean: int = 0
    n_pert: int = 0
    n_missing: int = 0
    paired: bool = False
    confidence: float = 0.95
    n_boot: int = 0
    reason_interval: str | None = None


def auc(
    clean: Any,
    pert: Any,
    prompts_clean: Sequence[Any] | None = None,
    prompts_pert: Sequence[Any] | None = None,
    *,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Auc:
    """Area under the ROC curve, P(pert > clean) + ½·P(pert = clean), with a cluster bootstrap over prompts.

    Where a prompt occurs on both sides, a replicate draws it for both; where no prompt does, the sides are drawn apart.

    Args:
        clean: One score per clean run (or token), larger = more like a perturbed one.
        pert: One per perturbed run.
        prompts_clean: Prompt of each clean score; default each its own.
        prompts_pert: Prompt of each perturbed one.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        AUC with its interval, inside [0, 1].

    Raises:
        MetricError: One side has prompts and the other has none, or lengths differ.

    Example:
        >>> auc([1, 2, 3], [2, 4, 5]).value.__round__(6)
        0.833333
    """
    check_bootstrap(n_boot, confidence)
    a, b = column(clean, "clean"), column(pert, "pert")
    if (prompts_clean is None) != (prompts_pert is None):
        raise MetricError("Name the prompts of both sides, or of neither.")
    if prompts_clean is None or prompts_pert is None:
        prompts_clean, prompts_pert = [(0, i) for i in range(len(a))], [(1, i) for i in range(len(b))]
    if len(prompts_clean) != len(a) or len(prompts_pert) != len(b):
        raise MetricError("prompts_clean and prompts_pert name the prompt of each score.")
    ok_a, ok_b = ~np.isnan(a), ~np.isnan(b)
    lost = int((~ok_a).sum() + (~ok_b).sum())
    labels_a = [p for p, ok in zip(prompts_clean, ok_a, strict=True) if ok]
    labels_b = [p for p, ok in zip(prompts_pert, ok_b, strict=True) if ok]
    n_all = (len(a), len(b))
    a, b = a[ok_a], b[ok_b]
    paired = bool(set(labels_a) & set(labels_b))
    shown: dict[str, Any] = {
        "n_clean": len(a), "n_pert": len(b), "n_missing": lost, "paired": paired, "confidence": confidence,
        "n_boot": n_boot,
    }  # fmt: skip
    why = "empty" if not min(n_all) else "coverage" if 2 * len(a) < n_all[0] or 2 * len(b) < n_all[1] else None
    if why is not None:
        return Auc(NAN, NAN, NAN, "missing", why, **shown, reason_interval=why)
    index, names = cluster_index(labels_a + labels_b, len(a) + len(b))
    of_a, of_b = index[: len(a)], index[len(a) :]
    wins = _wins(a, b, of_a, of_b, len(names))
    size_a, size_b = (np.bincount(of, minlength=len(names)).astype(np.float64) for of in (of_a, of_b))
    value = float(wins.sum() / (len(a) * len(b)))
    sides = [np.unique(of_a), np.unique(of_b)]
    least = len(names) if paired else min(len(s) for s in sides)
    no_interval = "prompts<2" if least < 2 else "separated" if value in (0.0, 1.0) else None if n_boot else "n_boot=0"
    low = high = NAN
    if no_interval is None:
        if paired:
            weights = multiplicity(resample(len(names), n_boot, seed), len(names))
        else:
            weights = np.zeros((n_boot, len(names)))
            for k, side in enumerate(sides):
                weights[:, side] = multiplicity(resample(len(side), n_boot, seed + k), len(side))
        pairs = (weights @ size_a) * (weights @ size_b)
        none = pairs == 0
        draws = ((weights @ wins) * weights).sum(axis=1) / np.where(none, 1.0, pairs)
        low, high = interval(np.where(none, 0.0, draws), np.where(none, 1.0, draws), confidence, least)
    return Auc(value, low, high, "resolved", None, **shown, reason_interval=no_interval)


def _wins(a: Array, b: Array, of_a: Any, of_b: Any, n: int) -> Array:
    """Pairs (b of cluster p, a of cluster q) with b above a, ties half, [p, q]."""
    out = np.zeros((n, n))
    order = np.argsort(a, kind="stable")
    sorted_a, cluster = a[order], of_a[order]
    # Column q: how many entries of cluster q lie below each place of the sorted clean scores.
    below = np.zeros((len(a) + 1, n))
    np.add.at(below, (np.arange(1, len(a) + 1), cluster), 1.0)
    below = below.cumsum(axis=0)
    left, right = np.searchsorted(sorted_a, b, "left"), np.searchsorted(sorted_a, b, "right")
    np.add.at(out, of_b, (below[left] + below[right]) / 2)
    return out
