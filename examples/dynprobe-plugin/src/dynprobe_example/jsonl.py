"""An export format: a line of JSON for each row, floats by their shortest text that reads back as the same number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynprobe.runs import Format, as_schema

__all__ = ["FORMAT"]

#: What JSON has no number for.
_WORDS = {"inf": math.inf, "-inf": -math.inf}


def _said(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _read(value: Any, kind: pa.DataType) -> Any:
    return _WORDS[value] if pa.types.is_floating(kind) and isinstance(value, str) else value


def write(folder: Path, name: str, schema: pa.Schema, chunks: Iterable[pa.Table]) -> list[str]:
    """Write one table."""
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            for row in chunk.to_pylist():
                line = json.dumps({key: _said(value) for key, value in row.items()}, allow_nan=False)
                file.write(line + "\n")
    return [path.name]


def read(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """Read it back, with the columns and types of the schema."""
    for file in files:
        with (folder / file).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        columns = [_column([_read(row[field.name], field.type) for row in rows], field.type) for field in schema]
        yield as_schema(pa.Table.from_arrays(columns, names=schema.names), schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    if pa.types.is_float32(kind):  # through float64, whose text it was
        numbers = np.array([math.nan if v is None else v for v in values], np.float64)
        return pa.array(numbers.astype(np.float32), mask=np.array([v is None for v in values], bool))
    return pa.array(values, kind)


FORMAT = Format(
    "JSON lines; hidden states cannot be written",
    write,
    read,
    states=False,
    code='import pandas as pd\ntable = pd.read_json("{file}", lines=True)',
)
