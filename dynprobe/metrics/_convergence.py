"""Does the iteration converge, how fast, and after how many iterations?

``converge.rho`` is the contraction estimate ρ̂, the median quotient of successive step lengths: below 1 the steps
shrink as ρ^k, at 1 they do not. ``converge.iterations`` is the number of updates after which a residual is below a
tolerance. If it never was, the answer is *more than K*, not a number: NaN with the reason ``censored``, and ``extras``
carry the observed time K and the event flag, which is what a survival analysis takes. Dropping censored values, or
putting K in their place, both make a model look faster than it is.

A small residual says that the state has almost stopped. It does not say that it stopped at the right place, nor that
the perplexity is lowest there: read it beside the best iteration. Whether the same fixed point is reached from another
start is ``converge.alignment``.

:func:`convergence` returns all of it in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dynprobe.errors import MetricError, did_you_mean
from dynprobe.metrics._block_influence import block_influence
from dynprobe.metrics._delta import delta_angle, delta_rel_next, delta_rel_prev, delta_rms
from dynprobe.metrics._geometry import NEAR_ZERO, norms_and_validity, pair_angle
from dynprobe.metrics._inputs import as_series, as_tokens, as_trajectory
from dynprobe.metrics._range import levelled
from dynprobe.metrics._reduce import profile_reasons, share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._residual import acceleration_terms, deq_residual
from dynprobe.metrics._result import Array, Result, Scores, first_reason
from dynprobe.metrics._walk import Walk, walk

__all__ = ["RESIDUALS", "contraction", "first_below", "iterations_to_tolerance"]


class _Steps(NamedTuple):
    """A residual of every step: over units [S, B], per unit [S, B, N] or None, and the updates done after the first."""

    profile: Array
    grid: Array | None
    first: int


def _quotient(w: Walk, norm: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(w.step_ok, w.diff / norm, np.nan)


def _profile(scores: Scores) -> Array:
    assert scores.profile is not None
    return scores.profile


def _accel(states: Sequence[torch.Tensor], w: Walk, dtype: torch.dtype) -> _Steps:
    grid, terms = acceleration_terms(states, w, "state", dtype)
    return _Steps(np.where(terms.enough, terms.mean(grid), np.nan), np.where(terms.ok, grid, np.nan), 2)


#: Name → the residual of every step, for ``converge.iterations/1{of=…}``.
RESIDUALS: dict[str, Callable[[Sequence[torch.Tensor], Walk, torch.dtype], _Steps]] = {
    "delta_rms": lambda s, w, t: _Steps(_profile(delta_rms(w)), _quotient(w, np.sqrt(max(w.dim, 1))), 1),
    "delta_rel_prev": lambda s, w, t: _Steps(_profile(delta_rel_prev(w)), _quotient(w, w.norm[:-1]), 1),
    "delta_rel_prev_fro": lambda s, w, t: _Steps(_profile(delta_rel_prev(w, "fro")), None, 1),
    "delta_rel_next": lambda s, w, t: _Steps(_profile(delta_rel_next(w)), _quotient(w, w.norm[1:]), 1),
    "delta_rel_next_fro": lambda s, w, t: _Steps(_profile(delta_rel_next(w, "fro")), None, 1),
    "delta_angle": lambda s, w, t: _Steps(_profile(delta_angle(w)), np.where(w.step_ok, w.angle / np.pi, np.nan), 1),
    "deq_residual": lambda s, w, t: _Steps(_profile(deq_residual(w)), None, 1),
    "influence_block": lambda s, w, t: _Steps(
        _profile(block_influence(w)), np.where(w.step_ok, 2 * np.sin(w.angle / 2) ** 2, np.nan), 1
    ),
    "converge_accel": _accel,
}


def first_below(residual: Array, tol: float, patience: int = 1, first: int = 1) -> tuple[Array, Array]:
    """Number of updates after which a residual has been below a tolerance ``patience`` times in a row.

    Args:
        residual: [S, …], one value per update; NaN is not below.
        tol: Tolerance; strictly below counts.
        patience: Values in a row.
        first: Updates done when the first value is known.

    Returns:
        The number of updates […], NaN where it never happened; and True where a NaN stands before that, so that it
        might have happened earlier.

    Example:
        >>> import numpy as np
        >>> first_below(np.array([0.5, 0.1, 0.2, 0.05, 0.04]), 0.15)[0].item()
        2.0
        >>> first_below(np.array([0.5, 0.1, 0.2, 0.05, 0.04]), 0.15, patience=2)[0].item()
        5.0
    """
    streak = np.zeros(residual.shape[1:])
    at = np.full(residual.shape[1:], np.nan)
    unsure = np.zeros(residual.shape[1:], bool)
    for k, now in enumerate(residual):
        with np.errstate(invalid="ignore"):
            streak = np.where(now < tol, streak + 1, 0)
        unsure |= np.isnan(now) & np.isnan(at)
        at = np.where(np.isnan(at) & (streak >= patience), k + first, at)
    return at, unsure


def contraction(w: Walk) -> Scores:
    """ρ̂: the median of Δ_{k+1}/Δ_k of delta.rms over the steps whose Δ_k is not zero."""
    delta, terms = _profile(delta_rms(w)), w.step_terms
    reach = np.maximum(w.norm[:-1], w.norm[1:]) if len(w.norm) > 1 else np.zeros((0, *w.norm.shape[1:]))
    reach, exponent = levelled(np.where(terms.ok, reach, 0.0), terms.ok)
    scale = np.ldexp(np.sqrt(terms.mean(reach**2) / max(w.dim, 1)), exponent)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = delta[:-1] > NEAR_ZERO * w.eps * scale[:-1]
        ratio = np.where(moved, delta[1:] / delta[:-1], np.nan)
    known = ~np.isnan(ratio)
    value = np.array([np.median(ratio[known[:, b], b]) if known[:, b].any() else np.nan for b in range(terms.batch)])
    n_ok, n_keep = (np.minimum(x[1:], x[:-1]) for x in (terms.n_ok, terms.n_keep))
    short = len(w.norm) < 3
    reason = first_reason(
        terms.batch,
        ((terms.n_states == 0) | ((terms.all_keep == 0) & (len(w.norm) > 1)), "empty"),
        (short, "depth<3"),
        (2 * terms.all_ok < terms.all_keep, "coverage"),
        (np.asarray(~known.any(0)), "zero-denominator"),
    )
    return Scores(
        value=np.where([r is not None for r in reason], np.nan, value),
        reason=reason,
        coverage=terms.coverage,
        n_units=terms.n_units,
        n_steps=known.sum(0),
        profile=ratio,
        profile_coverage=share(n_ok, n_keep),
        profile_reason=profile_reasons(ratio, n_ok, n_keep),
        extras={"n_still": (~np.isnan(delta[:-1]) & ~moved).sum(0)},
    )


def iterations_to_tolerance(
    states: Sequence[torch.Tensor], w: Walk, of: str = "delta_rms", tol: float = 1e-3, patience: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Scores:  # fmt: skip
    """Smallest number of updates k whose last residual is below ``tol``; right-censored at K."""
    if of not in RESIDUALS:
        raise MetricError(f"of={of!r} is no residual.{did_you_mean(of, RESIDUALS)} Known: {', '.join(RESIDUALS)}.")
    _check_rule(tol, patience)
    steps, terms, depths = RESIDUALS[of](states, w, dtype), w.step_terms, len(w.norm)
    at, unsure = first_below(steps.profile, tol, patience, steps.first)
    never = np.isnan(at)
    reason = first_reason(
        terms.batch,
        ((terms.n_states == 0) | ((terms.all_keep == 0) & (depths > 1)), "empty"),
        (depths <= steps.first, f"depth<{steps.first + 1}"),
        (np.asarray((2 * terms.all_ok < terms.all_keep) | unsure), "coverage"),
        (never, "censored"),
    )
    per_unit = None
    if steps.grid is not None:
        alone, doubt = first_below(steps.grid, tol, patience, steps.first)
        per_unit = np.where(doubt, np.nan, alone)
    known = np.array([r in (None, "censored") for r in reason])
    return Scores(
        value=np.where([r is not None for r in reason], np.nan, at),
        reason=reason,
        coverage=terms.coverage,
        n_units=terms.n_units,
        n_steps=np.full(terms.batch, len(steps.profile)),
        per_unit=per_unit,
        extras={
            "time": np.where(known, np.where(never, depths - 1, at), np.nan),
            "event": np.where(known, ~never, np.nan),
        },
    )


def _check_rule(tol: float, patience: int) -> None:
    if not tol > 0 or patience < 1:
        raise MetricError(f"a tolerance is positive and a patience at least 1; found tol={tol}, patience={patience}.")


def _compute_rho(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    t = as_trajectory(inputs[0], mask, metric_id)
    return contraction(walk(t.states, t.keep, t.keep, eps=t.eps)).result(0, metric_id, dtype=t.dtype)


def _compute_iterations(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    t = as_trajectory(inputs[0], mask, metric_id)
    w = walk(t.states, t.keep, t.keep, eps=t.eps)
    return iterations_to_tolerance(t.states, w, **params).result(0, metric_id, dtype=t.dtype)


def _compute_exit(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    _check_rule(params["tol"], params["patience"])
    values = s.values[0][s.keep[0]]
    at, unsure = first_below(np.where(np.isfinite(values), values, np.nan), params["tol"], params["patience"])
    n = len(values)
    reason = "tokens<1" if not s.values.size else "empty" if not n else "coverage" if unsure else None
    known = reason is None
    reason = "censored" if known and np.isnan(at) else reason
    extras = {
        "time": (float(n) if np.isnan(at) else float(at)) if known else float("nan"),
        "event": float(not np.isnan(at)) if known else float("nan"),
    }
    return Result(
        float("nan") if reason else float(at), reason, float(np.isfinite(values).mean()) if n else float("nan"), 1, n,
        metric_id, dtype=s.dtype, extras=extras,
    )  # fmt: skip


def _compute_alignment(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    a, b = (as_tokens(x, mask, metric_id) for x in inputs)
    if a.states[0].shape != b.states[0].shape:
        raise MetricError(f"{metric_id} needs two tokens[unit, dim] of one shape.")
    (norm_a, ok_a), (norm_b, ok_b) = (norms_and_validity(x.states, x.keep) for x in (a, b))
    ok = (ok_a & ok_b)[0, 0]
    angle = pair_angle(a.states[0], b.states[0], norm_a[0], norm_b[0])[0]
    cosine = np.where(ok, 1.0 - 2.0 * np.sin(0.5 * angle) ** 2, np.nan)
    n_ok, n_keep = int(ok.sum()), int(a.keep.sum())
    reason = "empty" if not n_keep else "coverage" if 2 * n_ok < n_keep else None
    return Result(
        float("nan") if reason else float(cosine[ok].mean()), reason, n_ok / n_keep if n_keep else float("nan"), n_ok,
        1, metric_id, dtype=a.dtype, per_unit=cosine,
    )  # fmt: skip


_GROUPS = frozenset({"optional", "convergence"})
register(
    MetricSpec(
        id="converge.rho/1",
        sentence="Contraction estimate: median quotient of the lengths of successive updates.",
        formula=(
            "ρ̂ = median_k Δ_{k+1}/Δ_k, Δ of delta.rms/1; k with Δ_k ≤ 16·eps·rms of max(‖s_k‖, ‖s_{k+1}‖)/√d dropped; "
            "none left → NaN zero-denominator"
        ),
        latex=(
            r"\hat\rho = \operatorname*{median}_{k}\frac{\Delta_{k+1}}{\Delta_k}, \qquad \Delta_k = \frac{\lVert "
            r"S_{k+1}-S_k\rVert_F}{\sqrt{Nd}}"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, ∞)",
        unit="1",
        invariances=frozenset({"R", "S", "P", "T", "shift"}),
        source="standard; dynprobe",
        column="converge_rho",
        levels={"profile": "quotient of two successive steps", "sample": "median over steps"},
        vectors=("s_k = 1 + 2^−k → 1/2", "constant trajectory → NaN zero-denominator", "D = 2 → NaN depth<3"),
        groups=_GROUPS,
    ),
    _compute_rho,
    score=lambda c, p: contraction(c.w),
)
register(
    MetricSpec(
        id="converge.iterations/1",
        sentence="Number of updates after which a residual is below a tolerance; censored at the last one.",
        formula=(
            "smallest k with r_{k−patience}, …, r_{k−1} < tol, r_j the residual of the update j → j+1 named by of "
            "(over units as in its own profile; converge_accel at k needs k ≥ 2); never → NaN censored, time K = D − 1 "
            "and event 0 beside it; a NaN before the hit → NaN coverage"
        ),
        latex=r"\min\bigl\{\,k : r_{k-\mathrm{patience}},\dots,r_{k-1} < \mathrm{tol}\,\bigr\}",
        input="trajectory[depth,unit,dim]",
        value_range="[1, D − 1]",
        unit="iterations",
        invariances=frozenset({"R", "P", "shift"}),
        source="dynprobe; exits of arXiv 2605.12466, 2502.05171, 1909.01377, 2509.23314",
        params={"of": "delta_rms", "patience": 1, "tol": 1e-3},
        column="converge_iterations",
        levels={"sample": "of the residual over units"},
        vectors=(
            "s_k = 1 + 2^−k, tol 0.1 → 4",
            "s_k = 1 + 2^−k, k ≤ 3, tol 0.1 → NaN censored, time 3",
            "s_k = 1 + 2^−k, of=delta_rel_next, tol 0.1 → 4",
            "constant trajectory → 1",
        ),
        groups=_GROUPS,
    ),
    _compute_iterations,
    score=lambda c, p: iterations_to_tolerance(c.states, c.w, **p, dtype=c.dtype),
)
register(
    MetricSpec(
        id="converge.exit/1",
        sentence="Number of updates after which a given series of residuals is below a tolerance.",
        formula=(
            "smallest k with r_{k−patience}, …, r_{k−1} < tol for a series r_0, r_1, … with one value per update; "
            "never → NaN censored, time = length and event 0 beside it; a NaN before the hit → NaN coverage"
        ),
        latex=r"\min\bigl\{\,k : r_{k-\mathrm{patience}},\dots,r_{k-1} < \mathrm{tol}\,\bigr\}",
        input="series",
        value_range="[1, T]",
        unit="iterations",
        invariances=frozenset(),
        source="dynprobe",
        params={"patience": 1, "tol": 1e-3},
        column="converge_exit",
        vectors=("(.5,.1,.2,.05,.04), tol .15 → 2; patience 2 → 5; tol .01 → NaN censored, time 5",),
        groups=_GROUPS,
    ),
    _compute_exit,
)
register(
    MetricSpec(
        id="converge.alignment/1",
        sentence="Asymptotic alignment: cosine of the states reached from two starts.",
        formula="mean over units of cos(s, s'), s and s' the last states of two runs on one input from different s⁰",
        latex=r"\operatorname*{mean}_{n}\cos(s_n,\,s'_n)",
        input="tokens[unit,dim] ×2",
        value_range="[−1, 1]",
        unit="1",
        invariances=frozenset({"R", "S", "P", "T", "scale-per-state"}),
        source="path independence, arXiv 2211.09961",
        column="converge_alignment",
        vectors=("s = s' → 1", "e₁, e₂ → 0", "e₁, −e₁ → −1"),
        groups=frozenset({"paired", "convergence"}),
    ),
    _compute_alignment,
    arity=2,
)
