"""Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from dynprobe.runs._export_format import Chunks, Format, as_schema, is_states, whole_table

__all__ = ["FORMAT"]


def _write_arrow(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    # The file format of Arrow has one dictionary per column, so the categories of all parts are brought together.
    if is_states(schema):
        files = []
        for number, chunk in enumerate(chunks):
            files.append(f"{name}-{number:05d}.arrow")
            _one_arrow(folder / files[-1], chunk)
        return files
    _one_arrow(folder / f"{name}.arrow", whole_table(schema, chunks))
    return [f"{name}.arrow"]


def _one_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read_arrow(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in files:
        with pa.OSFile(str(folder / file), "rb") as source:
            yield as_schema(pa.ipc.open_file(source).read_all(), schema)


FORMAT = Format(
    "Arrow files",
    _write_arrow,
    _read_arrow,
    code='import pyarrow as pa\ntable = pa.ipc.open_file(pa.memory_map("{file}")).read_all()',
)
