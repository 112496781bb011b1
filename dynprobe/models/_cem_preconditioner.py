"""The symmetric matrix that a descent step is multiplied with: diagonal, or diagonal plus low rank.

P = diag(softplus(√D p)) + U Vᵀ + V Uᵀ, one per head in attention and one in the MLP. P is never formed: it multiplies
either vectors or, once per forward, the output weights (folding), in O(D R). The published text calls P positive
definite; U Vᵀ + V Uᵀ is indefinite in general, so ``psd_margin`` says what holds, from the eigenvalues of a 2R × 2R
matrix, and ``psd="clamp"`` enforces it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Preconditioner"]

_DELTA = 1e-3


class Preconditioner(nn.Module):
    """P = diag(softplus(√D p)) + U Vᵀ + V Uᵀ for one or several heads.

    Args:
        dim: Width D.
        rank: R; 0 leaves out the low-rank part.
        heads: Number of matrices, or None for a single one without a head axis.
        psd: ``free`` or ``clamp``.
        start: ``paper`` (P = softplus(1) I at initialisation) or ``identity``.
    """

    def __init__(self, dim: int, rank: int, heads: int | None = None, psd: str = "free", start: str = "paper") -> None:
        super().__init__()
        lead = () if heads is None else (heads,)
        self.dim, self.rank, self.psd, self.start = dim, rank, psd, start
        self.p = nn.Parameter(torch.empty(*lead, dim))
        self.U = nn.Parameter(torch.empty(*lead, dim, rank)) if rank else None
        self.V = nn.Parameter(torch.empty(*lead, dim, rank)) if rank else None
        self.reset_parameters()

    @property
    def p_start(self) -> float:
        """Value of every entry of p at initialisation."""
        inner = 1.0 if self.start == "paper" else math.log(math.e - 1)
        return inner / math.sqrt(self.dim)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Set p to its start, U to small noise, V to zero."""
        self.p.fill_(self.p_start)
        if self.U is not None and self.V is not None:
            self.U.normal_(0.0, std)
            self.V.zero_()

    def diagonal(self) -> Tensor:
        """Return the diagonal part, ``[D]`` or ``[heads, D]``, always positive."""
        return functional.softplus(math.sqrt(self.dim) * self.p)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return U and V as they enter P (scaled down where ``psd="clamp"`` asks for it), or None."""
        if self.U is None or self.V is None:
            return None
        if self.psd == "free":
            return self.U, self.V
        with torch.no_grad():
            floor = (1 - _DELTA) * self.diagonal().amin(-1)
            low = (-self._lowest()).clamp_min(torch.finfo(floor.dtype).tiny)
            shrink = (floor / low).clamp_max(1.0).sqrt()[..., None, None].to(self.U.dtype)
        return self.U * shrink, self.V * shrink

    def forward(self, rows: Tensor) -> Tensor:
        """Return P applied to every row.

        Args:
            rows: ``[..., n, D]``, or ``[..., heads, n, D]`` where there is one P per head.
        """
        result = rows * self.diagonal()[..., None, :]
        factors = self.factors()
        if factors is None:
            return result
        U, V = factors
        return result + (rows @ U) @ V.mT + (rows @ V) @ U.mT

    def matrix(self) -> Tensor:
        """Return P itself, ``[D, D]`` or ``[heads, D, D]``."""
        return self(torch.eye(self.dim, dtype=self.p.dtype, device=self.p.device).expand(*self.p.shape, self.dim))

    @torch.no_grad()
    def psd_margin(self) -> Tensor:
        """Return min softplus(·) + min(0, λ_min(U Vᵀ + V Uᵀ)), one number or one per head.

        Above 0 it proves P ≻ 0; for a constant diagonal it is P's smallest eigenvalue (or its diagonal, where the
        low-rank part has no negative eigenvalue). Computed in float64.
        """
        margin = functional.softplus(math.sqrt(self.dim) * self.p.double()).amin(-1)
        factors = self.factors()
        return margin if factors is None else margin + _lowest(*factors).clamp_max(0.0)

    def _lowest(self) -> Tensor:
        assert self.U is not None
        assert self.V is not None
        return _lowest(self.U, self.V).to(self.p.dtype)


def _lowest(U: Tensor, V: Tensor) -> Tensor:
    """λ_min of U Vᵀ + V Uᵀ among its non-zero eigenvalues, which are those of [[VᵀU, VᵀV], [UᵀU, UᵀV]]."""
    U, V = U.detach().double(), V.detach().double()
    small = torch.cat([torch.cat([V.mT @ U, V.mT @ V], -1), torch.cat([U.mT @ U, U.mT @ V], -1)], -2)
    return torch.linalg.eigvals(small).real.amin(-1)
