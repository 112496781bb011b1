"""``relnorm``: u = α‖h‖ε̂, a share of the norm of the state itself."""

from __future__ import annotations

import torch
from torch import Tensor

from dynprobe.probes._scales import NoiseScale, ScaleStats

__all__ = ["SCALE", "relnorm"]


def relnorm(h: Tensor, eps: Tensor, alpha: Tensor, stats: ScaleStats) -> tuple[Tensor, Tensor]:
    """Return u = α‖h‖ε̂ and which states have norm zero."""
    unit = stats.norm / torch.linalg.vector_norm(eps, dim=-1, keepdim=True)
    return eps * (alpha * unit), stats.norm[:, 0] == 0


SCALE = NoiseScale(
    name="relnorm",
    meaning="α is the size of the write as a share of each state's norm (‖u‖/‖h‖ = α)",
    unit="‖u‖ / ‖h‖",
    update=relnorm,
    passport="alpha_relnorm",
    equivariances=frozenset("RS"),
    wave=True,
)
