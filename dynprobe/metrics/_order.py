"""Vector order parameter: how far the units of one depth point the same way.

``order.vector`` is the length of the mean direction, the usual order parameter; units pointing nowhere in common still
give about 1/√N. ``order.pairwise`` removes that: it is the mean cosine over pairs, with null value 0 at every N.
``kappa.sync`` is the same reading along the depth instead of over the units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.metrics._geometry import norms, norms_and_validity
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import Terms, mean_of_profile
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores

__all__ = ["order_parameter"]


def order_parameter(
    states: Sequence[torch.Tensor], norm: Array, valid: Bools, keep: Bools, *, debiased: bool = False
) -> Scores:
    """Score every row.

    Args:
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        debiased: Mean pairwise cosine instead of the length of the mean.
    """
    ok = valid & keep
    terms = Terms(valid, keep, keep.sum((0, 2)))
    n = terms.n_ok
    length = np.zeros(keep.shape[:2])
    with torch.no_grad(), np.errstate(divide="ignore", invalid="ignore"):
        for depth, state in enumerate(states):
            weight = torch.from_numpy(np.where(ok[depth], 1.0 / norm[depth], 0.0)[..., None])
            flags = torch.from_numpy(ok[depth][..., None])
            x = torch.where(flags, state.detach().cpu().double(), 0.0)
            length[depth] = norms((x * weight).sum(1))
        value = (length**2 / n - 1.0) / (n - 1.0) if debiased else length / n
    few = (n < 2) & (n > 0) if debiased else np.zeros(n.shape, bool)
    scores = mean_of_profile(
        np.where((n > 0) & ~few, value, np.nan), terms,
        few=(n < 2).all(0) if debiased and len(n) else False, few_text="units<2", few_profile=few,
    )  # fmt: skip
    scores.extras = {"n_invalid": (keep & ~valid).sum((0, 2)), "n_nonfinite": (keep & np.isnan(norm)).sum((0, 2))}
    return scores


def _computer(debiased: bool) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        (x,) = inputs
        t = as_trajectory(x, mask, metric_id, ragged=True)
        norm, valid = norms_and_validity(t.states, t.keep)
        return order_parameter(t.states, norm, valid, t.keep, debiased=debiased).result(0, metric_id, dtype=t.dtype)

    return compute


_INVARIANCES = frozenset({"R", "R_l", "S", "S_l", "P", "scale-per-state"})
_COMMON: dict[str, Any] = {
    "input": "trajectory[depth,unit,dim], dim may differ by depth",
    "unit": "1",
    "source": "Kuramoto order parameter, vector form",
    "levels": {"profile": "one value per depth", "sample": "mean over depths"},
    "groups": frozenset({"optional"}),
}
register(
    MetricSpec(
        id="order.vector/1",
        span=True,
        sentence="Vector order parameter: length of the mean direction of the units at one depth.",
        formula="R_l = ‖(1/N) Σ_n x̂_{l,n}‖, x̂ = x/‖x‖; value = mean over l; null ≈ 1/√N",
        latex=(
            r"R_l = \Bigl\lVert \frac{1}{N}\sum_{n=1}^{N}\hat x_{l,n}\Bigr\rVert, \qquad \hat x = \frac{x}{\lVert "
            r"x\rVert}, \qquad "
            r"\operatorname*{mean}_{l} R_l"
        ),
        value_range="[0, 1]",
        invariances=_INVARIANCES,
        column="order_vector",
        vectors=("identical directions → 1", "e₁, e₂ → 1/√2", "±e₁ → 0"),
        **_COMMON,
    ),
    _computer(False),
    score=lambda c, p: order_parameter(*c.of_span),
)
register(
    MetricSpec(
        id="order.pairwise/1",
        span=True,
        sentence="Debiased order parameter: mean cosine over pairs of units at one depth.",
        formula="C_l = (N·R_l² − 1)/(N − 1), R_l of order.vector/1; value = mean over l; N ≥ 2",
        latex=(
            r"C_l = \frac{N R_l^2-1}{N-1}, \qquad R_l = \Bigl\lVert \frac{1}{N}\sum_{n=1}^{N}\hat "
            r"x_{l,n}\Bigr\rVert, \qquad "
            r"\operatorname*{mean}_{l} C_l"
        ),
        value_range="[−1/(N−1), 1]",
        invariances=_INVARIANCES | {"T"},
        column="order_pairwise",
        vectors=("identical directions → 1", "e₁, e₂ → 0", "±e₁ → −1", "N = 1 → NaN units<2"),
        **_COMMON,
    ),
    _computer(True),
    score=lambda c, p: order_parameter(*c.of_span, debiased=True),
)
