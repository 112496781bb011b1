"""What makes one controller another than the next: a digest of its code and of its settings."""

from __future__ import annotations

import hashlib
import inspect
import re
from typing import Any

import numpy as np
import torch

from dynprobe.controllers._controller import Controller

__all__ = ["likeness"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def likeness(controller: Controller) -> str:
    """Return eight hexadecimal digits that change with a controller's code or settings.

    Code that no file holds (a prompt, ``exec``) counts by what it was compiled to.
    """
    digest = hashlib.sha256()
    for kind in type(controller).__mro__:
        if kind is Controller:
            break
        digest.update(_code(kind).encode())
    for name, value in sorted(vars(controller).items()):
        digest.update(f"{name}=".encode() + _value(value))
    return digest.hexdigest()[:8]


def _code(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        compiled = {name: member.__code__ for name, member in vars(kind).items() if inspect.isfunction(member)}
        plain = {name: value for name, value in vars(kind).items() if isinstance(value, str | int | float | bool)}
        constants = [
            (name, code.co_code.hex(), _ADDRESS.sub("", repr(code.co_consts))) for name, code in compiled.items()
        ]
        return repr((kind.__qualname__, sorted(constants), sorted((k, v) for k, v in plain.items() if k[:2] != "__")))


def _value(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray):
        return str(value.shape).encode() + np.ascontiguousarray(value).tobytes()
    return _ADDRESS.sub("", repr(value)).encode()
