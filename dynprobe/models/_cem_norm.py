"""RMS normalisation with or without a gain, and the transpose of its Jacobian.

The gain decides a theorem: without it (and with ε → 0) a step of the interaction energy rotates the state towards the
force on a sphere, and the energy falls for every step size; with it that is not guaranteed. The Jacobian's transpose
pulls a gradient at the normalised state back to the state itself, which the ``chain`` solver descends along.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CemRMSNorm"]


class CemRMSNorm(nn.Module):
    """x ↦ γ ∘ x / √(mean(x²) + ε), in float32 or better inside, in the dtype of ``x`` outside.

    Args:
        dim: Width D.
        eps: ε.
        gain: Whether γ is learned (starts at 1) or absent.
    """

    def __init__(self, dim: int, eps: float = 1e-6, gain: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if x.dtype in (torch.float16, torch.bfloat16):
            unit = nn.functional.rms_norm(x.float(), (self.dim,), None, self.eps).to(x.dtype)
            return unit if self.weight is None else self.weight * unit
        return nn.functional.rms_norm(x, (self.dim,), self.weight, self.eps)

    def scale(self, force: Tensor) -> Tensor:
        """Return γ ∘ force: the force on the point of the sphere behind a normalised state."""
        return force if self.weight is None else self.weight * force

    def unit(self, x: Tensor) -> Tensor:
        """Return x / √(mean(x²) + ε), the point of the sphere before the gain."""
        return nn.functional.rms_norm(x, (self.dim,), None, self.eps)

    def pull_back(self, x: Tensor, force: Tensor) -> Tensor:
        """Return Jᵀ force with J = ∂norm(x)/∂x = diag(γ) (I − x xᵀ / (D r²)) / r and r² = mean(x²) + ε.

        Args:
            x: State [..., D].
            force: Vectors at the normalised state, broadcastable with ``x``.
        """
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        unit = x * inverse
        force = self.scale(force)
        return (force - unit * (unit * force).mean(-1, keepdim=True)) * inverse

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"{self.dim}, eps={self.eps}, gain={self.weight is not None}"
