"""The untied sub-layers that CEM is compared with: Llama's attention and gated MLP, once or re-applied.

With ``attention="llama"`` or ``mlp="llama"`` a block (or some blocks) of a CEM holds the ordinary sub-layer, so that
one half of the architecture can be studied inside the other. ``reuse`` applies the whole residual sub-block again and
again with the same weights, keys and values recomputed from the new state each time: the baseline that descent on an
energy is measured against. Neither has an energy. A whole Llama comes from transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.errors import UsageError
from dynprobe.models._cem_frame import Frame, alibi_slopes, rotate
from dynprobe.models._cem_norm import CemRMSNorm

if TYPE_CHECKING:
    from dynprobe.models._cem_config import CemConfig

__all__ = ["LlamaAttentionStep", "LlamaField", "LlamaMlpStep"]


@dataclass
class LlamaField:
    """One forward of an untied sub-layer: its frame, and the keys and values that each application adds."""

    frame: Frame
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class LlamaAttentionStep(nn.Module):
    """x ↦ x + Attention(norm(x)), the standard pre-norm sub-block with four matrices.

    Args:
        config: The model's configuration.
        layer: Index of the layer, which is its place in the cache.
    """

    kind = "attention"

    def __init__(self, config: CemConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.layer, self.heads, self.head_dim = layer, config.num_attention_heads, config.head_dim
        self.norm = CemRMSNorm(D, config.rms_norm_eps, config.norm_gain)
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.rope_base = config.rope_base if config.llama_position == "rope" else None
        self.slopes = alibi_slopes(config.alibi_slopes, self.heads) if config.llama_position == "alibi" else None

    def prepare(self, h: Tensor, frame: Frame) -> tuple[Tensor, LlamaField]:
        """Return the first state and an empty record of this forward."""
        return h, LlamaField(frame)

    def forward(self, x: Tensor, field: LlamaField) -> Tensor:
        """Apply the sub-block once."""
        frame = field.frame
        n = self.norm(x)
        q, k, v = (self._split(project(n)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            angles = frame.angles(self.rope_base, self.head_dim)
            q, k = rotate(q, angles), rotate(k, angles)
        k, v = self._with_past(k, v, field)
        bias = None if frame.plain and self.slopes is None else frame.bias(self.slopes)
        causal = bias is None and frame.n_query > 1
        o = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        return x + self.o_proj(o.transpose(1, 2).flatten(2))

    def finish(self, field: LlamaField, frame: Frame) -> None:
        """Take the keys and values of all applications into the cache, side by side along the head axis."""
        if frame.cache is not None and field.keys:
            frame.cache.update(torch.cat(field.keys, 1), torch.cat(field.values, 1), self.layer)

    def _with_past(self, k: Tensor, v: Tensor, field: LlamaField) -> tuple[Tensor, Tensor]:
        cache, turn = field.frame.cache, len(field.keys)
        if cache is None:
            return k, v
        field.keys.append(k)
        field.values.append(v)
        layers = getattr(cache, "layers", ())
        held = layers[self.layer] if self.layer < len(layers) else None
        past = 0 if held is None else int(held.get_seq_length())
        heads = slice(turn * self.heads, (turn + 1) * self.heads)
        kept = heads.stop if held is None or not past else int(held.keys.shape[1])
        if past + k.shape[2] != field.frame.n_key or kept < heads.stop:
            raise UsageError(
                f"the cache of layer {self.layer} holds {past} positions, and application {turn + 1} of "
                f"{field.frame.n_key} positions was asked for. Make the cache with the same steps_attention, as a "
                "DynamicCache."
            )
        if held is None or not past:
            return k, v
        return torch.cat([held.keys[:, heads], k], 2), torch.cat([held.values[:, heads], v], 2)

    def _split(self, t: Tensor) -> Tensor:
        return t.view(*t.shape[:-1], self.heads, self.head_dim).transpose(1, 2)


class LlamaMlpStep(nn.Module):
    """x ↦ x + W_down (SiLU(W_gate n) ∘ W_up n) with n = norm(x).

    Args:
        config: The model's configuration.
    """

    kind = "mlp"

    def __init__(self, config: CemConfig) -> None:
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.norm = CemRMSNorm(D, config.rms_norm_eps, config.norm_gain)
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def prepare(self, h: Tensor, frame: Frame) -> tuple[Tensor, LlamaField]:
        """Return the first state."""
        return h, LlamaField(frame)

    def forward(self, x: Tensor, field: LlamaField) -> Tensor:
        """Apply the sub-block once."""
        n = self.norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(n)) * self.up_proj(n))

    def finish(self, field: LlamaField, frame: Frame) -> None:
        """Keep nothing."""
