"""B3: the logits of a sweep over strengths and layers, against loops over both."""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from _sides import COMPLETE, TOLERANCE, Table, verdict
from torch import Tensor

from dynprobe.probes import Subject, make_batch, tokenize
from dynprobe.prompts import load_prompts
from dynprobe.protocols._bench_loops import Batched, LastOnly, Loop, directions
from dynprobe.protocols._bench_sweep import fork_of, logit_difference, sweep_layers
from dynprobe.protocols._bench_timing import spread, timed

__all__ = ["b3"]

TITLES = {
    "all": "logits at all positions",
    "last": "logits of the last token",
    "position": "write at the last position",
}
#: Pairs of layers that loops not named in COMPLETE run.
ROUNDS = 3
WIDTH = 64


def b3(subject: Subject, loops: dict[str, Loop], alphas: np.ndarray, quick: bool) -> dict[str, Any]:
    """One prompt, all layers."""
    text = " ".join(p.text for p in load_prompts(limit=4))
    ids = torch.tensor(tokenize(subject, [text]), device=subject.device)[:, :WIDTH]
    batch, n_layers = make_batch(subject, ids.tolist(), row_keys=["sweep"]), subject.n_layers
    units = {layer: directions(subject, "sweep", layer, WIDTH) for layer in range(n_layers)}
    out: dict[str, Any] = {"tokens": ids.shape[1], "layers": n_layers}
    for variant in TITLES:
        sweep_layers(fork_of(subject, batch, variant), [n_layers - 1], alphas, variant)  # warm-up
    table = Table(
        f"B3: {len(alphas)} α × {n_layers} layers, {ids.shape[1]} tokens", "loop", "dynprobe faster (quartiles)",
        "pairs", "loop, all layers", "dynprobe, all layers", "largest difference of logits (in SD)", "budget",
    )  # fmt: skip
    for variant, title in TITLES.items():
        extra = [Batched] if variant == "all" else [LastOnly]
        arms = loops | {kind.name: kind(subject) for kind in extra if "raw hooks" in loops}
        pairs = n_layers // 2
        rounds = 1 if quick else pairs if variant == "all" else ROUNDS
        seconds: dict[str, dict[int, float]] = defaultdict(dict)
        setups, ours, worst = [], {}, dict.fromkeys(arms, (0.0, 0.0))
        stride = pairs // ROUNDS
        for turn in range(rounds):
            number = turn if rounds == pairs else turn * stride
            pair = [number, n_layers - 1 - number]
            few = rounds == pairs and (turn % stride or turn // stride >= ROUNDS)
            names = ["dynprobe", *(n for n in arms if not few or n in COMPLETE)]
            mine: dict[int, Tensor] = {}
            theirs: dict[str, list[list[Tensor]]] = {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                gc.collect()
                if name == "dynprobe":
                    setup, fork = timed(lambda v=variant: fork_of(subject, batch, v))
                    at = range(n_layers) if variant == "position" else pair
                    spent, mine = timed(lambda f=fork, at=at, v=variant, p=pair: sweep_layers(f, at, alphas, v, p))
                    ours[number] = setup / pairs + spent * len(pair) / len(at)
                    assert not fork.roads.refusals, fork.roads
                    assert not fork.roads.whole, fork.roads
                    setups.append(setup)
                    del fork
                else:
                    loop = arms[name]
                    seconds[name][number], theirs[name] = timed(
                        lambda loop=loop, at=pair, v=variant: [
                            loop.logits(ids, layer, alphas.tolist(), units[layer], v) for layer in at
                        ]
                    )
            for name, logits in theirs.items():
                for layer, other in zip(pair, logits, strict=True):
                    worst[name] = tuple(map(max, worst[name], logit_difference(mine[layer], other)))
            del mine, theirs
        whole = math.nan
        if not quick:
            gc.collect()
            whole, _ = timed(lambda v=variant: sweep_layers(fork_of(subject, batch, v), range(n_layers), alphas, v))
        summed = sum(ours.values()) if len(ours) == pairs else math.nan
        out[variant] = {
            "dynprobe_whole_s": whole,
            "dynprobe_sum_of_pairs_s": summed,
            "clean_pass_s": setups,
            "arms": {},
        }
        for name in arms:
            ratios = [seconds[name][number] / ours[number] for number in seconds[name]]
            middle, low, high = spread(ratios)
            loop_s = sum(seconds[name].values()) * pairs / len(ratios)
            how = "all" if len(ratios) == pairs else f"{len(ratios)} of {pairs}"
            whole_said = "not run" if quick else f"{whole:.1f} s"
            budget = verdict(middle, variant, quick or name in (Batched.name, LastOnly.name))
            table.row(
                title, name, f"{middle:.2f} ({low:.2f} – {high:.2f})", how, f"{loop_s:.1f} s",
                whole_said, f"{worst[name][0]:.1e} ({worst[name][1]:.1e})", budget,
            )  # fmt: skip
            assert worst[name][1] <= TOLERANCE, f"{name} and dynprobe differ by {worst[name][1]:.1e} SD in {variant}"
            out[variant]["arms"][name] = {
                "ratio": middle, "low": low, "high": high, "pairs": len(ratios), "loop_s": loop_s,
                "pair_s": seconds[name], "difference": worst[name][0], "difference_sd": worst[name][1],
            }  # fmt: skip
        if not quick:
            print(f"<!-- {title}: our pairs add up to {summed:.1f} s; in one go {whole:.1f} s -->")
    return out
