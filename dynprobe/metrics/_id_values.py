"""Values inside a metric id: read from its text, written into an id and into the name of a column."""

from __future__ import annotations

from typing import Any

from dynprobe.errors import MetricError, did_you_mean

__all__ = ["near_key", "show", "snake", "typed"]


def near_key(word: str, known: list[str]) -> str:
    """Like ``did_you_mean``, but a wrong case is the nearest miss of all."""
    same = [k for k in known if k.lower() == word.lower()]
    return f" Did you mean {same[0]!r}?" if same else did_you_mean(word, known)


def typed(key: str, text: str, default: Any, metric_id: str) -> Any:
    """Read a value as what its default is: a whole number, a number, or a word."""
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        try:
            number = float(text)
        except ValueError:
            raise MetricError(f"Parameter {key!r} of {metric_id!r} is a number, found {text!r}.") from None
        return int(number) if isinstance(default, int) and number == int(number) else number
    return text


def show(value: Any) -> str:
    """Write a value as it stands in an id."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def snake(number: Any) -> str:
    """A number inside a column name: 0.5 → 0_5, 1e-09 → 1em09."""
    return show(number).replace(".", "_").replace("-", "m").replace("+", "")
