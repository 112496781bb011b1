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
from pathlib import Path

import numpy as np

from dynprobe.protocols._bench_disk import plain_write, state_keys, write_states
from dynprobe.protocols._bench_timing import timed
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
    keys, data = state_keys(rows, 512, 6), memoryview(states).cast("B")
    size = states.nbytes / 1e6
    written: list[float] = []
    bare: list[float] = []
    read: list[float] = []
    busy: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for number in range(args.rounds + 1):
            place = Path(folder) / f"bare-{number}"
            bare.append(size / timed(lambda place=place: plain_write(place, data))[0])  # type: ignore[misc]
            place.unlink()
            writer = RunWriter.begin(
                Path(folder) / str(number), ident=f"{number:08x}", model_name="synthetic", config={}
            )
            with writer:
                began = time.process_time()
                spent = timed(lambda writer=writer: write_states(writer, 0, [(keys, states)], "float32"))[0]  # type: ignore[misc]
                written.append(size / spent)
                busy.append(size / (time.process_time() - began))
                writer.finish({})
            run = open_run(writer.folder)
            read.append(size / timed(lambda run=run: [array for _, array in run.state_parts()])[0])  # type: ignore[misc]
            parts = [array for _, array in run.state_parts()]
            assert all(array.base is not None and not array.flags.owndata for array in parts), "reading copied"
            assert np.array_equal(np.concatenate(parts), states)
            for part in run.manifest.parts_of("states"):
                (run.path / part.path).unlink()
    digest = statistics.median(size / timed(lambda: hashlib.sha256(states).digest())[0] for _ in range(3))
    for name, values, note in (
        ("states to Parquet, fsync and SHA-256 included", written[1:], " (budget 500)"),
        ("the same per second of processor time", busy[1:], ""),
        ("the same bytes by write and fsync alone", bare[1:], ""),
        ("reading, as views over the decoded buffer", read[1:], ""),
    ):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        print(f"{name}: {middle:.0f} MB/s ({low:.0f} – {high:.0f}){note}")
    print(f"SHA-256 alone: {digest:.0f} MB/s; {size:.0f} MB of float32 [{rows}, {args.dim}] a round")


if __name__ == "__main__":
    main()
