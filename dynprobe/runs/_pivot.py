"""A value by two labels: the small table most figures start from.

The value is looked for in the tables that hold it; samples, conditions and prompts are joined on by their labels, so
that ``arm`` or ``category`` can stand on either axis. Two things are refused because they would give a number that is
not what it says: a value that stands in several tables at different grains, and an average over the depths of two
tracks, which are two different clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, did_you_mean
from dynprobe.runs._schema import TABLES

__all__ = ["pivot_table"]

_SEARCHED = ("samples", "depths", "profiles", "tokens", "slots", "actions", "items", "trials", "fits")


def pivot_table(
    read: Callable[[str, Sequence[str]], pd.DataFrame],
    names: dict[str, list[str]],
    value: str,
    index: str | Sequence[str],
    columns: str | Sequence[str],
    table: str | None,
    aggfunc: Any,
) -> pd.DataFrame:
    """Return ``value`` aggregated by ``index`` and ``columns``.

    Args:
        read: Returns columns of a table.
        names: Table → its columns.
        value: Column to aggregate.
        index: One label or several.
        columns: One label or several.
        table: Table that holds the value, where several do.
        aggfunc: As in ``pandas.pivot_table``; missing values are skipped.

    Raises:
        RunFolderError: The value or a label is unknown, or the request is ambiguous.
    """
    rows, cols = _several(index), _several(columns)
    labels = [*rows, *cols]
    home = _home(names, value, labels, table)
    joined = _joins(names, home, labels)
    reachable = {column for name in (home, *joined) for column in names[name]}
    for label in labels:
        if label not in reachable:
            raise RunFolderError(
                f"Table {home} cannot be split by {label!r}.{did_you_mean(label, reachable)} "
                f"Labels: {', '.join(sorted(reachable & _labels()))}."
            )
    guard = ["track"] if "depth" in labels and "track" in names[home] and "track" not in labels else []
    own = dict.fromkeys([value, *(c for c in (*labels, *guard) if c in names[home])])
    own |= dict.fromkeys(key for _, key in joined.values() if key in names[home])
    frame = read(home, list(own))
    for name, (source, key) in joined.items():
        if key not in frame:
            raise RunFolderError(f"Table {source} has no {key}, so {name} cannot be joined to it.")
        wanted = [c for c in (*labels, *_keys_needed(joined)) if c in names[name] and c not in frame]
        right = read(name, list(dict.fromkeys([key, *wanted])))
        if right[key].duplicated().any():
            raise RunFolderError(f"Table {name} has several rows with one {key}, so nothing can be joined to it.")
        for column in dict.fromkeys(wanted):
            frame[column] = _looked_up(frame[key], right[key], right[column])
    if guard and frame["track"].nunique() > 1:
        tracks = ", ".join(sorted(map(str, frame["track"].unique())))
        raise RunFolderError(
            f"This run has several tracks ({tracks}), whose depths count different updates. "
            'Add the track to the labels: index=["track", "depth"].'
        )
    return frame.pivot_table(values=value, index=rows, columns=cols, aggfunc=aggfunc, observed=True)


def _home(names: dict[str, list[str]], value: str, labels: list[str], table: str | None) -> str:
    holders = [name for name in _SEARCHED if value in names.get(name, [])]
    if table is not None:
        if table not in holders:
            raise RunFolderError(f"Table {table} has no column {value!r}; it stands in {', '.join(holders) or 'none'}.")
        return table
    if not holders:
        known = sorted({c for name in _SEARCHED for c in names.get(name, [])})
        raise RunFolderError(f"No table of this run has a column {value!r}.{did_you_mean(value, known)}")
    fine = [label for label in labels if label in {"depth", "pos", "track", "layer", "iteration", "slot", "phase"}]
    fitting = [name for name in holders if all(label in names[name] for label in fine)] or holders
    if not fine and "samples" in fitting:
        return "samples"
    if len(fitting) > 1:
        raise RunFolderError(
            f"{value!r} stands in several tables ({', '.join(fitting)}), which mean different things. "
            f'Say which: run.pivot({value!r}, …, table="{fitting[0]}").'
        )
    return fitting[0]


def _joins(names: dict[str, list[str]], home: str, labels: list[str]) -> dict[str, tuple[str, str]]:
    """Return the tables to join: name → (table it hangs on, key)."""
    have = set(names[home])
    joined: dict[str, tuple[str, str]] = {}
    if all(label in have for label in labels):
        return joined
    if "sample_id" in have and home != "samples" and "samples" in names:
        joined["samples"] = (home, "sample_id")
        have |= set(names["samples"])
    for name, key in (("conditions", "condition_id"), ("prompts", "prompt_id")):
        if key in have and name in names and any(c in names[name] and c not in have for c in labels):
            joined[name] = ("samples" if "samples" in joined else home, key)
    return joined


def _looked_up(keys: pd.Series, known: pd.Series, values: pd.Series) -> Any:
    """Return ``values`` where ``known`` equals ``keys``, looked up once per category instead of once per row."""
    found = pd.Index(known.astype(object)).get_indexer(keys.cat.categories.astype(object))
    # The code of a missing key is -1, which stands for the last place: there, and only there, nothing is found.
    places = np.append(found, -1)[keys.cat.codes.to_numpy()]
    return values.array.take(places, allow_fill=True)


def _keys_needed(joined: dict[str, tuple[str, str]]) -> list[str]:
    return [key for _, key in joined.values()]


def _labels() -> set[str]:
    return {c for table in TABLES.values() for c in (*table.keys, *table.columns)}


def _several(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
