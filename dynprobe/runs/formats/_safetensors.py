"""safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dynprobe.runs._export_arrays import from_arrays
from dynprobe.runs._export_format import Chunks, Format, is_states
from dynprobe.runs._states import decode_bfloat16
from dynprobe.runs.formats._array_files import array_files

__all__ = ["FORMAT"]


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

    return array_files(folder, name, schema, chunks, "safetensors", one)


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


FORMAT = Format(
    "safetensors",
    _write_safetensors,
    _read_safetensors,
    code='from safetensors.numpy import load_file\narrays = load_file("{file}")',
)
