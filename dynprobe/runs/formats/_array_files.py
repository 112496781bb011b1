"""One file of arrays for a table, or one per part of the states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from dynprobe.runs._export_arrays import to_arrays
from dynprobe.runs._export_format import Chunks, is_states, whole_table
from dynprobe.runs._export_tables import describe_columns
from dynprobe.runs._json import dumps

__all__ = ["array_files"]


def array_files(
    folder: Path, name: str, schema: pa.Schema, chunks: Chunks, ending: str,
    write: Callable[[Path, Mapping[str, Any], str], None],
) -> list[str]:  # fmt: skip
    """One file for a table, or one per part of the states, whose whole may not fit into memory."""
    facts = dumps(describe_columns(schema))
    if not is_states(schema):
        write(folder / f"{name}.{ending}", to_arrays(whole_table(schema, chunks)), facts)
        return [f"{name}.{ending}"]
    files = []
    for number, chunk in enumerate(chunks):
        files.append(f"{name}-{number:05d}.{ending}")
        write(folder / files[-1], to_arrays(chunk), facts)
    return files
