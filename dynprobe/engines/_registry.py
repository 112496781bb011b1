"""The engines by name: one file and one line each.

Another package adds one through the entry-point group ``dynprobe.engines``: a subclass of :class:`Engine` that has
``made``; :func:`dynprobe.testing.check_engine` tries whether it keeps the promises that runs rely on.
"""

from __future__ import annotations

from typing import Any

from dynprobe._plugins import Registry
from dynprobe.engines._contract import Engine

__all__ = ["ENGINES"]


def _plugin(name: str, found: Any) -> type[Engine]:
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise TypeError(f"it is {found!r}, not a subclass of dynprobe.engines.Engine")
    if getattr(found, "name", None) != name:
        raise ValueError(f"it calls itself {getattr(found, 'name', None)!r} and its entry point calls it {name!r}")
    if found.made.__func__ is Engine.made.__func__:  # type: ignore[attr-defined]
        raise ValueError("it has no made(settings, out), by which --engine makes it")
    return found


ENGINES: Registry[type[Engine]] = Registry(
    "dynprobe.engines", "engine",
    {
        "local": "dynprobe.engines._local:Local",
        "ray": "dynprobe.engines._ray:Ray",
        "slurm": "dynprobe.engines._slurm:Slurm",
    },
    _plugin,
)  # fmt: skip
