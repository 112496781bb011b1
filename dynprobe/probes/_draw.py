"""What a write draws: noise at its address, a direction, the wave of a sine; each only when a formula asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes._noise import NoiseSource, shared
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._perturb_values import TAKES_DIRECTION

__all__ = ["GAUSSIAN", "UNIFORM", "Draw", "law_of", "sine"]

UNIFORM: Final = "uniform"
GAUSSIAN: Final = "gaussian"


def law_of(perturb: Perturb) -> str | None:
    """Return the distribution a perturbation draws its noise from; None where it draws none.

    Example:
        >>> [law_of(Perturb(alpha=0.1, kind=kind)) for kind in ("gaussian", "dropout", "scale")]
        ['gaussian', 'uniform', None]
    """
    fixed = perturb.kind in ("direction", "sine", "scale") or (
        perturb.kind == "impulse" and perturb.direction is not None
    )
    return None if fixed else UNIFORM if perturb.kind == "dropout" else perturb.noise_scale.law


def sine(positions: np.ndarray, period: float) -> np.ndarray:
    """Return sin(2π·pos/period), float64 of the shape of ``positions``; exactly 0 at every half period.

    The cycle is taken off first, so that a wave is as exact at token 10⁶ as at token 1.

    Example:
        >>> sine(np.array([0, 1, 2, 4, 6]), 8).round(6).tolist()
        [0.0, 0.707107, 1.0, 0.0, -1.0]
    """
    cycle = np.mod(np.asarray(positions, dtype=np.float64), period) / period
    return np.where(np.isin(cycle, (0.0, 0.5)), 0.0, np.sin(2 * np.pi * cycle))


@dataclass(frozen=True)
class Draw:
    """The draws of the selected states of one write.

    Args:
        perturb: What is written.
        h: States [batch, pos, dim] or [batch, pos, slot, dim].
        mask: Bool [batch, pos] or with slots: which are written.
        source: Address of the noise, which also knows the positions.
        pick: Takes the selected states out of a tensor of the shape of ``h``, or of ``h`` with a last axis of 1.
        dtype: Dtype of the arithmetic.
    """

    perturb: Perturb
    h: Tensor
    mask: Tensor
    source: NoiseSource | None
    pick: Callable[[Tensor], Tensor]
    dtype: torch.dtype

    def __call__(self, law: str) -> Tensor:
        """Return the noise of each selected state, [n, dim]."""
        source = self._source("draws noise")
        units = self.h.shape[2:]  # the slots of one position share an address and split one long vector
        wanted = self.mask.flatten(2).any(-1) if self.mask.ndim > 2 else self.mask
        draw = source.uniform if law == UNIFORM else source.gaussian
        noise = torch.from_numpy(draw(self.perturb.seed, units.numel(), wanted.cpu().numpy()))
        self._fits(tuple(noise.shape[:2]))
        return self.pick(noise.reshape(self.h.shape).to(self.h.device, self.dtype))

    @property
    def directed(self) -> bool:
        """Whether one vector stands in for the noise of all states."""
        kind = self.perturb.kind
        given = self.perturb.direction is not None and kind in TAKES_DIRECTION
        return given or kind in ("direction", "sine")

    def direction(self) -> Tensor:
        """Return √d·v̂ [1, dim] for the unit vector v̂, which stands in for ε."""
        vector, dim = self.perturb.direction, self.h.shape[-1]
        if vector is None and self.perturb.kind == "sine":
            vector = shared(self.perturb.seed, self._source("draws its direction").site, dim).astype(np.float64)
        if vector is None:
            raise UsageError("kind=direction needs a vector: --direction FILE, --contrast A B, or direction=array.")
        if vector.shape != (dim,):
            raise UsageError(f"direction has {vector.size} numbers, the states at this site have {dim}.")
        v = torch.from_numpy(vector.copy())
        length = torch.linalg.vector_norm(v)
        if not bool(torch.isfinite(length)) or float(length) == 0:
            raise UsageError("direction must be a finite vector other than zero.")
        return (v / length * dim**0.5).to(self.h.device, self.dtype)[None]

    def wave(self) -> Tensor:
        """Return sin(2π·pos/period) of each selected state, [n, 1]."""
        assert self.perturb.period is not None
        positions = np.asarray(self._source("counts positions").positions)
        self._fits(positions.shape)
        wave = torch.from_numpy(sine(positions, self.perturb.period)).to(self.h.device, self.dtype)
        return self.pick(wave.reshape(*wave.shape, *(1,) * (self.h.ndim - 2)).expand(*self.h.shape[:-1], 1))

    def _source(self, why: str) -> NoiseSource:
        if self.source is None:
            raise UsageError(f"kind={self.perturb.kind}, scale={self.perturb.scale} {why}: give noise_source.")
        return self.source

    def _fits(self, shape: tuple[int, ...]) -> None:
        if shape != tuple(self.h.shape[:2]):
            raise UsageError(f"noise_source is for {shape} states, h has {tuple(self.h.shape[:2])}.")
