"""``abs``: u = αε, in the model's own units."""

from __future__ import annotations

from torch import Tensor

from dynprobe.probes._scales import NoiseScale, ScaleStats

__all__ = ["SCALE"]


def _update(h: Tensor, eps: Tensor, alpha: Tensor, stats: ScaleStats) -> Tensor:
    return alpha * eps


SCALE = NoiseScale(
    name="abs",
    meaning="α is the standard deviation of the noise in the model's own units",
    unit="the model's own units",
    update=_update,
    passport="alpha_abs",
    equivariances=frozenset("R"),
    wave=True,
)
