"""Two warm workers against one: a sweep of tiny-llama, one thread each, in interleaved pairs.

    python benchmarks/engines.py [--engine local|ray] [--pairs 5] [--model tiny-llama] [--prompts 24]

Both crews are started and made warm before the clock. What is compared is the time from warm workers to the last unit,
which the manifest of each run holds, and beside it the whole call. The tables of both are the same (tests); here the
number of workers that took part is checked. Budget: 1.5 times as fast, the median of the pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import tempfile
from typing import Any

import dynprobe as dp
from dynprobe.engines import Local, Ray
from dynprobe.protocols._bench_timing import machine, spread, timed

BUDGET = 1.5


def crew(engine: str, workers: int) -> Any:
    """Workers of one thread each."""
    if engine == "ray":
        import ray

        # Both crews live at once so that their turns can alternate, and the waiting one computes nothing: Ray hears
        # of more cores than the three actors ask for, or the last of them would wait for ever on a machine of two.
        settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init(num_cpus=4, ignore_reinit_error=True, configure_logging=False, **settings)
    return Local(workers, threads=1) if engine == "local" else Ray(workers, threads=1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--strengths", type=int, default=12)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine())
    seconds: dict[int, list[float]] = {1: [], 2: []}
    calls: dict[int, list[float]] = {1: [], 2: []}
    with contextlib.ExitStack() as stack:
        crews = {n: stack.enter_context(crew(args.engine, n)) for n in (1, 2)}

        def sweep(n: int, limit: int) -> list[Any]:
            with tempfile.TemporaryDirectory() as out:
                run = dp.sweep(
                    args.model, layers="all", alphas=f"0.01:10:{args.strengths}", limit=limit, batch_size=2, out=out,
                    quiet=True, engine=crews[n],
                )  # fmt: skip
                told = (run.manifest.model_extra or {})["engine"][-1]
            return [told["seconds"], len(told["workers"])]

        for n in crews:
            sweep(n, 4)  # loads the model in every worker
        for pair in range(args.pairs):
            for n in (1, 2) if pair % 2 == 0 else (2, 1):
                call, (alone, took_part) = timed(lambda n=n: sweep(n, args.prompts))
                assert took_part == n, f"{took_part} of {n} workers took part"
                seconds[n].append(alone)
                calls[n].append(call)
    print(f"| {args.engine}, {args.model}, {args.prompts} prompts | one | two | faster (quartiles) | budget |")
    print("|---|---|---|---|---|")
    for name, found in (("warm workers to the last unit", seconds), ("whole call", calls)):
        middle, low, high = spread([a / b for a, b in zip(found[1], found[2], strict=True)])
        budget = f"≥ {BUDGET}: {'met' if middle >= BUDGET else 'MISSED'}" if found is seconds else ""
        one, two = (statistics.median(found[n]) for n in (1, 2))
        print(f"| {name} | {one:.2f} s | {two:.2f} s | {middle:.2f} ({low:.2f} – {high:.2f}) | {budget} |")


if __name__ == "__main__":
    main()
