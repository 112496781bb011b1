"""A noise scale: α in units of the largest coordinate of the state itself."""

from __future__ import annotations

from torch import Tensor

from dynprobe.probes import NoiseScale, ScaleStats

__all__ = ["PEAK"]


def update(h: Tensor, eps: Tensor, alpha: Tensor, stats: ScaleStats) -> tuple[Tensor, Tensor]:
    """Return u = α·max_i|h_i|·ε and which states have no unit.

    Args:
        h: States [n, dim].
        eps: Noise [n, dim], or one direction [1, dim].
        alpha: Strengths [n, 1] or [1, 1].
        stats: What else is known of the states; here nothing is needed.
    """
    largest = h.abs().amax(dim=-1, keepdim=True)
    return eps * (alpha * largest), largest[:, 0] == 0


PEAK = NoiseScale(
    name="peak",
    meaning="α is in units of the largest coordinate of each state",
    unit="largest coordinates of the state",
    update=update,
    equivariances=frozenset("S"),
    wave=True,
)
