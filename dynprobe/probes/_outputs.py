"""Find the hidden state in whatever a block takes and returns.

Blocks return a tensor, a tuple, a list, a dict or a ``ModelOutput``, and the answer changes between library versions;
indexing ``output[0]`` on a tensor silently slices the batch. Everything in dynprobe that touches a block's input or
output goes through the functions here, and nothing else guesses. So does the way to the logits of a whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynprobe.errors import ModelError

__all__ = [
    "hidden_argument",
    "hidden_of",
    "identical",
    "logits_of",
    "ordinary",
    "replace_argument",
    "replace_hidden",
    "replace_logits",
    "wrapper_like",
]

_NAMES = ("hidden_states", "last_hidden_state", "hidden_state", "x", "hidden", "inputs_embeds")


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def _key_of(output: Any) -> int | str | None:
    """Index or key under which ``output`` carries its state; None when ``output`` is the state itself."""
    if _is_state(output):
        return None
    if isinstance(output, Mapping):  # ModelOutput is a mapping too
        for name in (*_NAMES, *output):
            if name in output and _is_state(output[name]):
                return name
    elif isinstance(output, tuple | list):
        for index, item in enumerate(output):
            if _is_state(item):
                return index
    raise ModelError(
        f"a block returned {type(output).__name__} and no floating-point tensor with at least two axes was found in "
        "it; name the modules that return states with layers='path.to.blocks.*'"
    )


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state inside a block's output.

    Args:
        output: A tensor, or a tuple, list, mapping or ``ModelOutput`` whose first floating-point tensor is the state.

    Returns:
        The state itself (not a copy), ``[batch, pos, dim]`` for a decoder block.

    Raises:
        ModelError: If there is no state in it.

    Example:
        >>> import torch
        >>> h = torch.zeros(2, 3, 4)
        >>> hidden_of(h) is h, hidden_of((h, None)) is h, hidden_of({"hidden_states": h}) is h
        (True, True, True)
    """
    if isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2:  # most blocks, every token
        return output
    key = _key_of(output)
    return output if key is None else output[key]


def replace_hidden(output: Any, state: Tensor) -> Any:
    """Return ``output`` with its state replaced by ``state``, in a container of the same type."""
    key = _key_of(output)
    return state if key is None else Wrapper(type(output), _items(output), key)(state)


@dataclass(frozen=True)
class Wrapper:
    """Puts a state into the container that a block returns; ``wrapper_like`` makes one."""

    kind: Any
    items: Mapping[Any, Any]
    key: int | str | None

    def __call__(self, state: Tensor) -> Any:
        """Return ``state`` in a new container."""
        if self.key is None:
            return state
        items = {**self.items, self.key: state}
        if issubclass(self.kind, Mapping):
            return items if self.kind is dict else self.kind(**items)
        # Named tuples take their fields one by one.
        return self.kind(*items.values()) if hasattr(self.kind, "_fields") else self.kind(items.values())


def wrapper_like(output: Any) -> Wrapper:
    """Return what wraps a state like ``output`` does, with everything else that it held left out.

    A stub answers with it. Nothing but plain constants is kept, so that no tensor and no cache of one forward can reach
    another.

    Example:
        >>> import torch
        >>> wrap = wrapper_like((torch.zeros(1, 2, 3), torch.ones(1, 2), True))
        >>> wrap(torch.ones(1, 1, 3))
        (tensor([[[1., 1., 1.]]]), None, True)
    """
    key = _key_of(output)
    if key is None:
        return Wrapper(Tensor, {}, None)
    constants = {k: v if isinstance(v, bool | int | float | str) else None for k, v in _items(output).items()}
    return Wrapper(type(output), constants, key)


def _items(output: Any) -> dict[Any, Any]:
    return dict(output if isinstance(output, Mapping) else enumerate(output))


def _argument_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    for name in _NAMES:
        if _is_state(kwargs.get(name)):
            return name
    for index, item in enumerate(args):
        if _is_state(item):
            return index
    for name, item in kwargs.items():
        if _is_state(item) and item.dim() == 3:
            return name
    raise ModelError("a block was called without a floating-point tensor among its arguments; its input cannot be read")


def hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a block's call.

    Example:
        >>> import torch
        >>> h = torch.zeros(2, 3, 4)
        >>> hidden_argument((h,), {}) is h, hidden_argument((), {"hidden_states": h}) is h
        (True, True)
    """
    key = _argument_key(args, kwargs)
    return args[key] if isinstance(key, int) else kwargs[key]


def replace_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block's call with its hidden state replaced."""
    key = _argument_key(args, kwargs)
    if isinstance(key, int):
        return (*args[:key], state, *args[key + 1 :]), dict(kwargs)
    return args, {**kwargs, key: state}


def ordinary(state: Tensor) -> Tensor:
    """Return ``state`` as a tensor that autograd and in-place operations accept (inference tensors are copied)."""
    if not state.is_inference():
        return state
    with torch.inference_mode(False):
        return state.clone()


def logits_of(output: object) -> Tensor:
    """Return the logits in a model's output.

    Raises:
        ModelError: If the model has none (it is a bare backbone).
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Tensor):
        return output
    raise ModelError(
        f"the model returned {type(output).__name__} without logits; load it as a language model, or ask for none with "
        "logits=None"
    )


def replace_logits(output: Any, logits: Tensor) -> Any:
    """Return a model's output with other logits, in a container of the same type."""
    if isinstance(output, Tensor):
        return logits
    return type(output)(**{**_items(output), "logits": logits})


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: signed zeros differ, a NaN equals itself.

    Example:
        >>> import torch
        >>> identical(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
        True
        >>> identical(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
