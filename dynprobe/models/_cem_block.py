"""A block: the recursion of its attention, then that of its MLP, each returned as an update of the residual stream.

A sub-layer runs its step T times and returns x^(T) − h, so a block is h + attention + mlp as in any decoder, and what
reads or writes decoders (updates, states between blocks) finds the same places here. The iterations themselves are
the calls of ``layers.<i>.self_attn.step`` and ``layers.<i>.mlp.step``: call t takes x^(t) as its first argument and
returns x^(t+1). A hook that replaces what a step returns changes the rest of the recursion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dynprobe.models._cem_attention import InteractionStep
from dynprobe.models._cem_frame import Frame
from dynprobe.models._cem_llama import LlamaAttentionStep, LlamaMlpStep
from dynprobe.models._cem_mlp import ElementwiseStep

if TYPE_CHECKING:
    from dynprobe.models._cem_config import CemConfig

__all__ = ["CemBlock", "IteratedSublayer"]


class IteratedSublayer(nn.Module):
    """h ↦ x^(T) − h, with x^(t+1) = step(x^(t)).

    Args:
        step: The step module; ``step.kind`` names the recursion it follows.
        layer: Index of the block.
        once: Whether it runs once whatever the recursion is (an ordinary Llama sub-layer).
    """

    def __init__(self, step: nn.Module, layer: int, once: bool = False) -> None:
        super().__init__()
        self.step, self.layer, self.once = step, layer, once

    def forward(self, h: Tensor, frame: Frame) -> Tensor:
        """Return the update.

        Args:
            h: Residual stream [batch, S, D].
            frame: What the layers share.
        """
        step, kind, recorder = self.step, str(self.step.kind), frame.recorder
        x, field = step.prepare(h, frame)  # type: ignore[operator]
        steps = 1 if self.once else frame.steps[kind]
        for t in range(steps):
            if recorder is not None:
                x = recorder.visit(self.layer, kind, t, steps, x, step, field)
            x = step(x, field)
        if recorder is not None:
            x = recorder.visit(self.layer, kind, steps, steps, x, step, field)
        step.finish(field, frame)  # type: ignore[operator]
        return x - h


class CemBlock(nn.Module):
    """h ↦ h + attention(h) + mlp(h + attention(h)).

    Args:
        config: The model's configuration.
        layer: Index of the block.
    """

    def __init__(self, config: CemConfig, layer: int) -> None:
        super().__init__()
        attention, mlp = config.style("attention", layer), config.style("mlp", layer)
        attention_step = (InteractionStep if attention == "cem" else LlamaAttentionStep)(config, layer)
        mlp_step = (ElementwiseStep if mlp == "cem" else LlamaMlpStep)(config)
        self.self_attn = IteratedSublayer(attention_step, layer, once=attention == "llama")
        self.mlp = IteratedSublayer(mlp_step, layer, once=mlp == "llama")

    def forward(self, hidden_states: Tensor, frame: Frame) -> Tensor:
        """Return the state after the block, [batch, S, D]."""
        hidden_states = hidden_states + self.self_attn(hidden_states, frame)
        return hidden_states + self.mlp(hidden_states, frame)
