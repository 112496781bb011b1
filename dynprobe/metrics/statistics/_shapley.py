"""Shares of R² among covariates that go together: the mean over all orders in which they could have been entered."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._clusters import column
from dynprobe.metrics.statistics._crossing import Array

__all__ = ["basis_of", "coded", "lmg_shares"]

#: All subsets are fitted: 2¹² regressions are the most.
_MOST = 12
_TINY = 1e-9


def lmg_shares(y: Any, covariates: Mapping[str, Any]) -> dict[str, float]:
    """Lindeman, Merenda and Gold's shares: the Shapley value of each covariate in R².

    Args:
        y: Response, one number per row.
        covariates: Name → one value per row (numbers enter linearly, words as a factor), or a matrix whose columns stay
            together.

    Returns:
        Name → share; they add up to R². All NaN where the response is constant.

    Raises:
        MetricError: Lengths differ, a value is missing, or there are more than 12 covariates.

    Source:
        Grömping, JSS 17(1), 2006; reference §9.1.

    Example:
        >>> y = [0.0, 1.0, 2.0, 3.0]
        >>> {k: round(v, 6) for k, v in lmg_shares(y, {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}).items()}
        {'a': 0.8, 'b': 0.2}
    """
    values = column(y, "y")
    if len(covariates) > _MOST:
        raise MetricError(f"{len(covariates)} covariates have {2 ** len(covariates)} subsets; give at most {_MOST}.")
    blocks = {name: coded(x, len(values), name) for name, x in covariates.items()}
    if not np.isfinite(values).all():
        raise MetricError("y has missing values; leave their rows out of y and of the covariates.")
    centred = values - values.mean()
    total = float(centred @ centred)
    if total <= len(values) * (16 * np.finfo(np.float64).eps * float(np.abs(values).max(initial=0.0))) ** 2:
        return dict.fromkeys(blocks, float("nan"))
    names = list(blocks)
    k = len(names)
    r2: dict[frozenset[str], float] = {}
    for size in range(k + 1):
        for some in combinations(names, size):
            q = basis_of(np.hstack([blocks[n] for n in some])) if some else np.zeros((len(values), 0))
            r2[frozenset(some)] = float(((q.T @ centred) ** 2).sum()) / total
    out = dict.fromkeys(names, 0.0)
    for name in names:
        others = [n for n in names if n != name]
        for size in range(k):
            weight = factorial(size) * factorial(k - 1 - size) / factorial(k)
            for some in combinations(others, size):
                out[name] += weight * (r2[frozenset((*some, name))] - r2[frozenset(some)])
    return out


def coded(x: Any, n: int, name: str) -> Array:
    """Columns of a covariate: a number as it is, words as 0/1 without their first level."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    raw = np.asarray(list(x) if not isinstance(x, np.ndarray) else x)
    if len(raw) != n:
        raise MetricError(f"covariate {name} has {len(raw)} values for {n} rows.")
    if raw.dtype.kind in "biuf":
        out = raw.astype(np.float64).reshape(n, -1)
        if not np.isfinite(out).all():
            raise MetricError(f"covariate {name} has missing values; leave those rows out, or the covariate.")
        return out
    words = [str(v) for v in raw]
    levels = list(dict.fromkeys(words))
    return np.array([[float(w == level) for level in levels[1:]] for w in words]).reshape(n, -1)


def basis_of(X: Array) -> Array:
    """Orthonormal basis of the centred columns; a column that follows from the others adds none."""
    from scipy.linalg import qr

    Z = X - X.mean(0)
    size = np.sqrt((Z**2).sum(0))
    live = size > _TINY * np.maximum(np.abs(X).max(0, initial=0.0), 1e-300) * np.sqrt(len(X))
    if not live.any():
        return np.zeros((len(X), 0))
    q, r, _ = qr(Z[:, live] / size[live], mode="economic", pivoting=True)
    return np.asarray(q[:, : int((np.abs(np.diag(r)) > _TINY).sum())])
