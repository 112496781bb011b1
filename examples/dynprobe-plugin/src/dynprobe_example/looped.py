"""A model with a loop that no trial forward can tell from layers, and the adapter that describes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.probes import Loop

__all__ = ["LoopedModel", "describe"]


class LoopedModel(nn.Module):
    """One block, called ``config.rounds`` times."""

    def __init__(self, rounds: int = 3, dim: int = 16, vocab: int = 96) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="example_loop", rounds=rounds)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.core = nn.Embedding(vocab, dim), _Core(dim)
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def get_input_embeddings(self) -> nn.Module:
        """Where tokens become states."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """Where states become logits."""
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits [batch, pos, vocab]."""
        state = self.embed(input_ids)
        for _ in range(self.config.rounds):
            state = self.core(state)
        logits: Tensor = self.head(self.norm(state))
        return logits


class _Core(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, state: Tensor) -> Tensor:
        return state + torch.tanh(self.mix(state))


def describe(model: Any) -> Loop:
    """Say which module's calls are the iterations, and how their number is read and chosen."""

    def choose(one: Any, iterations: int) -> None:
        one.config.rounds = iterations

    return Loop((("core", "core", -1),), prefix=True, iterations=lambda one: one.config.rounds, set_iterations=choose)
