"""B1: what reading every layer and token costs over a bare forward with all logits, beside peers that capture alone.

python benchmarks/capture.py [--rounds 15] [--model smollm2-135m] [--no-peers]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging

import torch
from _timing import interleaved, machine

import dynprobe as dp
from dynprobe import metrics
from dynprobe.probes import Instrument, Subject, Where, sites_to_read
from dynprobe.probes._ring import Ring

BUDGETS = {("8x64", "core"): 1.06, ("1x16", "core"): 1.10, ("8x64", "default"): 1.30}


def arms(subject: Subject, ids: torch.Tensor) -> dict:
    """The reading arms on one batch."""
    sites = sites_to_read(subject, Where.parse("layers=all"))
    mask = torch.ones(ids.shape, dtype=torch.bool)
    targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -1)], 1)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    keys = [f"row-{i}" for i in range(len(ids))]

    @torch.no_grad()
    def bare():
        return subject.model(**inputs).logits

    ring = Ring(sites)

    def into_ring():
        ring.begin(*ids.shape)
        with torch.no_grad(), Instrument(subject, sites, row_keys=keys, ring=ring) as instrument:
            subject.model(**inputs)
        instrument.tape()
        ring.end()

    def read(which=None, outputs=False):
        with torch.no_grad(), Instrument(subject, sites, row_keys=keys) as instrument:
            logits = subject.model(**inputs).logits
        tape = instrument.tape()
        if which is not None:
            metrics.measure(list(tape.states), mask, metrics=which)
        if outputs:
            metrics.output_metrics(logits, targets)

    return {
        "bare": bare,
        "capture": read,
        "capture into a ring": into_ring,
        "core": lambda: read(metrics.CORE),
        "default": lambda: read(metrics.DEFAULT, outputs=True),
    }


def peers(subject: Subject, ids: torch.Tensor) -> dict:
    """Peers capturing the same states, written the way their users write it."""
    found = {}
    layers = subject.blocks

    @torch.no_grad()
    def raw():
        kept = []
        handles = [b.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o)) for b in layers]
        subject.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return kept

    found["raw hooks"] = raw
    if importlib.util.find_spec("nnsight"):
        from nnsight import LanguageModel

        traced = LanguageModel(subject.model, tokenizer=subject.tokenizer)

        @torch.no_grad()
        def with_nnsight():
            kept = []
            with traced.trace(ids, use_cache=False):
                for layer in traced.model.layers:
                    kept.append(layer.output.save())
            assert len(kept) == len(layers)

        found["nnsight"] = with_nnsight
    if importlib.util.find_spec("pyvene"):
        import pyvene

        config = pyvene.IntervenableConfig(
            [
                {"layer": i, "component": "block_output", "intervention_type": pyvene.CollectIntervention}
                for i in range(len(layers))
            ]
        )
        wrapped = pyvene.IntervenableModel(config, model=subject.model)
        units = list(range(ids.shape[1]))

        @torch.no_grad()
        def with_pyvene():
            return wrapped({"input_ids": ids}, unit_locations={"base": units})

        found["pyvene"] = with_pyvene
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    subject = dp.load(args.model)
    print(machine())
    print("| batch | arm | ratio to bare forward (quartiles) | budget |\n|---|---|---|---|")
    for rows, width in ((8, 64), (1, 16)):
        ids = torch.randint(
            5, (subject.vocab_size or 100) - 5, (rows, width), generator=torch.Generator().manual_seed(0)
        )
        named = arms(subject, ids)
        bare = named.pop("bare")
        if (rows, width) == (1, 16) and not args.no_peers:
            for name, run in peers(subject, ids).items():
                try:
                    run()
                except Exception as error:  # a peer that does not run with these versions is reported, not hidden
                    print(f"| {rows}x{width} | {name}, capture alone | failed: {type(error).__name__}: {error} | |")
                else:
                    named[f"{name}, capture alone"] = run
        result = interleaved(bare, named, rounds=args.rounds * (1 if rows > 1 else 6))
        seconds = result.pop("baseline")
        print(f"| {rows}x{width} | bare forward | {1000 * seconds[0]:.1f} ms | |")
        for name, (median, low, high) in result.items():
            budget = BUDGETS.get((f"{rows}x{width}", name))
            print(f"| {rows}x{width} | {name} | {median:.3f} ({low:.3f} – {high:.3f}) | {budget or ''} |")
    if not args.no_peers and importlib.util.find_spec("transformer_lens"):
        transformer_lens(subject, args.rounds * 6)


def transformer_lens(subject: Subject, rounds: int) -> None:
    """TransformerLens runs its own copy of the model, so its baseline is its own forward without a cache."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = subject.facts["folder"]
    try:
        bridge = TransformerBridge.boot_transformers(folder, dtype=torch.float32)
    except Exception as error:
        print(f"| 1x16 | TransformerLens | failed: {type(error).__name__}: {error} | |")
        return
    ids = torch.randint(5, 1000, (1, 16), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def bare():
        return bridge(ids)

    @torch.no_grad()
    def cached():
        return bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_out") and name.count(".") == 2)

    median, low, high = interleaved(bare, {"cache": cached}, rounds=rounds)["cache"]
    print(f"| 1x16 | TransformerLens run_with_cache, over its own forward | {median:.3f} ({low:.3f} – {high:.3f}) | |")


if __name__ == "__main__":
    main()
