"""Small controllers, hand-made calibrations, and a way to feed given texts under controllers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe import models
from dynprobe.controllers import Controller, Steering
from dynprobe.probes import (
    Calibration,
    Instrument,
    Subject,
    Tape,
    Where,
    make_batch,
    make_writers,
    sites_to_read,
)  # fmt: skip
from dynprobe.probes._calibration import QUANTILE_LEVELS
from dynprobe.probes._decode import decode
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import pad_token
from dynprobe.probes._outputs import logits_of

PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50, 51, 52], [60, 61, 62, 63, 64]]
NEW = [[7, 8, 9, 10, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33, 34, 35, 36, 37, 38]]


@dataclass
class Fed:
    """What feeding left behind."""

    tape: Tape
    steerings: list[Steering]
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def actions(self) -> Any:
        return self.steerings[0].actions()

    def state(self, row: int, pos: int, depth: int) -> Tensor:
        column = int((self.tape.positions[row] == pos).nonzero()[0, 0])
        return self.tape.states[depth][row, column]


def fed(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
    *controllers: Controller,
    calibration: Calibration | None = None,
    perturb: Any = None,
) -> Fed:
    """Feed prompts, and their continuations token by token; all depths are read."""
    batch = make_batch(subject, [list(p) for p in prompts], side="left")
    steerings = [Steering(c, subject, calibration) for c in controllers]
    writers = [*make_writers(subject, perturb, calibration=calibration), *steerings]
    out = Fed(None, steerings)  # type: ignore[arg-type]

    def keep(step: Any, output: Any) -> None:
        rows = range(len(prompts)) if step.rows is None else step.rows
        for i, row in enumerate(rows):
            out.logits[int(row), int(step.positions[i].max())] = logits_of(output)[i, -1].clone()

    read = sites_to_read(subject, Where.parse("layers=all"))
    instrument = Instrument(subject, read, writers, listeners=(keep,), **batch.rows)
    with torch.no_grad(), evaluating(subject.model), instrument:
        texts = [list(n) for n in new]
        decode(
            subject, batch, max(map(len, texts)), (), instrument=instrument, pad=pad_token(subject), forced=texts
        )  # fmt: skip
    instrument.check_fired()
    out.tape = instrument.tape()
    return out


def calibration_of(subject: Subject, *, first: int = 1, signals: dict[str, tuple[float, float]] | None = None) -> Any:
    """A made-up calibration of a subject: every step has mean 0.2 and SD 0.1, every signal the given range."""
    n, dim = subject.n_layers + 1, subject.dim
    mu = torch.full((n,), 0.2, dtype=torch.float64)
    mu[: first + 1] = torch.nan
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "mean": torch.randn(n, dim, generator=generator), "std": torch.ones(n, dim), "mad": torch.ones(n, dim),
        "pcs": torch.linalg.qr(torch.randn(n, dim, 4, generator=generator))[0].mT.contiguous(),
        "pc_var": torch.ones(n, 4), "norm_q99": torch.full((n,), 2.0, dtype=torch.float64),
        "kappa_token_mu": mu, "kappa_token_sigma": torch.where(mu.isnan(), mu, 0.1),
        "norm_step_mu": mu, "norm_step_sigma": torch.where(mu.isnan(), mu, 0.1),
    }  # fmt: skip
    names = ("kappa_phase_zmax", "kappa_phase", "kappa_phase_z", "norm_step_zmax", "entropy", "limen_ct")
    given = dict.fromkeys(names, (-1e9, 1e9)) | (signals or {})
    levels = {name: lo + (hi - lo) * QUANTILE_LEVELS for name, (lo, hi) in given.items()}
    header = {
        "hash": "made-up", "weights": models.weights_hash(subject.model),
        "dtype": str(subject.dtype).removeprefix("torch."),
    }  # fmt: skip
    return Calibration(tensors, levels, header)


class Scale(Controller):
    """Multiply the states of one block, of new tokens only."""

    def __init__(self, factor: float = 0.5, layer: int = 1, name: str = "") -> None:
        self.factor, self.writes, self.id = factor, f"layers={layer}", name

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return self.factor * state if seen.decoding else state


class Shift(Scale):
    """Add a number to every coordinate."""

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return self.factor + state if seen.decoding else state


class History(Controller):
    """Remember the tokens of a row, which is what a beam search mixes up."""

    def start(self, n_rows: int) -> dict[str, Any]:
        return {"text": np.full((n_rows, 64), -1), "n": np.zeros(n_rows, int)}

    def decide(self, seen: Any, memory: Any) -> None:
        for i, ids in enumerate(seen.step.token_ids.numpy()):
            real = ids[seen.step.positions[i] >= 0]
            memory["text"][i, memory["n"][i] : memory["n"][i] + len(real)] = real
            memory["n"][i] += len(real)
