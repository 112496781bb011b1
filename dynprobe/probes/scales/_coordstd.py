"""``coordstd``: u = α·s⊙ε with the SDs s of each coordinate over calibration tokens at the site."""

from __future__ import annotations

from torch import Tensor

from dynprobe.probes._scales import NoiseScale, ScaleStats

__all__ = ["SCALE"]


def _update(h: Tensor, eps: Tensor, alpha: Tensor, stats: ScaleStats) -> Tensor:
    return alpha * (stats.deviations() * eps)


SCALE = NoiseScale(
    name="coordstd",
    meaning="α is in standard deviations of each coordinate over the calibration prompts",
    unit="SDs of each coordinate",
    update=_update,
    needs=frozenset({"calibration"}),
    passport="alpha_coordstd",
    equivariances=frozenset("S"),
    wave=True,
)
