"""``neftune``: u = α/√(L·d)·(2υ − 1) for υ in [0, 1) and L real tokens of the prompt. NEFTune, arXiv 2310.05914."""

from __future__ import annotations

import torch
from torch import Tensor

from dynprobe.probes._scales import NoiseScale, ScaleStats

__all__ = ["SCALE"]


def _update(h: Tensor, uniforms: Tensor, alpha: Tensor, stats: ScaleStats) -> Tensor:
    return (alpha / torch.sqrt(stats.lengths() * uniforms.shape[-1])) * (2 * uniforms - 1)


SCALE = NoiseScale(
    name="neftune",
    meaning="α is NEFTune's: α/√(L·d) times uniform noise",
    unit="in α/√(L·d)",
    update=_update,
    needs=frozenset({"lengths"}),
    law="uniform",
    own_write="uniform noise",
    at_embedding=True,
)
