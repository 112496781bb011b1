"""``cov``: u = α·Σ^{1/2}ε with the covariance Σ of the calibration states at the site."""

from __future__ import annotations

from torch import Tensor

from dynprobe.probes._scales import NoiseScale, ScaleStats

__all__ = ["SCALE"]


def _update(h: Tensor, eps: Tensor, alpha: Tensor, stats: ScaleStats) -> Tensor:
    for factor in stats.half_covariance():
        eps = eps @ factor
    return alpha * eps


SCALE = NoiseScale(
    name="cov",
    meaning="α scales noise with the calibration covariance of the site",
    unit="SDs along the principal axes",
    update=_update,
    needs=frozenset({"covariance"}),
    equivariances=frozenset("RS"),
)
