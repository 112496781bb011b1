"""How much of the attention of newly written tokens falls on the prompt.

Attention weights exist only where they are computed explicitly (``eager``), so a model is switched to that for the time
being and back. The weights of each layer are reduced where they arise, ``[rows]`` per token, and never kept. What
a model does not hand out is not guessed: the mass is NaN and the reason is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.controllers import Controller, Memory, Seen
from dynprobe.probes import Subject

__all__ = ["PromptMass", "eager"]


@contextmanager
def eager(subject: Subject) -> Iterator[str | None]:
    """Let a model compute its attention weights; yields why it cannot, or None where it does."""
    model: Any = subject.model
    switch = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if switch is None or before is None:
        yield "no-eager-attention"
        return
    try:
        switch("eager")
    except (ValueError, ImportError, AttributeError, NotImplementedError) as error:
        yield f"no-eager-attention: {(str(error).splitlines() or [''])[0][:80]}"
        return
    try:
        yield None
    finally:
        switch(before)


class PromptMass(Controller):
    """Mean over layers and heads of the attention that a decode step gives to the prompt's columns.

    It acts on nothing; it is a controller only to know which forward belongs to the text that is being written.

    Args:
        subject: The model, in eager attention.
    """

    id = "attention.prompt/1"

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.reason: str | None = None
        self._columns = 0
        self._handles: list[Any] = []
        self._now: list[Tensor] = []
        self._steps: list[Tensor] = []

    def __enter__(self) -> PromptMass:
        modules = dict.fromkeys(m for b in self.subject.blocks for m in b.modules() if _is_attention(m))
        self._handles = [module.register_forward_hook(self._reduce) for module in modules]
        self.reason = None if modules else "no-attention-module"
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, n_rows: int) -> Memory:
        """A new text."""
        self._now, self._steps, self._columns = [], [], 0
        return {}

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Close a forward: the first one is the prompt, every other one a new token."""
        if seen.step.index == 0:
            self._columns = seen.step.positions.shape[1]
        elif self._now:
            self._steps.append(torch.stack(self._now).mean(0))
        self._now = []

    def _reduce(self, _module: nn.Module, _args: Any, output: Any) -> None:
        weights = _weights_of(output)
        if weights is None:
            self.reason = self.reason or "no-attention-weights"
        elif self._columns and weights.shape[2] == 1:
            if weights.shape[3] <= self._columns:
                self.reason = self.reason or "sliding-window"
                return
            self._now.append(weights[:, :, 0, : self._columns].float().sum(-1).mean(1))

    def table(self, rows: int, steps: int) -> np.ndarray:
        """Return the mass ``[rows, steps]`` of the tokens fed after the prompt; NaN where it could not be read."""
        if self.reason is None and (len(self._steps) != steps or any(s.shape != (rows,) for s in self._steps)):
            self.reason = "no-attention-weights"
        if self.reason is not None or not steps:
            return np.full((rows, steps), np.nan)
        return torch.stack(self._steps, 1).cpu().numpy()


def _weights_of(output: Any) -> Tensor | None:
    """The attention weights ``[batch, head, query, key]`` among what a module returned."""
    if not isinstance(output, tuple | list):
        return None
    return next((x for x in output[1:] if isinstance(x, Tensor) and x.dim() == 4), None)


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is one layer's attention: it is named so and has projections of its own."""
    named = "attention" in type(module).__name__.lower() or type(module).__name__.lower().endswith("attn")
    return (
        named and any(True for _ in module.children()) and not any(_is_attention(child) for child in module.children())
    )
