"""Numbers of a summary as JSON keeps them."""

from __future__ import annotations

from typing import Any

__all__ = ["stored_number"]


def stored_number(value: Any) -> float:
    """Return a number of a summary: NaN is stored as null, an infinity by its name.

    Example:
        >>> stored_number(None), stored_number("-Infinity"), stored_number(0.5)
        (nan, -inf, 0.5)
    """
    return float("nan") if value is None else float(value)
