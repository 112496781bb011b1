"""``kappa.geom``: geometric desynchronisation, one minus unbiased CKA between neighbouring depths.

It compares *relations among units*, so it ignores any rotation and rescaling of a depth, and depths may differ in
width. The rows are unit vectors, so no single unit with a massive norm decides the value; ``cka.linear`` is the same
comparison with the rows as they are. Windows, centring and the numerical choices are those of
:mod:`~dynprobe.metrics._gram`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dynprobe.metrics._geometry import norms_and_validity
from dynprobe.metrics._gram import adjacent
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = ["kappa_geom"]


def kappa_geom(
    states: Sequence[torch.Tensor],
    norm: Array,
    valid: Bools,
    keep: Bools,
    *,
    eps: float,
    W: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Scores:
    """Score every row.

    Args:
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        eps: Rounding unit of the degenerate-Gram test.
        W: Units per window.
        dtype: Arithmetic of the Gram product; centring is always float64.
    """
    return adjacent(states, norm, valid, keep, eps=eps, W=W, dtype=dtype)


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id, ragged=True)
    norm, valid = norms_and_validity(t.states, t.keep)
    scores = kappa_geom(t.states, norm, valid, t.keep, eps=t.eps, W=params["W"])
    return scores.result(0, metric_id, dtype=t.dtype)


def _score(c: Context, params: dict[str, Any]) -> Scores:
    w = c.w
    return kappa_geom(c.states, w.norm, w.valid, c.deep_span, eps=w.eps, W=params["W"], dtype=c.dtype)


register(
    MetricSpec(
        id="kappa.geom/1",
        span=True,
        sentence="One minus unbiased CKA of the cosine geometry of units at neighbouring depths.",
        formula=(
            "G_l = X̂_l X̂_lᵀ; Ã_ij = K_ij − Σ_k K_ik/(N−2) − Σ_k K_kj/(N−2) + ΣK/((N−1)(N−2)) for i ≠ j, K zero on the "
            "diagonal; HSIC_u = Σ_{i≠j} Ã_ij B̃_ij/(N(N−3)); CKA_u = HSIC_u(G_l,G_{l+1})/√(HSIC_u(G_l,G_l)·"
            "HSIC_u(G_{l+1},G_{l+1})); κ_geom = 1 − mean_l CKA_u, mean over non-overlapping windows of W units first; "
            "degenerate when the rms of Ã ≤ 16·eps"
        ),
        latex=(
            r"\begin{aligned} G_l &= \hat X_l\hat X_l^{\mathsf T}, \quad K = G_l \text{ with zero diagonal} \\"
            r"\tilde A_{ij} &= K_{ij} - \frac{\sum_k K_{ik}}{N-2} - \frac{\sum_k K_{kj}}{N-2} + \frac{\sum_{kk'} "
            r"K_{kk'}}{(N-1)(N-2)}, \quad i\ne j \\"
            r"\mathrm{HSIC}_u(A,B) &= \frac{1}{N(N-3)}\sum_{i\ne j}\tilde A_{ij}\tilde B_{ij} \\"
            r"\mathrm{CKA}_u(l) &= "
            r"\frac{\mathrm{HSIC}_u(G_l,G_{l+1})}{\sqrt{\mathrm{HSIC}_u(G_l,G_l)\;\mathrm{HSIC}_u(G_{l+1},G_{l+1})}} \\"
            r"\kappa_{\mathrm{geom}} &= 1-\operatorname*{mean}_{l}\ \operatorname*{mean}_{\text{windows of }W}\ "
            r"\mathrm{CKA}_u(l) \end{aligned}"
        ),
        input="trajectory[depth,unit,dim], dim may differ by depth",
        value_range="[0, 2]",
        unit="1",
        invariances=frozenset({"R", "R_l", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe; unbiased HSIC of Song et al. 2012, CKA of Kornblith et al. 2019",
        params={"W": 64},
        column="kappa_geom",
        levels={"profile": "mean over windows", "sample": "mean over steps"},
        vectors=(
            "kgeom-1: units e₁,e₁,e₂,e₂ then e₁,e₂,e₁,e₂ → 1.5",
            "kgeom-2: A, A, B → 0.75",
            "N = 3 → NaN units<4",
            "off-diagonal cosines a_i + a_j → NaN zero-denominator",
        ),
        groups=frozenset({"default"}),
    ),
    _compute,
    score=_score,
)
