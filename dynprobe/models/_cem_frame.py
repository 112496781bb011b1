"""What all layers of one forward share: who may look at whom, how far apart, and the rotary angles.

Distances count real tokens, so a padded row has the biases that it has alone, whichever side the padding is on and
wherever the holes are. A padding position may look at itself, so that no softmax is empty. Tables are made when first
asked for and shared by all layers; a forward that needs no bias makes none, and attention can use its causal kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Frame", "alibi_slopes", "rotate", "rotate_back"]


def alibi_slopes(kind: str, heads: int) -> tuple[float, ...]:
    """Return the ALiBi slopes m_k, k = 1…K: ``paper`` 2^−k or ``press`` 2^(−8k/K).

    Example:
        >>> alibi_slopes("paper", 2), alibi_slopes("press", 4)
        ((0.5, 0.25), (0.25, 0.0625, 0.015625, 0.00390625))
    """
    rate = 1.0 if kind == "paper" else 8 / heads
    return tuple(2.0 ** (-rate * k) for k in range(1, heads + 1))


@dataclass
class Frame:
    """Positions of one forward.

    Args:
        n_query: Tokens S of this call.
        n_key: Tokens T they may look back on, cached ones included.
        mask: Real tokens, bool [batch, T]; None where all are.
        positions: Positions of the S tokens for RoPE, [batch or 1, S].
        dtype: Dtype of the states.
        device: Their device.
        cache: The transformers cache, or None.
        steps: Recursion of this forward, by kind.
        eager: Whether attention forms its weights explicitly although it could use a fused kernel.
        recorder: What watches the iterations, or None.
    """

    n_query: int
    n_key: int
    mask: Tensor | None
    positions: Tensor
    dtype: torch.dtype
    device: torch.device
    cache: Any = None
    steps: dict[str, int] = field(default_factory=dict)
    eager: bool = False
    recorder: Any = None
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the mask is the causal triangle or a single row, which fused kernels know by themselves."""
        return self.mask is None and self.n_query in (1, self.n_key)

    def own(self) -> Tensor:
        """Bool [S, T]: whether the key is the query's own position."""
        if "own" not in self._made:
            self._made["own"] = self._query_columns()[:, None] == torch.arange(self.n_key, device=self.device)
        return self._made["own"]

    def allowed(self) -> Tensor:
        """Bool [batch or 1, 1, S, T]: whether the query may look at the key."""
        if "allowed" not in self._made:
            causal = self._query_columns()[:, None] >= torch.arange(self.n_key, device=self.device)
            table = causal[None, None]
            if self.mask is not None:
                table = table & (self.mask[:, None, None, :] | self.own())
            self._made["allowed"] = table
        return self._made["allowed"]

    def bias(self, slopes: tuple[float, ...] | None) -> Tensor:
        """Float [batch or 1, K or 1, S, T]: −m_k (i − j) where the query may look, −∞ elsewhere.

        Args:
            slopes: m_k, [K]; None for no ALiBi.
        """
        key = ("bias", slopes)
        if key not in self._made:
            if slopes is None:
                table = torch.zeros((), dtype=self.dtype, device=self.device)
            else:
                wide = torch.promote_types(self.dtype, torch.float32)
                counted = self._counted()
                distance = counted[:, -self.n_query :, None] - counted[:, None, :]
                rates = torch.tensor(slopes, dtype=wide, device=self.device)[:, None, None]
                table = (-rates * distance[:, None]).to(self.dtype)
            self._made[key] = torch.where(self.allowed(), table, -torch.inf)
        return self._made[key]

    def angles(self, base: float, dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles, each [batch or 1, 1, S, dim]."""
        key = ("angles", base, dim)
        if key not in self._made:
            wide = torch.promote_types(self.dtype, torch.float32)
            rates = base ** (-torch.arange(0, dim, 2, dtype=wide, device=self.device) / dim)
            phase = self.positions.to(self.device, wide)[..., None] * rates
            phase = torch.cat([phase, phase], -1)[:, None]
            self._made[key] = phase.cos().to(self.dtype), phase.sin().to(self.dtype)
        return self._made[key]

    def _query_columns(self) -> Tensor:
        return torch.arange(self.n_key - self.n_query, self.n_key, device=self.device)

    def _counted(self) -> Tensor:
        """Number of real tokens before each column, [batch or 1, T]."""
        if self.mask is None:
            return torch.arange(self.n_key, device=self.device)[None]
        return (self.mask.long().cumsum(-1) - 1).clamp_min(0)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [batch, heads, S, dim] by the angles of its positions (halves, as Llama does)."""
    cos, sin = angles
    return x * cos + _half_turn(x) * sin


def rotate_back(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Undo :func:`rotate`; it is the transpose too."""
    cos, sin = angles
    return x * cos - _half_turn(x) * sin


def _half_turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
