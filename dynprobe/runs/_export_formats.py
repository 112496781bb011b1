"""Writing and reading a table in each format: Parquet (for ``datasets``), Arrow, CSV, ``.npz``, ``.safetensors``, Zarr.

A format is two functions, *write* (schema and chunks of rows in, names of files out) and *read* (files and schema in,
a table out); what one writes the other reads back exactly. Facts of columns travel inside the file where the format
has a place for them (field metadata, a header, attributes), and in the sidecar always.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError
from dynprobe.runs._export_arrays import from_arrays, to_arrays
from dynprobe.runs._export_tables import describe_columns
from dynprobe.runs._json import dumps
from dynprobe.runs._states import decode_bfloat16

__all__ = ["FORMATS", "Format", "is_states", "missing_extra", "read_unguarded_csv"]

Chunks = Iterable[pa.Table]

#: Rows of a Parquet file, after which another begins.
_SHARD_ROWS = 4_000_000


class Format(NamedTuple):
    """How tables are written and read.

    Attributes:
        title: What it is, in words.
        write: ``(folder, name, schema, chunks) → files``, relative to the folder.
        read: ``(folder, files, schema) → table``.
        states: Whether hidden states can be written.
    """

    title: str
    write: Callable[[Path, str, pa.Schema, Chunks], list[str]]
    read: Callable[[Path, Sequence[str], pa.Schema], Iterator[pa.Table]]
    states: bool = True


def is_states(schema: pa.Schema) -> bool:
    """Whether a table is one of hidden states."""
    return "state" in schema.names and pa.types.is_fixed_size_list(schema.field("state").type)


def missing_extra(what: str, package: str) -> RunFolderError:
    """Return the error for a format whose library is not installed."""
    return RunFolderError(f"{what} needs {package}, which is not installed. Type: pip install 'dynprobe[export]'")


# Parquet


def _write_parquet(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    floats = [f.name for f in schema if pa.types.is_floating(f.type)]
    others = [f.name for f in schema if not pa.types.is_floating(f.type) and not pa.types.is_nested(f.type)]
    files: list[str] = []
    writer, rows = None, 0
    try:
        for chunk in chunks:
            if not chunk.num_rows:
                continue
            if writer is None or rows >= _SHARD_ROWS:
                if writer is not None:
                    writer.close()
                files.append(f"{name}/{len(files):05d}.parquet")
                (folder / name).mkdir(exist_ok=True)
                writer, rows = pq.ParquetWriter(
                    folder / files[-1], schema, compression="zstd", use_dictionary=others or False,
                    use_byte_stream_split=floats or False, write_page_index=True,
                ), 0  # fmt: skip
            writer.write_table(chunk)
            rows += chunk.num_rows
    finally:
        if writer is not None:
            writer.close()
    return files


def _read_parquet(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in files:
        with pq.ParquetFile(folder / file, memory_map=False) as opened:
            yield _as(opened.read(), schema)


# Arrow


def _write_arrow(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    # The file format of Arrow has one dictionary per column, so the categories of all parts are brought together.
    if is_states(schema):
        files = []
        for number, chunk in enumerate(chunks):
            files.append(f"{name}-{number:05d}.arrow")
            _one_arrow(folder / files[-1], chunk)
        return files
    _one_arrow(folder / f"{name}.arrow", _whole(schema, chunks))
    return [f"{name}.arrow"]


def _one_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read_arrow(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in files:
        with pa.OSFile(str(folder / file), "rb") as source:
            yield _as(pa.ipc.open_file(source).read_all(), schema)


# CSV

#: A spreadsheet takes a cell that begins like this for a formula and runs it; the apostrophe, which says that it is
#: text, is itself among them so that what is put in front can be taken away again.
_FORMULA = r"^[=+\-@\t\r\n']"


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
    risky = pc.match_substring_regex(column, _FORMULA)
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
        yield _as(_unflat(table, schema, guarded), schema)


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


# Arrays: .npz, .safetensors, Zarr


def _write_npz(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    def one(path: Path, arrays: Mapping[str, Any], facts: str) -> None:
        np.savez(path, allow_pickle=False, **arrays, **{"dynprobe.columns": np.array(facts)})

    return _array_files(folder, name, schema, chunks, "npz", one)


def _read_npz(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in files:
        with np.load(folder / file, allow_pickle=False) as opened:
            yield from_arrays({name: opened[name] for name in opened.files if name != "dynprobe.columns"}, schema)


def _write_safetensors(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    import torch
    from safetensors.torch import save_file

    half = schema.field("state").metadata[b"dynprobe.dtype"] == b"bfloat16" if is_states(schema) else False

    def one(path: Path, arrays: Mapping[str, Any], facts: str) -> None:
        # torch wants memory that may be written, which the buffers of Arrow are not.
        tensors = {k: torch.from_numpy(np.require(v, requirements=("C", "W"))) for k, v in arrays.items()}
        if half:
            # Bits, not a conversion: that changes the sign and the payload of a NaN.
            bits = (np.ascontiguousarray(arrays["state"], np.float32).view(np.uint32) >> 16).astype(np.uint16)
            tensors["state"] = torch.from_numpy(bits).view(torch.bfloat16)
        save_file(tensors, path, metadata={"dynprobe.columns": facts})
        path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes files that only their owner can read

    return _array_files(folder, name, schema, chunks, "safetensors", one)


def _read_safetensors(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    import torch
    from safetensors.torch import load_file

    for file in files:
        found = load_file(folder / file)
        arrays = {
            k: decode_bfloat16(v.view(torch.uint16).numpy()) if v.dtype == torch.bfloat16 else v.numpy()
            for k, v in found.items()
        }
        yield from_arrays(arrays, schema)


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
    table = pa.concat_tables(keys) if keys else _whole(schema, chunks)
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


def _array_files(
    folder: Path, name: str, schema: pa.Schema, chunks: Chunks, ending: str,
    write: Callable[[Path, Mapping[str, Any], str], None],
) -> list[str]:  # fmt: skip
    """One file for a table, or one per part of the states, whose whole may not fit into memory."""
    facts = dumps(describe_columns(schema))
    if not is_states(schema):
        write(folder / f"{name}.{ending}", to_arrays(_whole(schema, chunks)), facts)
        return [f"{name}.{ending}"]
    files = []
    for number, chunk in enumerate(chunks):
        files.append(f"{name}-{number:05d}.{ending}")
        write(folder / files[-1], to_arrays(chunk), facts)
    return files


def _whole(schema: pa.Schema, chunks: Chunks) -> pa.Table:
    tables = list(chunks)
    return pa.concat_tables(tables).unify_dictionaries() if tables else schema.empty_table()


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns and types of a schema."""
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise RunFolderError(f"the column {missing[0]!r} is missing")
    return pa.Table.from_arrays([table[f.name].cast(f.type) for f in schema], schema=schema)


FORMATS: dict[str, Format] = {
    "hf": Format("Parquet, as datasets.load_dataset and the hub's viewer open it", _write_parquet, _read_parquet),
    "arrow": Format("Arrow files", _write_arrow, _read_arrow),
    "csv": Format("CSV; hidden states cannot be written", _write_csv, _read_csv, states=False),
    "npz": Format("NumPy arrays", _write_npz, _read_npz),
    "safetensors": Format("safetensors", _write_safetensors, _read_safetensors),
    "zarr": Format("one Zarr group per table", _write_zarr, _read_zarr),
}
