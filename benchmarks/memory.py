"""B7: resident memory after 2,000 prompts over that after 200, metrics on, states off.

python benchmarks/memory.py [--prompts 2000]
"""

from __future__ import annotations

import argparse
import gc
import tempfile

import psutil
from _timing import machine

import dynprobe as dp
from dynprobe.testing import tiny_llama


def main() -> None:
    """Run once, read the resident set at 10 % and at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2000)
    args = parser.parse_args()
    subject = tiny_llama(layers=6, dim=64, vocab=512)
    prompts = [[(7 * i + 3 * j + i * j) % 509 + 1 for j in range(12 + i % 17)] for i in range(args.prompts)]
    process, seen = psutil.Process(), {}

    def listen(progress: dp.protocols.Progress) -> None:
        gc.collect()
        done = args.prompts * progress.done / max(progress.total, 1)
        if progress.stage == "batch" and progress.total:
            seen[done] = process.memory_info().rss

    with tempfile.TemporaryDirectory() as out:
        dp.run(subject, prompts, perturb="alpha=0.1", max_new_tokens=16, out=out, listener=listen, stop_at_eos=False)
    early = min(seen, key=lambda n: abs(n - args.prompts / 10))
    late = max(seen)
    print(machine())
    print(f"RSS after {early:.0f} prompts {seen[early] / 2**20:.0f} MiB, after {late:.0f} {seen[late] / 2**20:.0f} MiB")
    print(f"ratio {seen[late] / seen[early]:.3f} (budget 1.05)")


if __name__ == "__main__":
    main()
