"""From tokens to memories: the causal half of the CSM-style model.

A short causal convolution mixes a few neighbouring embeddings, and a gated leaky integrator writes them into N memories
per position, m_t = a_t∘m_{t−1} + (1 − a_t)∘w_t, with half-lives between one and some hundred tokens. After this step no
information crosses positions any more: the energy that follows is minimised at each position on its own.

Padding may stand on either side or in between. Real tokens are moved together before anything is computed and moved
back afterwards, so that a row in a padded batch goes through the same arithmetic as the row alone. Padded places get
memory and context 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.models._csm_cache import CsmCache
from dynprobe.models._csm_config import CsmConfig
from dynprobe.models._csm_scan import linear_scan

__all__ = ["CsmWriter", "rms"]


def rms(x: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    """Divide by the root mean square over the last axis, in float32 or better.

    Args:
        x: States ``[…, dim]``.
        eps: Added to the mean square.
        gain: Factor per coordinate ``[dim]``, or None.

    Returns:
        Same shape and dtype.

    Example:
        >>> import torch
        >>> rms(torch.tensor([3.0, 3.0]), 1e-12).tolist()
        [1.0, 1.0]
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    unit = functional.rms_norm(wide, wide.shape[-1:], None, eps).to(x.dtype)
    return unit if gain is None else unit * gain


class CsmWriter(nn.Module):
    """Embeddings to memories and context.

    Args:
        config: Sizes and half-lives.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__()
        D, N, d = config.hidden_size, config.num_states, config.state_size
        self.config = config
        self.norm_convolution = nn.Parameter(torch.empty(D))
        self.convolution = nn.Parameter(torch.empty(D, config.conv_width))
        self.write = nn.Parameter(torch.empty(N * d, D))
        self.decay = nn.Parameter(torch.empty(N, D))
        self.decay_bias = nn.Parameter(torch.empty(N))
        self.context = nn.Parameter(torch.empty(d, D))

    def half_life_bias(self) -> Tensor:
        """Bias of the decay gates whose half-lives are spaced evenly in logarithm, ``[slot]``."""
        c = self.config
        low, high = math.log2(c.half_life_min), math.log2(c.half_life_max)
        lives = 2.0 ** torch.linspace(low, high, c.num_states, dtype=torch.float64)
        keep = 2.0 ** (-1.0 / lives)
        return torch.logit(keep).to(torch.float32)

    def forward(
        self, embedded: Tensor, real: Tensor | None = None, cache: CsmCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write one stretch of tokens.

        Args:
            embedded: Token embeddings ``[batch, pos, hidden]``.
            real: True where a token is no padding ``[batch, pos]``; None = all are.
            cache: Decoding state to start from; memory and window are moved on in it.

        Returns:
            Memory m ``[batch, pos, slot, dim]`` and context c ``[batch, pos, 1, dim]``, both 0 at padding.
        """
        if real is None or bool(real.all()):
            order = mask = None
        else:
            order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
            embedded = embedded.gather(1, order[..., None].expand_as(embedded))
            mask = real.gather(1, order)
        h = self._convolve(embedded, mask, cache)
        memory = self._integrate(h, mask, cache)
        context = functional.linear(h, self.context)
        if order is not None and mask is not None:
            context = context * mask[..., None]
            memory = memory * mask[..., None, None]
            back = torch.argsort(order, dim=1)
            context = context.gather(1, back[..., None].expand_as(context))
            memory = memory.gather(1, back[..., None, None].expand_as(memory))
        return memory.to(h.dtype), context[:, :, None, :]

    def _convolve(self, embedded: Tensor, mask: Tensor | None, cache: CsmCache | None) -> Tensor:
        c = self.config
        e = rms(embedded, c.norm_eps)
        if mask is not None:
            e = e * mask[..., None]
        past = c.conv_width - 1
        if cache is not None and cache.window is not None:
            window = cache.window.to(e.dtype)
        else:
            window = e.new_zeros(e.shape[0], past, e.shape[2])
        longer = torch.cat([window, e], dim=1)
        if cache is not None:
            cache.window = _last_real(longer, mask, past)
        mixed = e.new_zeros(e.shape)
        for j in range(c.conv_width):
            mixed = mixed + longer[:, j : j + e.shape[1]] * self.convolution[:, j]
        return rms(mixed, c.norm_eps, self.norm_convolution)

    def _integrate(self, h: Tensor, mask: Tensor | None, cache: CsmCache | None) -> Tensor:
        c = self.config
        w = functional.linear(h, self.write).unflatten(-1, (c.num_states, c.state_size))
        gate = functional.linear(h, self.decay, self.decay_bias)
        if h.dtype in (torch.float16, torch.bfloat16):
            w, gate = w.float(), gate.float()
        keep, take = torch.sigmoid(gate), torch.sigmoid(-gate)
        if mask is not None:
            keep, take = torch.where(mask[..., None], keep, 1.0), torch.where(mask[..., None], take, 0.0)
        keep, take = keep[..., None], take[..., None] * w
        if cache is not None and cache.memory is not None:
            first = take[:, :1] + keep[:, :1] * cache.memory[:, None].to(take.dtype)
            take = torch.cat([first, take[:, 1:]], dim=1)
        memory = linear_scan(keep, take)
        if cache is not None and memory.shape[1]:
            cache.memory = memory[:, -1].clone()
        return memory


def _last_real(longer: Tensor, mask: Tensor | None, past: int) -> Tensor:
    """The last ``past`` real entries of ``[window, real tokens, padding]``."""
    if mask is None:
        return longer[:, longer.shape[1] - past :].clone()
    last = mask.sum(1)[:, None] + torch.arange(past, device=longer.device)
    return longer.gather(1, last[..., None].expand(-1, -1, longer.shape[2]))
