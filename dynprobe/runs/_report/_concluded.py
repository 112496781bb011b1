"""What a run concluded, as rows: every estimate of its summary that has an interval, however deep it lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from dynprobe.runs._stored_number import stored_number

__all__ = ["concluded"]


def concluded(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return every estimate of a summary as a row: what it is of, its value, its interval, prompts, and a reason.

    Example:
        >>> found = concluded({"conditions": {"clean": {"nll": {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 4}}}})
        >>> found.to_dict("records")
        [{'of': 'conditions clean', 'quantity': 'nll', 'value': 2.0, 'low': 1.0, 'high': 3.0, 'n': 4, 'reason': None}]
    """
    rows: list[dict[str, Any]] = []
    _walk(summary, [], rows)
    return pd.DataFrame(rows, columns=["of", "quantity", "value", "low", "high", "n", "reason"])


def _walk(item: Any, path: list[str], rows: list[dict[str, Any]]) -> None:
    if isinstance(item, Mapping):
        centre = "mean" if "mean" in item else "value" if "value" in item else None
        if centre is not None and "low" in item and path:
            reason = item.get("reason") or item.get("reason_interval")
            rows.append(
                {"of": " ".join(path[:-1]), "quantity": path[-1], "value": stored_number(item[centre]),
                 "low": stored_number(item["low"]), "high": stored_number(item.get("high")), "n": item.get("n"),
                 "reason": str(reason) if reason else None}
            )  # fmt: skip
            return
        flat = [k for k in item if f"{k}_low" in item]
        for k in flat:
            rows.append(
                {"of": " ".join([*path, *_named(item)]), "quantity": str(k), "value": stored_number(item[k]),
                 "low": stored_number(item[f"{k}_low"]), "high": stored_number(item.get(f"{k}_high")),
                 "n": item.get("n"), "reason": None}
            )  # fmt: skip
        for k, value in item.items():
            if isinstance(value, Mapping | list):
                _walk(value, [*path, *_named(item), str(k)], rows)
    elif isinstance(item, list):
        for value in item:
            _walk(value, path, rows)


def _named(item: Mapping[str, Any]) -> list[str]:
    """What tells an entry of a list from its neighbours."""
    names = ("condition", "arm", "task", "metric", "iterations", "alpha", "layer", "length", "scale", "criterion")
    held = {n: item[n] for n in names if isinstance(item.get(n), str | int | float)}
    return [
        str(v) if n in ("condition", "task") else f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}"
        for n, v in held.items()
    ]
