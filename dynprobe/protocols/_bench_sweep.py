"""A sweep over strengths, beside the loop that users of other libraries write; the logits of both are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.probes import Batch, Fork, Perturb, PerturbWriter, Subject, make_batch
from dynprobe.protocols._bench_case import Case, Size, random_ids
from dynprobe.protocols._bench_loops import LOOPS, Loop, RawHooks, directions
from dynprobe.protocols._bench_peers import made

__all__ = ["fork_of", "logit_difference", "sweep_cases", "sweep_layers"]

_KEY = "sweep"
#: Variant → its name in the tables.
_NAMES = {"all": "all logits", "position": "write at the last position"}


def fork_of(subject: Subject, batch: Batch, variant: str) -> Fork:
    """Return the clean pass that every branch of a sweep leaves from."""
    return Fork(subject, batch, logits="all" if variant == "all" else "last")


def sweep_layers(
    fork: Fork, layers: Iterable[int], alphas: np.ndarray, variant: str, keep: Collection[int] = ()
) -> dict[int, Tensor]:
    """Return logits ``[alpha, pos, vocab]`` or ``[alpha, vocab]`` of each layer, of which some are kept."""
    found: dict[int, Tensor] = {}
    at = ",positions=-1" if variant == "position" else ""
    start = fork.batch.mask.shape[1] - 1 if at else 0
    for layer in layers:
        writer = PerturbWriter(fork.subject, Perturb.parse(f"alpha=1,layers={layer}{at}"), magnitude=alphas)
        tape = fork.branch([0] * len(alphas), [writer], start=start, logits="all" if variant == "all" else "last")
        assert tape.logits is not None
        if layer in keep:
            found[layer] = tape.logits
    return found


def logit_difference(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest difference of logits over the strengths, and the largest in a strength's own SD."""
    other = torch.cat(list(theirs)).to(ours.device)
    assert ours.shape == other.shape, (ours.shape, other.shape)
    apart = [(float((a - b).abs().max()), float(b.std())) for a, b in zip(ours.float(), other.float(), strict=True)]
    return max(worst for worst, _ in apart), max(worst / sd for worst, sd in apart)


def sweep_cases(subject: Subject, size: Size, wanted: Sequence[str] | None) -> list[Case]:
    """All strengths at some layers of one prompt: logits of all positions, and a write at the last position alone."""
    ids = random_ids(subject, 1, size.length)
    alphas = np.geomspace(0.01, 10.0, size.strengths)
    n = min(size.layers, subject.n_layers)
    layers = sorted({round(i * (subject.n_layers - 1) / max(n - 1, 1)) for i in range(n)})
    units = {layer: directions(subject, _KEY, layer, size.length) for layer in layers}
    batch = make_batch(subject, ids.tolist(), row_keys=[_KEY])
    # The loop of raw hooks is what the others are compared with, whether or not peers are wanted.
    names = None if wanted is None else [RawHooks.name, *wanted]
    loops, absent = made(
        LOOPS, names, subject, lambda loop: loop.logits(ids, layers[0], [0.1], units[layers[0]], "all")
    )
    if RawHooks.name not in loops:
        return [Case("sweep", "", RawHooks.name, {}, absent=absent)]
    return [_case(subject, batch, ids, alphas, layers, units, loops, absent, variant) for variant in _NAMES]


def _case(
    subject: Subject, batch: Batch, ids: Tensor, alphas: np.ndarray, layers: Sequence[int], units: dict[int, Tensor],
    loops: dict[str, Loop], absent: dict[str, str], variant: str,
) -> Case:  # fmt: skip
    def ours(keep: Collection[int] = ()) -> dict[int, Tensor]:
        return sweep_layers(fork_of(subject, batch, variant), layers, alphas, variant, keep)

    def theirs(loop: Loop, some: Sequence[int] = layers) -> list[list[Tensor]]:
        return [loop.logits(ids, layer, alphas.tolist(), units[layer], variant) for layer in some]

    arms: dict[str, Callable[[], object]] = {name: (lambda loop=loop: theirs(loop)) for name, loop in loops.items()}  # type: ignore[misc]
    probe, deviations, differences = layers[len(layers) // 2], {}, {}
    mine = ours([probe])[probe]
    for name, loop in loops.items():
        differences[name], deviations[name] = logit_difference(mine, theirs(loop, [probe])[0])
    arms["dynprobe"] = ours
    facts: dict[str, Any] = {
        "strengths": len(alphas), "layers": list(layers), "tokens": ids.shape[1], "difference_sd": deviations,
    }  # fmt: skip
    name = f"{len(alphas)} α × {len(layers)} layers × {ids.shape[1]}, {_NAMES[variant]}"
    return Case("sweep", name, RawHooks.name, arms, {}, differences, absent, facts)
