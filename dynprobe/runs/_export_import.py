"""An export as a run folder again, with the same tables.

Every file is compared with its checksum before it is read. Types, facts and the manifest come from ``dynprobe.json``;
hidden states become bytes again, bfloat16 from the float32 it was widened to, which is exact.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from dynprobe.errors import DynprobeError, RunFolderError
from dynprobe.runs._atomic import TEMPORARY, sync_folder, write_bytes, write_stream, writing
from dynprobe.runs._card import card
from dynprobe.runs._encode import METADATA_KEY, to_bytes
from dynprobe.runs._export import SIDECAR
from dynprobe.runs._export_arrays import to_arrays
from dynprobe.runs._export_formats import FORMATS
from dynprobe.runs._export_sidecar import Sidecar, TableFacts, read_sidecar, verify_files
from dynprobe.runs._export_tables import schema_of
from dynprobe.runs._find import find_run, folder_name, parent_lock
from dynprobe.runs._json import dumps
from dynprobe.runs._manifest import MANIFEST_NAME, Part, encode_manifest, validated
from dynprobe.runs._open_run import open_run
from dynprobe.runs._run import Run
from dynprobe.runs._schema import table_schema
from dynprobe.runs._start import now
from dynprobe.runs._states import states_table, write_states_file
from dynprobe.runs._tables import hash_file
from dynprobe.runs.formats._csv import read_unguarded_csv

__all__ = ["import_export", "is_export"]


def is_export(path: str | Path) -> bool:
    """Whether a path is an exported run: its folder, or the ``dynprobe.json`` in it."""
    found = Path(path)
    return (found / SIDECAR).is_file() if found.is_dir() else found.name == SIDECAR and found.is_file()


def import_export(path: str | Path, out: str | Path = "runs") -> Run:
    """Make a run folder of an export.

    Args:
        path: The folder that ``dynprobe export`` wrote, as it was or downloaded from the hub.
        out: Folder of runs. A run with the same id that is there already is opened.

    Raises:
        RunFolderError: A file is missing or changed, or the export is of a newer version.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    side = read_sidecar(folder)
    verify_files(folder, side)
    content = {**side.manifest, "imported_from": {
        "name": folder.resolve().name, "to": side.to, "sidecar_sha256": hash_file(folder / SIDECAR),
    }}  # fmt: skip
    advice = "Restore the export from a copy."
    manifest = validated({**content, "parts": []}, str(folder / SIDECAR), advice)
    parent = Path(out)
    with writing(parent, "the folder"):
        parent.mkdir(parents=True, exist_ok=True)
    with parent_lock(parent):
        known = find_run(parent, manifest.id8)
    if known is not None:
        return open_run(known)
    named = side.folder
    whole = named == Path(named).name and named.endswith(manifest.id8) and not named.startswith(".")
    name = named if whole else folder_name(now(), manifest.model_name, manifest.id8)
    temporary = parent / f"{TEMPORARY}{os.getpid()}_{manifest.id8}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(parent, name):
            temporary.mkdir()
            parts = [part for table in side.tables for part in _table(folder, side, table, temporary)]
            manifest = manifest.model_copy(update={"parts": parts})
            if side.summary:
                write_bytes(temporary / "summary.json", (dumps(side.summary, indent=1) + "\n").encode())
            write_bytes(temporary / MANIFEST_NAME, encode_manifest(manifest))
            target = parent / name
            temporary.rename(target)
            sync_folder(parent)
            write_bytes(target / "README.md", card(target, manifest).encode("utf-8", "replace"))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return open_run(target)


def _table(folder: Path, side: Sidecar, table: TableFacts, target: Path) -> list[Part]:
    name, parts = table.table, []
    sharded = table_schema(name).sharded
    version = str(side.manifest["schema_version"])
    found = 0
    try:
        schema = schema_of(name, table.plain(), version)
        read = read_unguarded_csv if side.to == "csv" and side.layout < 2 else FORMATS[side.to].read
        tables = read(folder, table.files, schema)
        for number, rows in enumerate(tables):
            found += rows.num_rows
            path = f"{name}/part-{number:05d}.parquet" if sharded else f"{name}.parquet"
            path = path if table.name == name else path.replace("part-", f"part-{table.name}-")
            (target / path).parent.mkdir(exist_ok=True)
            if name == "states":
                written = write_stream(target / path, partial(write_states_file, table=_stored(rows)))
            else:
                written = write_bytes(target / path, to_bytes(rows))
            parts.append(Part(path=path, table=name, rows=rows.num_rows, **vars(written)))
    except DynprobeError as error:
        raise RunFolderError(f"{folder}: table {table.name} cannot be read: {error}") from error
    except Exception as error:  # the readers of five formats, and files that may be anything
        raise RunFolderError(
            f"{folder}: table {table.name} cannot be read: {error}. Restore the export from a copy."
        ) from error
    if found != table.rows:
        raise RunFolderError(f"{folder}: table {table.name} has {found} rows, and {SIDECAR} says {table.rows}.")
    if not parts and name != "states":  # a table without rows
        path = f"{name}/part-00000.parquet" if sharded else f"{name}.parquet"
        (target / path).parent.mkdir(exist_ok=True)
        written = write_bytes(target / path, to_bytes(schema.empty_table()))
        parts.append(Part(path=path, table=name, rows=0, **vars(written)))
    return parts


def _stored(rows: pa.Table) -> pa.Table:
    """States as a run stores them."""
    field = rows.schema.field("state")
    dtype = field.metadata[b"dynprobe.dtype"].decode()
    values = to_arrays(rows.select(["state"]))["state"]
    if dtype == "bfloat16":
        values = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    keys = rows.drop_columns(["state"])
    facts = {f"states.{f.name}": json.loads((f.metadata or {}).get(METADATA_KEY, b"{}")) for f in keys.schema}
    return states_table(keys, values, dtype, facts)
