"""Debt and late collapse: what a ct series accumulates, and whether it freezes at the end.

``debt.cusum`` is repaid by calm tokens and so separates controlled debt (it returns to 0) from high debt; it is the
standard sequential change detector. ``debt.excess`` is never repaid and grows with T. Both need θ, the 90th percentile
of ct on a clean calibration of the same model: without it they are NaN, reason ``no-calibration``.
``collapse.late_ct`` detects near-frozen states, not repetition: pair it with an n-gram repetition rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dynprobe.metrics._inputs import as_series
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, register, register_column
from dynprobe.metrics._result import Array, Result, Scores
from dynprobe.metrics._series import Values

__all__ = ["collapse_late", "debt_cusum", "debt_excess"]

LATE_SHARE = 0.25
LATE_MIN = 12
LATE_LIMIT = 0.001


def _excess(v: Values, theta: float | None) -> Array:
    return np.where(v.ok, v.x - (np.nan if theta is None else theta), 0.0)


def debt_excess(v: Values, theta: float | None = None) -> Scores:
    """Σ max(0, ct − θ) per row."""
    total = np.maximum(_excess(v, theta), 0.0).sum(-1)
    no_theta = np.full(len(v.x), theta is None or bool(np.isnan(theta)))
    extras = {"per_step": share(total, v.n), "n_missing": v.n_keep - v.n}
    return v.scores(total, v.reasons((no_theta, "no-calibration")), extras=extras)


def debt_cusum(v: Values, theta: float | None = None) -> Scores:
    """Largest D_t per row, D_t = max(0, D_{t−1} + ct_t − θ); the whole path as series."""
    path = np.zeros(v.x.shape)
    level = np.zeros(len(v.x))
    step = _excess(v, theta)
    for t in range(v.x.shape[1]):
        level = np.maximum(0.0, level + step[:, t])
        path[:, t] = level
    no_theta = np.full(len(v.x), theta is None or bool(np.isnan(theta)))
    top = path.max(-1, initial=0.0)
    final = np.where(no_theta, np.nan, level)
    extras = {"max": np.where(no_theta, np.nan, top), "final": final, "n_missing": v.n_keep - v.n}
    return v.scores(top, v.reasons((no_theta, "no-calibration")), path, extras)


def collapse_late(v: Values) -> Scores:
    """Mean ct over the last ⌈T/4⌉ valid values per row."""
    size = np.ceil(LATE_SHARE * v.n).astype(np.int64)
    from_end = np.cumsum(v.ok[:, ::-1], axis=-1)[:, ::-1]
    late = v.ok & (from_end <= size[:, None])
    mean = share(np.add.reduce(v.x, axis=-1, where=late, initial=0.0), late.sum(-1))
    scores = v.scores(mean, v.reasons(before=((v.n < LATE_MIN, "steps<12"),)))
    scores.extras["collapsed"] = [
        None if why else bool(x < LATE_LIMIT) for x, why in zip(mean, scores.reason, strict=True)
    ]
    return scores


def _computer(score: Callable[..., Scores]) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, **more: Any) -> Result:
        s = as_series(inputs[0], mask, metric_id)
        return score(Values(s.values, s.ok, s.keep), **more).result(0, metric_id, dtype=s.dtype)

    return compute


def _with_theta(score: Callable[..., Scores]) -> Callable[..., Result]:
    inner = _computer(score)

    def compute(
        inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, theta: float | None = None
    ) -> Result:
        return inner(inputs, mask, params, metric_id, theta=theta)

    return compute


def _plain(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    return _computer(collapse_late)(inputs, mask, params, metric_id)


_SAMPLE = {"sample": "over the ct values inside the span"}
register(
    MetricSpec(
        id="debt.cusum/1",
        span=True,
        sentence="Highest level of accumulated excess of ct over θ, repaid by calm tokens.",
        formula="D_t = max(0, D_{t−1} + ct_t − θ), D_0 = 0; value = max_t D_t; invalid ct: D carried over and counted",
        latex=r"D_0 = 0, \qquad D_t = \max(0,\ D_{t-1}+\mathrm{ct}_t-\theta), \qquad \max_t D_t",
        input="series",
        value_range="[0, ∞)",
        unit="rad",
        invariances=frozenset(),
        source="dynprobe; CUSUM",
        column="debt_cusum",
        levels=_SAMPLE,
        vectors=("debt-1: (0,2,2,0), θ = 1 → D 0,1,2,1; max 2, final 1", "ct ≤ θ everywhere → 0"),
        groups=frozenset({"default"}),
    ),
    _with_theta(debt_cusum),
    score=lambda c, p: debt_cusum(c.values, c.theta),
    needs=("ct",),
)
register(
    MetricSpec(
        id="debt.excess/1",
        span=True,
        sentence="Sum of the excess of ct over θ, never repaid; extensive in length.",
        formula="E_T = Σ_t max(0, ct_t − θ) over valid t; E_T/T beside it",
        latex=r"E_T = \sum_t\max(0,\ \mathrm{ct}_t-\theta)",
        input="series",
        value_range="[0, ∞)",
        unit="rad",
        invariances=frozenset({"P"}),
        source="dynprobe",
        column="debt_excess",
        levels=_SAMPLE,
        vectors=("debt-1: (0,2,2,0), θ = 1 → E 2", "ct ≤ θ everywhere → 0"),
        groups=frozenset({"default"}),
    ),
    _with_theta(debt_excess),
    score=lambda c, p: debt_excess(c.values, c.theta),
    needs=("ct",),
)
register(
    MetricSpec(
        id="collapse.late_ct/1",
        span=True,
        sentence="Mean ct over the last quarter of the series; below 0.001 counts as collapsed.",
        formula="mean of ct over the last ⌈0.25·T⌉ valid values, T ≥ 12 valid; collapsed iff < 0.001 strictly",
        latex=(
            r"\frac{1}{\lceil T/4\rceil}\sum_{t>T-\lceil T/4\rceil}\mathrm{ct}_t, \qquad \text{collapsed} \iff "
            r"\text{value} < 0.001"
        ),
        input="series",
        value_range="[0, ∞)",
        unit="rad",
        invariances=frozenset({"T"}),
        source="late_ct < 0.001: DOI 10.5281/zenodo.20348878; window by dynprobe",
        column="collapse_late_ct",
        levels=_SAMPLE,
        vectors=(
            "constant tail → 0 → collapsed",
            "circle φ = 0.05 → 0.1·sin 0.025 → not collapsed",
            "T = 11 → steps<12",
        ),
        groups=frozenset({"default"}),
    ),
    _plain,
    score=lambda c, p: collapse_late(c.values),
    needs=("ct",),
)
register_column("debt_final", "debt.cusum/1", "rad", {"sample": "level after the last token"})
