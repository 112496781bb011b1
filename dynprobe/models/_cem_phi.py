"""The antiderivative of SiLU, which the energy of a gated MLP is made of.

φ(x) = ∫₀ˣ t σ(t) dt = x softplus(x) + Li₂(−eˣ) + π²/12 has no elementary form, and the obvious evaluation cancels
near zero and overflows far from it. With a = |x| and L = log1p(e^{−a}) ∈ (0, ln 2] the Landen and Bernoulli expansions
of the dilogarithm converge so fast that eight terms give float64 accuracy everywhere. The backward is SiLU itself,
never a derivative of the series, so the energy's gradient is exactly the update of the layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["silu_integral"]

_C = math.pi**2 / 12
# −Li₂(−e^{−a}) = L + L²/4 + Σ c_n L^n over odd n ≥ 3
_ODD = (1 / 36, -1 / 3600, 1 / 211_680, -1 / 10_886_400, 1 / 526_901_760, -4.0647616451e-11)
_SMALL = 0.05
#: Numbers that are worked on at a time.
_CHUNK = 2**15


def silu_integral(x: Tensor) -> Tensor:
    """Return φ(x) = ∫₀ˣ SiLU, elementwise.

    φ(−∞) = π²/12, φ(x) → x²/2 − π²/12 for large x, φ(x) + φ(−x) = x²/2. Half precision is computed in float32.

    Args:
        x: Any float tensor.

    Returns:
        Tensor of the shape and dtype of ``x``; its derivative is SiLU(x), its second derivative SiLU′(x).

    Example:
        >>> round(float(silu_integral(torch.tensor(1.0, dtype=torch.float64))), 14)
        0.32944265049756
    """
    return _SiluIntegral.apply(x)


def _series(x: Tensor, out: Tensor) -> None:
    """Write φ(x) into ``out``; what is needed in between stays in the cache."""
    terms = _ODD if x.dtype == torch.float64 else _ODD[:4]
    a = x.abs()
    L = a.neg().exp_().log1p_()
    square = L.square()
    odd = torch.full_like(L, terms[-1])
    for coefficient in reversed(terms[:-1]):
        odd.mul_(square).add_(coefficient)
    psi = odd.mul_(square).mul_(L).add_(square, alpha=0.25).add_(L).sub_(_C).add_(a.mul(L))
    torch.clamp(x, min=0, out=out)
    out.square_().mul_(0.5).addcmul_(torch.sign(x), psi)
    near = a < _SMALL
    if bool(near.any()):
        y = x * x
        out.copy_(torch.where(near, y * (0.25 + x * (1 / 12 - y / 240 + y * y / 3360)), out))


class _SiluIntegral(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        out = torch.empty_like(wide)
        for piece, target in zip(wide.view(-1).split(_CHUNK), out.view(-1).split(_CHUNK), strict=True):
            _series(piece, target)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * functional.silu(x)
