"""Δ: how far a state moves in one step, relative to where it was, to where it arrives, or absolutely.

The same sentence, "state change magnitude", stands for different normalisers in public code; each has its own id. With
r = ‖b‖/‖a‖ and θ the angle between a and b, Δ_prev² = (r − 1)² + 4·r·sin²(θ/2) exactly: a radial and an angular part.
``delta.angle`` is the angular part alone and equals ``kappa.phase``. There are no clamps: a zero state makes its unit
invalid. ``resid.norm``, the length of the states, is here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._kappa_phase import kappa_phase
from dynprobe.metrics._range import levelled
from dynprobe.metrics._reduce import mean_of_profile
from dynprobe.metrics._registry import MetricSpec, register, register_column
from dynprobe.metrics._result import Array, Result, Scores
from dynprobe.metrics._walk import Walk, walk

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = ["delta_angle", "delta_rel_next", "delta_rel_prev", "delta_rms", "resid_norm"]


def _close(w: Walk, profile: Array, per_unit: Array | None) -> Scores:
    extras = {"n_invalid": w.n_invalid, "n_nonfinite": w.n_nonfinite}
    return mean_of_profile(profile, w.step_terms, short=len(w.norm) < 2, per_unit=per_unit, extras=extras)


def _relative(w: Walk, norm: Array, agg: str) -> Scores:
    terms = w.step_terms
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = w.diff / norm
        if agg == "mean":
            profile = terms.mean(ratio)
        elif agg == "fro":
            (diff, up), (base, down) = levelled(w.diff, terms.ok), levelled(norm, terms.ok)
            moved = np.add.reduce(diff**2, axis=-1, where=terms.ok, initial=0.0)
            profile = np.sqrt(moved / np.add.reduce(base**2, axis=-1, where=terms.ok, initial=0.0))
            profile = np.ldexp(profile, up - down)
        else:
            raise MetricError(f"agg is 'mean' or 'fro', found {agg!r}.")
    return _close(w, profile, terms.mean_steps(ratio))


def delta_rel_prev(w: Walk, agg: str = "mean") -> Scores:
    """‖b − a‖/‖a‖ for every step."""
    return _relative(w, w.norm[:-1], agg)


def delta_rel_next(w: Walk, agg: str = "mean") -> Scores:
    """‖b − a‖/‖b‖ for every step."""
    return _relative(w, w.norm[1:], agg)


def delta_rms(w: Walk) -> Scores:
    """‖B − A‖_F/√(N·d) for every step, N = valid units."""
    per_unit = w.step_terms.mean_steps(w.diff) / np.sqrt(max(w.dim, 1))
    diff, exponent = levelled(w.diff, w.step_terms.ok)
    return _close(w, np.ldexp(np.sqrt(w.step_terms.mean(diff**2) / max(w.dim, 1)), exponent), per_unit)


def delta_angle(w: Walk) -> Scores:
    """The angular part of Δ: ``kappa.phase`` under the name it has beside the other deltas."""
    scores = kappa_phase(w)
    del scores.extras["kappa_path"]
    return scores


def resid_norm(w: Walk) -> Scores:
    """‖x‖ for every depth."""
    terms = w.state_terms
    extras = {"n_invalid": w.n_invalid, "n_nonfinite": w.n_nonfinite}
    return mean_of_profile(terms.mean(w.norm), terms, per_unit=terms.mean_steps(w.norm), extras=extras)


def _computer(score: Callable[..., Scores]) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        (x,) = inputs
        t = as_trajectory(x, mask, metric_id)
        return score(walk(t.states, t.keep, t.keep, eps=t.eps), **params).result(0, metric_id, dtype=t.dtype)

    return compute


def _score_angle(c: Context, params: dict[str, Any]) -> Scores:
    return replace(c.phase, extras={k: v for k, v in c.phase.extras.items() if k != "kappa_path"})


_CORE = frozenset({"core", "default"})
_VECTOR_1 = "delta-1: e₁ → e₁ + e₂: prev 1; next 1/√2; κ 1/4"
_LEVELS = {
    "depth": "per unit",
    "profile": "mean over units (agg=mean) or ratio of Frobenius norms (agg=fro)",
    "sample": "profile, then mean over steps",
}

register(
    MetricSpec(
        id="delta.rel_prev/1",
        sentence="Length of the update relative to the state it starts from.",
        formula="‖S_{k+1} − S_k‖/‖S_k‖; agg=mean: per unit, mean over units, then steps; agg=fro: Frobenius norms",
        latex=(
            r"\begin{cases} \operatorname*{mean}_{k}\ \operatorname*{mean}_{n}\ "
            r"\dfrac{\lVert x_{k+1,n}-x_{k,n}\rVert}{\lVert x_{k,n}\rVert} & \text{agg=mean} \\"
            r"\operatorname*{mean}_{k}\ "
            r"\dfrac{\lVert S_{k+1}-S_k\rVert_F}{\lVert S_{k}\rVert_F} & \text{agg=fro} \end{cases}"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, ∞)",
        unit="1",
        invariances=frozenset({"R", "S", "P", "T"}),
        source="residual of the Attractor Models code (arXiv 2605.12466), without its clamp",
        params={"agg": "mean"},
        column="delta_rel_prev",
        levels=_LEVELS,
        vectors=(_VECTOR_1, "b = 2a: 1"),
        groups=_CORE,
    ),
    _computer(delta_rel_prev),
    score=lambda c, p: delta_rel_prev(c.w, p["agg"]),
)
register(
    MetricSpec(
        id="delta.rel_next/1",
        sentence="Length of the update relative to the state it arrives at.",
        formula="‖S_{k+1} − S_k‖/‖S_{k+1}‖; agg=mean: per unit, mean over units, then steps; agg=fro: Frobenius norms",
        latex=(
            r"\begin{cases} \operatorname*{mean}_{k}\ \operatorname*{mean}_{n}\ "
            r"\dfrac{\lVert x_{k+1,n}-x_{k,n}\rVert}{\lVert x_{k+1,n}\rVert} & \text{agg=mean} \\"
            r"\operatorname*{mean}_{k}\ "
            r"\dfrac{\lVert S_{k+1}-S_k\rVert_F}{\lVert S_{k+1}\rVert_F} & \text{agg=fro} \end{cases}"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, ∞)",
        unit="1",
        invariances=frozenset({"R", "S", "P", "T"}),
        source="latent-diff exit of the Huginn code (arXiv 2502.05171)",
        params={"agg": "mean"},
        column="delta_rel_next",
        levels=_LEVELS,
        vectors=(_VECTOR_1, "delta-2: s_k = 1 + 2^−k: 1/3, 1/5, 1/9, 1/17", "b = 2a: 1/2"),
        groups=_CORE,
    ),
    _computer(delta_rel_next),
    score=lambda c, p: delta_rel_next(c.w, p["agg"]),
)
register(
    MetricSpec(
        id="delta.rms/1",
        sentence="Root mean square of the update over coordinates, in the units of the state.",
        formula="‖S_{k+1} − S_k‖_F/√(N·d), N = valid units; mean over steps",
        latex=r"\Delta_k = \frac{\lVert S_{k+1}-S_k\rVert_F}{\sqrt{N d}}, \qquad \operatorname*{mean}_{k}\Delta_k",
        input="trajectory[depth,unit,dim]",
        value_range="[0, ∞)",
        unit="state",
        invariances=frozenset({"R", "P", "T", "shift"}),
        source="dynprobe, for the Δ of the CSM thread",
        column="delta_rms",
        levels={"depth": "per unit, ‖diff‖/√dim", "profile": "Frobenius over units", "sample": "mean over steps"},
        vectors=("s_k = 1 + 2^−k: 2^−(k+1), successive quotient 1/2",),
        groups=_CORE,
    ),
    _computer(delta_rms),
    score=lambda c, p: delta_rms(c.w),
)
register(
    MetricSpec(
        id="delta.angle/1",
        sentence="The angular part of the update alone; equal to kappa.phase/1.",
        formula="κ_k of kappa.phase/1",
        latex=(
            r"\kappa_k = \frac{1}{\pi}\operatorname*{mean}_{n}\ \operatorname{angle}(x_{k,n},\,x_{k+1,n}), \qquad "
            r"\operatorname*{mean}_{k}\kappa_k"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, 1]",
        unit="half-turns",
        invariances=frozenset({"R", "S", "S_l", "P", "T", "scale-per-state"}),
        source="angular distance, Gromov et al. (arXiv 2403.17887)",
        column="delta_angle",
        levels={"profile": "mean over units", "sample": "mean over units, then over steps"},
        vectors=(_VECTOR_1, "b = 2a: 0"),
        groups=_CORE,
    ),
    _computer(delta_angle),
    score=_score_angle,
)
register(
    MetricSpec(
        id="resid.norm/1",
        sentence="Euclidean length of the states.",
        formula="‖x_{l,n}‖₂; mean over valid units, then over depths",
        latex=r"\operatorname*{mean}_{l}\ \operatorname*{mean}_{n}\ \lVert x_{l,n}\rVert_2",
        input="trajectory[depth,unit,dim]",
        value_range="[0, ∞)",
        unit="state",
        invariances=frozenset({"R", "R_l", "P", "T"}),
        source="standard",
        column="norm",
        levels={"depth": "per unit", "profile": "mean over units", "sample": "mean over units, then over depths"},
        vectors=("e₁, 2e₁ → 3/2",),
        groups=_CORE,
    ),
    _computer(resid_norm),
    score=lambda c, p: resid_norm(c.w),
)
register_column("angle", "delta.angle/1", "rad", {"depth": "per unit, π·delta.angle"})
