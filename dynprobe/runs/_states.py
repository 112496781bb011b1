"""Hidden states on disk at the speed of the disk, and back as NumPy views.

A list column of Parquet pays for repetition levels on every number. A state is therefore stored as one
``fixed_size_binary`` value per row, plain, without dictionary and uncompressed: the file holds the same bytes as the
tensor, the Arrow array is built over the tensor's own memory, and what is read is a view over the decoded buffer.
Dtype, shape and byte order stand in the field's metadata. bfloat16, which NumPy does not have, is stored as its sixteen
bits and widened to float32 on reading, which is exact.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dynprobe.errors import RunFolderError, did_you_mean
from dynprobe.runs._advice import damaged
from dynprobe.runs._encode import conform

__all__ = [
    "DTYPES",
    "decode_bfloat16",
    "read_group",
    "read_states",
    "state_groups",
    "states_table",
    "write_states_file",
]

#: Dtypes a state may have, with the little-endian NumPy type that holds its bits.
DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}

_ROW_GROUP_BYTES = 64 * 2**20


def decode_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 numbers, given as their sixteen bits, as float32 (exact).

    Example:
        >>> decode_bfloat16(np.array([0x3F80, 0xC000], dtype=np.uint16)).tolist()
        [1.0, -2.0]
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def states_table(keys: Any, states: Any, dtype: str, facts: Mapping[str, Mapping[str, str]]) -> pa.Table:
    """Return an Arrow table of keys and states whose ``state`` column lies over the memory of ``states``.

    Args:
        keys: Frame with ``sample_id, pos, track, depth`` and any further label.
        states: Tensor or array ``[rows, …]``; a NumPy array for bfloat16 holds the bits as ``uint16``.
        dtype: ``float16``, ``bfloat16``, ``float32`` or ``float64``; must be the dtype of ``states``.
        facts: Column facts.

    Raises:
        RunFolderError: Rows or dtypes do not agree.
    """
    if dtype not in DTYPES:
        raise RunFolderError(f"States cannot be stored as {dtype!r}.{did_you_mean(dtype, DTYPES)} Use {list(DTYPES)}.")
    array = _bits(states, dtype)
    table = conform("states", keys, facts)
    if array.ndim < 2 or array.shape[0] != table.num_rows:
        raise RunFolderError(
            f"States have shape {list(array.shape)} and {table.num_rows} rows of keys; "
            "[rows, …] with one row of keys each is needed."
        )
    width = int(np.prod(array.shape[1:])) * array.itemsize
    if not width:
        raise RunFolderError(f"States have shape {list(array.shape)}: a state without any number cannot be stored.")
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, pa.py_buffer(array)])
    field = pa.field(
        "state",
        column.type,
        nullable=False,
        metadata={
            b"dynprobe.dtype": dtype.encode(),
            b"dynprobe.shape": json.dumps(list(array.shape[1:])).encode(),
            b"dynprobe.order": b"little",
        },
    )
    return table.append_column(field, column)


def write_states_file(target: Any, table: pa.Table, compression: str = "none") -> None:
    """Write a table of states to a path or an Arrow stream; ``compression`` is ``none`` or ``lz4``."""
    keys = [name for name in table.column_names if name != "state"]
    packed = [k for k in keys if not pa.types.is_floating(table.schema.field(k).type)]
    group = max(1, _ROW_GROUP_BYTES // table.schema.field("state").type.byte_width)
    opened = pa.OSFile(str(target), "wb") if isinstance(target, Path) else contextlib.nullcontext(target)
    with opened as sink:
        pq.write_table(
            table,
            sink,
            compression={name: (compression if name == "state" else "zstd") for name in table.column_names},
            use_dictionary=packed or False,
            use_byte_stream_split=False,
            write_statistics=packed,
            row_group_size=group,
            write_batch_size=256,
            store_schema=True,
        )


def read_states(path: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[pd.DataFrame, NDArray[Any], str]]:
    """Yield ``(keys, states, dtype)`` per row group that holds a wanted row.

    A group whose wanted rows are contiguous is a view over the decoded buffer; otherwise the rows are copied.

    Args:
        path: A states file.
        wanted: Key column → value, or a list of values.
    """
    path = Path(path)
    with _opened(path) as file:
        dtype, shape, names = _layout(file, path)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise RunFolderError(
                f"States have no key {unknown[0]!r}.{did_you_mean(unknown[0], names)} Keys: {', '.join(names)}."
            )
        for group in range(file.num_row_groups):
            keys = _group(file, group, names, path).to_pandas()
            rows = np.flatnonzero(_matches(keys, wanted))
            if not rows.size:
                continue
            column = _group(file, group, ["state"], path).column(0)
            values = _view(column, DTYPES[dtype]).reshape(-1, *shape)
            together = rows[-1] - rows[0] + 1 == rows.size
            chosen = values[rows[0] : rows[-1] + 1] if together else values[rows]
            yield keys.iloc[rows].reset_index(drop=True), chosen, dtype


def state_groups(path: Path) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yield number and keys of every row group of a states file; the states themselves are not read."""
    with _opened(path) as file:
        _, _, names = _layout(file, path)
        for group in range(file.num_row_groups):
            yield group, _group(file, group, names, path).to_pandas()


def read_group(path: Path, group: int) -> tuple[NDArray[Any], str]:
    """Return the states of one row group as a view over the decoded buffer (bfloat16 as its bits), and their dtype."""
    with _opened(path) as file:
        dtype, shape, _ = _layout(file, path)
        return _view(_group(file, group, ["state"], path).column(0), DTYPES[dtype]).reshape(-1, *shape), dtype


def _opened(path: Path) -> pq.ParquetFile:
    try:
        # memory_map off: a view over a mapped file would break when the file is replaced.
        return pq.ParquetFile(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(damaged(path, error)) from error


def _layout(file: pq.ParquetFile, path: Path) -> tuple[str, list[int], list[str]]:
    try:
        field = file.schema_arrow.field("state")
        meta = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        dtype, shape = meta["dynprobe.dtype"], json.loads(meta["dynprobe.shape"])
        if dtype not in DTYPES:
            raise KeyError(dtype)
    except (KeyError, ValueError) as error:
        raise RunFolderError(damaged(path, f"it does not say dtype and shape of its states ({error})")) from error
    return dtype, shape, [name for name in file.schema_arrow.names if name != "state"]


def _group(file: pq.ParquetFile, group: int, columns: list[str], path: Path) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(damaged(path, error)) from error


def _bits(states: Any, dtype: str) -> NDArray[Any]:
    if hasattr(states, "detach"):
        found = str(states.dtype).removeprefix("torch.")
        if found != dtype:
            raise RunFolderError(f"States are {found}, and {dtype} was announced; convert them, or announce {found}.")
        tensor = states.detach().cpu().contiguous()
        if dtype == "bfloat16":
            import torch

            tensor = tensor.view(torch.int16)
            return _ordered(tensor.numpy().view(np.uint16), "<u2")
        return _ordered(tensor.numpy(), DTYPES[dtype])
    array = np.ascontiguousarray(states)
    needed = np.dtype(DTYPES[dtype])
    if array.dtype.newbyteorder("<") != needed:
        raise RunFolderError(f"States are {array.dtype}, and {dtype} (as {needed.name}) was announced.")
    return _ordered(array, DTYPES[dtype])


def _ordered(array: NDArray[Any], wanted: str) -> NDArray[Any]:
    return array if sys.byteorder == "little" and array.dtype.isnative else array.astype(wanted)


def _matches(keys: pd.DataFrame, wanted: Mapping[str, Any]) -> NDArray[np.bool_]:
    keep = np.ones(len(keys), dtype=bool)
    for name, value in wanted.items():
        values = list(value) if isinstance(value, list | tuple | set | range | np.ndarray) else [value]
        keep &= keys[name].isin(values).to_numpy()
    return keep


def _view(column: pa.ChunkedArray, dtype: str) -> NDArray[Any]:
    views = []
    for chunk in column.chunks:
        width = chunk.type.byte_width
        count = len(chunk) * width // np.dtype(dtype).itemsize
        views.append(np.frombuffer(chunk.buffers()[1], dtype=dtype, count=count, offset=chunk.offset * width))
    return views[0] if len(views) == 1 else np.concatenate(views)
