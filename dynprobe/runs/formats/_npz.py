"""NumPy arrays, without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynprobe.runs._export_arrays import from_arrays
from dynprobe.runs._export_format import Chunks, Format
from dynprobe.runs.formats._array_files import array_files

__all__ = ["FORMAT"]


def _write_npz(folder: Path, name: str, schema: pa.Schema, chunks: Chunks) -> list[str]:
    def one(path: Path, arrays: Mapping[str, Any], facts: str) -> None:
        np.savez(path, allow_pickle=False, **arrays, **{"dynprobe.columns": np.array(facts)})

    return array_files(folder, name, schema, chunks, "npz", one)


def _read_npz(folder: Path, files: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in files:
        with np.load(folder / file, allow_pickle=False) as opened:
            yield from_arrays({name: opened[name] for name in opened.files if name != "dynprobe.columns"}, schema)


FORMAT = Format(
    "NumPy arrays",
    _write_npz,
    _read_npz,
    code='import numpy as np\narrays = np.load("{file}")   # column.codes, column.utf8, …: see docs',
)
