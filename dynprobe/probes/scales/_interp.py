"""``interp``: u = α(h′ − h), linear towards the states h′ of the next prompt."""

from __future__ import annotations

from torch import Tensor

from dynprobe.probes._scales import NoiseScale, ScaleStats

__all__ = ["SCALE"]


def _update(h: Tensor, eps: None, alpha: Tensor, stats: ScaleStats) -> Tensor:
    return alpha * (stats.donor() - h)


SCALE = NoiseScale(
    name="interp",
    meaning="α is the share of the way to the state of the next prompt",
    unit="share of the way to the donor",
    update=_update,
    needs=frozenset({"donor"}),
    law=None,
    equivariances=frozenset("RS"),
    own_write="h' = h + α(donor − h)",
)
