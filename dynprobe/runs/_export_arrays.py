"""An Arrow table as named NumPy arrays and back: what ``.npz``, ``.safetensors`` and Zarr can hold.

None of the three has labels, texts, lists or missing integers. They are written with the parts that Arrow itself makes
them of, so that nothing is lost and nothing is pickled:

========  =====================================================================================================
column    arrays
========  =====================================================================================================
number    ``name``; a missing float is NaN, other missing values are 0 where ``name.valid`` is False
label     ``name.codes`` (−1 = missing), and the categories as a text ``name.categories``
text      ``name.utf8`` (all texts in one), ``name.offsets`` (text i lies between offsets i and i + 1)
list      ``name.values``, ``name.offsets``
state     ``name`` [rows, …]
========  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dynprobe.errors import RunFolderError

__all__ = ["from_arrays", "nested", "to_arrays"]

Arrays = dict[str, NDArray[Any]]


def to_arrays(table: pa.Table) -> Arrays:
    """Return the columns of a table as named arrays.

    Example:
        >>> arrays = to_arrays(pa.table({"a": pa.array(["x", None, "x"]).dictionary_encode(), "n": [1, None, 3]}))
        >>> {name: array.tolist() for name, array in arrays.items() if "categories" not in name}
        {'a.codes': [0, -1, 0], 'n.valid': [True, False, True], 'n': [1, 0, 3]}
    """
    out: Arrays = {}
    for name, column in zip(table.column_names, table.unify_dictionaries().columns, strict=True):
        array = column.combine_chunks()
        out.update(_split(name, array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array))
    return out


def from_arrays(arrays: Mapping[str, NDArray[Any]], schema: pa.Schema) -> pa.Table:
    """Return the table of some named arrays.

    Args:
        arrays: From :func:`to_arrays`.
        schema: Schema of the table.

    Raises:
        RunFolderError: An array is missing.

    Example:
        >>> table = pa.table({"text": ["a", None, ""], "ids": [[1, 2], [], None], "x": [0.5, None, 1.0]})
        >>> from_arrays(to_arrays(table), table.schema).equals(table)
        True
    """
    try:
        columns = [_join(field.name, field.type, arrays) for field in schema]
    except KeyError as error:
        raise RunFolderError(f"the array {error.args[0]!r} is missing") from error
    return pa.Table.from_arrays(columns, schema=schema)


def _split(name: str, array: pa.Array) -> Iterator[tuple[str, NDArray[Any]]]:
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield f"{name}.codes", array.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        yield from _split(f"{name}.categories", array.dictionary)
        return
    if pa.types.is_fixed_size_list(kind):
        flat, shape = array, []
        while pa.types.is_fixed_size_list(flat.type):
            shape.append(flat.type.list_size)
            flat = flat.flatten()
        yield name, flat.to_numpy(zero_copy_only=False).reshape(-1, *shape)
        return
    if array.null_count and not pa.types.is_floating(kind):
        yield f"{name}.valid", array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_string(kind):
        array = array.fill_null("").cast(pa.large_string())
        offsets = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8) if len(array) else None
        offsets = np.zeros(1, np.int64) if offsets is None else offsets
        data = array.buffers()[2]
        whole = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        yield f"{name}.utf8", whole[offsets[0] : offsets[-1]]
        yield f"{name}.offsets", offsets - offsets[0]
    elif pa.types.is_list(kind):
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        yield from _split(f"{name}.values", array.flatten())
        yield f"{name}.offsets", np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    elif pa.types.is_floating(kind):
        yield name, array.to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        zero = pa.scalar(0, pa.int8()).cast(kind)
        yield name, array.fill_null(zero).to_numpy(zero_copy_only=False)
    else:
        raise RunFolderError(f"column {name!r} has the type {kind}, which cannot be written as arrays")


def _join(name: str, kind: pa.DataType, arrays: Mapping[str, NDArray[Any]]) -> pa.Array:
    if pa.types.is_dictionary(kind):
        codes = arrays[f"{name}.codes"]
        categories = _join(f"{name}.categories", kind.value_type, arrays)
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32(), mask=codes < 0), categories)
    valid = arrays.get(f"{name}.valid")
    missing = None if valid is None else ~valid.astype(bool)
    if pa.types.is_fixed_size_list(kind):
        sizes, inner = [], kind
        while pa.types.is_fixed_size_list(inner):
            sizes.append(inner.list_size)
            inner = inner.value_type
        return nested(pa.array(np.ascontiguousarray(arrays[name]).reshape(-1), inner), sizes)
    if pa.types.is_string(kind):
        utf8, offsets = arrays[f"{name}.utf8"], arrays[f"{name}.offsets"].astype(np.int64)
        buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(np.ascontiguousarray(utf8))]
        texts = pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, buffers).cast(pa.string())
        texts.validate(full=True)
        return texts if missing is None else pc.if_else(pa.array(~missing), texts, pa.scalar(None, pa.string()))
    if pa.types.is_list(kind):
        offsets = pa.array(arrays[f"{name}.offsets"].astype(np.int32))
        values = _join(f"{name}.values", kind.value_type, arrays)
        mask = None if missing is None else pa.array(missing)
        return pa.ListArray.from_arrays(offsets, values, mask=mask).cast(kind)
    array = arrays[name]
    if pa.types.is_floating(kind):
        missing = np.isnan(array)
    return pa.array(array, kind, mask=missing)


def nested(flat: pa.Array, sizes: Sequence[int]) -> pa.Array:
    """Return numbers as fixed-size lists: ``[rows · s0 · s1]`` as rows of s0 lists of s1."""
    for size in reversed(sizes):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat
