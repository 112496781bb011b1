"""The element-wise energy, whose descent is a gated MLP with tied weights.

With γ = W n constant and φ = ∫SiLU,

    ξ(u)   = −γᵀ φ(V u),      −∂ξ/∂u = Vᵀ (γ ∘ SiLU(V u))

so the down-projection is Vᵀ (or P Vᵀ, folded once per forward) and there are two matrices instead of three. ξ is
neither convex nor concave; without a norm a step descends if η λ_max(P) < 2 / L with L = 1.0999 max|γ| ‖V‖².
``convex_sign`` is the variant of the paper's appendix B, ξ = −|γ|ᵀ φ(sign(γ) ∘ V u), with a straight-through sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.models._cem_frame import Frame
from dynprobe.models._cem_phi import silu_integral
from dynprobe.models._cem_preconditioner import Preconditioner
from dynprobe.models._cem_step import EnergyStep, Field, wide

if TYPE_CHECKING:
    from dynprobe.models._cem_config import CemConfig

__all__ = ["SILU_SLOPE_MAX", "SILU_SLOPE_MIN", "ElementwiseField", "ElementwiseStep"]

#: SiLU′ lies between these, at x = ∓2.39936.
SILU_SLOPE_MIN, SILU_SLOPE_MAX = -0.09984, 1.09984


@dataclass
class ElementwiseField(Field):
    """What the MLP's recursion does not change.

    Args:
        gate: γ = W n, [batch, S, M].
        sign: sign(γ) with a straight-through gradient for ``convex_sign``, else None.
        output: V P, [M, D]; None where the preconditioner is not folded.
    """

    gate: Tensor
    sign: Tensor | None
    output: Tensor | None


class ElementwiseStep(EnergyStep):
    """One descent step on the element-wise energy of one layer.

    Args:
        config: The model's configuration.
    """

    kind = "mlp"

    def __init__(self, config: CemConfig) -> None:
        super().__init__(config, config.step_size_mlp)
        D, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.signed = config.mlp_energy == "convex_sign"
        self.preconditioner: Preconditioner | None = None
        if config.preconditioner != "none":
            rank = config.rank_mlp if config.preconditioner == "diag_low_rank" else 0
            self.preconditioner = Preconditioner(D, rank, None, config.psd, config.prec_init)
        self.fold = config.fold_preconditioner

    def field(self, n: Tensor, frame: Frame) -> ElementwiseField:
        """Return the gates and the folded output weights."""
        gate = self.gate_proj(n)
        sign = gate + (gate.sign() - gate).detach() if self.signed else None
        output: Tensor | None = self.up_proj.weight
        if self.preconditioner is not None:
            output = self.preconditioner(self.up_proj.weight) if self.fold else None
        return ElementwiseField(gate, sign, output)

    def energy(self, u: Tensor, field: ElementwiseField) -> Tensor:
        """Return ξ(u_i), [batch, S]."""
        z = functional.linear(wide(u), wide(self.up_proj.weight))
        gate = wide(field.gate)
        if field.sign is not None:
            return -(gate.abs() * silu_integral(wide(field.sign) * z)).sum(-1)
        return -(gate * silu_integral(z)).sum(-1)

    def move(self, u: Tensor, field: ElementwiseField) -> Tensor:
        """Return P s."""
        if field.output is None:
            return self.force(u, field, lambda s: s)
        return self._activation(u, field) @ field.output

    def force(self, u: Tensor, field: ElementwiseField, through: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return s, or P through(s)."""
        s = self._activation(u, field) @ self.up_proj.weight
        if through is None:
            return s
        return through(s) if self.preconditioner is None else self.preconditioner(through(s))

    @torch.no_grad()
    def curvature_bound(self, field: ElementwiseField) -> Tensor:
        """Return L ≥ λ_max of ξ's Hessian −Vᵀ diag(γ ∘ SiLU′) V for every token, [batch, S, 1]."""
        gate = field.gate
        if field.sign is not None:
            worst = -SILU_SLOPE_MIN * gate.abs().amax(-1, keepdim=True)
        else:
            worst = torch.maximum(
                -SILU_SLOPE_MIN * gate.amax(-1, keepdim=True), -SILU_SLOPE_MAX * gate.amin(-1, keepdim=True)
            ).clamp_min(0.0)
        return worst * torch.linalg.matrix_norm(wide(self.up_proj.weight), 2).to(gate.dtype).square()

    def _activation(self, u: Tensor, field: ElementwiseField) -> Tensor:
        z = self.up_proj(u)
        if field.sign is not None:
            return field.gate * functional.silu(field.sign * z)
        return field.gate * functional.silu(z)
