"""``id.twonn``: intrinsic dimension of the units of a depth from the two nearest neighbours of each.

On a locally uniform d-dimensional cloud the ratio μ of second to first neighbour distance is Pareto distributed with
exponent d, whatever the density. The estimate belongs to the scale of those distances, which shrinks as units are
added: so the scale is given beside it, and the value on half of the units; where the two values differ much, the cloud
has no single dimension at these scales.

Duplicates make the first distance zero. Position-0 tokens and repeated prompts are duplicates. Such points are taken
out of the cloud and counted before neighbours are looked for: left in, they would be two equal neighbours of a third
point and pull its ratio to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import NEAR_ZERO, norms_and_validity
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._pairwise import pairwise
from dynprobe.metrics._reduce import Terms, mean_of_profile, share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores

__all__ = ["estimate", "twonn"]

MIN_POINTS = 10


def estimate(log_mu: Array, est: str) -> float:
    """Dimension from the logarithms of the ratios μ ≥ 1; NaN where all are 1 up to rounding.

    Args:
        log_mu: ln(r₂/r₁) of the N points.
        est: ``ml`` for (N−1)/Σ ln μ, ``base`` for the slope through the origin of −ln(1 − i/N) on the sorted ln μ
            without the top tenth.

    Example:
        >>> import numpy as np
        >>> round(estimate(np.full(12, np.log(2.0)), "ml"), 10), round(float(11 / 12 / np.log(2)), 10)
        (1.3224704541, 1.3224704541)
    """
    if est not in ("ml", "base"):
        raise MetricError(f"id.twonn/1: est is 'ml' or 'base', found {est!r}.")
    n = len(log_mu)
    if est == "ml":
        total = float(log_mu.sum())
        return float(n - 1) / total if total > NEAR_ZERO * np.finfo(np.float64).eps * n else float("nan")
    kept = 9 * n // 10
    x, y = np.sort(log_mu)[:kept], -np.log1p(-np.arange(1, kept + 1) / n)
    bottom = float(x @ x)
    return float(x @ y) / bottom if bottom > (NEAR_ZERO * np.finfo(np.float64).eps) ** 2 * n else float("nan")


def _two_nearest(distance: Array) -> tuple[Array, Array]:
    """First and second neighbour distance of every unit [G, N]; NaN or inf where there is none."""
    table = np.where(np.isnan(distance), np.inf, distance)
    n = table.shape[-1]
    table[:, np.arange(n), np.arange(n)] = np.inf
    if n < 2:
        return np.full(table.shape[:2], np.inf), np.full(table.shape[:2], np.inf)
    nearest = np.partition(table, 1, axis=-1)
    return nearest[..., 0], nearest[..., 1]


def _ratios(r1: Array, r2: Array, est: str) -> float:
    fine = np.isfinite(r2)
    if fine.sum() < MIN_POINTS:
        return float("nan")
    return estimate(np.log(r2[fine] / r1[fine]), est)


def _depth(x: torch.Tensor, norm: Array, ok: Bools, eps: float, est: str) -> tuple[Array, ...]:
    """Value, value on half, scale, points, duplicates of every row at one depth, each [B]."""
    distance, factor = pairwise(x, norm, ok)
    first, _ = _two_nearest(distance)
    reach = norm / factor[:, None]
    with np.errstate(invalid="ignore"):
        twin = ok & (first <= NEAR_ZERO * eps * reach)
    distance[twin] = np.nan
    distance.transpose(0, 2, 1)[twin] = np.nan
    points = ok & ~twin
    r1, r2 = _two_nearest(distance)
    out = np.full((3, len(ok)), np.nan)
    for row in np.flatnonzero(points.sum(-1) >= MIN_POINTS):
        own = points[row]
        out[0, row] = _ratios(r1[row, own], r2[row, own], est)
        out[2, row] = factor[row] * 0.5 * float((r1[row, own] + r2[row, own]).mean())
        half = np.flatnonzero(own)[::2]
        if len(half) >= MIN_POINTS:
            h1, h2 = _two_nearest(distance[row][None][:, half[:, None], half])
            out[1, row] = _ratios(h1[0], h2[0], est)
    return (*out, points.sum(-1), twin.sum(-1))


def twonn(
    states: Sequence[torch.Tensor], norm: Array, valid: Bools, keep: Bools, *, eps: float, est: str = "ml"
) -> Scores:
    """Score every row.

    Args:
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        eps: Rounding unit of the test for duplicates.
        est: ``ml`` or ``base``.
    """
    estimate(np.ones(MIN_POINTS), est)  # refuses an unknown estimator before anything is computed
    shape = keep.shape[:2]
    found = np.full((5, *shape), np.nan)
    places = np.flatnonzero(keep.any((0, 1))) if keep.size else np.zeros(0, np.int64)
    span = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
    for depth, state in enumerate(states):
        ok = (valid & keep)[depth][:, span]
        found[:, depth] = _depth(state[:, span], norm[depth][:, span], ok, eps, est)
    profile, half, scale, points, twins = found
    terms = Terms(valid, keep, keep.sum((0, 2)))
    few = ~(points >= MIN_POINTS)
    scores = mean_of_profile(
        profile, terms, few=few.all(0) if len(few) else False, few_text=f"units<{MIN_POINTS}", few_profile=few
    )
    seen = ~np.isnan(half)
    scores.extras = {
        "decimated": share(np.where(seen, half, 0.0).sum(0), seen.sum(0)),
        "decimated_profile": half.T,
        "scale_profile": scale.T,
        "n_points": points.T,
        "n_duplicates": twins.sum(0).astype(np.int64),
        "n_invalid": (keep & ~valid).sum((0, 2)),
        "n_nonfinite": (keep & np.isnan(norm)).sum((0, 2)),
    }
    return scores


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id, ragged=True)
    norm, valid = norms_and_validity(t.states, t.keep)
    return twonn(t.states, norm, valid, t.keep, eps=t.eps, est=params["est"]).result(0, metric_id, dtype=t.dtype)


register(
    MetricSpec(
        id="id.twonn/1",
        span=True,
        sentence="Intrinsic dimension of the units of each depth from the ratio of their two nearest distances.",
        formula=(
            "points with r₁ ≤ 16·eps·‖x‖ leave the cloud and are counted; μ_i = r_{i,2}/r_{i,1} among the N left; "
            "est=ml: (N−1)/Σ ln μ; est=base: slope through the origin of −ln(1 − i/N) on sorted ln μ, i = 1..⌊0.9·N⌋; "
            "N < 10 → NaN units<10; decimated: the same on every second point in their order; scale: mean of "
            "(r₁ + r₂)/2; value = mean over depths"
        ),
        latex=(
            r"\mu_i = \frac{r_{i,2}}{r_{i,1}}, \qquad \hat d_l = \frac{N-1}{\sum_{i}\ln\mu_i} \quad (\text{est=ml}), "
            r"\qquad \operatorname*{mean}_{l}\hat d_l"
        ),
        input="trajectory[depth,unit,dim], dim may differ by depth",
        value_range="(0, ∞)",
        unit="1",
        invariances=frozenset({"R", "R_l", "S", "S_l", "P", "shift"}),
        source="Facco et al. 2017; sissa-data-science/DADApy",
        params={"est": "ml"},
        column="id_twonn",
        levels={"profile": "one cloud per depth", "sample": "mean over depths"},
        vectors=(
            "all ln μ = 1 → (N−1)/N",
            "all μ = 2 → (N−1)/(N·ln 2)",
            "N < 10 → NaN units<10",
            "all μ = 1 → NaN zero-denominator",
        ),
        groups=frozenset({"optional"}),
    ),
    _compute,
    score=lambda c, p: twonn(*c.of_span, eps=c.w.eps, **p),
)
