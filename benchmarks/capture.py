"""B1: what reading every layer and token costs over a bare forward with all logits, beside peers that capture alone.

python benchmarks/capture.py [--rounds 15] [--model smollm2-135m] [--no-peers]

The same arms as ``dynprobe bench --only capture,metrics``, at the two sizes that have budgets.
"""

from __future__ import annotations

import argparse
import statistics

import dynprobe as dp
from dynprobe.protocols._bench_timing import machine

BUDGETS = {("8 × 64", "core"): 1.06, ("1 × 16", "core"): 1.10, ("8 × 64", "default"): 1.30}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    subject = dp.load(args.model)
    print(machine())
    print("| batch | arm | ratio to its bare forward (quartiles) | budget |\n|---|---|---|---|")
    for rows, width in ((8, 64), (1, 16)):
        found = dp.bench(
            subject, batch=rows, length=width, rounds=args.rounds * (1 if rows > 1 else 6), only="capture,metrics",
            peers="auto" if rows == 1 and not args.no_peers else "none",
        )  # fmt: skip
        for m in found.measurements:
            for name in m.seconds:
                if m.over[name] == name:
                    print(f"| {m.name} | {name} | {1000 * statistics.median(m.seconds[name]):.1f} ms | |")
                    continue
                (median, low, high), budget = m.ratio(name), BUDGETS.get((m.name, name))
                print(f"| {m.name} | {name} | {median:.3f} ({low:.3f} – {high:.3f}) | {budget or ''} |")
            for name, reason in m.absent.items():
                print(f"| {m.name} | {name} | {reason} | |")


if __name__ == "__main__":
    main()
