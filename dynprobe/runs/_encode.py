"""From a data frame to Parquet bytes: types, labels, and how each column is packed.

* Labels become dictionaries of text (pandas categoricals on reading); integers stay integers.
* Metrics become float32, or float64 where the name says so (``alpha…``, ``threshold…``) or the facts do. A column
  that float32 cannot hold (a perplexity of 1e50, a probability of 1e-60) keeps its double precision in that part:
  readers take the wider type of all parts.
* A NaN is stored as null, so that SQL averages skip it as pandas does. A column with no value at all still has a type.
* Floats are split by byte and compressed with zstd, which suits their slowly varying exponents; the rest is
  dictionary-encoded.

What is refused: a missing, null or mistyped key, two rows with one label in a table whose label is unique, and nested
values that were not declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError
from dynprobe.runs._json import dumps
from dynprobe.runs._schema import COLUMNS, SCHEMA_VERSION, Table, facts_of, table_schema

__all__ = ["METADATA_KEY", "conform", "empty", "to_bytes"]

#: Key of the column facts, as JSON, in the Parquet field metadata.
METADATA_KEY = b"dynprobe"

LABEL = pa.dictionary(pa.int32(), pa.string())
_TYPES: dict[str, Any] = {
    "label": LABEL,
    "text": pa.string(),
    "json": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "ids": pa.list_(pa.int32()),
}
_TEXT_ENDINGS = ("reason", "text", "label", "regime", "status", "_name", "_id")
_FLOAT32 = np.finfo(np.float32)


def conform(name: str, data: Any, facts: Mapping[str, Mapping[str, str]]) -> pa.Table:
    """Return ``data`` as an Arrow table in the schema of the table ``name``, keys first.

    Args:
        name: Name of the table.
        data: A ``pandas.DataFrame``, ``pyarrow.Table`` or mapping of columns.
        facts: What is known of the metric columns (``id``, ``unit`` … and optionally ``dtype``).

    Raises:
        RunFolderError: A key is missing, null, mistyped or doubled, or a column cannot be stored.

    Example:
        >>> table = conform("tokens", {"sample_id": ["a", "a"], "pos": [0, 1], "nll": [2.5, float("nan")]}, {})
        >>> [str(f.type) for f in table.schema], table["nll"].null_count
        (['dictionary<values=string, indices=int32, ordered=0>', 'int32', 'float'], 1)
    """
    schema = table_schema(name)
    columns = _columns(data, name)
    missing = [key for key in schema.keys if key not in columns]
    if missing:
        raise RunFolderError(
            f"Table {name} was given without its key column {', '.join(map(repr, missing))}; found "
            f"{', '.join(map(repr, columns)) or 'no column'}. This is a defect of the code that writes the run."
        )
    order = [*schema.keys, *(c for c in schema.columns if c in columns and c not in schema.keys)]
    order += [c for c in columns if c not in order]
    arrays, fields = [], []
    for column in order:
        array = _typed(columns[column], column, name, facts)
        arrays.append(array)
        fields.append(_field(column, array.type, facts, name))
    lengths = {column: len(array) for column, array in zip(order, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        raise RunFolderError(f"Table {name} has columns of different lengths: {lengths}.")
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=_table_metadata(name)))
    _check_keys(table, schema)
    return table


def empty(name: str) -> pa.Table:
    """Return the table ``name`` with its declared columns and no row."""
    schema = table_schema(name)
    fields = [_field(c, _TYPES[COLUMNS[c].kind], {}, name) for c in (*schema.keys, *schema.columns)]
    return pa.schema(fields, metadata=_table_metadata(name)).empty_table()


def to_bytes(table: pa.Table) -> memoryview:
    """Return the Parquet file of a conformed table: zstd-3, floats split by byte, the rest as dictionaries."""
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    packed = [f.name for f in table.schema if not pa.types.is_floating(f.type) and not pa.types.is_nested(f.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=packed or False,
        use_byte_stream_split=floats or False,
        store_schema=True,
    )
    return memoryview(sink.getvalue())


def _columns(data: Any, name: str) -> dict[str, Any]:
    if isinstance(data, pd.DataFrame):
        if any(level is not None for level in data.index.names):
            data = data.reset_index()
        names, series = list(data.columns), [data.iloc[:, i] for i in range(data.shape[1])]
    elif isinstance(data, pa.Table):
        names, series = data.column_names, data.columns
    elif isinstance(data, Mapping):
        names, series = list(data), list(data.values())
    else:
        raise RunFolderError(f"Table {name} was given as {type(data).__name__}; a DataFrame or Arrow table is needed.")
    if len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
        raise RunFolderError(f"Table {name} has column names that are doubled or no text: {names!r}.")
    return dict(zip(names, series, strict=True))


def _typed(values: Any, column: str, table: str, facts: Mapping[str, Mapping[str, str]]) -> pa.Array:
    declared = COLUMNS.get(column)
    kind: str | None = declared.kind if declared else facts_of(column, facts, table).get("dtype")
    try:
        if kind == "json":
            return pa.array([v if v is None or isinstance(v, str) else dumps(v) for v in _list(values)], pa.string())
        array = _arrow(values)
        if kind is not None and kind not in _TYPES:
            kind = None
        return _cast(array, kind) if kind else _infer(array, column)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        wanted = kind or "numbers or text"
        raise RunFolderError(
            f"Column {column!r} of table {table} cannot be stored as {wanted}: {error}. "
            "This is a defect of the code that writes the run."
        ) from error


def _arrow(values: Any) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.unify_dictionaries() if pa.types.is_dictionary(values.type) else values
        array = values.combine_chunks()
    elif isinstance(values, pa.Array):
        array = values
    else:
        array = pa.array(values.tolist() if hasattr(values, "detach") else values, from_pandas=True)
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_dictionary(array.type) and not pa.types.is_string(array.type.value_type):
        array = array.dictionary_decode()
    if pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    if pa.types.is_floating(array.type):
        nan = pc.is_nan(array)
        if pc.any(nan).as_py():
            array = pc.if_else(nan, pa.scalar(None, array.type), array)
    return array


def _cast(array: pa.Array, kind: str) -> pa.Array:
    wanted = _TYPES[kind]
    if pa.types.is_null(array.type):
        return (
            pa.nulls(len(array), wanted) if kind != "label" else pa.nulls(len(array), pa.string()).dictionary_encode()
        )
    if kind in {"label", "text"}:
        if pa.types.is_floating(array.type) or pa.types.is_nested(array.type):
            raise TypeError(f"text is needed, {array.type} was given")
        if kind == "label":
            return _label(array)
        return array.cast(wanted)
    if kind == "float32" and pa.types.is_floating(array.type):
        return _narrow(array)
    return array.cast(wanted)


def _infer(array: pa.Array, column: str) -> pa.Array:
    kind = array.type
    double = column.startswith(("alpha", "threshold"))
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.string() if column.endswith(_TEXT_ENDINGS) else pa.float32())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return array.cast(pa.float64()) if double else _narrow(array)
    if pa.types.is_integer(kind):
        return array.cast(pa.float64() if double else pa.int64())
    if pa.types.is_dictionary(kind):
        return _label(array)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        raise TypeError("nested values have no column of their own; store one number per column, or JSON text")
    return array


def _label(array: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        return pa.DictionaryArray.from_arrays(array.indices.cast(pa.int32()), array.dictionary.cast(pa.string()))
    return array.cast(pa.string()).dictionary_encode().cast(LABEL)


def _narrow(array: pa.Array) -> pa.Array:
    """Return the array as float32, or as float64 where a value would become infinite, zero or subnormal."""
    if not pa.types.is_float32(array.type):
        array = array.cast(pa.float64())
        size = np.abs(array.to_numpy(zero_copy_only=False))
        size = size[np.isfinite(size) & (size > 0)]
        if size.size and (size.max() > float(_FLOAT32.max) or size.min() < float(_FLOAT32.tiny)):
            return array
    return array.cast(pa.float32(), safe=False)


def _list(values: Any) -> list[Any]:
    items = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
    return [None if isinstance(v, float) and v != v else v for v in items]


def _field(column: str, kind: Any, facts: Mapping[str, Mapping[str, str]], table: str) -> pa.Field:
    return pa.field(column, kind, metadata={METADATA_KEY: dumps(facts_of(column, facts, table)).encode()})


def _table_metadata(name: str) -> dict[bytes, bytes]:
    return {b"dynprobe.table": name.encode(), b"dynprobe.schema": SCHEMA_VERSION.encode()}


def _check_keys(table: pa.Table, schema: Table) -> None:
    for key in schema.keys:
        if table[key].null_count:
            raise RunFolderError(
                f"Key column {key!r} of table {schema.name} has {table[key].null_count} empty values. "
                "This is a defect of the code that writes the run."
            )
    if schema.unique and table.num_rows:
        counts = pc.value_counts(table[schema.keys[0]].combine_chunks())
        doubled = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(doubled):
            raise RunFolderError(
                f"Table {schema.name} has several rows with {schema.keys[0]} {doubled[0]['values'].as_py()!r}; "
                "labels must be unique. This is a defect of the code that writes the run."
            )
