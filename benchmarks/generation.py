"""B6: what every probe and an inactive controller cost while a model writes, over its own ``generate``.

python benchmarks/generation.py [--rounds 7] [--model smollm2-135m] [--tokens 32] [--profile]

Both sides write the same number of tokens greedily, without an end token. Ours records every depth and token, measures
the core set of metrics over the whole text, and has a recovery controller on that watches and never fires. The budget
is on tokens per second: at least 0.95 of the plain call's, so the ratio of times is at most 1/0.95.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats

import torch
from _timing import interleaved, machine

import dynprobe as dp
from dynprobe import metrics
from dynprobe.controllers import Steering
from dynprobe.controllers.recovery import Deadband, Recovery, Slerp
from dynprobe.probes import Calibration, Instrument, Sampling, Subject, Where, generate, make_batch, sites_to_read

#: Least share of the plain call's tokens per second.
BUDGET = 0.95


def quiet(calibration: Calibration) -> Calibration:
    """The same calibration with levels that no token reaches."""
    signals = {**calibration.signals, "kappa_phase_zmax": calibration.signals["kappa_phase_zmax"] + 1e6}
    return Calibration(calibration.tensors, signals, calibration.header)


def arms(subject: Subject, calibration: Calibration, rows: int, width: int, tokens: int) -> dict:
    """Ours in steps, and the plain call."""
    ids = torch.randint(5, (subject.vocab_size or 100) - 5, (rows, width), generator=torch.Generator().manual_seed(0))
    batch = make_batch(subject, ids.tolist(), side="left", row_keys=[f"row-{i}" for i in range(rows)])
    sampling = Sampling(max_new_tokens=tokens, stop_at_eos=False)
    sites = sites_to_read(subject, Where.parse("layers=all"))
    plain_settings = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True, "num_beams": 1,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip

    def plain():
        with torch.no_grad():
            return subject.model.generate(ids, attention_mask=torch.ones_like(ids), **plain_settings)

    def ours(read: bool, controlled: bool, measured: bool):
        steerings = [Steering(Recovery(Deadband(horizon=tokens), Slerp()), subject, calibration)] if controlled else []
        instrument = Instrument(subject, sites if read else (), steerings, **batch.rows)
        new = generate(subject, batch, sampling, instrument)
        assert all(len(n) == tokens for n in new)
        if steerings:
            assert not steerings[0].memory["active"].any()
        if measured:
            tape = instrument.tape()
            metrics.measure(list(tape.states), tape.mask, metrics=metrics.CORE)
        return new

    assert [row[width:] for row in plain().tolist()] == ours(True, True, True)
    return {
        "plain": plain,
        "our loop alone": lambda: ours(False, False, False),
        "every depth read": lambda: ours(True, False, False),
        "inactive controller": lambda: ours(False, True, False),
        "all of it": lambda: ours(True, True, True),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--profile", action="store_true", help="say where the time of 'all of it' goes, and stop")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subject = dp.load(args.model)
    calibration = quiet(dp.calibrate(subject))
    print(machine())
    if not args.profile:
        print("| batch × tokens | arm | share of the plain call's tokens/s (quartiles) | budget |\n|---|---|---|---|")
    for rows in args.rows:
        named = arms(subject, calibration, rows, args.prompt, args.tokens)
        if args.profile:
            profile(named["all of it"])
            continue
        label = f"{rows} × {args.tokens}"
        result = interleaved(named.pop("plain"), named, rounds=args.rounds, warmup=1)
        seconds = result.pop("baseline")
        print(f"| {label} | plain generate | {rows * args.tokens / seconds[0]:.1f} tokens/s | |")
        for name, (median, low, high) in result.items():
            share, least, most = (1 / value for value in (median, high, low))
            budget = f"≥ {BUDGET}: {'met' if share >= BUDGET else 'MISSED'}" if name == "all of it" else ""
            print(f"| {label} | {name} | {share:.3f} ({least:.3f} – {most:.3f}) | {budget} |")


def profile(run) -> None:
    """Print what the run spends its time on, outside the model."""
    run()
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats = pstats.Stats(profiler)
    stats.sort_stats("tottime").print_stats("dynprobe")
    stats.sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
