"""B7: resident memory after 2,000 prompts over that after 200, metrics on, states off.

python benchmarks/memory.py [--prompts 2000]
"""

from __future__ import annotations

import argparse
import gc
import tempfile

import psutil
import torch

import dynprobe as dp
from dynprobe.probes import Subject
from dynprobe.protocols._bench_timing import machine
from dynprobe.testing import tiny_llama

BUDGET = 1.05


def growth(subject: Subject, prompts: int, tokens: int = 16) -> dict[str, tuple[float, int, float, int]]:
    """Return, of the resident set and of a GPU's memory: prompts and bytes early on, prompts and bytes at the end."""
    rows = [[(7 * i + 3 * j + i * j) % 89 + 6 for j in range(12 + i % 17)] for i in range(prompts)]
    process = psutil.Process()
    seen: dict[str, dict[float, int]] = {"RSS": {}}
    if subject.device.type == "cuda":
        seen["GPU memory"] = {}

    def listen(progress: dp.protocols.Progress) -> None:
        gc.collect()
        if progress.stage == "batch" and progress.total:
            done = prompts * progress.done / progress.total
            seen["RSS"][done] = process.memory_info().rss
            if "GPU memory" in seen:
                seen["GPU memory"][done] = torch.cuda.memory_allocated(subject.device)

    with tempfile.TemporaryDirectory() as out:
        dp.run(subject, rows, perturb="alpha=0.1", max_new_tokens=tokens, out=out, listener=listen, stop_at_eos=False)
    found = {}
    for name, sizes in seen.items():
        early, late = min(sizes, key=lambda n: abs(n - prompts / 10)), max(sizes)
        found[name] = (early, sizes[early], late, sizes[late])
    return found


def show(found: dict[str, tuple[float, int, float, int]]) -> None:
    """Print it."""
    for name, (early, before, late, after) in found.items():
        print(f"{name} after {early:.0f} prompts {before / 2**20:.0f} MiB, after {late:.0f} {after / 2**20:.0f} MiB")
        print(f"ratio {after / before:.3f} (budget {BUDGET})")


def main() -> None:
    """Run once, read the resident set at 10 % and at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2000)
    args = parser.parse_args()
    found = growth(tiny_llama(layers=6, dim=64, vocab=512), args.prompts)
    print(machine())
    show(found)


if __name__ == "__main__":
    main()
