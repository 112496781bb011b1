"""From terms to a number: masks, coverage, profiles and the reasons for NaN.

One rule everywhere. Masked terms leave the denominator of the coverage, invalid ones stay in it. A profile entry below
one half is NaN; the scalar is the unweighted mean of the entries that are left, and NaN when less than half of *all*
terms is valid. When several reasons apply the order is: empty, too short, too few units, coverage, zero denominator.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from dynprobe.metrics._result import Array, Bools, Scores, first_reason

__all__ = ["Terms", "mean_of_profile", "mean_over_units", "profile_reasons", "share"]


def share(part: Any, whole: Any) -> Array:
    """``part / whole`` with NaN where the whole is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
    return ratio


def mean_over_units(x: Array, ok: Bools, axis: int = -1) -> Array:
    """Mean of ``x`` where ``ok``; NaN where nothing is."""
    return share(np.add.reduce(x, axis=axis, where=ok, initial=0.0), ok.sum(axis))


def profile_reasons(profile: Array, n_ok: Any, n_keep: Any, *cases: tuple[Any, str]) -> Any:
    """Reason per profile entry [S, B]; None beside a number."""
    out = np.full(profile.shape, None, dtype=object)
    missing = np.isnan(profile)
    if missing.any():
        out[missing] = "zero-denominator"
        out[missing & (2 * n_ok < n_keep)] = "coverage"
        for holds, text in reversed(cases):
            out[missing & holds] = text
        out[missing & (n_keep == 0)] = "empty"
    return out


class Terms:
    """Which terms [S, B, N] of an aggregate are valid and unmasked, and their counts, made once for many metrics.

    Args:
        ok: Valid terms; masked ones may be True.
        keep: Unmasked terms.
        n_states: Per row, unmasked states; zero means empty.
    """

    def __init__(self, ok: Bools, keep: Bools, n_states: Any) -> None:
        self.ok, self.keep, self.n_states = ok & keep, keep, np.asarray(n_states)
        self.n_ok, self.n_keep = self.ok.sum(-1), keep.sum(-1)
        self.all_ok, self.all_keep = self.n_ok.sum(0), self.n_keep.sum(0)
        self.batch = keep.shape[1]
        self.complete = bool((self.all_ok == self.all_keep).all()) and bool((self.n_keep > 0).all())

    @cached_property
    def coverage(self) -> Array:
        """Valid over unmasked terms per row."""
        return share(self.all_ok, self.all_keep)

    @cached_property
    def profile_coverage(self) -> Array:
        """Valid over unmasked terms per entry."""
        return share(self.n_ok, self.n_keep)

    @cached_property
    def enough(self) -> Bools:
        """Entries with at least half of their terms."""
        return (2 * self.n_ok >= self.n_keep) & (self.n_ok > 0)

    @cached_property
    def n_units(self) -> Any:
        """Units with at least one unmasked term, per row."""
        return np.logical_or.reduce(self.keep, axis=0).sum(-1)

    @cached_property
    def _over_units(self) -> Array:
        return np.where(self.n_ok > 0, self.n_ok, np.nan)

    @cached_property
    def _over_steps(self) -> Array:
        count = self.ok.sum(0)
        return np.where(count > 0, count, np.nan)

    def mean(self, x: Array) -> Array:
        """Mean over the valid units of each entry, [S, B]."""
        return np.asarray(np.add.reduce(x, axis=-1, where=self.ok, initial=0.0) / self._over_units)

    def mean_steps(self, x: Array) -> Array:
        """Mean over the valid steps of each unit, [B, N]."""
        return np.asarray(np.add.reduce(x, axis=0, where=self.ok, initial=0.0) / self._over_steps)


def mean_of_profile(
    profile: Array,
    terms: Terms,
    *,
    short: Bools | bool = False,
    short_text: str = "depth<2",
    few: Any = False,
    few_text: str = "units<4",
    few_profile: Any = None,
    per_unit: Array | None = None,
    extras: dict[str, Any] | None = None,
) -> Scores:
    """Close a profile into a scalar.

    Args:
        profile: [S, B], already NaN where undefined for its own reasons; entries below half coverage become NaN here.
        terms: The terms behind it.
        short: Rows that are too short.
        short_text: Their reason.
        few: Rows with too few units.
        few_text: Their reason.
        few_profile: Entries [S, B] with too few units.
        per_unit: Passed on.
        extras: Passed on.
    """
    if not terms.complete:
        profile = np.where(terms.enough, profile, np.nan)
    seen = ~np.isnan(profile)
    n_seen = seen.sum(0)
    reason: list[str | None]
    if terms.complete and len(profile) and short is False and few is False and bool(seen.all()):
        reason, value = [None] * terms.batch, np.add.reduce(profile, axis=0) / len(profile)
        profile_reason = None
    else:
        value = share(np.add.reduce(profile, axis=0, where=seen, initial=0.0), n_seen)
        empty = (terms.n_states == 0) | ((terms.all_keep == 0) & ~np.asarray(short))
        low = 2 * terms.all_ok < terms.all_keep
        reason = first_reason(
            terms.batch,
            (empty, "empty"),
            (short, short_text),
            (few, few_text),
            (low, "coverage"),
            (n_seen == 0, "zero-denominator"),
        )
        value = np.where([r is not None for r in reason], np.nan, value)
        cases = () if few_profile is None else ((few_profile, few_text),)
        profile_reason = profile_reasons(profile, terms.n_ok, terms.n_keep, *cases)
    return Scores(
        value=value,
        reason=reason,
        coverage=terms.coverage,
        n_units=terms.n_units,
        n_steps=n_seen,
        profile=profile,
        profile_coverage=terms.profile_coverage,
        profile_reason=profile_reason,
        per_unit=per_unit,
        extras=extras or {},
    )
