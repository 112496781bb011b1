"""B11: what an attractor layer at one middle block costs while a model writes, and in a long prefill with large chunks.

python benchmarks/attractor.py [--rounds 7] [--model smollm2-135m] [--tokens 32] [--columns 1024] [--profile]

Both sides of generation call the model's own ``generate``, greedily, without an end token; the layer is attached and
detached inside the time, its strength is 1 and its burn-in short, so it reads, injects and writes at nearly every
token. A prefill is one forward with all logits. Budgets: 1.03 for generation, 1.10 for the prefill with chunks.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats

import torch
from _timing import interleaved, machine

import dynprobe as dp
from dynprobe.probes import Subject

GENERATION, PREFILL = 1.03, 1.10


def layer_with(subject: Subject, held: dp.AttractorLayer, commit_every: int) -> dp.AttractorLayer:
    """A layer that acts at nearly every token, with what was measured for another one."""
    layer = dp.AttractorLayer(strength=1.0, burn_in=4, theta_read=0.0, commit_every=commit_every)
    layer._centres = held._centres
    return layer


def generation(subject: Subject, held: dp.AttractorLayer, rows: int, tokens: int) -> dict:
    """Plain generation, and the same call under the layer."""
    ids = torch.randint(5, (subject.vocab_size or 100) - 5, (rows, 16), generator=torch.Generator().manual_seed(0))
    settings = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True, "num_beams": 1,
        "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip

    def plain():
        with torch.no_grad():
            return subject.model.generate(ids, **settings)

    def under(layer: dp.AttractorLayer):
        with layer.attach(subject) as handle:
            plain()
        return handle

    single, chunked = (layer_with(subject, held, size) for size in (1, 64))
    ((_, state),) = under(single).states.items()
    assert state["n"].tolist() == [16 + tokens - 1] * rows
    assert bool((state["s"] > 0).any())
    return {
        "plain": plain,
        "layer": lambda: under(single),
        "layer, commit_every=64": lambda: under(chunked),
    }


def prefill(subject: Subject, held: dp.AttractorLayer, columns: int) -> dict:
    """One forward over a long row, bare and under layers with chunks of several sizes."""
    ids = torch.randint(5, (subject.vocab_size or 100) - 5, (1, columns), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def bare():
        return subject.model(ids, use_cache=False).logits

    def under(layer: dp.AttractorLayer):
        with layer.attach(subject):
            return bare()

    arms = {"bare": bare}
    for size in (columns, columns // 4, columns // 16, 1):
        layer = layer_with(subject, held, size)
        arms[f"commit_every={size}"] = lambda layer=layer: under(layer)
    if columns >= 64:  # of one chunk nothing is read before its end
        assert not torch.equal(arms[f"commit_every={columns // 4}"](), bare())
    return arms


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--profile", action="store_true", help="say where the layer's time goes, and stop")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subject = dp.load(args.model)
    subject.model.eval()
    held = dp.AttractorLayer().calibrate(subject)
    if args.profile:
        for named in (generation(subject, held, 1, args.tokens), prefill(subject, held, args.columns)):
            profile(list(named.values())[1])
        return
    print(machine())
    print("| what | arm | ratio to the bare model (quartiles) | budget |\n|---|---|---|---|")
    for rows in args.rows:
        named = generation(subject, held, rows, args.tokens)
        show(f"generation, {rows} × {args.tokens}", named.pop("plain"), named, args.rounds, {"layer": GENERATION})
    named = prefill(subject, held, args.columns)
    budgets = {f"commit_every={args.columns // part}": PREFILL for part in (1, 4)}
    show(f"prefill, 1 × {args.columns}", named.pop("bare"), named, args.rounds, budgets)


def show(what: str, bare, named: dict, rounds: int, budgets: dict[str, float]) -> None:
    """Time the arms and print their lines."""
    result = interleaved(bare, named, rounds=rounds, warmup=1)
    print(f"| {what} | bare | {1000 * result.pop('baseline')[0]:.0f} ms | |")
    for name, (median, low, high) in result.items():
        budget = f"≤ {budgets[name]}: {'met' if median <= budgets[name] else 'MISSED'}" if name in budgets else ""
        print(f"| {what} | {name} | {median:.3f} ({low:.3f} – {high:.3f}) | {budget} |", flush=True)


def profile(run) -> None:
    """Print what the run spends its time on, outside the model."""
    run()
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats = pstats.Stats(profiler)
    stats.sort_stats("tottime").print_stats("dynprobe")


if __name__ == "__main__":
    main()
