"""B1–B8, B11 and B12 on one GPU, on models of 1–8 billion parameters with random weights: no network is needed.

    python benchmarks/gpu.py [--size 1b 3b 8b] [--rounds 15] [--dtype bfloat16] [--json FILE] [--only b1 b3 …]
    python benchmarks/gpu.py --size tiny --device cpu      # a dry run of the same lines, without a GPU

Throughput does not depend on the values of the weights; what does (texts, thresholds) is not measured for its value
here. The models are Llamas made from a configuration. B2 is B1 at d ≥ 2048 in prefill, with states to disk beside it.
B3 to B5 compare logits and tokens bit by bit as far as float32 goes, so they run in float32; the rest in --dtype.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cem_attention
import memory
import numpy as np
import torch
from _sweep_logits import b3
from _sweep_texts import b4
from _sweep_threshold import b5
from sweep import ready

import dynprobe as dp
from dynprobe.models import byte_tokenizer
from dynprobe.probes import Subject
from dynprobe.protocols._bench_loops import LOOPS, RawHooks
from dynprobe.protocols._bench_timing import machine_facts

#: Shapes: width, layers, heads, key-value heads, MLP, vocabulary (Llama 3.2 1B and 3B, Llama 3.1 8B).
SIZES = {
    "tiny": (64, 4, 4, 2, 128, 512),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "3b": (3072, 28, 24, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
#: Budget, section, arm → largest ratio. Those of B2 hold for prefill on a GPU, d ≥ 2048.
BUDGETS = {
    ("B2", "metrics", "core"): 1.03,
    ("B2", "disk", "dynprobe, one file"): 1.10,
    ("B6", "generation", "all of it"): 1 / 0.95,
    ("B11", "attractor", "layer"): 1.03,
}
ALL = ("b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "b11", "b12")


def random_model(size: str, dtype: torch.dtype, device: torch.device) -> Subject:
    """A Llama of a size with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, layers, heads, kv, mlp, vocab = SIZES[size]
    config = LlamaConfig(
        hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=mlp, vocab_size=vocab, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    # Logits of about three nats, so that a push moves their distribution and a threshold exists.
    with torch.no_grad():
        model.lm_head.weight.mul_(3 / (config.initializer_range * dim**0.5))
    model.generation_config.eos_token_id = None
    return dp.discover(model, tokenizer=byte_tokenizer(), name=f"random-llama-{size}")


def sections(subject: Subject, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """B1, B2, B6, B8 and B11 by the package's own benchmark."""
    small = size == "tiny"
    wanted = {"b1": "capture,metrics", "b2": "metrics,disk", "b6": "generation", "b8": "states", "b11": "attractor"}
    names = sorted({s for budget, text in wanted.items() if budget in args.only for s in text.split(",")})
    found: dict[str, Any] = {}
    shapes = [("prefill", 2, 16)] if small else [("small", 1, 16), ("prefill", 8, 512)]
    for shape, rows, width in shapes if names else ():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            done = dp.bench(
                subject, batch=rows, length=width, rounds=args.rounds, only=names, peers=args.peers,
                new_tokens=4 if small else 32, megabytes=2 if small else 512, out=Path(folder) / "bench.json",
            )  # fmt: skip
        found[shape] = done.as_dict()
        print(f"\n| {subject.name}, {shape} | arm | ratio (quartiles) | largest difference | budget |")
        print("|---|---|---|---|---|")
        for m in done.measurements:
            for arm in m.seconds:
                if m.over[arm] == arm:
                    print(f"| {m.section} {m.name} | {arm} | {1000 * np.median(m.seconds[arm]):.2f} ms | | |")
                    continue
                (ratio, low, high), apart = m.ratio(arm), m.differences.get(arm)
                print(
                    f"| {m.section} {m.name} | {arm} | {ratio:.3f} ({low:.3f} – {high:.3f}) | "
                    f"{'' if apart is None else f'{apart:.1e}'} | {verdict(m.section, arm, ratio, shape, subject)} |",
                    flush=True,
                )
            for arm, why in m.absent.items():
                print(f"| {m.section} {m.name} | {arm} | {why} | | |")
        for section, why in done.left_out.items():
            print(f"| {section} | not measured | {why} | | |")
    return found


def verdict(section: str, arm: str, ratio: float, shape: str, subject: Subject) -> str:
    """The budget and whether it is met; none where this is a dry run."""
    if subject.device.type != "cuda":
        return ""
    for (name, wanted, which), most in BUDGETS.items():
        if (section, arm) == (wanted, which) and (name != "B2" or (shape == "prefill" and (subject.dim or 0) >= 2048)):
            return f"{name} ≤ {most:.3g}: {'met' if ratio <= most else 'MISSED'}"
    return ""


def sweeps(size: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """B3, B4 and B5 in float32, against loops over strengths."""
    small, out = size == "tiny", {}
    wanted = {"b3", "b4", "b5"} & set(args.only)
    if not wanted:
        return out
    subject = random_model(size, torch.float32, device)
    alphas = np.geomspace(0.01, 10.0, 4 if small else 16)
    loops = ready(subject, [RawHooks] if args.peers == "none" else list(LOOPS))
    steps: dict[str, Callable[[], Any]] = {
        "b3": lambda: b3(subject, loops, alphas, small), "b4": lambda: b4(subject, loops, alphas, small),
        "b5": lambda: b5(subject, small),
    }  # fmt: skip
    for name in sorted(wanted):
        out[name] = steps[name]()
    return out


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["1b", "3b", "8b"], choices=list(SIZES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=list(ALL), choices=ALL)
    parser.add_argument("--peers", default="auto")
    parser.add_argument("--folder", help="disk of B2 and B8; default the system's folder for temporary files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device is here, so nothing was measured; --size tiny --device cpu tries the script without one"
        )
    if device.type != "cuda":
        print("A DRY RUN: no GPU is measured here, and none of these figures says anything about one.")
    facts = machine_facts(device)
    print(" · ".join(f"{k} {v}" for k, v in facts.items()))
    everything: dict[str, Any] = {"machine": facts, "dry": device.type != "cuda", "sizes": {}}
    for size in args.size:
        subject = random_model(size, getattr(torch, args.dtype), device)
        found = sections(subject, size, args)
        if "b7" in args.only:
            print()
            grown = memory.growth(subject, 40 if size == "tiny" else 2000, 4 if size == "tiny" else 16)
            memory.show(grown)
            found["b7"] = grown
        del subject
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        everything["sizes"][size] = found | sweeps(size, device, args)
    if "b12" in args.only:
        print()
        presets, length = (["tiny"], 32) if args.size == ["tiny"] else (["86m", "162m"], 1024)
        cem_attention.attention_table(presets, 4, length, args.rounds, args.device, getattr(torch, args.dtype))
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1, default=float), encoding="utf-8")


if __name__ == "__main__":
    main()
