"""Values as strict JSON: what goes into ``manifest.json``, ``summary.json`` and ``events.jsonl``.

Python's own encoder writes ``NaN`` and ``Infinity``, which no other reader of JSON accepts, and refuses NumPy scalars,
paths and dates, which a resolved configuration is full of. ``plain`` turns all of these into the six JSON types, once,
so that the text written is the same on every machine. A NaN becomes ``null`` and an infinity its name as a string.
What has no obvious JSON form is refused with its place, never turned into the text of its ``repr``, which would carry
memory addresses into a file that identifies a run.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

from dynprobe.errors import RunFolderError

__all__ = ["dumps", "loads", "plain"]


def loads(text: str | bytes) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: It is none; that includes brackets nested so deeply that Python's own decoder gives up with another
            error, which no reader of files expects.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def plain(value: Any, where: str = "value") -> Any:
    """Return ``value`` in the six JSON types.

    Args:
        value: Mappings, sequences, sets, scalars (also NumPy's and PyTorch's), paths, dates, enums, dataclasses,
            pydantic models.
        where: Name of the value in messages.

    Raises:
        RunFolderError: Something inside has no JSON form; the message names its place.

    Example:
        >>> plain({"alpha": float("nan"), "layers": (6, 7), "out": PurePath("runs")})
        {'alpha': None, 'layers': [6, 7], 'out': 'runs'}
    """
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _number(float(value))
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return _mapping(value, where)
    if isinstance(value, Set):
        return sorted((plain(item, where) for item in value), key=lambda item: (str(type(item)), str(item)))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(), where)
    if hasattr(value, "tolist"):  # NumPy and PyTorch, scalars and arrays
        return plain(value.tolist(), where)
    raise RunFolderError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored as JSON. "
        "Pass text, numbers, lists or mappings instead."
    )


def dumps(value: Any, *, indent: int | None = None, sort_keys: bool = False, where: str = "value") -> str:
    """Return strict JSON text of ``plain(value)``.

    Example:
        >>> dumps({"b": 1, "a": float("inf")}, sort_keys=True)
        '{"a":"Infinity","b":1}'
    """
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(
        plain(value, where),
        indent=indent,
        sort_keys=sort_keys,
        separators=separators,
        ensure_ascii=False,
        allow_nan=False,
    )


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        name = key if isinstance(key, str) else str(plain(key, f"a key of {where}"))
        if name in result:
            raise RunFolderError(f"{where} has two keys that read {name!r} in JSON. Rename one of them.")
        result[name] = plain(item, f"{where}.{name}")
    return result
