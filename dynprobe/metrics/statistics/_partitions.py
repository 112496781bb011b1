r"""Partitions of models: how alike two are, and which clusters come back when the prompts are drawn again.

**ARI**, the adjusted Rand index: 1 for equal partitions, 0 on average for partitions dealt at random. Its permutation
interval is where it lies when one of the two is dealt at random; a value inside it says nothing.

**Stable clusters.** Each model is a profile over prompts. The models are clustered (average linkage on Euclidean
distance, the number of clusters that has the largest mean silhouette on all prompts, unless given), and again on every
bootstrap sample of the prompts. A set of models is a *stable cluster* when every pair of it falls together in at least
95 % of the samples. The share of models outside the largest is the **fragmentation**: 0 when one stable cluster holds
all models, near 1 when no two models stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import resample
from dynprobe.metrics.statistics._clusters import cluster_index
from dynprobe.metrics.statistics._crossing import Array

__all__ = ["RandIndex", "Topology", "adjusted_rand", "stable_clusters"]

NAN = float("nan")
_STABLE = 0.95
_MOST_CLUSTERS = 8


@dataclass(frozen=True, slots=True)
class RandIndex:
    """Agreement of two partitions.

    Attributes:
        value: Adjusted Rand index.
        null_low: Lower end of the middle 95 % (or other coverage) of its values under permutation.
        null_high: Upper end.
        p: (1 + permutations as large)/(1 + permutations).
        n: Items.
        reason: ``units<2``.
    """

    value: float
    null_low: float
    null_high: float
    p: float
    n: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """Clusters of models and how stable they are.

    Attributes:
        models: The models.
        labels: Cluster of each on all prompts.
        n_clusters: Clusters.
        together: Share of samples in which two models fall together [model, model].
        stable: Stable clusters, the largest first; every model is in one, if only alone.
        fragmentation: 1 − size of the largest stable cluster / number of models.
        silhouette: Mean silhouette of the clusters on all prompts.
        n_boot: Samples.
        threshold: Share of samples from which a pair counts as stable.
        n_prompts: Prompts that all models have.
        reason: ``models<3``, ``prompts<3``, ``zero-denominator``.
    """

    models: tuple[Any, ...]
    labels: tuple[int, ...]
    n_clusters: int
    together: Array
    stable: tuple[tuple[Any, ...], ...]
    fragmentation: float
    silhouette: float
    n_boot: int
    threshold: float
    n_prompts: int
    reason: str | None = None


def adjusted_rand(
    a: Sequence[Any], b: Sequence[Any], *, n_permutations: int = 9999, confidence: float = 0.95, seed: int = 0
) -> RandIndex:
    """Adjusted Rand index with its permutation interval.

    ARI = (Σ_ij C(n_ij, 2) − E)/(½(Σ_i C(a_i, 2) + Σ_j C(b_j, 2)) − E), E = Σ_i C(a_i, 2)·Σ_j C(b_j, 2)/C(n, 2).

    Args:
        a: Label of each item in one partition.
        b: Label of each in the other.
        n_permutations: Permutations of ``b``.
        confidence: Coverage of the interval.
        seed: Seed of the permutations.

    Source:
        Hubert and Arabie 1985; reference §9.3.

    Example:
        >>> adjusted_rand([1, 1, 2, 2], [1, 2, 1, 2]).value, adjusted_rand("aabb", "ccdd").value
        (-0.5, 1.0)
    """
    x, _ = cluster_index(a, len(a), "a")
    y, _ = cluster_index(b, len(a), "b")
    n = len(x)
    if n < 2:
        return RandIndex(NAN, NAN, NAN, NAN, n, "units<2")
    value = _rand(x, y)
    if not n_permutations:
        return RandIndex(value, NAN, NAN, NAN, n)
    generator = np.random.default_rng(seed)
    drawn = np.array([_rand(x, y[generator.permutation(n)]) for _ in range(int(n_permutations))])
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return RandIndex(value, float(low), float(high), (1 + int((drawn >= value - 1e-12).sum())) / (1 + len(drawn)), n)


def _rand(x: NDArray[np.int64], y: NDArray[np.int64]) -> float:
    def pairs(counts: NDArray[np.int64]) -> float:
        return float((counts * (counts - 1)).sum()) / 2

    cells = np.bincount(x * (int(y.max()) + 1) + y)
    both, rows, columns = pairs(cells), pairs(np.bincount(x)), pairs(np.bincount(y))
    # Numerator and denominator are both multiplied by C(n, 2): whole and half numbers, not rounded before the quotient.
    pairs_in_all = len(x) * (len(x) - 1) / 2
    expected = rows * columns
    most = (rows + columns) / 2 * pairs_in_all
    # 0/0 for two partitions of single items, or of one cluster: they are equal.
    return 1.0 if most == expected else (both * pairs_in_all - expected) / (most - expected)


def stable_clusters(
    profiles: Any, models: Sequence[Any], *, n_clusters: int | None = None, n_boot: int = 1000,
    threshold: float = _STABLE, seed: int = 0,
) -> Topology:  # fmt: skip
    """Cluster models by their profiles, and again on bootstrap samples of the prompts.

    Args:
        profiles: Values [model, prompt] or [model, prompt, metric]; prompts that a model lacks are left out. Several
            metrics are each divided by their SD.
        models: Names.
        n_clusters: Number of clusters; default that with the largest mean silhouette, from 2 to 8.
        n_boot: Samples of the prompts.
        threshold: Share of samples in which every pair of a stable cluster falls together.
        seed: Seed of the samples.

    Raises:
        MetricError: The shape does not fit the names, or ``n_clusters`` is not from 1 to the number of models.

    Source:
        Reference §9.3; the rule stands in ``threshold``.

    Example:
        >>> found = stable_clusters([[0, 0, 0, 0], [0, 0.1, 0, 0.1], [5, 5, 5, 5]], "abc", n_boot=100)
        >>> found.stable, round(found.fragmentation, 4)
        ((('a', 'b'), ('c',)), 0.3333)
    """
    X = np.asarray(profiles, dtype=np.float64)
    X = X[:, :, None] if X.ndim == 2 else X
    names = tuple(models)
    if X.ndim != 3 or len(X) != len(names):
        raise MetricError(f"profiles are [model, prompt] of {len(names)} models, found {list(np.shape(profiles))}.")
    n = len(names)
    X = X[:, np.isfinite(X).all((0, 2))]
    spread = X.std((0, 1)) if X.shape[1] else np.zeros(X.shape[2])
    size = np.abs(X).max((0, 1), initial=0.0)
    X = X[:, :, spread > 1e-12 * np.maximum(size, 1e-300)]
    why = "models<3" if n < 3 else "prompts<3" if X.shape[1] < 3 else "zero-denominator" if not X.shape[2] else None
    if why:
        return Topology(names, (), 0, np.full((n, n), NAN), (), NAN, NAN, 0, threshold, X.shape[1], why)
    if n_clusters is not None and not 1 <= n_clusters <= n:
        raise MetricError(f"n_clusters lies between 1 and the number of models {n}, found {n_clusters}.")
    X = X / X.std((0, 1))
    # Squared distance per prompt: a sample of prompts is a sum of these with multiplicities.
    square = ((X[:, None] - X[None, :]) ** 2).sum(-1)
    distance = np.sqrt(square.mean(-1))
    if n_clusters is None:
        tried = [(_silhouette(distance, _cut(distance, k)), -k) for k in range(2, min(n - 1, _MOST_CLUSTERS) + 1)]
        k = -max(tried)[1]
    else:
        k = n_clusters
    labels = _cut(distance, k)
    picks = resample(X.shape[1], int(n_boot), seed)
    together = np.zeros((n, n))
    for pick in picks:
        drawn = _cut(np.sqrt(square[:, :, pick].mean(-1)), k)
        together += drawn[:, None] == drawn[None, :]
    together /= max(len(picks), 1)
    stable = _cliques(together >= threshold)
    return Topology(
        names, tuple(int(v) for v in labels), k, together, tuple(tuple(names[i] for i in c) for c in stable),
        1 - len(stable[0]) / n, _silhouette(distance, labels), len(picks), threshold, X.shape[1],
    )  # fmt: skip


def _cut(distance: Array, k: int) -> NDArray[np.int64]:
    """Cluster of each model: average linkage cut into k, numbered in the order of the models."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    found = fcluster(linkage(squareform(distance, checks=False), "average"), k, "maxclust")
    return cluster_index(list(found), len(found))[0]


def _silhouette(distance: Array, labels: NDArray[np.int64]) -> float:
    """Mean over models of (b − a)/max(a, b): distance to the nearest other cluster against the own; 0 when alone."""
    kinds = np.unique(labels)
    if len(kinds) < 2:
        return NAN
    out = np.zeros(len(labels))
    for i, own in enumerate(labels):
        mates = (labels == own) & (np.arange(len(labels)) != i)
        if not mates.any():
            continue
        a = distance[i, mates].mean()
        b = min(distance[i, labels == other].mean() for other in kinds if other != own)
        out[i] = (b - a) / max(a, b) if max(a, b) > 0 else 0.0
    return float(out.mean())


def _cliques(joined: NDArray[np.bool_]) -> list[list[int]]:
    """Split the models into sets whose members are all joined: the largest such set, then the next of what is left."""
    left, out = set(range(len(joined))), []
    neighbours = [{j for j in range(len(joined)) if j != i and joined[i, j]} for i in range(len(joined))]
    while left:
        best: list[int] = []

        def grow(held: list[int], possible: set[int], excluded: set[int]) -> None:
            nonlocal best
            if not possible and not excluded and (len(held), [-i for i in sorted(held)]) > (
                len(best), [-i for i in sorted(best)]
            ):  # fmt: skip
                best = held
            if not possible or len(held) + len(possible) < len(best):
                return
            pivot = max(sorted(possible | excluded), key=lambda i: len(neighbours[i] & possible))
            for i in sorted(possible - neighbours[pivot]):
                grow([*held, i], possible & neighbours[i], excluded & neighbours[i])
                possible, excluded = possible - {i}, excluded | {i}

        grow([], set(left), set())
        out.append(sorted(best))
        left -= set(best)
    return sorted(out, key=lambda c: (-len(c), c))
