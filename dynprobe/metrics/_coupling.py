"""``coupling.mk``: do two blocks act along the same singular directions?

J is the Jacobian of the residual part of a block, f(x) where the block gives x + f(x). m_K looks at J₁ through the top
K singular vectors of J₂: 0 when it is diagonal there with its own singular values. It is not symmetric in its
arguments, and the signs of singular vectors cancel because they come in pairs.

A frame exists only where singular values differ. If σ_i = σ_{i+1} of J₂ for some i ≤ K, every rotation inside that
plane is an equally good frame and m_K has no value: NaN, reason ``degenerate-frame``; only J₁ = J₂ is 0 whatever the
frame. Near-degenerate frames are told by ``gap``, the smallest (σ_i − σ_{i+1})/σ_1 over i ≤ K: the value moves by about
rounding/gap.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array, eps_of
from dynprobe.metrics._range import in_range
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["Singular", "coupling_mk", "singular"]


class Singular(NamedTuple):
    """The top of a singular value decomposition.

    Args:
        u: Left vectors ``[dim, K]``.
        s: Singular values ``[K]``, descending.
        v: Right vectors ``[dim, K]``.
        gap: Smallest (σ_i − σ_{i+1})/σ_1 for i = 1 … K (without the last where there is no σ_{K+1}); NaN for J = 0.
    """

    u: Array
    s: Array
    v: Array
    gap: float


def singular(jacobian: Array, k: int) -> Singular:
    """Return the top ``k`` singular triples of ``[out, in]``.

    Raises:
        MetricError: If there are fewer than ``k``.
    """
    if not 1 <= k <= min(jacobian.shape):
        raise MetricError(f"K={k} singular vectors were asked for; a Jacobian {list(jacobian.shape)} has "
                          f"{min(jacobian.shape)}.")  # fmt: skip
    u, s, vt = np.linalg.svd(jacobian, full_matrices=False)
    steps = -np.diff(s[: k + 1])
    gap = (float(steps.min()) / s[0] if len(steps) else math.inf) if s[0] > 0 else math.nan
    return Singular(u[:, :k], s[:k], vt[:k].T, gap)


def coupling_mk(j1: Array, one: Singular, j2: Array, two: Singular, eps: float) -> tuple[float, str | None]:
    """Return m_K(J₁, J₂) and why it is NaN.

    Args:
        j1: The Jacobian that is looked at ``[out, in]``.
        one: Its singular triples.
        j2: The one whose frame it is looked at in.
        two: Its singular triples.
        eps: Rounding unit of the Jacobians.

    Example:
        >>> a, b = np.diag([2.0, 1.0]), np.diag([1.0, 2.0])
        >>> coupling_mk(a, singular(a, 1), b, singular(b, 1), 1e-16)
        (0.5, None)
        >>> eye = np.eye(2)
        >>> coupling_mk(a, singular(a, 1), eye, singular(eye, 1), 1e-16)
        (nan, 'degenerate-frame')
    """
    scale = np.linalg.norm(one.s)
    if not scale > 0:
        return math.nan, "zero-denominator"
    if j1 is not j2 and np.linalg.norm(j1 - j2) > 16 * eps * np.linalg.norm(j1):
        if not two.gap > 16 * eps:
            return math.nan, "degenerate-frame"
    else:
        two = one  # equal up to rounding: the frame cancels, and need not exist
    return float(np.linalg.norm(two.u.T @ j1 @ two.v - np.diag(one.s)) / scale), None


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (j1, one_dtype), (j2, two_dtype) = (as_array(x, metric_id) for x in inputs)
    coarse = max(one_dtype, two_dtype, key=eps_of)
    dtype = str(coarse).removeprefix("torch.")
    if j1.ndim != 2 or j1.shape != j2.shape or mask is not None:
        raise MetricError(
            f"{metric_id} takes two Jacobians [out, in] of one shape without mask, found {list(j1.shape)} and "
            f"{list(j2.shape)}."
        )
    k = int(params["K"])
    if not (np.isfinite(j1).all() and np.isfinite(j2).all()):
        return Result(math.nan, "nonfinite", 0.0, j1.shape[1], 2, metric_id, dtype=dtype)
    (j1,), (j2,) = in_range(j1), in_range(j2)
    one, two = singular(j1, k), singular(j2, k)
    value, reason = coupling_mk(j1, one, j2, two, eps_of(coarse))
    extras = {"gap": two.gap, "sigma_1": one.s, "sigma_2": two.s}
    return Result(value, reason, 1.0, j1.shape[1], 2, metric_id, dtype=dtype, extras=extras)


register(
    MetricSpec(
        id="coupling.mk/1",
        sentence="How far a block's Jacobian is from diagonal in the top singular frame of another block's.",
        formula="m_K(J1,J2) = ‖U_{2,K}ᵀ J_1 V_{2,K} − S_{1,K}‖_F/‖S_{1,K}‖_F, J = U S Vᵀ the Jacobian of the residual "
        "part of a block; NaN 'degenerate-frame' where σ_i − σ_{i+1} ≤ 16·eps·σ_1 of J2 for an i ≤ K, unless J1 = J2",
        latex=(
            r"m_K(J_1,J_2) = \frac{\lVert U_{2,K}^{\mathsf T}\,J_1\,V_{2,K}-S_{1,K}\rVert_F}{\lVert "
            r"S_{1,K}\rVert_F}, \qquad J = U S V^{\mathsf T}"
        ),
        input="jacobian[out,in], jacobian[out,in]",
        value_range="[0, 2]; 0 coupled, 2 at J2 = −J1",
        unit="1",
        invariances=frozenset({"R", "S", "S_l"}),
        source="block coupling, arXiv 2407.07810 (project page); Frobenius denominator",
        params={"K": 1},
        vectors=(
            "mk-1: diag(2,1) vs diag(1,2): m₁ 1/2; m₂ √2/√5",
            "J1 = J2 → 0, repeated singular values or not",
            "J2 = −J1 → 2",
            "diag(2,1) vs I → degenerate-frame",
        ),
        groups=frozenset({"optional"}),
    ),
    _compute,
    arity=2,
)
