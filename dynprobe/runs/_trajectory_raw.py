"""What a trajectory file says, before it is one thing: arrays, names and notes, and how their axes are put in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._json import loads

__all__ = [
    "AXES",
    "Raw",
    "as_tensor",
    "canonical",
    "digest_of",
    "integers",
    "names",
    "per_iteration",
    "per_position",
    "read_dims",
    "read_meta",
    "refuse",
    "stack_finals",
]

#: The axes of a trajectory, in their order.
AXES = ("iter", "batch", "pos", "state", "dim")

#: Words of other fields for them.
_OTHER_WORDS = {
    "step": "iter", "iteration": "iter", "iterations": "iter", "depth": "iter", "layer": "iter", "time": "iter",
    "sample": "batch", "prompt": "batch", "token": "pos", "position": "pos", "sequence": "pos", "seq": "pos",
    "slot": "state", "states": "state", "vector": "state", "unit": "state", "hidden": "dim", "feature": "dim",
    "features": "dim", "channel": "dim", "d": "dim", "width": "dim",
}  # fmt: skip


@dataclass
class Raw:
    """The content of a file in its own axes; what it lacks is None.

    Attributes:
        where: The file, as messages name it.
        states: Full trajectory.
        finals: Depth → last state of the run of that depth, without the iter axis.
        dims: Names of the axes of ``states``.
        layers: Whether the first axis is that of a Transformer's layers, numbered by depth, not of iterations.
    """

    where: str
    states: torch.Tensor | None = None
    finals: dict[int, torch.Tensor] = field(default_factory=dict)
    dims: list[str] | None = None
    iter: NDArray[np.int64] | None = None
    depth: NDArray[np.int64] | None = None
    stage: list[str] | None = None
    energy: NDArray[Any] | None = None
    delta: NDArray[Any] | None = None
    valid: NDArray[Any] | None = None
    positions: NDArray[np.int64] | None = None
    token_ids: NDArray[Any] | None = None
    ids: list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    layers: bool = False


def refuse(raw: Raw, found: str, instead: str) -> NoReturn:
    """Refuse a file: what was found in it, and what to type."""
    raise UsageError(f"{raw.where}: {found}; {instead}")


def as_tensor(raw: Raw, name: str, array: NDArray[Any]) -> torch.Tensor:
    """Return an array of floats as a tensor of the same dtype."""
    if array.dtype.kind == "O":
        refuse(raw, f"{name} holds Python objects", "store numbers: np.stack(list).astype(np.float32)")
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        refuse(
            raw, f"{name} has the dtype {array.dtype}; float16, float32 and float64 are read (bfloat16 from "
            ".safetensors)", f"store {name}.astype(np.float32)",
        )  # fmt: skip
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def integers(raw: Raw, name: str, array: NDArray[Any]) -> NDArray[np.int64]:
    """Return whole numbers, one per entry."""
    array = np.asarray(array)
    if array.ndim != 1:
        refuse(raw, f"{name} has the shape {list(array.shape)}", f"give {name} one axis, with one number per entry")
    whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and bool((array == np.floor(array)).all()))
    if not whole:
        refuse(raw, f"{name} holds no whole numbers (dtype {array.dtype})", f"store {name} as integers")
    return array.astype(np.int64)


def names(raw: Raw, name: str, value: Any) -> list[str]:
    """Return a list of names, given as an array, a JSON list or a text with commas."""
    if isinstance(value, str):
        try:
            value = loads(value) if value.lstrip().startswith("[") else [v.strip() for v in value.split(",")]
        except ValueError as error:
            refuse(raw, f"{name} is no JSON list ({error})", f'write {name} as ["a", "b"] or a, b')
    try:
        array = np.asarray(value)
    except ValueError:  # lists of lists of unequal lengths
        refuse(raw, f"{name} is no list of names", f'write {name} as ["a", "b"] or a, b')
    if array.ndim == 0:
        return names(raw, name, str(array))
    if array.ndim != 1 or array.dtype.kind not in "USiu":
        refuse(
            raw, f"{name} has the shape {list(array.shape)} and dtype {array.dtype}",
            f"give {name} as a list of names" + (" (token ids are called token_ids)" if name == "ids" else ""),
        )  # fmt: skip
    return [v.decode() if isinstance(v, bytes) else str(v) for v in array.tolist()]


def read_dims(raw: Raw, value: Any) -> list[str]:
    """Return the names of the axes."""
    found = names(raw, "dims", value)
    for name in found:
        if name not in AXES:
            word = _OTHER_WORDS.get(name.lower())
            near = f" Did you mean {word!r}?" if word else did_you_mean(name, AXES)
            refuse(raw, f"dims {found} have an axis {name!r} that is not known.{near}", f"name axes {', '.join(AXES)}")
    if len(set(found)) < len(found):
        refuse(raw, f"dims {found} name an axis twice", "give every axis its own name")
    if "dim" not in found:
        refuse(raw, f"dims {found} have no dim axis", "name the axis of the features 'dim'")
    return found


def read_meta(raw: Raw, value: Any) -> dict[str, Any]:
    """Return the author's notes, stored as JSON."""
    text = value.decode() if isinstance(value, bytes) else str(np.asarray(value))
    try:
        meta = loads(text)
    except ValueError as error:
        refuse(raw, f"meta is no JSON ({error})", "store json.dumps({'model': …, 'seed': …})")
    if not isinstance(meta, Mapping):
        refuse(raw, f"meta is a {type(meta).__name__}", "store json.dumps({'model': …, 'seed': …})")
    return dict(meta)


def canonical(raw: Raw, states: torch.Tensor, dims: Sequence[str]) -> torch.Tensor:
    """Return states with all axes, in their order; a missing one has size 1."""
    if states.ndim != len(dims):
        refuse(
            raw, f"states have {states.ndim} axes ({list(states.shape)}) and dims name {len(dims)} ({list(dims)})",
            "give one name per axis",
        )  # fmt: skip
    if 0 in states.shape:
        refuse(raw, f"states have the shape {list(states.shape)}", "store at least one number along every axis")
    order = [dims.index(axis) for axis in AXES if axis in dims]
    out = states.permute(order)
    for place, axis in enumerate(AXES):
        if axis not in dims:
            out = out.unsqueeze(place)
    return out


def stack_finals(raw: Raw) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return the last states of the runs of all depths along the first axis, and the depths."""
    if not raw.finals:
        refuse(raw, "it holds no states", "store an array called states (dynprobe import --template shows how)")
    depths = sorted(raw.finals)
    shapes = {k: list(raw.finals[k].shape) for k in depths}
    first = shapes[depths[0]]
    if other := next((k for k in depths if shapes[k] != first), None):
        refuse(
            raw, f"the shape changes with the depth: states_depth_{depths[0]} has {first}, states_depth_{other} has "
            f"{shapes[other]}", "give all depths one shape",
        )  # fmt: skip
    if raw.dims is None:
        if len(first) != 2:
            refuse(raw, f"states_depth_{depths[0]} has the shape {first} and no dims", "add dims, such as state, dim")
        raw.dims = ["state", "dim"]
        raw.assumed.append("dims: read as state, dim")
    raw.dims = ["iter", *(d for d in raw.dims if d != "iter")]
    stacked = canonical(raw, torch.stack([raw.finals[k] for k in depths]), raw.dims)
    return stacked, np.array(depths, dtype=np.int64)


def _fit(raw: Raw, name: str, array: NDArray[Any], shape: tuple[int, ...], axes: tuple[str, ...]) -> NDArray[Any]:
    """Give an array the axes it belongs to; those of size 1 may be missing."""
    if array.shape != shape and tuple(s for s in array.shape if s != 1) != tuple(s for s in shape if s != 1):
        refuse(
            raw, f"{name} has the shape {list(array.shape)}, and the states need {list(shape)} ({', '.join(axes)})",
            f"store {name} with these axes in this order",
        )  # fmt: skip
    return array.reshape(shape)


def per_position(raw: Raw, name: str, array: NDArray[Any] | None, shape: tuple[int, int], kind: Any) -> Any:
    """Return an array ``[batch, pos]`` of a kind, or None."""
    if array is None:
        return None
    array = np.asarray(array)
    ok = array.dtype.kind in "biu" and (
        kind is not bool or array.dtype.kind == "b" or bool(np.isin(array, (0, 1)).all())
    )
    if not ok:
        what = "True and False" if kind is bool else "whole numbers"
        refuse(raw, f"{name} has the dtype {array.dtype}; {what} are needed", f"store {name}.astype({kind.__name__})")
    return _fit(raw, name, array.astype(kind), shape, AXES[1:3])


def per_iteration(
    raw: Raw, name: str, array: NDArray[Any] | None, shape: tuple[int, int, int]
) -> NDArray[np.float64] | None:
    """Return an array ``[iter, batch, pos]`` of numbers, or None; NaN stands where one is missing."""
    if array is None:
        return None
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        refuse(raw, f"{name} has the dtype {array.dtype}", f"store {name} as numbers")
    out = _fit(raw, name, array.astype(np.float64), shape, AXES[:3])
    if np.isinf(out).any():
        at = [int(i) for i in np.argwhere(np.isinf(out))[0]]
        refuse(raw, f"{name} is infinite at iter, batch, pos = {at}", "store NaN where there is no value")
    if missing := int(np.isnan(out).sum()):
        raw.remarks.append(f"{name} is missing at {missing} of {out.size} places")
    return out


def digest_of(raw: Raw) -> str:
    """Return a hash of everything that came from memory."""
    assert raw.states is not None
    notes = [raw.dims, raw.stage, raw.ids, raw.meta, str(raw.states.dtype), list(raw.states.shape)]
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True, default=str).encode())
    digest.update(raw.states.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for grid in (raw.iter, raw.valid, raw.token_ids, raw.energy):
        digest.update(b"none" if grid is None else np.ascontiguousarray(grid).tobytes())
    return digest.hexdigest()
