"""The design of a panel: models crossed with prompts, prompts inside categories, seeds inside the cells.

Every factor of the design is a function of the cell (model, prompt), so the rows enter a projection only through the
count and the mean of each cell; a panel of a million rows costs what its cells cost. Prompts, the factor with the most
levels, are absorbed by centring inside each of them, so that no matrix has a column per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._clusters import cluster_index, column
from dynprobe.metrics.statistics._crossing import Array

__all__ = ["TERMS", "CrossedDesign", "crossed_design"]

#: The terms of the design, from the widest to what is left inside a cell.
TERMS = ("model", "category", "model:category", "prompt", "model:prompt", "seed")

#: Relative size below which a pivot, or a sum of squares, is rounding.
_TINY = 1e-10
_ROUNDING = 16 * np.finfo(np.float64).eps


@dataclass(frozen=True, eq=False)
class CrossedDesign:
    """Values of a panel, gathered into cells.

    Attributes:
        y: Values that are known [row].
        model: Model of each row, as a number.
        category: Category of each row.
        prompt: Prompt of each row.
        cell: Cell of each row.
        cell_model: Model of each cell.
        cell_category: Category of each cell.
        cell_prompt: Prompt of each cell.
        count: Rows of each cell.
        mean: Mean of each cell.
        n_asked: Rows that were handed in, known or not.
        copies: Rows left out because every cell repeats one value: copies, not replicates.
    """

    y: Array
    model: NDArray[np.int64]
    category: NDArray[np.int64]
    prompt: NDArray[np.int64]
    cell: NDArray[np.int64]
    cell_model: NDArray[np.int64]
    cell_category: NDArray[np.int64]
    cell_prompt: NDArray[np.int64]
    count: Array
    mean: Array
    n_asked: int
    copies: int = 0

    @property
    def n(self) -> int:
        """Rows with a value."""
        return len(self.y)

    @property
    def n_models(self) -> int:
        """Models that have a value."""
        return len(np.unique(self.model))

    @property
    def n_categories(self) -> int:
        """Categories that have a value."""
        return len(np.unique(self.category))

    @property
    def n_prompts(self) -> int:
        """Prompts that have a value."""
        return len(np.unique(self.prompt))

    @property
    def balanced(self) -> bool:
        """Whether all models have all prompts equally often, and all categories as many prompts."""
        whole = len(self.count) == self.n_models * self.n_prompts and bool((self.count == self.count[0]).all())
        per_category = np.bincount(self.category_of_prompt)
        return whole and len(np.unique(per_category[per_category > 0])) == 1

    @property
    def category_of_prompt(self) -> NDArray[np.int64]:
        """Category of each prompt that has a value."""
        _, first = np.unique(self.cell_prompt, return_index=True)
        return self.cell_category[first]

    @property
    def total(self) -> float:
        """Sum of squares about the mean."""
        return float(((self.y - self.y.mean()) ** 2).sum()) if self.n else 0.0

    @property
    def constant(self) -> bool:
        """Whether the values differ by rounding at most."""
        return not self.n or bool(self.total <= self.n * (_ROUNDING * float(np.abs(self.y).max())) ** 2)

    def residual(self, terms: frozenset[str]) -> tuple[float, int]:
        """Sum of squares that a set of terms leaves, and the rank of their space (the mean included).

        Args:
            terms: Any of :data:`TERMS` but ``seed``; a term brings along the terms that contain it.
        """
        if "model:prompt" in terms:
            return float(((self.y - self.mean[self.cell]) ** 2).sum()), len(self.count)
        within = float(((self.y - self.mean[self.cell]) ** 2).sum())
        factors = []
        if "model:category" in terms:
            factors = [self.cell_model * (self.cell_category.max() + 1) + self.cell_category]
        else:
            factors += [self.cell_model] if "model" in terms else []
            factors += [self.cell_category] if "category" in terms and "prompt" not in terms else []
        absorbed = self.cell_prompt if "prompt" in terms else np.zeros(len(self.count), dtype=np.int64)
        rest, rank = _project(self.mean, self.count, absorbed, factors)
        return within + rest, rank


def crossed_design(
    y: Any, model: Sequence[Any], category: Sequence[Any] | None, prompt: Sequence[Any]
) -> CrossedDesign:
    """Gather rows into a design.

    Args:
        y: One value per row; a row without a value is left out and counted.
        model: Model of each row.
        category: Category of each row; None is one category.
        prompt: Prompt of each row; a prompt lies in one category.

    Raises:
        MetricError: Lengths differ, or a prompt lies in two categories.
    """
    values = column(y, "y")
    n = len(values)
    m, _ = cluster_index(model, n, "model")
    c, names = cluster_index(["all"] * n if category is None else category, n, "category")
    p, prompts = cluster_index(prompt, n, "prompt")
    first = np.full(len(prompts), -1, dtype=np.int64)
    first[p[::-1]] = c[::-1]
    if (wrong := np.flatnonzero(first[p] != c)).size:
        at = wrong[0]
        raise MetricError(
            f"prompt {prompts[p[at]]!r} lies in the categories {names[first[p[at]]]!r} and {names[c[at]]!r}; a prompt "
            "belongs to one category. Give prompts of one name and several texts names of their own."
        )
    ok = np.isfinite(values)
    design = _gathered(values[ok], m[ok], c[ok], p[ok], n)
    if design.n > len(design.count) and not design.constant:
        inside = ((design.y - design.mean[design.cell]) ** 2).sum()
        if inside <= design.n * (_ROUNDING * float(np.abs(design.y).max())) ** 2:
            _, one = np.unique(design.cell, return_index=True)
            kept = _gathered(design.y[one], design.model[one], design.category[one], design.prompt[one], n)
            return CrossedDesign(**{**vars(kept), "copies": design.n - kept.n})
    return design


def _gathered(
    y: Array, m: NDArray[np.int64], c: NDArray[np.int64], p: NDArray[np.int64], n_asked: int
) -> CrossedDesign:
    width = int(p.max()) + 1 if len(p) else 1
    keys, first, cell = np.unique(m * width + p, return_index=True, return_inverse=True)
    count = np.bincount(cell, minlength=len(keys)).astype(np.float64)
    mean = np.bincount(cell, weights=y, minlength=len(keys)) / np.maximum(count, 1)
    return CrossedDesign(y, m, c, p, cell, m[first], c[first], p[first], count, mean, n_asked)


def _project(
    y: Array, weight: Array, absorbed: NDArray[np.int64], factors: Sequence[NDArray[np.int64]]
) -> tuple[float, int]:
    """Weighted sum of squares that an absorbed factor and others leave, and the rank of their space."""
    from scipy.linalg import qr

    groups = np.unique(absorbed, return_inverse=True)[1]
    mass = np.bincount(groups, weights=weight)

    def centred(x: Array) -> Array:
        return np.asarray(x - (np.bincount(groups, weights=weight * x) / mass)[groups])

    root = np.sqrt(weight)
    left, rank = root * centred(y), len(mass)
    columns = [centred((f == level).astype(np.float64)) for f in factors for level in np.unique(f)]
    if columns:
        matrix = root[:, None] * np.stack(columns, axis=1)
        q, r, _ = qr(matrix, mode="economic", pivoting=True)
        size = np.abs(np.diag(r))
        found = int((size > _TINY * np.sqrt(weight.sum())).sum())
        q = q[:, :found]
        left = left - q @ (q.T @ left)
        left = left - q @ (q.T @ left)  # once more: what the first pass left of rounding
        rank += found
    return float(left @ left), rank
