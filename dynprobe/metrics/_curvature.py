"""Turning angles: ``curv.depth`` along the layers, ``curv.token`` along the tokens.

The angle is taken between successive *differences* of states, folded nowhere. Two null values exist: π/2 for
independent increments, 2π/3 for independent points (their differences have correlation −1/2); say which applies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.metrics._geometry import NEAR_ZERO
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import Terms, mean_of_profile, mean_over_units
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores
from dynprobe.metrics._walk import Walk, walk

__all__ = ["curv_depth", "curv_token", "turn_defined"]


def turn_defined(w: Walk) -> Bools:
    """Turning angles along depth whose three states are valid and whose two updates are not zero, [S − 1, B, T]."""
    moved, ok = w.moved, w.step_ok
    return ok[1:] & ok[:-1] & moved[1:] & moved[:-1]


def curv_depth(w: Walk) -> Scores:
    """Score every row of a walk made with ``turn=True``."""
    ok, keep = w.step_ok, w.step_keep
    both, unmasked = ok[1:] & ok[:-1], keep[1:] & keep[:-1]
    turn = np.zeros(both.shape) if w.turn is None else w.turn
    used = turn_defined(w) & unmasked
    scores = mean_of_profile(
        mean_over_units(turn, used),
        Terms(both, unmasked, w.n_states),
        short=len(w.norm) < 3,
        short_text="depth<3",
        per_unit=mean_over_units(turn, used, axis=0),
    )
    scores.extras = {
        "n_stall": (both & unmasked & ~used).sum((0, 2)),
        "n_invalid": w.n_invalid,
        "n_nonfinite": w.n_nonfinite,
    }
    return scores


def curv_token(w: Walk, keep: Bools | None = None) -> Scores:
    """Score every row of a walk made with ``hop_turn=True``; ``keep`` [D, B, T] narrows the tokens that count."""
    keep = w.keep if keep is None else keep
    unmasked = _triple(keep)
    both = _triple(w.valid)
    turn: Array = np.zeros(both.shape)
    used = both & unmasked
    if w.hop_turn is not None and w.hop_diff is not None:
        turn = w.hop_turn
        with np.errstate(invalid="ignore"):
            moved = w.hop_diff > NEAR_ZERO * w.eps * np.maximum(w.norm[..., 1:], w.norm[..., :-1])
        used = used & moved[..., 1:] & moved[..., :-1]
    tokens = keep.any(0).sum(-1) if len(keep) else np.zeros(keep.shape[1], np.int64)
    terms = Terms(both, unmasked, keep.sum((0, 2)))
    scores = mean_of_profile(mean_over_units(turn, used), terms, short=tokens < 3, short_text="tokens<3")
    scores.n_units = tokens
    scores.extras = {
        "n_stall": (both & unmasked & ~used).sum((0, 2)),
        "n_invalid": (keep & ~w.valid).sum((0, 2)),
        "n_nonfinite": (keep & np.isnan(w.norm)).sum((0, 2)),
    }
    return scores


def _triple(units: Bools) -> Bools:
    return units[..., 2:] & units[..., 1:-1] & units[..., :-2]


def _compute_depth(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    return curv_depth(walk(t.states, t.keep, t.keep, eps=t.eps, turn=True)).result(0, metric_id, dtype=t.dtype)


def _compute_token(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    w = walk(t.states, t.keep, t.keep, eps=t.eps, steps=False, hop_turn=True)
    return curv_token(w).result(0, metric_id, dtype=t.dtype)


register(
    MetricSpec(
        id="curv.depth/1",
        sentence="Mean turning angle between a unit's successive updates along depth.",
        formula=(
            "u_l = x_{l+1} − x_l; c_{l,n} = angle(u_{l−1,n}, u_{l,n}); mean over units, then over steps; "
            "zero updates (≤ 16·eps·max(‖x_l‖, ‖x_{l+1}‖)) dropped"
        ),
        latex=(
            r"u_{l,n} = x_{l+1,n}-x_{l,n}, \qquad c_{l,n} = \operatorname{angle}(u_{l-1,n},\,u_{l,n}), \qquad "
            r"\operatorname*{mean}_{l}\ \operatorname*{mean}_{n}\ c_{l,n}"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, π]",
        unit="rad",
        invariances=frozenset({"R", "S", "P", "T", "shift"}),
        source="arXiv 2311.04930 on the depth axis",
        column="curv_depth",
        levels={"depth": "per unit", "profile": "mean over units", "sample": "mean over units, then over steps"},
        vectors=("circle increment φ → φ; straight line → 0; ping-pong → π",),
        groups=frozenset({"default"}),
    ),
    _compute_depth,
    score=lambda c, p: curv_depth(c.w),
    needs=("turn",),
)
register(
    MetricSpec(
        id="curv.token/1",
        span=True,
        sentence="Mean turning angle along the tokens at each depth.",
        formula=(
            "v_t = x_{l,t+1} − x_{l,t}; c_{l,t} = angle(v_t, v_{t+1}); C_l = mean_t c_{l,t}; value = mean_l C_l; "
            "zero differences dropped"
        ),
        latex=(
            r"v_{l,t} = x_{l,t+1}-x_{l,t}, \qquad c_{l,t} = \operatorname{angle}(v_{l,t},\,v_{l,t+1}), \qquad "
            r"\operatorname*{mean}_{l}\ \operatorname*{mean}_{t}\ c_{l,t}"
        ),
        input="trajectory[depth,unit,dim], units in order of time",
        value_range="[0, π]",
        unit="rad",
        invariances=frozenset({"R", "R_l", "S", "S_l", "T", "shift"}),
        source="arXiv 2311.04930",
        column="curv_token",
        levels={"profile": "mean over tokens", "sample": "mean over tokens, then over depths"},
        vectors=("circle increment φ → φ; straight line → 0; ping-pong → π",),
        groups=frozenset({"default"}),
    ),
    _compute_token,
    score=lambda c, p: curv_token(c.w, c.deep_span),
    needs=("hop_turn",),
)
