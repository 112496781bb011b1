"""A batch of series with holes, and the order statistics of it.

The scalars of the LIMEN family (ratio, quantile ratio, Gini, winsorised ratio, debt, late collapse) are functions of
one series of ct values. :class:`Values` holds B of them, sorts each at most once, and knows the reasons they share.
Quantiles interpolate linearly between order statistics (type 7); 1.4826 is applied to the raw median of |x − median|.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from dynprobe.metrics._reduce import share
from dynprobe.metrics._result import Array, Bools, Scores, first_reason

__all__ = ["MAD_FACTOR", "Values", "quantile_sorted"]

MAD_FACTOR = 1.4826


def quantile_sorted(ordered: Array, count: Any, q: float) -> Array:
    """Type-7 quantile of the first ``count`` entries of each sorted row; NaN for none."""
    place = q * np.maximum(count - 1, 0)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0))
    rows = np.arange(len(ordered))
    if not ordered.shape[1]:
        return np.full(len(ordered), np.nan)
    some = count > 0
    a, b = np.where(some, ordered[rows, low], 0.0), np.where(some, ordered[rows, high], 0.0)
    return np.where(some, a + (b - a) * (place - low), np.nan)


class Values:
    """B series of length T with validity.

    Args:
        x: Values [B, T].
        ok: Valid entries.
        keep: Unmasked entries.
        tokens: Tokens each series was made from, where known; otherwise a series of no entries counts as too short.
    """

    def __init__(self, x: Array, ok: Bools, keep: Bools, tokens: Any = None) -> None:
        self.x, self.ok, self.keep = x, ok & keep, keep
        self.n, self.n_keep = self.ok.sum(-1), keep.sum(-1)
        self.tokens = tokens
        self.coverage = share(self.n, self.n_keep)

    @cached_property
    def sorted(self) -> Array:
        """Each row ascending, valid entries first."""
        out = np.where(self.ok, self.x, np.inf)
        out.sort(axis=-1)
        return out

    @cached_property
    def mean(self) -> Array:
        """Mean of the valid entries."""
        return share(np.add.reduce(self.x, axis=-1, where=self.ok, initial=0.0), self.n)

    @cached_property
    def max(self) -> Array:
        """Largest valid entry."""
        top = np.maximum.reduce(self.x, axis=-1, where=self.ok, initial=-np.inf)
        return np.where(self.n > 0, top, np.nan)

    def quantile(self, q: float) -> Array:
        """Type-7 quantile of the valid entries."""
        return quantile_sorted(self.sorted, self.n, q)

    @cached_property
    def median(self) -> Array:
        """Median of the valid entries."""
        return self.quantile(0.5)

    @cached_property
    def mad(self) -> Array:
        """Raw median of |x − median|."""
        with np.errstate(invalid="ignore"):
            away = np.where(self.ok, np.abs(self.x - self.median[:, None]), np.inf)
        away.sort(axis=-1)
        return quantile_sorted(away, self.n, 0.5)

    def reasons(self, *more: tuple[Any, str], before: tuple[tuple[Any, str], ...] = ()) -> list[str | None]:
        """Shared reasons in their order, ``before`` ahead of coverage and ``more`` after it."""
        if self.tokens is None:
            start = [((self.n_keep == 0) & (self.x.shape[1] > 0), "empty"), (self.n_keep == 0, "tokens<3")]
        else:
            start = [(self.tokens == 0, "empty"), (self.tokens < 3, "tokens<3"), (self.n_keep == 0, "empty")]
        return first_reason(len(self.x), *start, *before, (2 * self.n < self.n_keep, "coverage"), *more)

    def scores(
        self,
        value: Array,
        reason: list[str | None],
        series: Array | None = None,
        extras: dict[str, Any] | None = None,
    ) -> Scores:
        """Put NaN where there is a reason and pack the rest."""
        undefined = np.fromiter((r is not None for r in reason), bool, len(reason))
        return Scores(
            value=np.where(undefined, np.nan, value),
            reason=reason,
            coverage=self.coverage,
            n_units=self.n_keep if self.tokens is None else self.tokens,
            n_steps=self.n,
            series=series,
            extras=extras or {},
        )
