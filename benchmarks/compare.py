"""B10: time and memory of `compare` over 10 million depth rows of synthetic runs, imports excluded.

python benchmarks/compare.py [--rows 10000000] [--runs 4] [--folder DIR]

The runs have no profiles table, so that every metric along depth is averaged from the rows of depths: the worst case.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from dynprobe.metrics import columns as metric_columns
from dynprobe.runs import RunWriter, registry_facts

CONDITIONS = ("clean", "perturbed.forced")
SAMPLE_COLUMNS = ("nll", "entropy", "kappa_phase", "kappa_path", "delta_rel_prev", "norm", "kl_clean_pert")
DEPTH_COLUMNS = ("angle", "delta_rel_prev", "norm", "curv_depth")


def main() -> None:
    """Make the runs, then compare them in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--measure", nargs="+", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        began = time.perf_counter()
        made = [make(Path(folder), number, args.rows // args.runs) for number in range(args.runs)]
        seconds, total = time.perf_counter() - began, sum(rows for _, rows in made)
        print(f"{total:,} depth rows in {args.runs} runs, made in {seconds:.0f} s", flush=True)
        subprocess.run([sys.executable, __file__, "--measure", *[str(path) for path, _ in made]], check=True)


def measure(paths: list[str]) -> None:
    """Compare once, and print seconds of wall and of processor, and the largest resident set."""
    import duckdb  # noqa: F401 - imports are not what is measured

    from dynprobe.runs import compare

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    found = compare(paths)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(found)
    print(f"compare {wall:.2f} s wall, {cpu:.2f} s of processor time (budget 3 s)")
    print(f"resident set {peak:.0f} MiB at most, {before:.0f} MiB after the imports (budget 1 GB)")


def make(out: Path, number: int, rows: int) -> tuple[Path, int]:
    """Write one synthetic run; its model has 24 + 8·number layers."""
    depths, tokens = 25 + 8 * (number % 3), 128
    prompts = max(3, rows // (depths * tokens * len(CONDITIONS)))
    names = [f"prompt-{i:05d}" for i in range(prompts)]
    rng = np.random.default_rng(number)
    writer = RunWriter.begin(
        out, ident=f"{number:08x}", model_name=f"synthetic-{number}", config={"perturb": ["alpha=0.1"]},
        columns=registry_facts(metric_columns()),
        manifest_fields={"model": {"model_id": f"synthetic-{number}", "model_type": f"kind-{number % 2}"}},
    )  # fmt: skip
    total = 0
    with writer:
        shared = [f"text {name}" for name in names]
        writer.write_table("prompts", pd.DataFrame({"prompt_id": names, "text": shared, "category": "none"}))
        writer.write_table(
            "conditions", pd.DataFrame({"condition_id": CONDITIONS, "arm": ["clean", "perturbed"], "alpha": [0.0, 0.1]})
        )
        for batch, first in enumerate(range(0, prompts, 64)):
            part = names[first : first + 64]
            ids = [f"{name}|{condition}|0" for name in part for condition in CONDITIONS]
            samples = {
                "sample_id": ids, "prompt_id": np.repeat(part, len(CONDITIONS)),
                "condition_id": np.tile(CONDITIONS, len(part)), "replicate": 0, "status": "ok", "n_fed": tokens,
            }  # fmt: skip
            samples |= {c: rng.lognormal(size=len(ids)) for c in SAMPLE_COLUMNS}
            n = len(ids) * tokens * depths
            step = np.tile(np.arange(depths), len(ids) * tokens)
            codes = np.repeat(np.arange(len(ids), dtype=np.int32), tokens * depths)
            table = {
                "sample_id": pa.DictionaryArray.from_arrays(codes, ids),
                "pos": np.tile(np.repeat(np.arange(tokens), depths), len(ids)),
                "track": pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), ["resid"]),
                "depth": step,
            }
            table |= {c: np.where(step > 0, rng.random(n), np.nan) for c in DEPTH_COLUMNS}
            table["norm"] = rng.lognormal(size=n)
            writer.write_batch(batch, {"samples": pd.DataFrame(samples), "depths": pa.table(table)})
            total += n
        writer.finish({})
        return writer.folder, total


if __name__ == "__main__":
    main()
