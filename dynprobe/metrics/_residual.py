"""Residuals of an iteration: how far from a fixed point a state still is, in the normalisations public code uses.

"Converged" means below a tolerance, and the tolerance only means something together with its normaliser. The step
sizes themselves are ``delta.*``: Huginn's latent-diff is ``delta.rel_next/1`` (tol 0.03), the residual of Attractor
models ``delta.rel_prev/1{agg=fro}`` (tol 1e-3), both without the clamps of that code; the cosine exit is
``influence.block/1``, one minus the cosine of successive states. Here are the ones that differ in more than the clamp:
``deq.residual`` with its additive ε and one norm over all units, and ``converge.accel``, the change of the update,
which also reaches zero for a state that drifts at constant speed and therefore alone is no proof of a fixed point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._range import levelled
from dynprobe.metrics._reduce import Terms, mean_of_profile
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores
from dynprobe.metrics._walk import Walk, walk

__all__ = ["acceleration", "acceleration_terms", "deq_residual"]

_NORMS = ("state", "none")


def _extras(w: Walk) -> dict[str, Any]:
    return {"n_invalid": w.n_invalid, "n_nonfinite": w.n_nonfinite}


def deq_residual(w: Walk, eps: float = 1e-9) -> Scores:
    """‖S_{k+1} − S_k‖_F/(‖S_{k+1}‖_F + ε) for every step, norms over all valid units."""
    terms = w.step_terms

    def length(x: Array) -> Array:
        x, exponent = levelled(x, terms.ok)
        total = np.add.reduce(x**2, axis=-1, where=terms.ok, initial=0.0)
        return np.where(terms.n_ok > 0, np.ldexp(np.sqrt(total), exponent), np.nan)

    profile = length(w.diff) / (length(w.norm[1:]) + eps)
    return mean_of_profile(profile, terms, short=len(w.norm) < 2, extras=_extras(w))


def second_differences(states: Sequence[torch.Tensor], dtype: torch.dtype, empty: tuple[int, int] = (1, 0)) -> Array:
    """‖s_{k+1} − 2s_k + s_{k−1}‖ for every unit [D − 2, B, N]."""
    rows = []
    with torch.no_grad():
        for a, b, c in zip(states, states[1:], states[2:], strict=False):
            a, b, c = (x.detach().to(dtype) for x in (a, b, c))
            rows.append(norms((c - b) - (b - a)))
    if rows:
        return np.stack(rows)
    return np.zeros((0, *(states[0].shape[:2] if len(states) else empty)))


def acceleration(
    states: Sequence[torch.Tensor], w: Walk, norm: str = "state", dtype: torch.dtype = torch.float64
) -> Scores:
    """‖Δ_k − Δ_{k−1}‖, Δ_k = s_{k+1} − s_k, over ‖s_{k+1}‖ or absolute, for every pair of steps."""
    grid, terms = acceleration_terms(states, w, norm, dtype)
    return mean_of_profile(
        terms.mean(grid), terms, short=len(w.norm) < 3, short_text="depth<3", per_unit=terms.mean_steps(grid),
        extras=_extras(w),
    )  # fmt: skip


def acceleration_terms(states: Sequence[torch.Tensor], w: Walk, norm: str, dtype: torch.dtype) -> tuple[Array, Terms]:
    """The values [D − 2, B, N] behind :func:`acceleration` and which of them count."""
    if norm not in _NORMS:
        raise MetricError(f"norm is one of {', '.join(_NORMS)}, found {norm!r}.")
    grid = second_differences(states, dtype, (w.keep.shape[1], w.keep.shape[2]))
    ok: Bools = w.step_ok[1:] & w.step_ok[:-1]
    keep: Bools = w.step_keep[1:] & w.step_keep[:-1]
    if norm == "state":
        with np.errstate(divide="ignore", invalid="ignore"):
            grid = grid / w.norm[2:]
    return np.where(ok, grid, 0.0), Terms(ok, keep, w.n_states)


def _computer(score: Callable[..., Scores]) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        t = as_trajectory(inputs[0], mask, metric_id)
        w = walk(t.states, t.keep, t.keep, eps=t.eps)
        return score(t.states, w, params).result(0, metric_id, dtype=t.dtype)

    return compute


_COMMON: dict[str, Any] = {
    "input": "trajectory[depth,unit,dim]",
    "groups": frozenset({"optional", "convergence"}),
}
register(
    MetricSpec(
        id="deq.residual/1",
        sentence="Length of the update of all units together relative to the state it arrives at, plus ε.",
        formula="‖S_{k+1} − S_k‖_F/(‖S_{k+1}‖_F + ε), norms over all valid units; mean over steps",
        latex=r"\operatorname*{mean}_{k}\frac{\lVert S_{k+1}-S_k\rVert_F}{\lVert S_{k+1}\rVert_F+\varepsilon}",
        value_range="[0, ∞)",
        unit="1",
        invariances=frozenset({"R", "P", "T"}),
        source="locuslab/deq (arXiv 1909.01377): ε = 1e-9 in its Broyden solver, 1e-5 in its Anderson solver",
        params={"eps": 1e-9},
        column="deq_residual",
        levels={"profile": "norms over all units", "sample": "mean over steps"},
        vectors=("s_k = 1 + 2^−k, ε → 0: 1/3, 1/5, 1/9, 1/17", "e₁ → e₁ + e₂, ε = 1: 1/(√2 + 1)", "constant → 0"),
        **_COMMON,
    ),
    _computer(lambda states, w, p: deq_residual(w, p["eps"])),
    score=lambda c, p: deq_residual(c.w, p["eps"]),
)
register(
    MetricSpec(
        id="converge.accel/1",
        sentence="Change of the update from one iteration to the next, relative to the state it leads to.",
        formula=(
            "‖(s_{k+1} − s_k) − (s_k − s_{k−1})‖/‖s_{k+1}‖ (norm=state) or without the quotient (norm=none) per unit "
            "valid at the three depths; mean over units, then over k"
        ),
        latex=(
            r"\operatorname*{mean}_{k}\ "
            r"\operatorname*{mean}_{n}\frac{\lVert(s_{k+1}-s_k)-(s_k-s_{k-1})\rVert}{\lVert s_{k+1}\rVert}"
        ),
        value_range="[0, ∞)",
        unit="1 (norm=state), state (norm=none)",
        invariances=frozenset({"R", "S", "P", "T"}),
        source="acceleration exit, arXiv 2509.23314; normaliser: Huginn code",
        params={"norm": "state"},
        column="converge_accel",
        levels={"profile": "mean over units", "sample": "mean over units, then over steps"},
        vectors=(
            "s_k = 1 + 2^−k: 2^−(k+1)/(1 + 2^−(k+1)), k = 1, 2, … (norm=state), 2^−(k+1) (norm=none)",
            "constant velocity → 0",
            "D = 2 → NaN depth<3",
        ),
        **_COMMON,
    ),
    _computer(lambda states, w, p: acceleration(states, w, p["norm"])),
    score=lambda c, p: acceleration(c.states, c.w, p["norm"], c.dtype),
)
