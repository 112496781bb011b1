"""SQL over a run: every table is a DuckDB view over its listed parts, read in place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from dynprobe.errors import RunFolderError, UsageError
from dynprobe.runs._manifest import Manifest
from dynprobe.runs._schema import TABLES
from dynprobe.runs._tables import part_path, whole_path

__all__ = ["connect", "create_views", "query"]


def query(folder: Path, manifest: Manifest, text: str) -> pd.DataFrame:
    """Return the result of a query over the tables of a run.

    Args:
        folder: The run folder.
        manifest: Its manifest.
        text: SQL; the tables have the names they have in the folder.

    Raises:
        RunFolderError: DuckDB is missing, or a part is damaged.
        UsageError: DuckDB does not understand the query.
    """
    with connect("run.sql") as connection:
        create_views(connection, folder, manifest)
        try:
            result: Any = connection.execute(text).df()
        except _errors() as error:
            tables = ", ".join(sorted(manifest.rows())) or "none yet"
            where = _where(str(error), connection)
            raise UsageError(f"The query cannot be answered: {error}\nTables of this run: {tables}.{where}") from error
    return result


def _where(error: str, connection: Any) -> str:
    """Return which tables have the column that a query looked for elsewhere, and how arms are joined to rows."""
    missing = re.search(r'column "([^"]+)" not found|does not have a column named "([^"]+)"', error)
    if missing is None:
        return ""
    name = (missing[1] or missing[2]).rpartition(".")[2].lower()
    found = connection.execute(
        "select table_name from information_schema.columns where lower(column_name) = ? order by 1", [name]
    ).fetchall()
    if not found:
        return ""
    join = " (samples has its condition_id, and every other table the sample_id)" if ("conditions",) in found else ""
    return f" {name!r} is a column of {', '.join(table for (table,) in found)}{join}."


def connect(asker: str) -> Any:
    """Open a DuckDB in memory.

    Args:
        asker: Who needs it, for the message.

    Raises:
        RunFolderError: DuckDB is missing.
    """
    try:
        import duckdb
    except ImportError as error:
        raise RunFolderError(
            f"{asker} needs DuckDB, which is not installed. Type: pip install 'dynprobe[sql]' (or pip install duckdb)"
        ) from error
    return duckdb.connect()


def create_views(connection: Any, folder: Path, manifest: Manifest, prefix: str = "") -> None:
    """Make a view of every table that has a part; nothing is read.

    Args:
        connection: From :func:`connect`.
        folder: The run folder.
        manifest: Its manifest.
        prefix: Put before the names of the tables.

    Raises:
        RunFolderError: A part is missing or cut short.
    """
    for name in TABLES:
        whole = part_path if name == "states" else whole_path
        paths = [_quoted(whole(folder, part)) for part in manifest.parts_of(name)]
        if paths:
            connection.execute(
                f'create view "{prefix}{name}" as select * from read_parquet([{", ".join(paths)}], union_by_name=true)'
            )


def _errors() -> type[Exception]:
    import duckdb

    found: type[Exception] = duckdb.Error
    return found


def _quoted(path: Path) -> str:
    """Return the path as an SQL string in which no character stands for others."""
    plain = "".join(f"[{c}]" if c in "*?[" else c for c in str(path.absolute()))
    return "'" + plain.replace("'", "''") + "'"
