"""States of the layers of a Transformer, as libraries name and stack them, on the axis of depth.

Depth d is the state entering block d; depth L, the output of the last block, is before the final norm. The names of
others say the same in other words:

* **TransformerLens**: ``blocks.6.hook_resid_pre`` is depth 6, ``blocks.6.hook_resid_post`` depth 7 (``hook_in`` and
  ``hook_out`` of a block in its newer models), each ``[batch, pos, d_model]``;
  https://transformerlensorg.github.io/TransformerLens/generated/code/transformer_lens.ActivationCache.html
* **transformers**: ``hidden_states`` has L + 1 entries, the embedding first, but its last one is taken *after* the
  final norm (https://huggingface.co/docs/transformers/main_classes/output), so that the last step would mix a
  normalisation into the trajectory. It is left out unless the user says that it is not normalised.
* **vLLM and speculators**: ``hidden_states`` ``[seq, layers, dim]`` and ``token_ids`` ``[seq]`` of one text per file.
  Layer id k is the state entering block k, and ``num_hidden_layers`` the last output, not normalised
  (https://docs.vllm.ai/en/latest/features/speculative_decoding/extract_hidden_states/). The file does not say which
  layers they are, so the user does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynprobe._ranges import whole_numbers
from dynprobe.errors import UsageError
from dynprobe.runs._trajectory_raw import Raw, refuse

__all__ = ["Reading", "from_hooks", "from_named", "from_stack", "from_text", "hook_depth", "read_depths"]

_HOOK = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_post|hook_in|hook_out)$")
_STACKS = ("hidden_states", "states")
_TOKENS = ("token_ids", "input_ids", "tokens")
_MASKS = ("valid", "attention_mask", "mask")


@dataclass(frozen=True)
class Reading:
    """What a file of layers does not say.

    Attributes:
        dims: Names of the axes of a stack: ``layer, batch, pos, dim`` in its order.
        depths: Depths of its layers.
        final_norm: ``applied`` where the last state is after the final norm, ``none`` where it is not; None takes what
            the library that writes such files does.
        allow_bin: Whether a pickled file may be read, with ``weights_only=True``.
    """

    dims: tuple[str, ...] | None = None
    depths: tuple[int, ...] | None = None
    final_norm: str | None = None
    allow_bin: bool = False

    def __post_init__(self) -> None:
        if self.final_norm not in (None, "applied", "none"):
            raise UsageError(f"final_norm={self.final_norm!r}; it is 'applied' (the last state is after it) or 'none'")


def read_depths(text: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return depths given as ``2,16,29`` or ``0:13`` (0 … 12).

    Example:
        >>> read_depths("0:4"), read_depths("2,16, 29")
        ((0, 1, 2, 3), (2, 16, 29))
    """
    if text is None or not isinstance(text, str):
        return None if text is None else tuple(int(d) for d in text)
    try:
        found = whole_numbers(text)
    except ValueError:
        raise UsageError(f"--depths {text!r}; it is numbers such as 2,16,29 or 0:13") from None
    if not found:
        raise UsageError(f"--depths {text!r} names no depth")
    return found


def hook_depth(name: str) -> int | None:
    """Return the depth that a name of TransformerLens stands for, or None where it is no state between blocks.

    Example:
        >>> hook_depth("blocks.6.hook_resid_post"), hook_depth("blocks.0.hook_resid_pre"), hook_depth("hook_embed")
        (7, 0, None)
    """
    match = _HOOK.match(name)
    return None if match is None else int(match[1]) + match[2].endswith(("post", "out"))


def from_named(raw: Raw, tensors: Mapping[str, Any], reading: Reading) -> bool:
    """Read named tensors of layers; False where there are none such.

    Args:
        raw: Gets the states.
        tensors: Name → tensor, or a list of tensors.
        reading: What the file does not say.
    """
    others = set(tensors)
    hooks = {name: depth for name in tensors if (depth := hook_depth(name)) is not None}
    stack = next((name for name in _STACKS[: 1 if reading.dims is None else 2] if name in tensors), None)
    if not hooks and stack is None:
        return False
    token = next((name for name in _TOKENS if name in tensors), None)
    mask = next((name for name in _MASKS if name in tensors), None)
    tokens = None if token is None else torch.as_tensor(tensors[token])
    others -= {*hooks, *(name for name in (stack, token, mask) if name)}
    if hooks:
        from_hooks(raw, {name: tensors[name] for name in hooks})
        others = {name for name in others if "hook_" not in name}  # other places of the model
    else:
        given = tensors[stack]  # type: ignore[index]
        one = not isinstance(given, list | tuple) and given.ndim == 3 and tokens is not None and tokens.ndim == 1
        if one and reading.dims is None:
            from_text(raw, given, tokens, reading)
        else:
            from_stack(raw, given, reading)
    if tokens is not None and raw.token_ids is None:
        raw.token_ids = np.atleast_2d(tokens.numpy())
    if mask is not None:
        raw.valid = np.atleast_2d(torch.as_tensor(tensors[mask]).numpy())
    raw.remarks += [f"{name} is not read" for name in sorted(others)]
    return True


def from_hooks(raw: Raw, hooks: Mapping[str, Any]) -> None:
    """Read states under the names of TransformerLens.

    The output of a block and the input of the next are one state; where both are there they must be equal.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name in sorted(hooks, key=lambda n: (hook_depth(n), n)):
        depth, state = hook_depth(name), _floats(raw, name, hooks[name])
        assert depth is not None
        if depth in found:
            before, other = found[depth]
            if other.shape != state.shape or not torch.equal(other, state):
                refuse(
                    raw, f"{before} and {name} are both depth {depth} and differ: something stands between the blocks, "
                    "or one of them was patched", "store one of them",
                )  # fmt: skip
            continue
        found[depth] = (name, state)
    shapes = {name: list(state.shape) for name, state in found.values()}
    first = next(iter(shapes))
    if other_name := next((name for name in shapes if shapes[name] != shapes[first]), None):
        refuse(
            raw, f"the shape changes: {first} has {shapes[first]}, {other_name} has {shapes[other_name]}",
            "give all layers one shape",
        )  # fmt: skip
    stacked = torch.stack([state for _, state in found.values()])
    if stacked.ndim == 3:  # no batch dimension: [layer, pos, d_model]
        stacked = stacked[:, None]
    if stacked.ndim != 4:
        refuse(raw, f"{first} has the shape {shapes[first]}", "store [batch, pos, d_model] per hook")
    wide = stacked.float()
    if bool((wide.mean(-1).abs() <= 1e-4 * wide.square().mean(-1).sqrt()).all()):
        raw.remarks.append(
            "every state has the mean 0 over its features: TransformerLens centred the weights that write to the "
            "residual stream, and norms, κ and Δ are not those of the model itself (cache it without processing)"
        )
    _take(raw, stacked, tuple(found))


def from_stack(raw: Raw, given: Any, reading: Reading) -> None:
    """Read a stack of layers: a list of states ``[batch, pos, dim]``, or one tensor with an axis of layers."""
    if isinstance(given, list | tuple):
        states = [_floats(raw, f"entry {i}", state) for i, state in enumerate(given)]
        if len({state.shape for state in states}) > 1:
            refuse(raw, f"the shape changes: {sorted({tuple(s.shape) for s in states})}", "give all layers one shape")
        if not states:
            refuse(raw, "the list of states is empty", "store one state per layer")
        given = torch.stack(states)
    else:
        given = _floats(raw, "hidden_states", given)
    dims = reading.dims or ("layer", "batch", "pos", "dim")
    if reading.dims is None and given.ndim != 4:
        refuse(
            raw, f"the states have the shape {list(given.shape)}, and nothing says which axis is which",
            "name the axes: --dims layer,pos,dim (out of layer, batch, pos, dim)",
        )  # fmt: skip
    if sorted({*dims} - {"batch", "pos"}) != ["dim", "layer"] or len(set(dims)) != given.ndim:
        refuse(
            raw, f"the states have the shape {list(given.shape)} and --dims names {list(dims)}",
            "name every axis once, out of layer, batch, pos, dim; layer and dim must be there",
        )  # fmt: skip
    order = [dims.index(axis) for axis in ("layer", "batch", "pos", "dim") if axis in dims]
    states = given.permute(order)
    for place, axis in ((1, "batch"), (2, "pos")):
        if axis not in dims:
            states = states.unsqueeze(place)
    n = len(states)
    depths = reading.depths or tuple(range(n))
    if len(depths) != n:
        refuse(raw, f"there are {n} layers and {len(depths)} depths", "give one depth per layer")
    if reading.depths is None:
        raw.assumed.append(f"depths: 0 … {n - 1}, 0 = the embedding, as transformers stacks hidden_states")
    if reading.final_norm != "none":
        if n < 2:
            refuse(raw, "there is one state, and the last is left out", "say --final-norm none if no norm was applied")
        raw.remarks.append(
            f"the last state (depth {depths[-1]}) is left out: transformers takes it after the final norm; "
            "--final-norm none keeps it"
        )
        states, depths = states[:-1], depths[:-1]
    _take(raw, states, depths)


def from_text(raw: Raw, given: Any, tokens: Any, reading: Reading) -> None:
    """Read the states of one text ``[seq, layers, dim]``, as vLLM and speculators store them."""
    states = _floats(raw, "hidden_states", given)
    seq, layers = int(states.shape[0]), int(states.shape[1])
    if len(tokens) != seq:
        refuse(
            raw, f"there are {len(tokens)} token ids and {seq} positions",
            "store hidden_states as [seq, layers, dim]; for another order name the axes with --dims",
        )  # fmt: skip
    if reading.depths is None or len(reading.depths) != layers:
        refuse(
            raw, f"hidden_states have {layers} layers, and the file does not say which"
            + ("" if reading.depths is None else f" ({len(reading.depths)} depths were named)"),
            "name the layer ids that vLLM was asked for, such as --depths 2,16,29,32 (k = the state entering block k)",
        )  # fmt: skip
    states, depths = states.permute(1, 0, 2)[:, None], reading.depths
    if reading.final_norm == "applied":
        states, depths = states[:-1], depths[:-1]
    raw.token_ids = np.asarray(tokens)[None]
    _take(raw, states, depths)


def _take(raw: Raw, states: torch.Tensor, depths: Sequence[int]) -> None:
    """Put states [layer, batch, pos, dim] in the order of their depths."""
    if len(set(depths)) < len(depths):
        twice = next(d for d in depths if list(depths).count(d) > 1)
        refuse(raw, f"depth {twice} stands twice", "name every depth once")
    order = sorted(range(len(depths)), key=lambda i: depths[i])
    raw.layers = True
    raw.states = states if order == list(range(len(order))) else states[order]
    raw.dims = ["iter", "batch", "pos", "dim"]
    raw.iter = np.array([depths[i] for i in order], dtype=np.int64)
    raw.stage = ["resid"]


def _floats(raw: Raw, name: str, value: Any) -> torch.Tensor:
    found = torch.as_tensor(value).detach().to("cpu")
    if not found.is_floating_point() or found.element_size() < 2:
        refuse(raw, f"{name} has the dtype {found.dtype}", "store floats: float16, bfloat16, float32 or float64")
    return found
