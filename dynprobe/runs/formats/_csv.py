"""CSV: lists as JSON text, labels as text, and nothing that a spreadsheet would run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dynprobe.runs._csv import FORMULA
from dynprobe.runs._export_format import Chunks, Format, as_schema

__all__ = ["FORMAT", "read_unguarded_csv"]


def _write_csv(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    from pyarrow import csv

    path = folder / f"{name}.csv"
    with csv.CSVWriter(path, _flat_schema(schema)) as writer:
        for chunk in chunks:
            writer.write_table(_flat(chunk))
    return [path.name]


def read_unguarded_csv(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """Read CSV of the first layout, whose texts stand as they are."""
    return _read_csv(folder, files, schema, guarded=False)


def _guard(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Put an apostrophe before texts that a spreadsheet would run."""
    risky = pc.match_substring_regex(column, FORMULA)
    return pc.if_else(risky, pc.binary_join_element_wise("'", column, ""), column)


def _unguard(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.starts_with(column, "'"), pc.utf8_slice_codeunits(column, 1), column)


def _read_csv(folder: Path, files: Sequence[str], schema: pa.Schema, *, guarded: bool = True) -> Iterator[pa.Table]:
    from pyarrow import csv

    flat = _flat_schema(schema)
    for file in files:
        table = csv.read_csv(
            folder / file,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            read_options=csv.ReadOptions(block_size=64 << 20),
            convert_options=csv.ConvertOptions(
                column_types=flat, include_columns=flat.names, strings_can_be_null=True, null_values=[""],
                quoted_strings_can_be_null=False, true_values=["true"], false_values=["false"],
            ),
        )  # fmt: skip
        yield as_schema(_unflat(table, schema, guarded), schema)


def _flat_schema(schema: pa.Schema) -> pa.Schema:
    kinds = [pa.string() if pa.types.is_nested(f.type) or pa.types.is_dictionary(f.type) else f.type for f in schema]
    return pa.schema(zip(schema.names, kinds, strict=True))


def _flat(table: pa.Table) -> pa.Table:
    """Lists as JSON text, labels as text."""
    columns: list[Any] = []
    for column in table.columns:
        if pa.types.is_list(column.type):
            columns.append(pa.array([None if v is None else json.dumps(v) for v in column.to_pylist()], pa.string()))
        elif pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
            columns.append(_guard(column.cast(pa.string())))
        else:
            columns.append(column)
    return pa.Table.from_arrays(columns, schema=_flat_schema(table.schema))


def _unflat(table: pa.Table, schema: pa.Schema, guarded: bool) -> pa.Table:
    columns: list[Any] = []
    for field, stored in zip(schema, table.columns, strict=True):
        text = pa.types.is_dictionary(field.type) or pa.types.is_string(field.type)
        column = _unguard(stored) if guarded and text else stored
        if pa.types.is_list(field.type):
            columns.append(pa.array([None if v is None else json.loads(v) for v in column.to_pylist()], field.type))
        elif pa.types.is_dictionary(field.type):
            columns.append(column.combine_chunks().dictionary_encode().cast(field.type))
        else:
            columns.append(column)
    return pa.Table.from_arrays(columns, names=schema.names)


FORMAT = Format(
    "CSV; hidden states cannot be written",
    _write_csv,
    _read_csv,
    states=False,
    code='import pandas as pd\ntable = pd.read_csv("{file}")',
)
