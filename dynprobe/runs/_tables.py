"""Reading the listed parts of a table as one.

Only what the manifest lists is read, and before it is read its size and its hash are compared, so that a file that was
cut short or changed is named instead of half understood: compressed pages that lost a bit may still decode, into other
numbers. (States are too large to hash on every look; ``run.verify()`` and ``dynprobe doctor`` do.) Parts may differ:
one has a column that another lacks, or holds it in double precision, or has other categories. They are joined by name,
at the wider type, with one set of categories.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError, did_you_mean
from dynprobe.runs._advice import ask_doctor, damaged
from dynprobe.runs._encode import METADATA_KEY, empty
from dynprobe.runs._manifest import Manifest, Part
from dynprobe.runs._schema import COLUMNS, FACTS, SCHEMA_VERSION, TABLES, table_schema

__all__ = [
    "check_footer",
    "column_facts",
    "hash_file",
    "part_path",
    "read_arrow",
    "read_frame",
    "to_frame",
    "whole_path",
]

#: Files whose hash was compared, by path: size and time of change at that moment.
_SEEN: dict[str, tuple[int, int, str]] = {}


def part_path(folder: Path, part: Part) -> Path:
    """Return the path of a listed part whose size is what the manifest says.

    Raises:
        RunFolderError: It is missing or cut short.
    """
    path = folder / part.path
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RunFolderError(f"{path} is listed in the manifest but missing. {ask_doctor(folder)}") from error
    if size != part.bytes:
        raise RunFolderError(
            f"{path} is damaged: it has {size} bytes, and the manifest lists {part.bytes}. {ask_doctor(folder)}"
        )
    return path


def whole_path(folder: Path, part: Part) -> Path:
    """Return the path of a listed part whose bytes are what was written.

    Raises:
        RunFolderError: It is missing, cut short, or changed.
    """
    path = part_path(folder, part)
    stat = path.stat()
    state = (stat.st_size, stat.st_mtime_ns, part.sha256)
    if _SEEN.get(str(path.absolute())) != state:
        try:
            digest = hash_file(path)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read: {error}. {ask_doctor(folder)}") from error
        if digest != part.sha256:
            raise RunFolderError(
                f"{path} is damaged: its content is not what was written (SHA-256 {digest[:12]}…, the manifest lists "
                f"{part.sha256[:12]}…). {ask_doctor(folder)}"
            )
        _SEEN[str(path.absolute())] = state
    return path


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return hashlib.sha256(b"").hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return hashlib.sha256(view).hexdigest()


def check_footer(schema: pa.Schema, name: str, path: Path) -> None:
    """Refuse a file that is not of this table, of a newer layout, or whose labels have another type.

    Raises:
        RunFolderError: The message names the file and the column.
    """
    facts = schema.metadata or {}
    table, version = (facts.get(key, b"").decode("utf-8", "replace") for key in (b"dynprobe.table", b"dynprobe.schema"))
    if table and table != name:
        raise RunFolderError(damaged(path, f"it is a part of table {table!r} and lies in {name!r}"))
    major, known = version.split(".")[0], SCHEMA_VERSION.split(".", maxsplit=1)[0]
    if version and (not major.isdigit() or int(major) > int(known)):
        raise RunFolderError(
            damaged(path, f"it was written with schema {version}, and this dynprobe reads {SCHEMA_VERSION}")
        )
    for key in table_schema(name).keys:
        if key not in schema.names:
            raise RunFolderError(damaged(path, f"its key column {key!r} is missing"))
        found = schema.field(key).type
        kind = COLUMNS[key].kind
        text = pa.types.is_dictionary(found) or pa.types.is_string(found) or pa.types.is_large_string(found)
        number = pa.types.is_integer(found) or (kind.startswith("float") and pa.types.is_floating(found))
        if not (text if kind in ("label", "text") else number):
            raise RunFolderError(damaged(path, f"its key column {key!r} holds {found} where {kind} is needed"))


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
    whole = part_path if name == "states" else whole_path
    parts = [(part, whole(folder, part)) for part in manifest.parts_of(name)]
    tables, seen = [], dict.fromkeys(empty(name).column_names if not parts else ())
    for _, path in parts:
        with _open(path, name) as file:
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
    table = _joined(tables, [path for _, path in parts]) if tables else empty(name)
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
            with _open(part_path(folder, part), name) as file:
                for field in file.schema_arrow:
                    row = found.setdefault(field.name, {"table": name, "column": field.name, **_facts(field)})
                    # Parts may differ in precision; a reader gets the widest.
                    if "dtype" not in row or str(field.type) == "double":
                        row["dtype"] = _dtype(field)
        rows += found.values()
    return pd.DataFrame(rows, columns=["table", "column", "dtype", *FACTS])


def _open(path: Path, name: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(damaged(path, error)) from error
    try:
        check_footer(file.schema_arrow, name, path)
    except BaseException:
        file.close()
        raise
    return file


def _read(file: pq.ParquetFile, columns: list[str], path: Path) -> pa.Table:
    try:
        return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(damaged(path, error)) from error


def _joined(tables: list[pa.Table], paths: list[Path]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    except pa.ArrowException as error:
        for number in range(1, len(tables)):  # the first file that does not go with those before it
            try:
                pa.unify_schemas([t.schema for t in tables[: number + 1]], promote_options="permissive")
            except pa.ArrowException as why:
                raise RunFolderError(damaged(paths[number], f"its columns do not fit the other parts: {why}")) from why
        raise RunFolderError(damaged(paths[0].parent / "*.parquet", error)) from error


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
