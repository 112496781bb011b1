"""Zarr: one group per table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynprobe.runs._export_arrays import from_arrays, to_arrays
from dynprobe.runs._export_format import Chunks, Format, is_states, missing_extra, whole_table
from dynprobe.runs._export_tables import describe_columns

__all__ = ["FORMAT"]


def _write_zarr(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    group = _zarr().open_group(folder / "run.zarr", mode="a").create_group(name)
    group.attrs["columns"] = describe_columns(schema)
    keys, rows = [], 0
    for chunk in chunks if is_states(schema) else ():
        values = to_arrays(chunk.select(["state"]))["state"]
        if "state" not in group:
            step = max(1, min(len(values), (16 << 20) // values[0].nbytes))
            group.create_array(
                "state", shape=(0, *values.shape[1:]), chunks=(step, *values.shape[1:]), dtype=values.dtype,
                compressors=None,
            )  # fmt: skip
        group["state"].append(values)
        rows += len(values)
        keys.append(chunk.drop_columns(["state"]))
    table = pa.concat_tables(keys) if keys else whole_table(schema, chunks)
    if not keys and is_states(schema):
        table = table.drop_columns(["state"])
    for key, array in to_arrays(table).items():
        group.create_array(key, data=np.ascontiguousarray(array))
    for column in describe_columns(schema):
        for key in (column["name"], f"{column['name']}.codes", f"{column['name']}.utf8"):
            if key in group:
                group[key].attrs.update(column)
    return [f"run.zarr/{name}"]


def _read_zarr(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in files:
        group = _zarr().open_group(folder / file, mode="r")
        arrays = {name: array[:] for name, array in group.arrays()}
        if is_states(schema) and "state" not in arrays:
            continue
        yield from_arrays(arrays, schema)


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise missing_extra("Zarr", "zarr") from error
    return zarr


FORMAT = Format(
    "one Zarr group per table",
    _write_zarr,
    _read_zarr,
    code='import zarr\narrays = zarr.open_group("FOLDER/run.zarr", mode="r")["{table}"]',
)
