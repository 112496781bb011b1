"""B6: what every probe and an inactive controller cost while a model writes, over its own ``generate``.

python benchmarks/generation.py [--rounds 7] [--model smollm2-135m] [--tokens 32] [--profile]

Both sides write the same number of tokens greedily, without an end token. Ours records every depth and token, measures
the core set of metrics over the whole text, and has a recovery controller on that watches and never fires. The budget
is on tokens per second: at least 0.95 of the plain call's, so the ratio of times is at most 1/0.95.
"""

from __future__ import annotations

import argparse
import logging
import statistics

from _profile import profile

import dynprobe as dp
from dynprobe.protocols._bench_case import Size
from dynprobe.protocols._bench_texts import generation_case
from dynprobe.protocols._bench_timing import machine

#: Least share of the plain call's tokens per second.
BUDGET = 0.95


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--profile", action="store_true", help="say where the time of 'all of it' goes, and stop")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subject = dp.load(args.model)
    print(machine())
    if not args.profile:
        print("| batch × tokens | arm | share of the plain call's tokens/s (quartiles) | budget |\n|---|---|---|---|")
    for rows in args.rows:
        case = generation_case(subject, Size(batch=rows, new_tokens=args.tokens))
        assert not case.facts["fired"], case.facts
        assert not case.facts["texts_that_differ"], case.facts
        if args.profile:
            profile(case.arms["all of it"])
            continue
        found = case.measure(subject.device, args.rounds)
        per_second = rows * args.tokens / statistics.median(found.seconds[case.baseline])
        print(f"| {case.name} | {case.baseline} | {per_second:.1f} tokens/s | |")
        for name in found.seconds:
            if name == case.baseline:
                continue
            median, low, high = found.ratio(name)
            share, least, most = 1 / median, 1 / high, 1 / low
            budget = f"≥ {BUDGET}: {'met' if share >= BUDGET else 'MISSED'}" if name == "all of it" else ""
            print(f"| {case.name} | {name} | {share:.3f} ({least:.3f} – {most:.3f}) | {budget} |", flush=True)


if __name__ == "__main__":
    main()
