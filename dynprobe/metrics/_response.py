"""The response to a push: how far each state has moved, as a share of its own norm.

``diverge.angle`` sees turns only; a state that grew or shrank on the spot has moved too. ``response.rel`` measures the
whole displacement h′ − h at every depth and position, in the unit of relative noise: at the written site of a
``relnorm`` write it is α itself. For a write at one place it is the impulse-response map. The difference is formed
before anything else, so what cannot respond (earlier depths, earlier positions of a causal model) is exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms, validity
from dynprobe.metrics._inputs import as_pair
from dynprobe.metrics._reduce import Terms, mean_of_profile
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["difference", "response"]


def difference(clean: torch.Tensor, arm: torch.Tensor, metric_id: str) -> torch.Tensor:
    """Return h′ − h in float32 or better (float64 stays float64)."""
    if clean.shape != arm.shape:
        raise MetricError(f"{metric_id}: states of shapes {list(clean.shape)} and {list(arm.shape)} cannot be paired.")
    wide = torch.float64 if clean.dtype == torch.float64 else torch.float32
    return arm.detach().to(clean.device, wide) - clean.detach().to(wide)


def response(
    states_clean: Sequence[Float[torch.Tensor, "batch pos *slot dim"]],
    states_arm: Sequence[Float[torch.Tensor, "batch pos *slot dim"]],
    mask: Any,
) -> Float[np.ndarray, "depth batch pos"]:
    """Relative displacement between the states of two runs at every depth.

    Args:
        states_clean: Depths, tensors [B, T, dim]; [B, T, slot, dim] count as one long vector per position.
        states_arm: The same depths of the other run.
        mask: Bool [B, T], True = real token.

    Returns:
        ‖h′ − h‖/‖h‖, float64 [depths, B, T]; NaN where masked, where h has no norm, or where a state is not finite.

    Raises:
        MetricError: The two runs have different numbers of depths or shapes.

    Example:
        >>> h = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
        >>> response([h], [h + torch.tensor([0.0, 0.5])], torch.tensor([[True, False]]))
        array([[[0.1, nan]]])
    """
    if len(states_clean) != len(states_arm):
        raise MetricError(f"response.rel: {len(states_clean)} depths against {len(states_arm)}; capture the same ones.")
    real = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask, dtype=bool)
    out = np.full((len(states_clean), *real.shape), np.nan)
    with torch.no_grad():
        for depth in range(len(states_clean)):
            out[depth] = _relative(states_clean[depth].flatten(2), states_arm[depth].flatten(2), real)
    return out


def _relative(clean: torch.Tensor, arm: torch.Tensor, real: Bools) -> Array:
    if tuple(clean.shape[:2]) != real.shape:
        raise MetricError(f"response.rel: states {list(clean.shape)} do not fit the mask {list(real.shape)}.")
    moved = difference(clean, arm, "response.rel/1")
    size, norm = norms(moved), norms(clean.detach().to(moved.dtype))
    ok = validity(norm, real, real) & np.isfinite(size)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(ok, size / norm, np.nan)


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    a, b = as_pair(inputs, mask, metric_id)
    rows = [_relative(p, q, k) for p, q, k in zip(a.states, b.states, a.keep, strict=True)]
    grid = np.stack(rows) if rows else np.zeros(a.keep.shape)
    terms = Terms(~np.isnan(grid), a.keep, a.keep.sum((0, 2)))
    scores = mean_of_profile(terms.mean(grid), terms, per_unit=terms.mean_steps(grid))
    scores.extras = {"grid": np.moveaxis(grid, 1, 0)}
    return scores.result(0, metric_id, dtype=b.dtype)


register(
    MetricSpec(
        id="response.rel/1",
        sentence="Displacement between the states of two runs at the same depth and unit, relative to the clean norm.",
        formula=(
            "ρ_{l,n} = ‖x'_{l,n} − x_{l,n}‖/‖x_{l,n}‖; profile = mean over units valid in both; value = mean over "
            "depths"
        ),
        latex=(
            r"\rho_{l,n} = \frac{\lVert x'_{l,n}-x_{l,n}\rVert}{\lVert x_{l,n}\rVert}, \qquad "
            r"\operatorname*{mean}_{l}\ \operatorname*{mean}_{n}\ \rho_{l,n}"
        ),
        input="trajectory[depth,unit,dim]×2, clean first",
        value_range="[0, ∞)",
        unit="‖h′−h‖/‖h‖",
        invariances=frozenset({"R", "R_l", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe",
        column="response_rel",
        levels={"depth": "per unit", "sample": "last depth, mean over affected tokens"},
        vectors=("equal runs → 0", "relnorm kick α → α at its place", "3,4 → 3,4.5: 0.1"),
        groups=frozenset({"paired", "response"}),
    ),
    _compute,
    arity=2,
)
