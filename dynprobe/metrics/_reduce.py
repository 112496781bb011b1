"""From terms to a number: masks, coverage, profiles and the reasons for NaN.

One rule everywhere. Masked terms leave the denominator of the coverage, invalid ones stay in it. A profile entry below
one half is NaN; the scalar is the unweighted mean of the entries that are left, and NaN when less than half of *all*
terms is valid. When several reasons apply the order is: empty, too short, too few units, coverage, zero denominator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.metrics._result import Array, Bools, Scores, first_reason

__all__ = ["mean_of_profile", "mean_over_units", "profile_reasons", "share"]


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


def mean_of_profile(
    profile: Array,
    ok: Bools,
    keep: Bools,
    *,
    n_states: Any,
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
        ok: Valid terms [S, B, N].
        keep: Unmasked terms [S, B, N].
        n_states: Per row, unmasked states; zero means empty.
        short: Rows that are too short.
        short_text: Their reason.
        few: Rows with too few units.
        few_text: Their reason.
        few_profile: Entries [S, B] with too few units.
        per_unit: Passed on.
        extras: Passed on.
    """
    batch = profile.shape[1]
    ok = ok & keep
    n_ok, n_keep = ok.sum(-1), keep.sum(-1)
    profile = np.where((2 * n_ok >= n_keep) & (n_ok > 0), profile, np.nan)
    all_ok, all_keep = n_ok.sum(0), n_keep.sum(0)
    coverage = share(all_ok, all_keep)
    seen = ~np.isnan(profile)
    n_seen = seen.sum(0)
    value = share(np.add.reduce(profile, axis=0, where=seen, initial=0.0), n_seen)
    low = 2 * all_ok < all_keep
    empty = (np.asarray(n_states) == 0) | ((all_keep == 0) & ~np.asarray(short))
    reason = first_reason(
        batch,
        (empty, "empty"),
        (short, short_text),
        (few, few_text),
        (low, "coverage"),
        (n_seen == 0, "zero-denominator"),
    )
    undefined = np.fromiter((r is not None for r in reason), bool, batch)
    cases = () if few_profile is None else ((few_profile, few_text),)
    return Scores(
        value=np.where(undefined, np.nan, value),
        reason=reason,
        coverage=coverage,
        n_units=np.logical_or.reduce(keep, axis=0).sum(-1) if keep.shape[0] else np.zeros(batch, np.int64),
        n_steps=n_seen,
        profile=profile,
        profile_coverage=share(n_ok, n_keep),
        profile_reason=profile_reasons(profile, n_ok, n_keep, *cases),
        per_unit=per_unit,
        extras=extras or {},
    )
