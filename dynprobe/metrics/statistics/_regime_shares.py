"""Regimes of a model with their uncertainty: how often each label comes back when the prompts are drawn again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.metrics._limen import regime_of
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, resample
from dynprobe.metrics.statistics._clusters import column
from dynprobe.metrics.statistics._prompt_means import per_prompt

__all__ = ["RegimeShares", "regime_shares"]


@dataclass(frozen=True, slots=True)
class RegimeShares:
    """The regime of a set of runs.

    Attributes:
        ratio: Median over prompts of the mean ratio of each prompt.
        label: Its regime.
        shares: Regime → share of bootstrap samples of the prompts whose median has it.
        runs: Regime → share of the single runs.
        n: Prompts with a ratio.
        n_asked: Prompts.
        reason: ``empty``, ``coverage``; ``prompts<3`` where there is no bootstrap.
    """

    ratio: float
    label: str
    shares: dict[str, float]
    runs: dict[str, float]
    n: int
    n_asked: int
    reason: str | None = None


def regime_shares(
    ratio: Any, prompts: Sequence[Any] | None = None, *, n_boot: int = 2000, seed: int = 0
) -> RegimeShares:
    """Give a model's regime with the share of bootstrap samples that agree.

    The ratio is a maximum over a mean and has a long upper tail, so the prompts' **median** carries the label.

    Args:
        ratio: ``limen.ratio`` of each run.
        prompts: Prompt of each run; default each its own.
        n_boot: Samples of the prompts.
        seed: Seed of the samples.

    Source:
        Bands: ``limen.regime/1``; reference §4.3.

    Example:
        >>> found = regime_shares([2.3, 2.4, 2.5, 2.6], n_boot=100)
        >>> found.label, found.shares
        ('ADAPTIVE', {'ADAPTIVE': 1.0})
    """
    check_bootstrap(n_boot, 0.5)
    x = column(ratio, "ratio")
    means = per_prompt(x, prompts)
    known = means[np.isfinite(means)]
    n, asked = len(known), len(means)
    runs = _shares([regime_of(float(v)) for v in x[np.isfinite(x)]])
    why = "empty" if not n else "coverage" if 2 * n < asked else None
    if why:
        return RegimeShares(float("nan"), regime_of(float("nan")), {}, runs, n, asked, why)
    middle = float(np.median(known))
    if n < 3 or not n_boot:
        return RegimeShares(middle, regime_of(middle), {}, runs, n, asked, "prompts<3" if n < 3 else "n_boot=0")
    drawn = np.median(known[resample(n, n_boot, seed)], axis=1)
    return RegimeShares(middle, regime_of(middle), _shares([regime_of(float(v)) for v in drawn]), runs, n, asked)


def _shares(labels: Sequence[str]) -> dict[str, float]:
    """Share of each label, the largest first."""
    pairs = sorted(Counter(labels).items(), key=lambda pair: (-pair[1], pair[0]))
    return {name: count / len(labels) for name, count in pairs}
