"""What a format of an export is: two functions, and what both may rely on.

*Write* takes a schema and chunks of rows and returns the names of the files it made; *read* takes files and schema and
gives tables. What one writes the other reads back exactly. Facts of columns travel inside the file where the format has
a place for them (field metadata, a header, attributes), and in the sidecar always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from dynprobe.errors import RunFolderError

__all__ = ["Chunks", "Format", "as_schema", "is_states", "missing_extra", "whole_table"]

Chunks = Iterable[pa.Table]


class Format(NamedTuple):
    """How tables are written and read.

    Attributes:
        title: What it is, in words.
        write: ``(folder, name, schema, chunks) → files``: write one table into the folder, under names that begin with
            ``name``, and return the paths relative to the folder. Nothing is written outside of it.
        read: ``(folder, files, schema) → tables``: what those files hold, in order, with the columns and types of the
            schema (:func:`as_schema` gives them to a table).
        states: Whether hidden states can be written.
        code: Python that reads one table without dynprobe, for the export's page; ``{file}`` and ``{table}`` stand for
            its first file and its name, FOLDER for the export.
    """

    title: str
    write: Callable[[Path, str, pa.Schema, Chunks], list[str]]
    read: Callable[[Path, Sequence[str], pa.Schema], Iterator[pa.Table]]
    states: bool = True
    code: str = ""


def is_states(schema: pa.Schema) -> bool:
    """Whether a table is one of hidden states."""
    return "state" in schema.names and pa.types.is_fixed_size_list(schema.field("state").type)


def missing_extra(what: str, package: str) -> RunFolderError:
    """Return the error for a format whose library is not installed."""
    return RunFolderError(f"{what} needs {package}, which is not installed. Type: pip install 'dynprobe[export]'")


def whole_table(schema: pa.Schema, chunks: Chunks) -> pa.Table:
    """Return all chunks as one table, with one set of labels for each column."""
    tables = list(chunks)
    return pa.concat_tables(tables).unify_dictionaries() if tables else schema.empty_table()


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns and types of a schema."""
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise RunFolderError(f"the column {missing[0]!r} is missing")
    return pa.Table.from_arrays([table[f.name].cast(f.type) for f in schema], schema=schema)
