r"""``varexp.skeleton/1``: how much of the difference between models their skeleton explains.

The response is the mean of a declared metric per model, over one set of prompts; the covariates (log₁₀ parameters,
depth, width, heads, norm, positions) are declared in advance. A published R² of 0.341 on 17 models says little alone:
five covariates of pure noise explain 5/16 = 0.31 on average. So the number never comes alone:

- the **null expectation** p/(n − 1) and the adjusted R²;
- a **permutation p**: covariates are dealt to the models at random, all orders where they are few. Where models share
  their covariates (two seeds of one architecture), whole groups are dealt, for the models of a group are no independent
  evidence about the covariates. Only groups of one size change places: their values are exchangeable as blocks when the
  covariates mean nothing, so the p is exact (Winkler et al. 2015, exchangeability blocks); dealing single models, or
  groups of different sizes, is not. Where no order gives another R², p is NaN and ``reason_p`` says so;
- **leave-one-model-out** R² = 1 − PRESS/SS_total, and **leave-one-family-out** R², where a family is predicted from the
  others; both may be negative: then the mean of all models predicts better than the skeleton;
- the **check** R² ≤ η²_model on the same runs. A covariate is a function of the model, so it cannot explain more of the
  runs than the models do. R² between model means and R² between runs are two numbers: ``r2`` and ``r2_runs``.

R² is refused with ``n<=p+2``. Covariates that are constant in the panel, or follow from those before them, are left out
and named.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from math import factorial, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._clusters import cluster_index, column
from dynprobe.metrics.statistics._crossing import Array
from dynprobe.metrics.statistics._shapley import basis_of, coded, lmg_shares

__all__ = ["Skeleton", "skeleton_r2"]

NAN = float("nan")
#: At most so many orders are all taken.
_EXACT = 5040
_TIE = 1e-9
#: Numbers that are held at once where every order is looked at.
_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a skeleton explains.

    Attributes:
        r2: R² between model means, or NaN.
        r2_adjusted: 1 − (1 − R²)(n − 1)/(n − p − 1).
        null: p/(n − 1), R² of covariates that mean nothing.
        p_value: Share of permutations with an R² as large.
        p_least: The smallest that it can be with these models and covariates, whatever the response.
        permutations: Permutations taken, the observed order among them; all there are where ``exact``.
        exact: Whether all were taken.
        permuted: ``models``; ``groups`` of models with one skeleton; ``groups of one size`` where sizes differ.
        reason_p: Why ``p_value`` is missing: ``skeletons<=p+1`` where the covariates tell all groups apart and every
            order explains as much, ``sizes`` where no two groups are of one size, ``symmetric`` where the orders that
            are allowed leave the covariates as they are.
        r2_leave_model: Leave-one-model-out R².
        r2_leave_skeleton: The same with all models of one skeleton left out together, so that no seed of an
            architecture is predicted from another; NaN where it cannot be.
        r2_leave_family: Leave-one-family-out R².
        reason_family: Why the latter is missing.
        r2_runs: R² of the same covariates over the single runs.
        eta2_model: Share of the models in the runs, the most that ``r2_runs`` can be.
        consistent: Whether it is; None without runs.
        shares: Covariate → Shapley share of R².
        dropped: Covariate → why it was left out.
        n: Models.
        p: Columns of the covariates, the mean not counted.
        n_skeletons: Models that differ in a covariate.
        reason: ``n<=p+2``, ``p<1``, ``zero-denominator``, ``empty``.
    """

    r2: float
    r2_adjusted: float
    null: float
    p_value: float
    permutations: int
    exact: bool
    permuted: str
    r2_leave_model: float
    r2_leave_skeleton: float
    r2_leave_family: float
    reason_family: str | None
    r2_runs: float
    eta2_model: float
    consistent: bool | None
    shares: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    n: int = 0
    p: int = 0
    n_skeletons: int = 0
    reason: str | None = None
    p_least: float = NAN
    reason_p: str | None = None


def skeleton_r2(
    y: Any,
    model: Sequence[Any],
    covariates: Mapping[str, Mapping[Any, Any]],
    *,
    families: Mapping[Any, Any] | None = None,
    n_permutations: int = 9999,
    seed: int = 0,
) -> Skeleton:
    """Regress model means on declared covariates.

    Args:
        y: One value per run, or one per model.
        model: Model of each value.
        covariates: Covariate → model → value; numbers enter linearly, words as a factor.
        families: Model → family, for leave-one-family-out.
        n_permutations: Permutations where there are too many to take all.
        seed: Seed of those.

    Returns:
        R² with everything that must stand beside it.

    Raises:
        MetricError: A covariate is not given for a model.

    Source:
        Reference §9.2, §2.3, §14.1.

    Example:
        >>> found = skeleton_r2([0, 0, 2, 2], "abcd", {"depth": {"a": 0, "b": 0, "c": 1, "d": 1}})
        >>> found.r2, found.r2_adjusted, round(found.null, 4)
        (1.0, 1.0, 0.3333)
    """
    values = column(y, "y")
    index, names = cluster_index(model, len(values), "model")
    ok = np.isfinite(values)
    held = np.unique(index[ok])
    names = [names[i] for i in held]
    values, index = values[ok], np.searchsorted(held, index[ok])
    n = len(names)
    if not n:
        return _missing("empty", 0, 0, 0, {})
    mean = np.bincount(index, weights=values) / np.bincount(index)
    kept, dropped = _columns(names, covariates)
    X = np.hstack([*kept.values(), np.zeros((n, 0))])
    q = basis_of(X)
    p = q.shape[1]
    keys = [row.tobytes() for row in X]
    groups = np.unique(np.array([keys.index(k) for k in keys]), return_inverse=True)[1]
    counts = (n, p, int(groups.max()) + 1)
    if p < 1:
        return _missing("p<1", *counts, dropped)
    if n <= p + 2:
        return _missing("n<=p+2", *counts, dropped)
    centred = mean - mean.mean()
    total = float(centred @ centred)
    if total <= n * (16 * np.finfo(np.float64).eps * float(np.abs(mean).max())) ** 2:
        return _missing("zero-denominator", *counts, dropped)
    r2 = _explained(q, centred) / total
    orders, exact, permuted = _orders(groups, n_permutations, seed)
    least = _least(q, orders)
    drawn = (centred[orders] @ q) ** 2
    hits = int((drawn.sum(1) / total >= r2 * (1 - _TIE)).sum())
    residual = centred - q @ (q.T @ centred)
    leverage = 1 / n + (q**2).sum(1)
    alone = bool((leverage > 1 - 1e-9).any())
    press = NAN if alone else float(((residual / (1 - leverage)) ** 2).sum())
    family, why = _leave_out(X, mean, [None if families is None else families.get(m) for m in names])
    runs, eta2 = _over_runs(X, values, index)
    p_value = NAN if least == 1 else hits / len(orders)
    return Skeleton(
        r2, 1 - (1 - r2) * (n - 1) / (n - p - 1), p / (n - 1), p_value, len(orders), exact, permuted,
        1 - press / total, _leave_out(X, mean, [int(g) for g in groups])[0], family, why, runs, eta2,
        bool(runs <= eta2 + 1e-9), lmg_shares(mean, kept) if len(kept) <= 12 else {}, dropped, *counts,
        p_least=least, reason_p=None if least < 1 else _why_no_p(orders, counts),
    )  # fmt: skip


def _missing(reason: str, n: int, p: int, skeletons: int, dropped: dict[str, str]) -> Skeleton:
    null = p / (n - 1) if n > 1 else NAN
    return Skeleton(
        NAN,
        NAN,
        null,
        NAN,
        0,
        False,
        "models",
        NAN,
        NAN,
        NAN,
        reason,
        NAN,
        NAN,
        None,
        {},
        dropped,
        n,
        p,
        skeletons,
        reason,
    )


def _columns(
    names: Sequence[Any], covariates: Mapping[str, Mapping[Any, Any]]
) -> tuple[dict[str, Array], dict[str, str]]:
    """Columns of the covariates that say something, and why the others do not."""
    kept: dict[str, Array] = {}
    dropped: dict[str, str] = {}
    for name, given in covariates.items():
        lacking = [m for m in names if given.get(m) is None or given.get(m) != given.get(m)]
        if lacking:
            raise MetricError(
                f"covariate {name} is not known of {lacking[0]!r}"
                f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}; give its value, or leave out the "
                "covariate or the model."
            )
        block = coded([given[m] for m in names], len(names), name)
        before = basis_of(np.hstack([*kept.values(), np.zeros((len(names), 0))]))
        after = basis_of(np.hstack([*kept.values(), block]))
        if after.shape[1] > before.shape[1]:
            kept[name] = block
        else:
            dropped[name] = "constant" if basis_of(block).shape[1] == 0 else f"follows from {', '.join(kept)}"
    return kept, dropped


def _explained(q: Array, centred: Array) -> float:
    return float(((q.T @ centred) ** 2).sum())


def _orders(groups: NDArray[np.int64], n_permutations: int, seed: int) -> tuple[NDArray[np.int64], bool, str]:
    """Orders of the models [permutation, model], the given one first: groups of one size change places as wholes."""
    n, sizes = len(groups), np.bincount(groups)
    alike = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]  # groups that may change places
    exact = max(map(len, alike)) <= 7 and prod(factorial(len(k)) for k in alike) <= _EXACT
    if exact:
        parts = [_all_orders(len(k)) for k in alike]
        which = np.indices([len(part) for part in parts]).reshape(len(parts), -1)
        dealt = [part[i] for part, i in zip(parts, which, strict=True)]
    else:
        dealt = [_drawn_orders(len(k), int(n_permutations), int(seed) + i) for i, k in enumerate(alike)]
    out = np.empty((len(dealt[0]), n), dtype=np.int64)
    for among, order in zip(alike, dealt, strict=True):
        members = np.array([np.flatnonzero(groups == group) for group in among])  # [group, member]
        out[:, members.ravel()] = members[order].reshape(len(order), -1)
    if sizes.max() == 1:
        return out, exact, "models"
    return out, exact, "groups" if len(alike) == 1 else "groups of one size"


def _why_no_p(orders: NDArray[np.int64], counts: tuple[int, int, int]) -> str:
    _, p, skeletons = counts
    if skeletons <= p + 1:
        return "skeletons<=p+1"
    return "sizes" if len(orders) == 1 else "symmetric"


def _least(q: Array, orders: NDArray[np.int64]) -> float:
    """Share of the orders that leave the space of the covariates as it is: every response ties with itself there."""
    hat, ties = q @ q.T, 0
    step = max(1, _AT_ONCE // hat.size)
    for i in range(0, len(orders), step):
        some = orders[i : i + step]
        ties += int((np.abs(hat[some[:, :, None], some[:, None, :]] - hat).max((1, 2)) < 1e-9).sum())
    return ties / len(orders)


@functools.lru_cache(maxsize=8)
def _all_orders(n: int) -> NDArray[np.int64]:
    return np.array(list(permutations(range(n))), dtype=np.int64)


@functools.lru_cache(maxsize=8)
def _drawn_orders(n: int, times: int, seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    first = np.arange(n)
    return np.vstack([first, generator.permuted(np.tile(first, (times, 1)), axis=1)])


def _leave_out(X: Array, mean: Array, families: Sequence[Any]) -> tuple[float, str | None]:
    """1 − Σ(y − ŷ without its family)²/SS_total."""
    if any(f is None for f in families):
        return NAN, "families"
    labels = list(dict.fromkeys(families))
    if len(labels) < 2:
        return NAN, "families<2"
    error = 0.0
    for label in labels:
        out = np.array([f == label for f in families])
        train = np.hstack([np.ones((int((~out).sum()), 1)), X[~out]])
        scale = np.maximum(np.abs(train).max(0), 1e-300)
        everything = np.hstack([np.ones((len(X), 1)), X]) / scale
        # What the others do not fix cannot be predicted: a covariate that only this family varies.
        rank = np.linalg.matrix_rank(train / scale, tol=1e-9 * np.sqrt(len(X)))
        if len(train) <= rank or np.linalg.matrix_rank(everything, tol=1e-9 * np.sqrt(len(X))) > rank:
            return NAN, f"not predictable without {label}"
        beta = np.linalg.lstsq(train / scale, mean[~out], rcond=None)[0]
        error += float(((mean[out] - everything[out] @ beta) ** 2).sum())
    return 1 - error / float(((mean - mean.mean()) ** 2).sum()), None


def _over_runs(X: Array, values: Array, index: NDArray[np.int64]) -> tuple[float, float]:
    """R² of the covariates over the single runs, and η² of the models over the same."""
    centred = values - values.mean()
    total = float(centred @ centred)
    if not total > 0:
        return NAN, NAN
    size = np.bincount(index)
    mean = np.bincount(index, weights=centred) / size
    return _explained(basis_of(X[index]), centred) / total, float((size * mean**2).sum()) / total
