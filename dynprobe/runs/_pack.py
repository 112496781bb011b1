"""One unit of work as files, so that another process can make what this one writes.

A worker packs its tables and states exactly as the writer would and sends the bytes: ``<table>.parquet``,
``states-NN.parquet``, ``facts.json`` and, where anything happened on the way, ``events.json``. The same unit gives the
same tables and states wherever it is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError
from dynprobe.runs._encode import conform, to_bytes
from dynprobe.runs._json import dumps, plain
from dynprobe.runs._states import states_table, write_states_file

__all__ = ["events_in", "facts_in", "n_rows", "pack", "table_of"]

_FACTS, _EVENTS = "facts.json", "events.json"
_STATES = re.compile(r"states-\d+\.parquet")


def pack(
    tables: Mapping[str, Any],
    states: Iterable[tuple[Any, Any]] = (),
    *,
    dtype: str = "float32",
    facts: Mapping[str, Any] | None = None,
    columns: Mapping[str, Mapping[str, str]] | None = None,
    events: Sequence[Mapping[str, Any]] = (),
) -> dict[str, bytes]:
    """Pack tables, states and facts of one unit.

    Args:
        tables: Table name → frame. A table without rows is left out.
        states: Keys and states, as for :meth:`dynprobe.runs.RunWriter.write_states`.
        dtype: Dtype of the states.
        facts: What the unit says about itself.
        columns: Facts of the columns.
        events: What happened meanwhile, each with its ``kind``.

    Raises:
        RunFolderError: A key is missing, or a column cannot be stored.

    Example:
        >>> files = pack({"tokens": {"sample_id": ["a"], "pos": [0], "nll": [2.5]}}, facts={"halved": [2]})
        >>> sorted(files), n_rows(files["tokens.parquet"])
        (['facts.json', 'tokens.parquet'], 1)
    """
    known = columns or {}
    files: dict[str, bytes] = {}
    for name, data in tables.items():
        table = conform(name, data, known)
        if table.num_rows:
            files[f"{name}.parquet"] = bytes(to_bytes(table))
    for number, (keys, values) in enumerate(states):
        sink = pa.BufferOutputStream()
        write_states_file(sink, states_table(keys, values, dtype, known))
        files[f"states-{number:02d}.parquet"] = sink.getvalue().to_pybytes()
    if facts:
        files[_FACTS] = dumps(plain(facts, "facts")).encode()
    if events:
        files[_EVENTS] = dumps(plain(list(events), "events")).encode()
    return files


def table_of(name: str) -> str | None:
    """Return the table that a packed file belongs to; None for facts and events.

    Raises:
        RunFolderError: If it is no name that :func:`pack` gives.
    """
    if name in (_FACTS, _EVENTS):
        return None
    if _STATES.fullmatch(name):
        return "states"
    if not name.endswith(".parquet") or "/" in name:
        raise RunFolderError(f"A worker sent a file named {name!r}, which is no table. Is it of another dynprobe?")
    return name.removesuffix(".parquet")


def n_rows(content: bytes) -> int:
    """Return the rows of a packed table.

    Raises:
        RunFolderError: If it is no whole Parquet file.
    """
    try:
        return int(pq.read_metadata(pa.BufferReader(content)).num_rows)
    except pa.ArrowException as error:
        raise RunFolderError(f"What a worker sent is no whole Parquet file: {error}") from error


def facts_in(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the facts among packed files."""
    return dict(json.loads(files[_FACTS])) if _FACTS in files else {}


def events_in(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return the events among packed files."""
    return list(json.loads(files[_EVENTS])) if _EVENTS in files else []
