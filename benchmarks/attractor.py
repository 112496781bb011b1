"""B11: what an attractor layer at one middle block costs while a model writes, and in a long prefill with large chunks.

python benchmarks/attractor.py [--rounds 7] [--model smollm2-135m] [--tokens 32] [--columns 1024] [--profile]

Both sides of generation call the model's own ``generate``, greedily, without an end token; the layer is attached and
detached inside the time, its strength is 1 and its burn-in short, so it reads, injects and writes at nearly every
token. A prefill is one forward with all logits. Budgets: 1.03 for generation, 1.10 for the prefill with chunks.
"""

from __future__ import annotations

import argparse
import logging
import statistics

from _profile import profile

import dynprobe as dp
from dynprobe.probes import Subject
from dynprobe.protocols._bench_case import Case, Size
from dynprobe.protocols._bench_texts import attractor_cases
from dynprobe.protocols._bench_timing import machine

GENERATION, PREFILL = 1.03, 1.10


def show(subject: Subject, case: Case, rounds: int, budgets: dict[str, float]) -> None:
    """Time the arms and print their lines."""
    found = case.measure(subject.device, rounds)
    bare = statistics.median(found.seconds[case.baseline])
    print(f"| {case.name} | {case.baseline} | {1000 * bare:.0f} ms | |")
    for name in found.seconds:
        if name == case.baseline:
            continue
        median, low, high = found.ratio(name)
        budget = f"≤ {budgets[name]}: {'met' if median <= budgets[name] else 'MISSED'}" if name in budgets else ""
        print(f"| {case.name} | {name} | {median:.3f} ({low:.3f} – {high:.3f}) | {budget} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--profile", action="store_true", help="say where the layer's time goes, and stop")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subject = dp.load(args.model)
    if args.profile:
        for case in attractor_cases(subject, Size(batch=1, length=args.columns, new_tokens=args.tokens)):
            profile(next(run for name, run in case.arms.items() if name != case.baseline))
        return
    print(machine())
    print("| what | arm | ratio to the bare model (quartiles) | budget |\n|---|---|---|---|")
    for rows in args.rows:
        written, _ = attractor_cases(subject, Size(batch=rows, new_tokens=args.tokens))
        assert written.facts["injected"], written.facts
        assert written.facts["tokens_seen"] == [16 + args.tokens - 1] * rows, written.facts
        show(subject, written, args.rounds, {"layer": GENERATION})
    _, prefill = attractor_cases(subject, Size(batch=1, length=args.columns, new_tokens=1))
    assert prefill.facts["acts"], prefill.facts
    columns = prefill.facts["chunks"][0]
    show(subject, prefill, args.rounds, {f"commit_every={columns // part}": PREFILL for part in (1, 4)})


if __name__ == "__main__":
    main()
