"""What makes one controller another than the next: a digest of its code and of its settings.

Two controllers that could write differently must not share a name: a study would take the one's runs for the other's.
So a digest goes into what methods close over, into the plain globals that they name, and into settings that are
objects; what cannot be told apart by its contents is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from dynprobe.controllers._controller import Controller
from dynprobe.errors import UsageError

__all__ = ["likeness"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_MEMBERS = (*_PLAIN, FunctionType, tuple, list, dict, np.ndarray, torch.Tensor)


def likeness(controller: Controller) -> str:
    """Return eight hexadecimal digits that change with a controller's code or settings.

    Raises:
        UsageError: If a setting has no contents that could be told from another's.
    """
    digest = hashlib.sha256()
    for kind in type(controller).__mro__:
        if kind is Controller:
            break
        digest.update(repr(_class(kind, ())).encode())
    digest.update(repr(_value(vars(controller), (id(controller),))).encode())
    return digest.hexdigest()[:8]


def _class(kind: type, above: tuple[int, ...]) -> Any:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # a prompt, or exec: no file holds it
        source = ""
    # Python keeps books of its own on a class, also later (copying it leaves __slotnames__); methods are the author's.
    own = [(k, v) for k, v in sorted(vars(kind).items()) if isinstance(v, FunctionType) or not k.startswith("__")]
    members = [(name, _value(member, above)) for name, member in own if isinstance(member, _MEMBERS)]
    return (kind.__qualname__, source, members)


def _function(function: FunctionType, above: tuple[int, ...]) -> Any:
    code = function.__code__
    held = [_value(cell.cell_contents, above) for cell in function.__closure__ or () if _filled(cell)]
    named = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    plain = [(name, value) for name, value in sorted(named.items()) if isinstance(value, _PLAIN)]
    defaults = [_value(value, above) for value in function.__defaults__ or ()]
    return (_code(code), held, plain, defaults, _value(function.__kwdefaults__ or {}, above))


def _filled(cell: Any) -> bool:
    try:
        return not isinstance(cell.cell_contents, type)  # the class itself, which super() closes over
    except ValueError:
        return False


def _code(code: CodeType) -> Any:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return (code.co_code.hex(), code.co_names, constants)


def _value(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in above:
        return "itself"
    inside = (*above, id(value))
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest())
    if isinstance(value, Mapping):
        return sorted((repr(key), repr(_value(held, inside))) for key, held in value.items())
    if isinstance(value, set | frozenset):
        return sorted(repr(_value(held, inside)) for held in value)
    if isinstance(value, list | tuple):
        return [_value(held, inside) for held in value]
    if isinstance(value, FunctionType):
        return _function(value, inside)
    if isinstance(value, MethodType):
        return (_value(value.__func__, inside), _value(value.__self__, inside))
    if isinstance(value, torch.nn.Module):
        return (_class(type(value), inside), _value(dict(value.state_dict()), inside))
    if isinstance(value, type):
        return _class(value, inside)
    if hasattr(value, "__dict__"):
        return (_class(type(value), inside), _value(vars(value), inside))
    text = repr(value)
    if _ADDRESS.search(text):
        raise UsageError(
            f"a controller holds {text}, which cannot be told from another {type(value).__name__}; keep numbers, "
            "arrays, functions or objects with attributes instead, or give the mode a package of its own"
        )
    return text
