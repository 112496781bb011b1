"""Distances between two probability distributions, under names that say which one.

Public code calls different things by one name: "Jensen–Shannon" is found for half the Jeffreys divergence, which has no
upper bound, and "total variation" for the largest single difference. Here ``dist.js`` is the true Jensen–Shannon
divergence (at most ln 2), ``dist.half_jeffreys`` the other, ``dist.tv`` half the summed difference and ``dist.linf``
the largest.

The divergences are sums of terms that are never negative, so small ones keep their digits. Half-Jeffreys is infinite
where one side is zero and the other is not: that is NaN with the reason ``support``, not a large number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["half_jeffreys", "jensen_shannon", "largest_difference", "total_variation"]

_SUM = 1e-4


def _excess(p: Array, m: Array) -> Array:
    """Σ p·ln(p/m) − p + m over the last axis: terms ≥ 0, 0·ln 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(m > 0, (p - m) / m, 0.0)
        terms = np.where(p > 0, p * np.log1p(np.maximum(x, -1.0)) - (p - m), m)
    total: Array = np.maximum(terms, 0.0).sum(-1)
    return total


def jensen_shannon(p: Array, q: Array) -> Array:
    """Jensen–Shannon divergence in nats over the last axis, in [0, ln 2].

    Example:
        >>> import numpy as np
        >>> round(float(jensen_shannon(np.array([0.75, 0.25]), np.array([0.25, 0.75]))), 10)
        0.1308120359
    """
    m = 0.5 * (p + q)
    return 0.5 * (_excess(p, m) + _excess(q, m))


def half_jeffreys(p: Array, q: Array) -> Array:
    """Mean of the two Kullback–Leibler divergences in nats over the last axis; inf without common support."""
    alone = (p > 0) != (q > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where((p > 0) & (q > 0), (p - q) * (np.log(p) - np.log(q)), 0.0)
    return np.asarray(np.where(alone.any(-1), np.inf, 0.5 * terms.sum(-1)))


def total_variation(p: Array, q: Array) -> Array:
    """Half the summed absolute difference over the last axis, in [0, 1]."""
    return np.asarray(0.5 * np.abs(p - q).sum(-1))


def largest_difference(p: Array, q: Array) -> Array:
    """Largest absolute difference over the last axis, in [0, 1]."""
    return np.asarray(np.abs(p - q).max(-1, initial=0.0))


def _probabilities(x: Any, metric_id: str) -> tuple[Array, str]:
    """Read ``probs[vocab]`` or ``probs[pos, vocab]``; every finite row must be a distribution."""
    p, dtype = as_array(x, metric_id)
    if p.ndim not in (1, 2) or not p.shape[-1]:
        raise MetricError(f"{metric_id} takes probs[vocab] or probs[pos, vocab] twice, found {list(p.shape)}.")
    p = np.atleast_2d(p)
    finite = np.isfinite(p).all(-1)
    total = p[finite].sum(-1)
    if (p[finite] < 0).any() or (np.abs(total - 1.0) > _SUM).any():
        raise MetricError(
            f"{metric_id} takes probabilities (≥ 0, sum 1); found a row with sum "
            f"{total[np.abs(total - 1).argmax()]:.6g} and smallest entry {p[finite].min():.3g}. Logits go through "
            "softmax first."
        )
    p = p.copy()
    p[finite] /= total[:, None]
    return p, str(dtype).removeprefix("torch.")


def _computer(distance: Callable[[Array, Array], Array]) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        (p, _), (q, dtype) = (_probabilities(x, metric_id) for x in inputs)
        if p.shape != q.shape:
            raise MetricError(f"{metric_id} needs two inputs of one shape, found {list(p.shape)} and {list(q.shape)}.")
        keep = np.ones(len(p), bool) if mask is None else np.asarray(mask, dtype=bool)
        if keep.shape != (len(p),):
            raise MetricError(f"{metric_id}: the mask has shape {list(keep.shape)}, expected [{len(p)}].")
        ok = keep & np.isfinite(p).all(-1) & np.isfinite(q).all(-1)
        series = np.full(len(p), np.nan)
        series[ok] = distance(p[ok], q[ok])
        lost = np.isinf(series)
        series[lost] = np.nan
        n_ok, n_keep = int(ok.sum()), int(keep.sum())
        reason = "empty" if not n_keep else "coverage" if 2 * n_ok < n_keep else "support" if lost.any() else None
        return Result(
            float("nan") if reason else float(series[ok].mean()),
            reason,
            n_ok / n_keep if n_keep else float("nan"),
            n_keep,
            1,
            metric_id,
            dtype=dtype,
            series=series,
            extras={"n_support": int(lost.sum()), "n_invalid": n_keep - n_ok},
        )

    return compute


_COMMON: dict[str, Any] = {
    "input": "probs[vocab] or probs[pos,vocab] ×2",
    "invariances": frozenset(),
    "groups": frozenset({"paired"}),
}
_ROWS = "; rows normalised in float64; mean over positions"
_VECTOR = "p = (.75,.25), q = (.25,.75)"
_FOUR = "p = (.4,.4,.1,.1), q = (.1,.1,.4,.4)"
_POSITIONS = r"\operatorname*{mean}_{\mathrm{pos}}\ "
register(
    MetricSpec(
        id="dist.js/1",
        sentence="Jensen–Shannon divergence of two distributions.",
        formula=f"½KL(p ‖ m) + ½KL(q ‖ m), m = (p + q)/2, 0·ln 0 = 0{_ROWS}",
        latex=(
            _POSITIONS + r"\Bigl[\tfrac{1}{2}\mathrm{KL}(p\,\Vert\,m)+\tfrac{1}{2}\mathrm{KL}(q\,\Vert\,m)\Bigr], "
            r"\qquad m = \frac{p+q}{2}"
        ),
        value_range="[0, ln 2]",
        unit="nat",
        source="Lin 1991",
        column="dist_js",
        vectors=(f"js-1: {_VECTOR} → 0.1308120359", "disjoint → ln 2", "equal → 0"),
        **_COMMON,
    ),
    _computer(jensen_shannon),
    arity=2,
)
register(
    MetricSpec(
        id="dist.half_jeffreys/1",
        sentence="Half the Jeffreys divergence: mean of the two KL divergences.",
        formula=f"½[KL(p ‖ q) + KL(q ‖ p)] = ½Σ (p − q)(ln p − ln q); no common support in a row → NaN support{_ROWS}",
        latex=(
            _POSITIONS
            + r"\tfrac{1}{2}\bigl[\mathrm{KL}(p\,\Vert\,q)+\mathrm{KL}(q\,\Vert\,p)\bigr] = "
            + _POSITIONS
            + r"\tfrac{1}{2}\sum_v(p_v-q_v)(\ln p_v-\ln q_v)"
        ),
        value_range="[0, ∞)",
        unit="nat",
        source="AlignmentResearch/tuned-lens, PredictionTrajectory.js_divergence",
        column="dist_half_jeffreys",
        vectors=(f"{_VECTOR} → ½ ln 3", "(1,0), (½,½) → NaN support", "equal → 0"),
        **_COMMON,
    ),
    _computer(half_jeffreys),
    arity=2,
)
register(
    MetricSpec(
        id="dist.tv/1",
        sentence="Total variation distance of two distributions.",
        formula=f"½ Σ |p − q|{_ROWS}",
        latex=_POSITIONS + r"\tfrac{1}{2}\sum_v|p_v-q_v|",
        value_range="[0, 1]",
        unit="1",
        source="standard",
        column="dist_tv",
        vectors=(f"{_FOUR} → 0.6", "disjoint → 1"),
        **_COMMON,
    ),
    _computer(total_variation),
    arity=2,
)
register(
    MetricSpec(
        id="dist.linf/1",
        sentence="Largest difference of a single probability between two distributions.",
        formula=f"max |p − q|{_ROWS}",
        latex=_POSITIONS + r"\max_v|p_v-q_v|",
        value_range="[0, 1]",
        unit="1",
        source="AlignmentResearch/tuned-lens, PredictionTrajectory.total_variation",
        column="dist_linf",
        vectors=(f"{_FOUR} → 0.3", "disjoint point masses → 1"),
        **_COMMON,
    ),
    _computer(largest_difference),
    arity=2,
)
