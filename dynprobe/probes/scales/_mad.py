"""``mad``: u = α·1.4826·MAD(h)·ε, a robust SD over the coordinates of the state itself."""

from __future__ import annotations

from torch import Tensor

from dynprobe.probes._mad import GAUSS_MAD, mad
from dynprobe.probes._scales import NoiseScale, ScaleStats

__all__ = ["SCALE"]


def _update(h: Tensor, eps: Tensor, alpha: Tensor, stats: ScaleStats) -> tuple[Tensor, Tensor]:
    spread = mad(h)[:, None]
    return eps * (alpha * (GAUSS_MAD * spread)), spread[:, 0] == 0  # MAD zero: half of the coordinates are equal


SCALE = NoiseScale(
    name="mad",
    meaning="α is in robust deviations (1.4826·MAD) of each state's own coordinates",
    unit="robust SDs of the state",
    update=_update,
    passport="alpha_mad",
    equivariances=frozenset("S"),
    wave=True,
)
