"""B3, B4, B5: sweeps and thresholds against the loops users of other libraries write.

    python benchmarks/sweep.py [--quick] [--json FILE] [--only b3 b4 b5] [--no-peers]

B3  16 strengths at every one of the model's layers, one 64-token prompt; logits of all positions, of the last token,
    and of the last token where it alone is written. Layers go in pairs (l, 29 − l), whose blocks above the write add up
    to the same number for every pair. One round times one pair in every arm, in rotating order; its ratio charges us a
    fifteenth of the clean pass, which serves all pairs. The loops named in COMPLETE run all pairs, so theirs is the
    whole sweep; the others run three pairs, and the table gives the time of all pairs at their rate. That our pairs add
    up to a sweep made in one go is measured at the end. Where only the last position is written, our side is the whole
    sweep, every round.
B4  16 strengths × 32 new tokens, the write active in prefill and decode at mid depth. The loop over strengths is cut
    into four rounds of four, which together are the whole loop (loops not named in COMPLETE stop after two). Our side
    runs all 16 in every round.
B5  `dp.threshold` on the 24 built-in prompts, beside a grid of 32 strengths over the same three decades.

Both sides end with the same numbers: the logits of every timed pair are compared, and every generated token. Directions
are drawn before the clocks run for the loops, and inside our time for us. What is tried once per model and then kept
(whether it resumes, whether rows may leave a batch that decodes) runs before the clocks, as a warm-up does.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sweep_logits import b3
from _sweep_texts import b4
from _sweep_threshold import b5

import dynprobe as dp
from dynprobe.probes import Subject, tokenize
from dynprobe.protocols._bench_loops import LOOPS, Loop, RawHooks, directions
from dynprobe.protocols._bench_peers import made
from dynprobe.protocols._bench_timing import machine


def ready(subject: Subject, kinds: list[type[Loop]]) -> dict[str, Loop]:
    """The loops, warmed up; one that does not run with these versions is reported, not hidden."""
    ids = torch.tensor(tokenize(subject, ["Some words to warm everything up."]))
    unit = directions(subject, "warm", 0, 64)

    def trial(loop: Loop) -> None:
        loop.logits(ids, 0, [0.1], unit, "all")
        loop.tokens(ids, 0, [0.1], unit, 2)

    loops, absent = made(kinds, None, subject, trial)
    for name, reason in absent.items():
        print(f"{name}: {reason}")
    return loops


def main() -> None:
    """Print the tables."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 strengths, one round: shows that it runs and agrees")
    parser.add_argument("--only", nargs="+", choices=("b3", "b4", "b5"), default=("b3", "b4", "b5"))
    parser.add_argument("--no-peers", action="store_true", help="raw hooks alone")
    parser.add_argument("--json", help="file for all numbers")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print(machine())
    subject = dp.load("smollm2-135m")
    assert subject.resumable
    model: Any = subject.model
    model.generation_config.eos_token_id = None  # every text has its 32 tokens on both sides
    out: dict[str, Any] = {"machine": machine(), "quick": args.quick}
    alphas = np.geomspace(0.01, 10.0, 4 if args.quick else 16)
    loops = ready(subject, [RawHooks] if args.no_peers else list(LOOPS)) if {"b3", "b4"} & set(args.only) else {}
    if "b3" in args.only:
        out["b3"] = b3(subject, loops, alphas, args.quick)
    if "b4" in args.only:
        out["b4"] = b4(subject, loops, alphas, args.quick)
    loops.clear()
    if "b5" in args.only:
        out["b5"] = b5(subject, args.quick)
    print(f"\n<!-- {time.perf_counter() - begun:.0f} s in all -->")
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1, default=float), encoding="utf-8")


if __name__ == "__main__":
    main()
