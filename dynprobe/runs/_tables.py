"""Reading the listed parts of a table as one.

Only what the manifest lists is read, and before it is read its size is compared, so that a file that was cut short is
named instead of half understood. Parts may differ: one has a column that another lacks, or holds it in double
precision, or has other categories. They are joined by name, at the wider type, with one set of categories.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError, did_you_mean
from dynprobe.runs._encode import METADATA_KEY, empty
from dynprobe.runs._manifest import Manifest, Part
from dynprobe.runs._schema import FACTS, TABLES, table_schema

__all__ = ["column_facts", "part_path", "read_arrow", "read_frame", "to_frame"]


def part_path(folder: Path, part: Part) -> Path:
    """Return the path of a listed part whose size is what the manifest says.

    Raises:
        RunFolderError: It is missing or cut short.
    """
    path = folder / part.path
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RunFolderError(f"{path} is listed in the manifest but missing. {_REPAIR}") from error
    if size != part.bytes:
        raise RunFolderError(f"{path} is damaged: it has {size} bytes, and the manifest lists {part.bytes}. {_REPAIR}")
    return path


def read_arrow(folder: Path, manifest: Manifest, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all listed parts of a table as one Arrow table.

    Args:
        folder: The run folder.
        manifest: Its manifest.
        name: Name of the table.
        columns: Columns to read; None for all.

    Raises:
        RunFolderError: The table or a column is unknown, or a part is damaged.
    """
    table_schema(name)
    parts = [(part, part_path(folder, part)) for part in manifest.parts_of(name)]
    tables, seen = [], dict.fromkeys(empty(name).column_names if not parts else ())
    for _, path in parts:
        with _open(path) as file:
            present = file.schema_arrow.names
            seen |= dict.fromkeys(present)
            wanted = present if columns is None else [c for c in columns if c in present]
            tables.append(_read(file, wanted, path))
    if columns is not None:
        known = list(seen)
        for column in columns:
            if column not in seen:
                raise RunFolderError(
                    f"Table {name} has no column {column!r}.{did_you_mean(column, known)} Columns: {', '.join(known)}."
                )
    table = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries() if tables else empty(name)
    return table if columns is None else table.select(list(columns))


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Return an Arrow table as pandas; labels become categoricals over all parts. The table's memory is given up."""
    return table.replace_schema_metadata(None).to_pandas(split_blocks=True, self_destruct=True)


def read_frame(folder: Path, manifest: Manifest, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return all listed parts of a table as pandas."""
    return to_frame(read_arrow(folder, manifest, name, columns))


def column_facts(folder: Path, manifest: Manifest) -> pd.DataFrame:
    """Return one row per table and column: type, metric id, unit, digest, span, aggregation, description."""
    rows: list[dict[str, Any]] = []
    for name in TABLES:
        found: dict[str, dict[str, Any]] = {}
        for part in manifest.parts_of(name):
            with _open(part_path(folder, part)) as file:
                for field in file.schema_arrow:
                    row = found.setdefault(field.name, {"table": name, "column": field.name, **_facts(field)})
                    # Parts may differ in precision; a reader gets the widest.
                    if "dtype" not in row or str(field.type) == "double":
                        row["dtype"] = _dtype(field)
        rows += found.values()
    return pd.DataFrame(rows, columns=["table", "column", "dtype", *FACTS])


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(f"{path} is damaged: {error}. {_REPAIR}") from error


def _read(file: pq.ParquetFile, columns: list[str], path: Path) -> pa.Table:
    try:
        return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(f"{path} is damaged: {error}. {_REPAIR}") from error


def _facts(field: pa.Field) -> dict[str, str]:
    stored = json.loads((field.metadata or {}).get(METADATA_KEY, b"{}"))
    return {name: str(stored.get(name, "")) for name in FACTS}


def _dtype(field: pa.Field) -> str:
    if b"dynprobe.dtype" in (field.metadata or {}):
        shape = field.metadata[b"dynprobe.shape"].decode()
        return f"{field.metadata[b'dynprobe.dtype'].decode()}{shape}"
    if pa.types.is_dictionary(field.type):
        return "category"
    return {"double": "float64", "float": "float32"}.get(str(field.type), str(field.type))


_REPAIR = (
    "Restore it from a copy of the run, or type the command that made the run again with another --out; "
    "run.verify() lists every damaged file."
)
