"""How a public name changes: the old one works and warns until the version that it was promised to."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["renamed"]


def renamed(room: str, table: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` for names that have new ones.

    Args:
        room: The module's own ``__name__``.
        table: Old name → new name in the same module, and the version in which the old one goes.

    Returns:
        A function that finds an old name with a ``FutureWarning``, which Python shows to everybody, and refuses others
        as Python does.

    Example:
        >>> import warnings
        >>> find = renamed("math", {"circumference": ("tau", "0.3")})
        >>> with warnings.catch_warnings(record=True) as heard:
        ...     warnings.simplefilter("always")
        ...     round(find("circumference"), 2)
        6.28
        >>> str(heard[0].message)
        'math.circumference is now math.tau; the old name goes with version 0.3'
    """

    def find(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        new, gone = table[name]
        warnings.warn(
            f"{room}.{name} is now {room}.{new}; the old name goes with version {gone}", FutureWarning, stacklevel=2
        )
        return getattr(importlib.import_module(room), new)

    return find
