"""``rsa.dist``: representational similarity analysis, the correlation of two tables of distances between units.

Units are compared with each other at one depth, and again at the next (or in another run); the correlation of the two
lists of distances says how far the geometry was kept. Pearson is sensitive to single far units, Spearman only to the
order of the distances. Distances are Euclidean, between states as they are (``rows=raw``) or between their directions
(``rows=cosine``); with massive-norm units use the latter. Windows as in ``kappa.geom``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._cka import checked_pair
from dynprobe.metrics._geometry import NEAR_ZERO, norms_and_validity
from dynprobe.metrics._gram import MIN_UNITS, Windows, check_window, lay_windows
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._pairwise import pairwise
from dynprobe.metrics._reduce import Terms, mean_of_profile, share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores

__all__ = ["ranks", "rsa", "rsa_paired"]

_TIE = NEAR_ZERO * np.finfo(np.float64).eps


def ranks(x: Array) -> Array:
    """Ranks from 1 with ties at their mean; values closer than 16·eps of themselves are ties.

    Example:
        >>> import numpy as np
        >>> ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist()
        [3.5, 1.0, 3.5, 2.0]
    """
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    starts = np.r_[True, np.diff(ordered) > _TIE * np.abs(ordered[1:])]
    group = np.cumsum(starts) - 1
    size = np.bincount(group)
    mean = np.cumsum(size) - (size - 1) / 2.0
    out: Array = np.empty(len(x))
    out[order] = mean[group]
    return out


def _correlation(a: Array, b: Array, floor: float, corr: str) -> float:
    """Correlation of two lists of distances; NaN where one is constant."""
    if not len(a) or np.ptp(a) <= floor or np.ptp(b) <= floor:
        return float("nan")
    if corr == "spearman":
        a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    bottom = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / bottom, -1.0, 1.0)) if bottom > 0 else float("nan")


class _Tables:
    """Distances of a trajectory, one depth at a time."""

    def __init__(self, windows: Windows, states: Sequence[torch.Tensor], norm: Array, ok: Bools, rows: str) -> None:
        self.windows, self.states, self.cosine = windows, states, rows == "cosine"
        self.usable = windows.take(ok) & windows.there.reshape(windows.groups, windows.size)
        self.norm = windows.take(norm)

    def at(self, depth: int) -> Array:
        """Distances [G, W, W] of one depth in units of the largest norm (of the directions with ``rows=cosine``)."""
        x = self.windows.gather(self.states[depth])
        return pairwise(x, self.norm[depth], self.usable[depth], cosine=self.cosine)[0]


def _checked(params: dict[str, Any], metric: str) -> tuple[str, str, int]:
    corr, rows, W = params["corr"], params["rows"], params["W"]
    if corr not in ("pearson", "spearman"):
        raise MetricError(f"{metric}: corr is 'pearson' or 'spearman', found {corr!r}.")
    if rows not in ("raw", "cosine"):
        raise MetricError(f"{metric}: rows is 'raw' or 'cosine', found {rows!r}.")
    check_window(W, MIN_UNITS, metric)
    return corr, rows, W


def _compare(a: Array, b: Array, floor: float, batch: int, corr: str) -> Array:
    """Mean over the windows of each row of the correlation of two tables [G, W, W]."""
    upper = np.triu(np.ones(a.shape[1:], bool), 1)
    both = ~np.isnan(a) & ~np.isnan(b)
    enough = np.diagonal(both, axis1=1, axis2=2).sum(-1) >= MIN_UNITS
    value = np.full(len(a), np.nan)
    for g in np.flatnonzero(enough):
        pairs = both[g] & upper
        value[g] = _correlation(a[g][pairs], b[g][pairs], floor, corr)
    by_row = value.reshape(batch, -1)
    good = ~np.isnan(by_row)
    return share(np.where(good, by_row, 0.0).sum(-1), good.sum(-1))


def _close(profile: Array, terms: Terms, short: bool, extras: dict[str, Any]) -> Scores:
    few: NDArray[np.bool_] = terms.n_ok < MIN_UNITS
    return mean_of_profile(
        np.where(few, np.nan, profile), terms, short=short,
        few=few.all(0) if len(few) else False, few_profile=few, extras=extras,
    )  # fmt: skip


def rsa(
    states: Sequence[torch.Tensor], norm: Array, valid: Bools, keep: Bools, *, eps: float, params: dict[str, Any]
) -> Scores:
    """Correlation of the distances at neighbouring depths, for every row.

    Args:
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        eps: Rounding unit: distances whose spread is below 16·eps of the largest norm count as constant.
        params: ``corr``, ``rows``, ``W``.
    """
    corr, rows, W = _checked(params, "rsa.dist/1")
    n_depths, batch = len(states), keep.shape[1]
    terms = Terms(valid[1:] & valid[:-1], keep[1:] & keep[:-1], keep.sum((0, 2)))
    profile = np.full((max(n_depths - 1, 0), batch), np.nan)
    if n_depths > 1 and terms.n_ok.max(initial=0) >= MIN_UNITS:
        tables = _Tables(Windows(lay_windows(keep, W), torch.float64), states, norm, valid & keep, rows)
        before = tables.at(0)
        for step in range(n_depths - 1):
            now = tables.at(step + 1)
            profile[step] = _compare(before, now, NEAR_ZERO * eps, batch, corr)
            before = now
    extras = {"n_invalid": (keep & ~valid).sum((0, 2)), "n_nonfinite": (keep & np.isnan(norm)).sum((0, 2))}
    return _close(profile, terms, n_depths < 2, extras)


def rsa_paired(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], norm: tuple[Array, Array], valid: tuple[Bools, Bools],
    keep: Bools, *, eps: float, params: dict[str, Any],
) -> Scores:  # fmt: skip
    """Correlation of the distances in two runs depth by depth, for every row; as :func:`rsa` otherwise."""
    corr, rows, W = _checked(params, "rsa.dist.paired/1")
    ok = valid[0] & valid[1] & keep
    terms = Terms(ok, keep, keep.sum((0, 2)))
    profile = np.full(keep.shape[:2], np.nan)
    if terms.n_ok.max(initial=0) >= MIN_UNITS:
        windows = Windows(lay_windows(keep, W), torch.float64)
        first, second = (_Tables(windows, s, n, ok, rows) for s, n in zip((a, b), norm, strict=True))
        for depth in range(len(profile)):
            profile[depth] = _compare(first.at(depth), second.at(depth), NEAR_ZERO * eps, keep.shape[1], corr)
    return _close(profile, terms, False, {"n_invalid": (keep & ~ok).sum((0, 2))})


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id, ragged=True)
    norm, valid = norms_and_validity(t.states, t.keep)
    return rsa(t.states, norm, valid, t.keep, eps=t.eps, params=params).result(0, metric_id, dtype=t.dtype)


def _compute_paired(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    a, b = checked_pair(inputs, mask, metric_id)
    (norm_a, valid_a), (norm_b, valid_b) = norms_and_validity(a.states, a.keep), norms_and_validity(b.states, b.keep)
    scores = rsa_paired(
        a.states, b.states, (norm_a, norm_b), (valid_a, valid_b), a.keep, eps=max(a.eps, b.eps), params=params
    )
    return scores.result(0, metric_id, dtype=b.dtype)


_PARAMS = {"W": 64, "corr": "pearson", "rows": "raw"}
_FORMULA = (
    "d_l(i,j) = ‖x_{l,i} − x_{l,j}‖ for i < j (rows=cosine: x/‖x‖), N ≥ 4 units valid on both sides; corr=pearson or "
    "spearman (ties at their mean rank, relative gaps ≤ 16·eps of float64 are ties); mean over non-overlapping windows "
    "of W units first; constant distances (max − min ≤ 16·eps of the largest norm) → zero-denominator"
)
_INVARIANCES = frozenset({"R", "R_l", "S", "S_l", "P", "T", "shift"})
register(
    MetricSpec(
        id="rsa.dist/1",
        span=True,
        sentence="Correlation of the distances between units at one depth with those at the next.",
        formula=f"{_FORMULA}; r_l = corr(d_l, d_{{l+1}}), value = mean over l",
        latex=(
            r"d_l(i,j) = \lVert x_{l,i}-x_{l,j}\rVert,\ i<j, \qquad r_l = "
            r"\operatorname*{corr}_{i<j}\bigl(d_l,\,d_{l+1}\bigr), \qquad "
            r"\operatorname*{mean}_{l} r_l"
        ),
        input="trajectory[depth,unit,dim], dim may differ by depth",
        value_range="[−1, 1]",
        unit="1",
        invariances=_INVARIANCES,
        source="Kriegeskorte et al. 2008",
        params=_PARAMS,
        column="rsa_dist",
        levels={"profile": "mean over windows", "sample": "mean over steps"},
        vectors=(
            "y = s·xQ + c → 1",
            "points 0, 1, 3, 7 then 0, 3, 1, 7 of a line (+1): corr=pearson → 113/161, corr=spearman → 5/7",
            "N = 3 → NaN units<4",
            "equal distances → NaN zero-denominator",
        ),
        groups=frozenset({"optional"}),
    ),
    _compute,
    score=lambda c, p: rsa(*c.of_span, eps=c.w.eps, params=p),
)
register(
    MetricSpec(
        id="rsa.dist.paired/1",
        span=True,
        sentence="Correlation of the distances between units in one run with those in another at the same depth.",
        formula=f"{_FORMULA}; r_l = corr(d_l, d'_l) over units valid in both runs, value = mean over l",
        latex=(
            r"d_l(i,j) = \lVert x_{l,i}-x_{l,j}\rVert,\ i<j, \qquad r_l = "
            r"\operatorname*{corr}_{i<j}\bigl(d_l,\,d'_l\bigr), \qquad "
            r"\operatorname*{mean}_{l} r_l"
        ),
        input="trajectory[depth,unit,dim]×2, clean first, dim may differ",
        value_range="[−1, 1]",
        unit="1",
        invariances=_INVARIANCES,
        source="Kriegeskorte et al. 2008",
        params=_PARAMS,
        column="rsa_dist_paired",
        vectors=("equal runs → 1",),
        groups=frozenset({"paired"}),
    ),
    _compute_paired,
    arity=2,
)
