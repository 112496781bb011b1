"""Parquet, as ``datasets`` and the hub's viewer open it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dynprobe.runs._export_format import Chunks, Format, as_schema

__all__ = ["FORMAT"]

#: Rows of a Parquet file, after which another begins.
_SHARD_ROWS = 4_000_000


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
            yield as_schema(opened.read(), schema)


FORMAT = Format(
    "Parquet, as datasets.load_dataset and the hub's viewer open it",
    _write_parquet,
    _read_parquet,
    code='import datasets\ntable = datasets.load_dataset("FOLDER", "{table}")["train"].to_pandas()',
)
