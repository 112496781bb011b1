"""Means over prompts with a cluster bootstrap, one number or a whole table of them on the same draws.

Every interval of a mean over prompts that dynprobe prints, stores or draws comes from here, whichever command asked for
it, and is of one kind: the expanded percentile interval of :mod:`._bootstrap`, missing below three prompts.
:func:`interval_words` is its name in captions, summaries and docs.

A comparison asks for hundreds of means over the same prompts. The draws are made once and every column is multiplied
by them, which is what lets the same statistics serve one number and ten million rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap, expanded_level, interval, multiplicity, resample
from dynprobe.metrics.statistics._clusters import cluster_index, cluster_sums, column
from dynprobe.metrics.statistics._crossing import Array, Status

__all__ = [
    "ClusterMean",
    "bootstrap_ends",
    "cluster_mean",
    "cluster_means",
    "draw_weights",
    "interval_words",
    "mean_interval",
    "per_prompt",
    "profile_interval",
    "quantile_ends",
    "same_prompts",
]

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class ClusterMean:
    """A mean over prompts.

    Args:
        value: Mean over prompts of the mean inside each prompt, or NaN.
        low: Lower end.
        high: Upper end.
        sd: SD over prompts, ddof = 1.
        status: ``resolved`` or ``missing``.
        reason: ``empty`` or ``coverage``.
        n: Prompts with a value.
        n_asked: Prompts.
        confidence: Nominal coverage.
        n_boot: Replicates.
        reason_interval: Why there is no interval.
    """

    value: float
    low: float
    high: float
    sd: float
    status: Status
    reason: str | None
    n: int = 0
    n_asked: int = 0
    confidence: float = 0.95
    n_boot: int = 0
    reason_interval: str | None = None


def cluster_mean(
    x: Any, prompts: Sequence[Any] | None = None, *, confidence: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> ClusterMean:
    """Mean over prompts, rows of one prompt averaged first, with a cluster bootstrap.

    Args:
        x: One number per row.
        prompts: Prompt of each row; default each its own.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        The mean; NaN where fewer than half of the prompts have a value. Below three prompts it has no interval.

    Source:
        Reference §10.4.

    Example:
        >>> cluster_mean([1.0, 3.0, 5.0], ["a", "a", "b"]).value
        3.5
    """
    values = per_prompt(column(x, "x"), prompts)
    return cluster_means(values[:, None], confidence=confidence, n_boot=n_boot, seed=seed)[0]


def cluster_means(x: Any, *, confidence: float = 0.95, n_boot: int = 2000, seed: int = 0) -> list[ClusterMean]:
    """:func:`cluster_mean` of every column of ``[prompt, column]`` at once, on one set of draws.

    Example:
        >>> [m.value for m in cluster_means([[1.0, 2.0], [3.0, 4.0]])]
        [2.0, 3.0]
    """
    check_bootstrap(n_boot, confidence)
    values = np.atleast_2d(np.asarray(x, dtype=np.float64))
    n_asked = len(values)
    out: list[ClusterMean] = [ClusterMean(NAN, NAN, NAN, NAN, "missing", "empty")] * values.shape[1]
    for rows, columns in same_prompts(values):
        n = int(rows.sum())
        counts: dict[str, Any] = {"n": n, "n_asked": n_asked, "confidence": confidence, "n_boot": n_boot}
        why = "empty" if not n else "coverage" if 2 * n < n_asked else None
        if why:
            empty = ClusterMean(NAN, NAN, NAN, NAN, "missing", why, **counts, reason_interval=why)
            for c in columns:
                out[c] = empty
            continue
        kept = values[np.ix_(rows, columns)]
        sd = np.std(kept, axis=0, ddof=1) if n > 1 else np.full(len(columns), NAN)
        low, high, no = bootstrap_ends(kept, confidence, n_boot, seed)
        for i, c in enumerate(columns):
            out[c] = ClusterMean(
                float(kept[:, i].mean()), float(low[i]), float(high[i]), float(sd[i]), "resolved", None, **counts,
                reason_interval=no,
            )  # fmt: skip
    return out


def mean_interval(
    x: Any, weights: Any = None, *, confidence: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> tuple[float, float]:
    r"""Interval of a mean over prompts: expanded percentiles of a bootstrap that draws prompts.

    The mean is :math:`\sum_p w_p x_p / \sum_p w_p`; a prompt that is drawn brings its value and its weight.

    Args:
        x: One number per prompt. A value that is NaN takes no part.
        weights: Weight of each prompt, such as its number of tokens; default equal.
        confidence: Nominal coverage.
        n_boot: Replicates.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end; NaN below three prompts with a value.

    Raises:
        MetricError: The settings give no interval, or weights and values differ in number.

    Source:
        Reference §10.4; Hesterberg, The American Statistician 69:371 (2015).

    Example:
        >>> low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
        >>> low < 2.5 < high, mean_interval([1.0, 2.0])
        (True, (nan, nan))
    """
    check_bootstrap(n_boot, confidence)
    values = column(x, "x")
    w = np.ones(len(values)) if weights is None else column(weights, "weights")
    if len(w) != len(values):
        raise MetricError(f"a prompt has one value and one weight, found {len(values)} values and {len(w)} weights.")
    ok = np.isfinite(values) & np.isfinite(w)
    values, w = values[ok], w[ok]
    if weights is None or len(values) < 3 or not n_boot:
        low, high, _ = bootstrap_ends(values[:, None], confidence, n_boot, seed)
        return float(low[0]), float(high[0])
    order = np.lexsort((w, values))  # as in :func:`bootstrap_ends`
    values, w = values[order], w[order]
    drawn = draw_weights(len(values), n_boot, seed)
    with np.errstate(invalid="ignore"):
        draws = (drawn @ (w * values)) / (drawn @ w)
    return interval(draws, draws, confidence, len(values))


def interval_words(confidence: float = 0.95, over: str = "prompts") -> str:
    """Name of the interval of a mean, as it stands in captions and summaries.

    Example:
        >>> interval_words()
        '95 % expanded percentile bootstrap interval over prompts'
    """
    return f"{100 * confidence:g} % expanded percentile bootstrap interval over {over}"


def profile_interval(
    x: Any, *, confidence: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Pointwise mean and bootstrap interval of profiles ``[prompt, point]``.

    A point that fewer than half of the prompts have is NaN; one that fewer than three have has no interval. Prompts
    that lack a point take no part in it, as in :func:`mean_interval`.

    Example:
        >>> profile_interval([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])[0].tolist()
        [3.0, 4.0]
    """
    check_bootstrap(n_boot, confidence)
    values = np.atleast_2d(np.asarray(x, dtype=np.float64))
    mean, low, high = np.full((3, values.shape[1]), NAN)
    for rows, columns in same_prompts(values):
        n = int(rows.sum())
        if n and 2 * n >= len(values):
            kept = values[np.ix_(rows, columns)]
            mean[columns] = kept.mean(0)
            low[columns], high[columns], _ = bootstrap_ends(kept, confidence, n_boot, seed)
    return mean, low, high


def per_prompt(x: Array, prompts: Sequence[Any] | None) -> Array:
    """Mean of each prompt over its rows that have a value, NaN where none has."""
    index, names = cluster_index(prompts, len(x))
    ok = np.isfinite(x)
    count = np.bincount(index[ok], minlength=len(names))
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Array = cluster_sums(x[ok], index[ok], len(names)) / count
    return means


def same_prompts(values: Array) -> list[tuple[Any, list[int]]]:
    """Columns [prompt, column] that have their values at the same prompts: those prompts, and the columns."""
    known = np.isfinite(values)
    groups: dict[bytes, list[int]] = {}
    for c in range(values.shape[1]):
        groups.setdefault(known[:, c].tobytes(), []).append(c)
    return [(known[:, columns[0]], columns) for columns in groups.values()]


@functools.lru_cache(maxsize=8)
def draw_weights(n: int, n_boot: int, seed: int) -> Array:
    """How often each prompt is drawn; the same draws for every number of one comparison."""
    return multiplicity(resample(n, n_boot, seed), n)


def quantile_ends(ordered: Array, confidence: float, n: int) -> tuple[Array, Array]:
    """Ends of the interval of each column of sorted draws [draw, column], as :func:`interval` has them."""
    tail, last = expanded_level(confidence, n), len(ordered) - 1
    return ordered[int(np.floor(tail * last))], ordered[int(np.ceil((1 - tail) * last))]


def bootstrap_ends(values: Array, confidence: float, n_boot: int, seed: int) -> tuple[Array, Array, str | None]:
    n, width = values.shape
    no = "prompts<3" if n < 3 else None if n_boot else "n_boot=0"
    if no:
        return np.full(width, NAN), np.full(width, NAN), no
    # Each column in its own order: the interval of a mean does not depend on the order in which its prompts stand.
    draws = np.sort(draw_weights(n, n_boot, seed) @ np.sort(values, axis=0) / n, axis=0)
    return *quantile_ends(draws, confidence, n), None
