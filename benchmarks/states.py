"""B8: hidden states to Parquet and back, one core, fsync included: megabytes a second, and whether reading copies.

python benchmarks/states.py [--megabytes 512] [--rounds 7] [--folder DIR] [--dim 2048]

What is timed is what a run does: the keys, the file, its hash, the sync, the rename and the manifest. Beside it stands
the same number of bytes written by ``write`` and synced, which is what the disk gives, and the hash alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from dynprobe.runs import RunWriter, open_run


def main() -> None:
    """Write and read states in rounds and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})  # one core, threads included
    rows = args.megabytes * 10**6 // (4 * args.dim)
    states = np.random.default_rng(0).standard_normal((rows, args.dim), dtype=np.float32)
    ids = [f"p{i}|clean|0" for i in range(rows // 512 + 1)]
    keys = pd.DataFrame(
        {
            "sample_id": pd.Categorical.from_codes(np.arange(rows) // 512, ids),
            "pos": (np.arange(rows) % 512).astype(np.int32), "track": pd.Categorical(["resid"] * rows),
            "depth": np.full(rows, 6, np.int32),
        }
    )  # fmt: skip
    size = states.nbytes / 1e6
    written: list[float] = []
    bare: list[float] = []
    read: list[float] = []
    busy: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for number in range(args.rounds + 1):
            place = Path(folder) / f"bare-{number}"
            bare.append(size / seconds(lambda place=place: plain_write(place, states)))  # type: ignore[misc]
            place.unlink()
            writer = RunWriter.begin(
                Path(folder) / str(number), ident=f"{number:08x}", model_name="synthetic", config={}
            )
            with writer:
                began = time.process_time()
                written.append(size / seconds(lambda writer=writer: write(writer, keys, states)))  # type: ignore[misc]
                busy.append(size / (time.process_time() - began))
                writer.finish({})
            run = open_run(writer.folder)
            read.append(size / seconds(lambda run=run: [array for _, array in run.state_parts()]))  # type: ignore[misc]
            parts = [array for _, array in run.state_parts()]
            assert all(array.base is not None and not array.flags.owndata for array in parts), "reading copied"
            assert np.array_equal(np.concatenate(parts), states)
            for part in run.manifest.parts_of("states"):
                (run.path / part.path).unlink()
    digest = statistics.median(size / seconds(lambda: hashlib.sha256(states).digest()) for _ in range(3))
    for name, values, note in (
        ("states to Parquet, fsync and SHA-256 included", written[1:], " (budget 500)"),
        ("the same per second of processor time", busy[1:], ""),
        ("the same bytes by write and fsync alone", bare[1:], ""),
        ("reading, as views over the decoded buffer", read[1:], ""),
    ):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        print(f"{name}: {middle:.0f} MB/s ({low:.0f} – {high:.0f}){note}")
    print(f"SHA-256 alone: {digest:.0f} MB/s; {size:.0f} MB of float32 [{rows}, {args.dim}] a round")


def write(writer: RunWriter, keys: pd.DataFrame, states: np.ndarray) -> None:
    """Write a batch of states and make it visible."""
    writer.write_states(0, keys, states, "float32")
    writer.write_batch(0, {})


def plain_write(place: Path, states: np.ndarray) -> None:
    """Write the bytes and nothing else."""
    with place.open("wb") as file:
        file.write(memoryview(states).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
