"""B4: texts written under every strength, against a ``generate`` for each."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from _sides import COMPLETE, TOLERANCE, Table, verdict
from torch import Tensor

from dynprobe.probes import Instrument, Perturb, PerturbWriter, Sampling, Subject, generate, make_batch, tokenize
from dynprobe.prompts import load_prompts
from dynprobe.protocols._bench_loops import Loop, directions
from dynprobe.protocols._bench_timing import spread, timed

__all__ = ["b4"]

CHUNKS, NEW = 4, 32


def b4(subject: Subject, loops: dict[str, Loop], alphas: np.ndarray, quick: bool) -> dict[str, Any]:
    """Generation under the write."""
    layer, new = subject.n_layers // 2, 8 if quick else NEW
    prompts = load_prompts(limit=2)
    rows = tokenize(subject, [p.text for p in prompts])
    keys = [p.prompt_id for p in prompts]
    units = [directions(subject, key, layer, len(row) + new) for key, row in zip(keys, rows, strict=True)]
    perturb = Perturb.parse(f"alpha=1,layers={layer}")

    def ours(n: int) -> list[list[int]]:
        """All strengths of the first ``n`` prompts in one batch, prompt by prompt."""
        many = len(alphas)
        batch = make_batch(
            subject, [row for row in rows[:n] for _ in range(many)], side="left",
            row_keys=[key for key in keys[:n] for _ in range(many)],
        )  # fmt: skip
        writer = PerturbWriter(subject, perturb, magnitude=np.tile(alphas, n))
        instrument = Instrument(subject, (), [writer], **batch.rows)
        return generate(subject, batch, Sampling(max_new_tokens=new, stop_at_eos=False), instrument)

    fed = [torch.tensor([row], device=subject.device) for row in rows]
    chunks = 1 if quick else CHUNKS
    ours(2)  # the trial of the model's decoding
    seconds: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    tokens: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(dict)
    made: dict[int, list[list[int]]] = {}
    for turn in range(chunks):
        few = turn % 2 and not quick
        names = ["dynprobe", *(n for n in loops if not few or n in COMPLETE)]
        chosen = range(turn, len(alphas), chunks)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            if name == "dynprobe":
                one, made[1] = timed(lambda: ours(1))
                two, made[2] = timed(lambda: ours(2))
                seconds[name][turn] = (one, two)
                continue
            spent = []
            for number, ids in enumerate(fed):
                picked = alphas[list(chosen)].tolist()
                took, found = timed(
                    lambda loop=loops[name], ids=ids, picked=picked, unit=units[number]: loop.tokens(
                        ids, layer, picked, unit, new
                    )
                )
                spent.append(took)
                tokens[name] |= {(number, i): text for i, text in zip(chosen, found, strict=True)}
            seconds[name][turn] = (spent[0], sum(spent))
    table = Table(
        f"B4: {len(alphas)} α × {new} tokens, layer {layer}", "loop", "dynprobe faster (quartiles)", "rounds",
        "whole loop", "dynprobe", "texts that differ", "budget",
    )  # fmt: skip
    out: dict[str, Any] = {"prompt_tokens": [len(row) for row in rows], "new": new, "layer": layer, "arms": {}}
    for name, loop in loops.items():
        for side, title in enumerate(("1 prompt", "2 prompts")):
            texts = {key: text for key, text in tokens[name].items() if key[0] <= side}
            apart = [
                first_difference(loop, fed[p], layer, float(alphas[i]), units[p], mine, theirs)
                for (p, i), theirs in texts.items()
                if (mine := made[side + 1][p * len(alphas) + i]) != theirs
            ]
            ratios = [chunks * took[side] / seconds["dynprobe"][turn][side] for turn, took in seconds[name].items()]
            middle, low, high = spread(ratios)
            loop_s = sum(took[side] for took in seconds[name].values()) * chunks / len(ratios)
            own_s = statistics.median(took[side] for took in seconds["dynprobe"].values())
            how = "all" if len(ratios) == chunks else f"{len(ratios)} of {chunks}"
            table.row(
                title, name, f"{middle:.2f} ({low:.2f} – {high:.2f})", how, f"{loop_s:.1f} s", f"{own_s:.2f} s",
                f"{len(apart)} of {len(texts)} texts{': ' * bool(apart)}{'; '.join(apart)}",
                verdict(middle, title, quick),
            )  # fmt: skip
            out["arms"][f"{name}, {title}"] = {
                "ratio": middle, "low": low, "high": high, "rounds": len(ratios), "loop_s": loop_s, "dynprobe_s": own_s,
                "apart": apart,
            }  # fmt: skip
    return out


def first_difference(
    loop: Loop, ids: Tensor, layer: int, alpha: float, unit: Tensor, mine: list[int], theirs: list[int]
) -> str:
    """Where two texts part, and how far apart the two tokens are there; a tie within rounding is no difference.

    Raises:
        AssertionError: If it is none.
    """
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(mine, theirs)) if a != b)
    longer = torch.cat([ids, torch.tensor([theirs[:at]], dtype=torch.long, device=ids.device)], 1)
    logits = loop.logits(longer, layer, [alpha], unit, "all")[0][0, -1]
    gap = float((logits[mine[at]] - logits[theirs[at]]).abs() / logits.std())
    said = f"α={alpha:.3g}, token {at}: {mine[at]} or {theirs[at]}, {gap:.1e} SD apart"
    assert gap <= TOLERANCE, f"{loop.name} and dynprobe part: {said}"
    return f"tie at {said}"
