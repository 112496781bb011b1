"""An attractor layer as a safetensors file: settings, centres, and the memory of its session.

Whatever the file holds is checked against the settings it names before a layer is made of it: a memory of another shape
would be broadcast without a word, and a number that is not finite would reach every state the layer writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynprobe.controllers._controller import Memory
from dynprobe.controllers.attractor._settings import Settings
from dynprobe.controllers.attractor._slots import empty_state
from dynprobe.errors import UsageError

__all__ = ["Stored", "read_layer", "write_layer"]


@dataclass(frozen=True)
class Stored:
    """What is stored of a layer.

    Attributes:
        settings: Its settings.
        centres: Site → mean ``[dim]`` and θ.
        base: Site → memory of the session.
        made_for: What the centres were measured on.
    """

    settings: Settings
    centres: Mapping[str, tuple[Tensor, float]]
    base: Mapping[str, Memory]
    made_for: Mapping[str, Any]


def write_layer(stored: Stored, path: str | Path) -> Path:
    """Write a layer under a temporary name and rename it."""
    from safetensors.torch import save_file

    tensors = {f"state/{site}/{k}": v.contiguous().cpu() for site, s in stored.base.items() for k, v in s.items()}
    tensors |= {f"centre/{key}": mean.contiguous().cpu() for key, (mean, _) in stored.centres.items()}
    header = {
        "settings": json.dumps(stored.settings.as_dict()),
        "thetas": json.dumps({key: theta for key, (_, theta) in stored.centres.items()}),
        "dynprobe": version("dynprobe"),
        "made_for": json.dumps(dict(stored.made_for)),
    }
    target = Path(path)
    temporary = target.with_name(f".{target.name}.part")
    save_file(tensors, temporary, metadata=header)
    temporary.replace(target)
    return target


def read_layer(path: str | Path) -> Stored:
    """Read and check a layer.

    Raises:
        UsageError: The file holds none, or one whose parts do not fit together.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        said = {name: json.loads(header.get(name, "{}")) for name in ("settings", "thetas", "made_for")}
    except Exception as error:  # a foreign file can fail in as many ways as its readers have
        raise UsageError(f"{path} holds no attractor layer ({type(error).__name__}: {error})") from error
    if "settings" not in header or not all(isinstance(value, dict) for value in said.values()):
        raise UsageError(f"{path} holds no attractor layer; AttractorLayer.save writes one")
    settings = Settings(**Settings.known(said["settings"]))
    centres: dict[str, tuple[Tensor, float]] = {}
    base: dict[str, Memory] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{path}: {name} has numbers that are not finite")
        if kind == "centre":
            theta = said["thetas"].get(rest)
            if isinstance(theta, bool) or not isinstance(theta, int | float) or not math.isfinite(theta):
                raise UsageError(f"{path}: the centre {rest!r} has the threshold {theta!r}; it is a number")
            if tensor.dim() != 1 or not tensor.is_floating_point():
                raise UsageError(f"{path}: {name} has the shape {list(tensor.shape)}; a centre is one vector [dim]")
            centres[rest] = (tensor, float(theta))
            continue
        site, _, field = rest.rpartition("/")
        if kind != "state" or not site:
            raise UsageError(f"{path}: the tensor {name!r} is none of an attractor layer")
        base.setdefault(site, {})[field] = tensor
    for site, memory in base.items():
        _check_memory(memory, settings, f"{path}: the memory of {site}")
    return Stored(settings, centres, base, said["made_for"])


def _check_memory(memory: Memory, settings: Settings, where: str) -> None:
    """Refuse a memory that is not of the form the settings ask for."""
    slots = memory.get("A")
    if slots is None or slots.dim() != 3:
        raise UsageError(f"{where} has no slots A [rows, slots, dim]")
    wanted = empty_state(slots.shape[0], slots.shape[2], settings)
    if memory.keys() != wanted.keys():
        odd = sorted(memory.keys() ^ wanted.keys())
        raise UsageError(f"{where} has other fields than a memory ({', '.join(odd)})")
    for name, tensor in wanted.items():
        found = memory[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise UsageError(
                f"{where}: {name} is {found.dtype} {list(found.shape)}; with {settings.slots} slots it is "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
