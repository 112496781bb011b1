"""The tables of a run as they leave it: one schema per table, one Arrow table per part, only the conditions asked for.

Parts of a run may differ (a column that another lacks, a wider type); what is exported has one schema, at the wider
type. Hidden states leave as fixed-size lists of numbers instead of bytes, so that every reader of Arrow sees numbers.
bfloat16, which Arrow does not have, is widened to float32, which is exact; the field says what it was, and an import
narrows it again. States of several shapes or dtypes become several tables.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._advice import damaged
from dynprobe.runs._encode import METADATA_KEY
from dynprobe.runs._export_arrays import nested
from dynprobe.runs._json import dumps
from dynprobe.runs._manifest import Manifest
from dynprobe.runs._schema import FACTS, TABLES
from dynprobe.runs._states import DTYPES, decode_bfloat16
from dynprobe.runs._tables import part_path, read_arrow, whole_path

__all__ = ["Leaving", "describe_columns", "leaving", "schema_of"]

#: Names of the Arrow types that columns have, as the sidecar says them.
_KINDS: dict[str, pa.DataType] = {
    "label": pa.dictionary(pa.int32(), pa.string()),
    "text": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}


@dataclass(frozen=True)
class Leaving:
    """A table that is exported.

    Attributes:
        name: Name of the table; states of a second shape are ``states_2``.
        table: Table of the run.
        schema: Its schema.
        chunks: Its rows, part by part; may be walked once.
    """

    name: str
    table: str
    schema: pa.Schema
    chunks: Iterator[pa.Table]


def leaving(
    folder: Path, manifest: Manifest, tables: Sequence[str] | None, conditions: Sequence[str] | None
) -> list[Leaving]:
    """Return the tables of a run that are asked for.

    Args:
        folder: The run folder.
        manifest: Its manifest.
        tables: Names; None for all that were written.
        conditions: Conditions by id or arm; None for all. Prompts are never filtered.

    Raises:
        UsageError: The run has no such table or condition.
        RunFolderError: A part is missing or damaged.
    """
    held = [name for name in TABLES if manifest.parts_of(name)]
    if not held:
        raise UsageError(f"{folder} has no tables yet; there is nothing to export")
    for name in tables or ():
        if name not in held:
            raise UsageError(f"{folder} has no table {name!r}.{did_you_mean(name, held)} It has {', '.join(held)}.")
    wanted = [name for name in held if tables is None or name in tables]
    keep = _Rows(folder, manifest, conditions) if conditions else None
    out = []
    for name in wanted:
        if name == "states":
            out += _states(folder, manifest, keep)
        else:
            schema = _unified(folder, manifest, name)
            out.append(Leaving(name, name, schema, _parts(folder, manifest, name, schema, keep)))
    return out


def describe_columns(schema: pa.Schema) -> list[dict[str, Any]]:
    """Return what is known of every column, as plain data: name, type, metric id, unit, digest, span and so on."""
    out = []
    for field in schema:
        facts = json.loads((field.metadata or {}).get(METADATA_KEY, b"{}"))
        row: dict[str, Any] = {"name": field.name, "type": _kind(field.type)}
        row |= {name: str(facts[name]) for name in FACTS if facts.get(name)}
        if b"dynprobe.dtype" in (field.metadata or {}):
            row["dtype"] = field.metadata[b"dynprobe.dtype"].decode()
            row["shape"] = json.loads(field.metadata[b"dynprobe.shape"])
        out.append(row)
    return out


def schema_of(table: str, columns: Sequence[dict[str, Any]], version: str) -> pa.Schema:
    """Return the schema that :func:`describe_columns` described.

    Raises:
        RunFolderError: A column has a type that is not known.
    """
    fields = []
    for column in columns:
        metadata: dict[bytes, bytes] = {}
        if "dtype" in column:
            metadata = {
                b"dynprobe.dtype": column["dtype"].encode(), b"dynprobe.shape": json.dumps(column["shape"]).encode(),
                b"dynprobe.order": b"little",
            }  # fmt: skip
        else:
            metadata = {METADATA_KEY: dumps({name: column.get(name, "") for name in FACTS}).encode()}
        fields.append(pa.field(column["name"], _type(column["type"]), "dtype" not in column, metadata))
    return pa.schema(fields, metadata={b"dynprobe.table": table.encode(), b"dynprobe.schema": version.encode()})


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{_kind(kind.value_type)}[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list {_kind(kind.value_type)}"
    return next((name for name, known in _KINDS.items() if known == kind), str(kind))


def _type(kind: str) -> pa.DataType:
    if kind.endswith("]"):
        inner, _, size = kind[:-1].rpartition("[")
        return pa.list_(_type(inner), int(size))
    if kind.startswith("list "):
        return pa.list_(pa.field("element", _type(kind.removeprefix("list "))))
    if kind not in _KINDS:
        raise RunFolderError(f"the type {kind!r} is not known.{did_you_mean(kind, _KINDS)}")
    return _KINDS[kind]


class _Rows:
    """Which rows belong to some conditions."""

    def __init__(self, folder: Path, manifest: Manifest, conditions: Sequence[str]) -> None:
        known = read_arrow(folder, manifest, "conditions").select(["condition_id", "arm"]).to_pylist()
        names = {str(row["condition_id"]): str(row["arm"]) for row in known}
        for asked in conditions:
            if asked not in names and asked not in names.values():
                words = sorted({*names, *names.values()})
                raise UsageError(
                    f"{folder} has no condition {asked!r}.{did_you_mean(asked, words)} It has {', '.join(names)}."
                )
        self.conditions = [i for i, arm in names.items() if i in conditions or arm in conditions]
        held = bool(manifest.parts_of("samples"))
        samples = read_arrow(folder, manifest, "samples", ["sample_id", "condition_id"]) if held else None
        kept = [] if samples is None else samples.filter(_among(samples["condition_id"], self.conditions))["sample_id"]
        self.samples = [] if samples is None else pc.unique(_plain(kept)).to_pylist()

    def of(self, table: pa.Table) -> pa.Table:
        for key, allowed in (("condition_id", self.conditions), ("sample_id", self.samples)):
            if key in table.column_names:
                return _compacted(table.filter(_among(table[key], allowed)))
        return table


def _among(column: Any, allowed: Collection[str]) -> Any:
    return pc.is_in(_plain(column), pa.array(list(allowed), pa.string()))


def _plain(column: Any) -> Any:
    return column.cast(pa.string())


def _compacted(table: pa.Table) -> pa.Table:
    """Return the table without categories that no row has."""
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(at, field, _plain(table.column(at)).dictionary_encode().cast(field.type))
    return table


def _unified(folder: Path, manifest: Manifest, name: str) -> pa.Schema:
    return pa.unify_schemas(
        [_opened(part_path(folder, part)).schema_arrow for part in manifest.parts_of(name)],
        promote_options="permissive",
    )


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(damaged(path, error)) from error


def _parts(folder: Path, manifest: Manifest, name: str, schema: pa.Schema, keep: _Rows | None) -> Iterator[pa.Table]:
    for part in manifest.parts_of(name):
        path = whole_path(folder, part)
        try:
            table = _opened(path).read()
        except (pa.ArrowException, OSError) as error:
            raise RunFolderError(damaged(path, error)) from error
        columns = [
            table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type) for f in schema
        ]
        table = pa.Table.from_arrays(columns, schema=schema)
        yield table if keep is None else keep.of(table)


def _states(folder: Path, manifest: Manifest, keep: _Rows | None) -> list[Leaving]:
    groups: dict[tuple[str, str], list[Path]] = {}
    for part in manifest.parts_of("states"):
        path = whole_path(folder, part)  # under the new checksums of an export a flipped bit would be valid
        found = _opened(path).schema_arrow.field("state").metadata
        groups.setdefault((found[b"dynprobe.dtype"].decode(), found[b"dynprobe.shape"].decode()), []).append(path)
    out = []
    for number, ((dtype, shape), paths) in enumerate(groups.items(), start=1):
        sizes = json.loads(shape)
        schemas = [_opened(path).schema_arrow for path in paths]
        keys = pa.unify_schemas([s.remove(s.get_field_index("state")) for s in schemas], promote_options="permissive")
        stored = schemas[0].field("state")
        width = pa.from_numpy_dtype(np.dtype("<f4" if dtype == "bfloat16" else DTYPES[dtype]))
        kind = width
        for size in reversed(sizes):
            kind = pa.list_(kind, size)
        schema = keys.append(pa.field("state", kind, False, stored.metadata))
        name = "states" if number == 1 else f"states_{number}"
        out.append(Leaving(name, "states", schema, _state_parts(paths, schema, dtype, sizes, keep)))
    return out


def _state_parts(
    paths: Sequence[Path], schema: pa.Schema, dtype: str, sizes: Sequence[int], keep: _Rows | None
) -> Iterator[pa.Table]:
    names = [name for name in schema.names if name != "state"]
    for path in paths:
        with _opened(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                flat = _numbers(table["state"].combine_chunks(), dtype)
                columns = [
                    table[n].cast(schema.field(n).type) if n in table.column_names
                    else pa.nulls(len(table), schema.field(n).type)
                    for n in names
                ]  # fmt: skip
                out = pa.Table.from_arrays([*columns, nested(pa.array(flat), sizes)], schema=schema)
                yield out if keep is None else keep.of(out)


def _numbers(bits: Any, dtype: str) -> np.ndarray:
    """The numbers of all states one after another, a view over their bytes; bfloat16 as float32."""
    kind, size = DTYPES[dtype], bits.type.byte_width
    count = len(bits) * size // np.dtype(kind).itemsize
    flat = np.frombuffer(bits.buffers()[1], kind, count, bits.offset * size) if count else np.empty(0, kind)
    return decode_bfloat16(flat) if dtype == "bfloat16" else flat
