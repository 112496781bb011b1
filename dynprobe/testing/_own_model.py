"""What a model does by itself: its states, logits and texts, taken without anything of dynprobe's.

The truth that captures and texts are held against. It runs on a copy of the model that dynprobe never touches, with the
library's own ``output_hidden_states`` and ``generate``, and with plain hooks on the blocks, whose names alone are taken
from dynprobe.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OwnModel", "own_inputs"]


def own_inputs(model: nn.Module, token_ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """The arguments of one whole forward: positions counted among real tokens, no cache.

    Args:
        model: Whose forward decides which of them it takes.
        token_ids: ``[batch, pos]``.
        mask: ``[batch, pos]``, True at real tokens.
    """
    offered = {
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0),
        "use_cache": False,
    }
    names = inspect.signature(model.forward).parameters
    return {"input_ids": token_ids} | {name: value for name, value in offered.items() if name in names}


def _first_state(values: Any) -> Tensor | None:
    """The first tensor of at least three axes; a block's result may be that tensor itself."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, dict):
        named = values.get("hidden_states")
        return named if isinstance(named, Tensor) else _first_state(list(values.values()))
    for value in values if isinstance(values, tuple | list) else ():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 3:
            return value
    return None


@dataclass
class OwnModel:
    """A copy of a model with the names of its blocks, in the order in which they run.

    Attributes:
        model: The copy.
        blocks: Names of the blocks; one that runs several times stands there once for each.
        start: Name of the module whose output, times ``gain``, is the first state; empty: the first block's input.
        gain: See ``start``.
    """

    model: Any
    blocks: Sequence[str]
    start: str = ""
    gain: float = 1.0

    @contextmanager
    def _listening(self, found: list[list[Tensor]]) -> Iterator[None]:
        """Append to ``found``, for each forward, the states of all depths in order."""
        first = True

        def forward(*_: Any) -> None:
            nonlocal first
            found.append([])
            first = True

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal first
            state = _first_state(args)
            state = _first_state(kwargs) if state is None else state
            if first and not self.start and state is not None:
                found[-1].append(state.clone())
            first = False

        def leave(_: nn.Module, _args: Any, output: Any) -> None:
            state = _first_state(output)
            if state is not None:
                found[-1].append(state.clone())

        handles = [self.model.register_forward_pre_hook(forward)]
        if self.start:
            begin = self.model.get_submodule(self.start)
            handles.append(begin.register_forward_hook(lambda _m, _a, output: found[-1].append(output * self.gain)))
        for name in dict.fromkeys(self.blocks):
            block = self.model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, token_ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """States of all depths and logits of one whole forward, by plain hooks."""
        found: list[list[Tensor]] = []
        with self._listening(found), torch.no_grad():
            logits = self.model(**own_inputs(self.model, token_ids, mask)).logits
        return found[0], logits.clone()

    def hidden_states(self, token_ids: Tensor, mask: Tensor) -> tuple[Any, ...] | str:
        """What the model returns when it is asked for its hidden states; a reason where it returns none."""
        with torch.no_grad():
            try:
                output = self.model(**own_inputs(self.model, token_ids, mask), output_hidden_states=True)
            except Exception as error:
                return f"asked for its hidden states it fails: {type(error).__name__}: {error}"[:160]
        found = getattr(output, "hidden_states", None)
        if not found:
            return "it returns no hidden states"
        return tuple(found)

    def text(self, token_ids: Tensor, mask: Tensor, n_new: int) -> tuple[list[list[int]], list[Tensor]]:
        """The new tokens of the model's own greedy ``generate``, and the states of every depth on the way.

        Returns:
            Tokens per row, and states by depth, all forwards joined along the positions (where each forward feeds the
            whole text so far, those of the last). Some models narrow upper blocks to the last position of the prompt;
            then a depth has its last columns only.
        """
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=n_new, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0, eos_token_id=None,
            bos_token_id=None,
        )  # fmt: skip
        self.model.generation_config = settings
        inputs: dict[str, Any] = {"input_ids": token_ids}
        if "attention_mask" in inspect.signature(self.model.forward).parameters:
            inputs["attention_mask"] = mask.long()
        found: list[list[Tensor]] = []
        with self._listening(found), torch.no_grad():
            out = self.model.generate(**inputs, generation_config=settings)
        width = token_ids.shape[1]
        grown = n_new > 1 and found[-1][0].shape[1] == width + n_new - 1
        joined = found[-1] if grown else [torch.cat(states, 1) for states in zip(*found, strict=True)]
        return out[:, width:].tolist(), joined
