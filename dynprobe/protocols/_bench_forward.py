"""What reading every layer and token costs over the bare forward: ours, the metrics on top, and peers that capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.probes import Instrument, Subject, Tape, Where, logits_of, sites_to_read
from dynprobe.protocols._bench_case import Case, Size, random_ids
from dynprobe.protocols._bench_peers import PEERS, Peer, largest_difference, made

__all__ = ["BARE", "bare_forward", "blocks_of", "capture_case", "capturing_peers", "metrics_case", "reader"]

BARE = "bare forward"


def bare_forward(subject: Subject, ids: Tensor) -> Callable[[], Tensor]:
    """Return the model's own forward, with logits at all positions and no cache."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    @torch.no_grad()
    def bare() -> Tensor:
        return logits_of(subject.model(**inputs))

    return bare


def reader(subject: Subject, ids: Tensor) -> Callable[..., Tape]:
    """Return that forward with every depth read, and with metrics of a list, and of the outputs, on top."""
    sites = sites_to_read(subject, Where.parse("layers=all"))
    mask = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -1, device=ids.device)], 1)
    forward, keys = bare_forward(subject, ids), [f"row-{i}" for i in range(len(ids))]

    def read(which: Sequence[str] | None = None, outputs: bool = False) -> Tape:
        with torch.no_grad(), Instrument(subject, sites, row_keys=keys) as instrument:
            logits = forward()
        tape = instrument.tape()
        if which is not None:
            metrics.measure(list(tape.states), mask, metrics=which)
        if outputs:
            metrics.output_metrics(logits, targets)
        return tape

    return read


def blocks_of(tape: Tape) -> list[Tensor]:
    """Return the states behind every block."""
    return [tape.states[depth] for depth in tape.depths if depth]


def capturing_peers(
    subject: Subject, ids: Tensor, wanted: Sequence[str] | None
) -> tuple[dict[str, Peer], dict[str, str], dict[str, float]]:
    """Return the peers that run with this model, why others do not, and how far their states are from ours."""
    ours = blocks_of(reader(subject, ids)())
    held: dict[str, list[Tensor]] = {}

    def trial(peer: Peer) -> None:
        held[peer.name] = peer.capture(ids)

    peers, absent = made(PEERS, wanted, subject, trial)
    return peers, absent, {name: largest_difference(ours, held[name]) for name in peers}


def capture_case(subject: Subject, size: Size, wanted: Sequence[str] | None) -> Case:
    """Capture alone: every block's output at every token."""
    ids = random_ids(subject, size.batch, size.length)
    read = reader(subject, ids)
    arms: dict[str, Callable[[], object]] = {BARE: bare_forward(subject, ids), "dynprobe": read}
    over: dict[str, str] = {}
    peers, absent, differences = capturing_peers(subject, ids, wanted)
    for name, peer in peers.items():
        if peer.own_forward:
            over[name] = f"{name}, bare"
            arms[over[name]] = lambda peer=peer: peer.forward(ids)  # type: ignore[misc]
            over[over[name]] = over[name]
        arms[name] = lambda peer=peer: peer.capture(ids)  # type: ignore[misc]
    return Case("capture", _size(size), BARE, arms, over, differences, absent)


def metrics_case(subject: Subject, size: Size, wanted: Sequence[str] | None) -> Case:
    """The core set of metrics, and the full default list with the metrics of the outputs."""
    ids = random_ids(subject, size.batch, size.length)
    read = reader(subject, ids)
    arms: dict[str, Callable[[], Any]] = {
        BARE: bare_forward(subject, ids),
        "core": lambda: read(metrics.CORE),
        "default": lambda: read(metrics.DEFAULT, outputs=True),
    }
    return Case("metrics", _size(size), BARE, arms, facts={"core": len(metrics.CORE), "default": len(metrics.DEFAULT)})


def _size(size: Size) -> str:
    return f"{size.batch} × {size.length}"
