"""Trajectories in ``.npz`` and ``.safetensors``: named arrays, read without running anything that is in the file."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.runs._array_file import physical_memory
from dynprobe.runs._trajectory_layers import Reading, from_named, hook_depth
from dynprobe.runs._trajectory_raw import Raw, as_tensor, integers, names, read_dims, read_meta, refuse

__all__ = ["read_npz", "read_safetensors"]

_KNOWN = ("states", "dims", "iter", "depth", "stage", "energy", "delta", "valid", "ids", "token_ids", "meta")
_FINAL = re.compile(r"states_depth_(\d+)$")


def read_npz(path: Path, reading: Reading) -> Raw:
    """Read an ``.npz`` file.

    Raises:
        UsageError: It is damaged, or holds Python objects.
    """
    raw = Raw(str(path))
    try:
        with zipfile.ZipFile(path) as opened:
            inside = [Path(name).stem for name in opened.namelist()]
            claimed = sum(member.file_size for member in opened.infolist())
    except Exception as error:  # an archive that somebody else wrote
        raise UsageError(f"{path} is no .npz file ({error}); write it with np.savez('states.npz', states=…)") from error
    if claimed > (memory := physical_memory()):
        refuse(
            raw, f"it unpacks to {claimed / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}",
            "store fewer states in one file, or read it on a larger machine",
        )  # fmt: skip
    if len(set(inside)) < len(inside):
        twice = next(name for name in inside if inside.count(name) > 1)
        refuse(raw, f"the array {twice!r} stands twice", "store every array once")

    def read(name: str) -> Any:
        try:
            return arrays[name]
        except ValueError as error:
            if "pickle" in str(error):
                refuse(
                    raw, f"{name} holds pickled Python objects, which run code when they are read (states of unequal "
                    "shapes, or a dict?)",
                    "store numbers of one shape: np.stack(list).astype(np.float32), and meta=json.dumps(dict)",
                )  # fmt: skip
            refuse(raw, f"{name} cannot be read ({error})", "write the file again")
        except UsageError:
            raise
        except Exception as error:
            refuse(raw, f"{name} cannot be read ({error})", "write the file again")

    try:
        arrays = np.load(path, allow_pickle=False)
    except Exception as error:
        refuse(raw, f"it cannot be read ({error})", "write it with np.savez('states.npz', states=…)")
    with arrays:
        layers = _of_layers(inside, reading)
        if layers and from_named(raw, {name: read(name) for name in inside if name != "dims"}, reading):
            return raw
        _fill(raw, inside, read, lambda name: as_tensor(raw, name, read(name)))
    return raw


def read_safetensors(path: Path, reading: Reading) -> Raw:
    """Read a ``.safetensors`` file; ``dims``, ``stage``, ``ids`` and ``meta`` stand in its metadata.

    Raises:
        UsageError: It is damaged.
    """
    from safetensors import SafetensorError, safe_open

    raw = Raw(str(path))
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            header = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is no .safetensors file ({error}); write it with safetensors.numpy.save_file({{'states': …}}, "
            "'states.safetensors', metadata={'dims': 'iter,state,dim'})"
        ) from error

    if _of_layers(list(tensors), reading) and from_named(raw, tensors, reading):
        return raw

    def states(name: str) -> torch.Tensor:
        found = tensors[name]
        if not found.is_floating_point() or found.element_size() < 2:
            refuse(raw, f"{name} has the dtype {found.dtype}", "store floats: float16, bfloat16, float32 or float64")
        return found

    def read(name: str) -> Any:
        if name in header:
            return header[name]
        return tensors[name].float().numpy() if tensors[name].dtype == torch.bfloat16 else tensors[name].numpy()

    own = {"format"} & set(header)  # what libraries write by themselves
    _fill(raw, [*tensors, *(set(header) - own)], read, states)
    return raw


def _of_layers(names: Iterable[str], reading: Reading) -> bool:
    """Whether the arrays are those of a Transformer's layers, by their names or because the user says so."""
    held = set(names)
    if reading.dims is not None and "layer" in reading.dims:
        return True
    return not any(name == "states" or _FINAL.match(name) for name in held) and any(
        name == "hidden_states" or hook_depth(name) is not None for name in held
    )


def _fill(raw: Raw, inside: Iterable[str], read: Callable[[str], Any], states: Callable[[str], torch.Tensor]) -> None:
    found = sorted(set(inside))
    finals = {name: int(match[1]) for name in found if (match := _FINAL.match(name))}
    if "states" not in found and not finals:
        near = next((hint for name in found if (hint := did_you_mean(name, ("states",)))), "")
        refuse(
            raw, f"there is no array called states, only {', '.join(found) or 'nothing'}.{near}",
            "store np.savez('states.npz', states=…, dims=[…]) (dynprobe import --template prints it whole)",
        )  # fmt: skip
    if "dims" in found:
        raw.dims = read_dims(raw, read("dims"))
    raw.states = states("states") if "states" in found else None
    for name, depth in finals.items():
        if depth in raw.finals:
            refuse(raw, f"there are two runs of depth {depth}", "store one")
        raw.finals[depth] = states(name)
    for name in ("iter", "depth"):
        if name in found:
            setattr(raw, name, integers(raw, name, read(name)))
    for name in ("stage", "ids"):
        if name in found:
            setattr(raw, name, names(raw, name, read(name)))
    for name in ("energy", "delta", "valid", "token_ids"):
        if name in found:
            setattr(raw, name, read(name))
    if "meta" in found:
        raw.meta = read_meta(raw, read("meta"))
    raw.remarks += [
        f"{name} is not read.{did_you_mean(name, _KNOWN)}"
        for name in found
        if name not in _KNOWN and name not in finals
    ]
