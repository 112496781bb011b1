"""What every run checks about itself: null, alone, resume, fired, readout.

Each test returns its numbers, not only a verdict, because they are stored with the run. ``null`` and ``fired`` must be
exact, NaN and signed zeros included. The others are compared with a tolerance relative to the spread of the logits,
since the arithmetic of a row legitimately changes by rounding with the shape of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynprobe.errors import ModelError, SelfTestError
from dynprobe.probes._capture import capture
from dynprobe.probes._dispatch import live_hooks
from dynprobe.probes._inputs import Batch, make_batch
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._measured import measure_track
from dynprobe.probes._outputs import identical
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._reading import sites_to_read
from dynprobe.probes._resume import logits_of, readout
from dynprobe.probes._road import try_road
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import Tape
from dynprobe.probes._where import Where
from dynprobe.probes._while_writing import while_writing
from dynprobe.probes._writers import make_writers

__all__ = [
    "SELF_TESTS",
    "Check",
    "check_alone",
    "check_fired",
    "check_null",
    "check_readout",
    "check_resume",
    "tolerance",
]

SELF_TESTS = ("null", "alone", "resume", "fired", "readout")

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Check:
    """The outcome of one self-test.

    Attributes:
        name: Which test.
        passed: Verdict.
        value: The number the verdict rests on.
        limit: What it must not exceed.
        unit: Unit of both.
        detail: Further numbers.
    """

    name: str
    passed: bool
    value: float
    limit: float
    unit: str
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it for the manifest."""
        return asdict(self)


def tolerance(dtype: torch.dtype) -> float:
    """Largest deviation that rounding explains, in standard deviations of the logits."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.2)


def _spread(logits: Tensor) -> float:
    return max(float(logits.float().std()), 1e-12)


def _worst(a: Tensor, b: Tensor) -> float:
    difference = (a.double() - b.double()).abs()
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")


def _kappa(tape: Tape, row: int) -> float:
    """κ of one row of a tape, as every run measures it."""
    kept = tape.mask[row].to(tape.states[0].device)
    states = [s[row][kept][None] for s in tape.states]
    found = measure_track(tape.subject, states, torch.ones(states[0].shape[:2], dtype=torch.bool), ("kappa.phase/1",))
    return float(found.sample[0]["kappa_phase"].value)


def check_null(subject: Subject, rows: Rows, perturb: Perturb | None = None, *, calibration: Any = None) -> Check:
    """α = 0 through the whole write path equals the untouched forward, bit for bit, in the same batch shape.

    Args:
        subject: The subject.
        rows: Token ids.
        perturb: The run's perturbation, tried at α = 0; default writes at every block.
        calibration: For scales that need one.
    """
    batch = make_batch(subject, rows)
    inputs = batch.model_inputs(subject)
    with torch.no_grad():
        bare = logits_of(subject.model(**inputs)).clone()
    untouched = capture(subject, [list(r) for r in rows], logits="all")
    assert untouched.logits is not None
    spec = (perturb or Perturb(alpha=0.1, layers="all", component="resid_post")).replace(alpha=0.0)
    writers = make_writers(subject, spec, calibration=calibration)
    reading = sites_to_read(subject, Where.parse("layers=all"))
    instrument = Instrument(subject, reading, writers, **batch.rows)
    with instrument, torch.no_grad():
        written = logits_of(subject.model(**inputs))
    counts = instrument.check_fired()
    tape = instrument.tape(written)
    real = batch.mask
    pairs = [(bare, written), (bare, untouched.logits), *zip(untouched.states, tape.states, strict=True)]
    passed = all(identical(a[real], b[real]) for a, b in pairs)
    worst = 0.0 if passed else max(_worst(a[real], b[real]) for a, b in pairs)
    return Check("null", passed, worst, 0.0, "max |difference|", {"spec": str(spec), **counts})


def _of_several_lengths(rows: Rows) -> list[list[int]]:
    """A few of the rows, among them two of different lengths: without padding there is nothing to test."""
    picked = [list(r) for r in sorted(rows, key=len)[:: max(1, len(rows) // 3)]][:4]
    if len({len(r) for r in picked}) == 1:
        longest = picked[-1]
        picked = [*picked[:3], longest[: len(longest) // 2] if len(longest) > 1 else longest * 3]
    return picked


def check_alone(subject: Subject, rows: Rows, *, side: str = "left") -> Check:
    """A row in a padded batch equals the row alone within the noise that batching itself makes.

    The noise floor is the deviation of a row from the same row repeated, where no padding is involved. With padding on
    the left, where texts are written, rows are also let write (:mod:`dynprobe.probes._while_writing`); ``detail`` then
    has ``writing``, the deviation of the padded row's states meanwhile, which counts like that of the logits, and
    ``decode``, how far a row's states while it writes are from one whole forward over its text, which is the model's
    own affair and does not count.
    """
    rows = _of_several_lengths(rows)
    unit = "SD of the logits"
    try:
        together = capture(subject, rows, logits="all", padding=side)
    except ModelError as error:  # a model that cannot be padded on this side says so
        detail = {"noise_floor": math.nan, "side": side, "kappa_phase": math.nan, "error": str(error)[:300]}
        return Check("alone", False, math.inf, tolerance(subject.dtype), unit, detail)
    assert together.logits is not None
    spread = _spread(together.logits[together.mask.to(together.logits.device)])
    worst = floor = states = 0.0
    kappas: list[float] = []
    for i, row in enumerate(rows):
        alone = capture(subject, [row], logits="all")
        repeated = capture(subject, [row] * len(rows), logits="all")
        assert alone.logits is not None
        assert repeated.logits is not None
        here = together.mask[i]
        worst = max(worst, _worst(together.logits[i][here], alone.logits[0]))
        floor = max(floor, _worst(repeated.logits[i], alone.logits[0]))
        kappas.append(abs(_kappa(together, i) - _kappa(alone, 0)))
        for padded, bare in zip(together.states, alone.states, strict=True):
            scale = max(float(bare[0].float().norm(dim=-1).max()), 1e-12)
            states = max(states, _worst(padded[i][here], bare[0]) / scale)
    limit = max(10 * floor / spread, tolerance(subject.dtype))
    value = worst / spread
    kappa = max((k for k in kappas if math.isfinite(k)), default=math.nan)
    detail = {"noise_floor": floor / spread, "side": side, "states": states, "kappa_phase": kappa}
    if side == "left":
        written = while_writing(subject, rows)
        detail |= {"writing": written.together, "decode": written.whole}
        detail |= {"writing_said": written.reason} if written.reason else {}
        if value <= limit < written.together:
            return Check("alone", False, written.together, limit, "norm of a state, while writing", detail)
    return Check("alone", value <= limit, value, limit, unit, detail)


def check_resume(subject: Subject, tape: Tape) -> Check:
    """Resuming from the recorded state of every depth gives the whole forward's logits.

    See :mod:`dynprobe.probes._road`. Where it does not, the test fails, and from then on :func:`dynprobe.resume` takes
    the slow road on this subject.

    Args:
        subject: The subject.
        tape: A tape of the rows to try it on.
    """
    assert tape.token_ids is not None
    device, n_prompt = subject.device, tuple(int(n) for n in tape.n_prompt)
    trial = try_road(subject, Batch(tape.token_ids.to(device), tape.mask.to(device), tape.row_keys, n_prompt))
    subject.road.fast, subject.road.reason = trial.passed, trial.reason
    detail: dict[str, Any] = {"by_depth": trial.by_depth} | ({"reason": trial.reason} if trial.reason else {})
    return Check("resume", trial.passed, trial.worst, trial.limit, "SD of the logits", detail)


def check_readout(subject: Subject, tape: Tape) -> Check:
    """The last captured state through the model's own tail gives the model's own logits."""
    assert tape.logits is not None
    real = tape.mask.to(tape.logits.device)
    spread = _spread(tape.logits[real])
    limit, unit = tolerance(subject.dtype), "SD of the logits"
    try:
        value = _worst(readout(subject, tape.states[subject.n_layers])[real], tape.logits[real]) / spread
    except Exception as error:  # a tail that cannot do without what the blocks left behind
        return Check("readout", False, math.inf, limit, unit, {"error": f"{type(error).__name__}: {error}"[:300]})
    return Check("readout", value <= limit, value, limit, unit)


def check_fired(subject: Subject, rows: Rows) -> Check:
    """Every hook fires once per forward and none is left behind."""
    before = live_hooks(subject.model)
    batch = make_batch(subject, rows)
    instrument = Instrument(subject, sites_to_read(subject, Where.parse("layers=all")), **batch.rows)
    with instrument, torch.no_grad():
        subject.model(**batch.model_inputs(subject))
    try:
        counts: dict[str, Any] = instrument.check_fired()
        missed = 0
    except SelfTestError as error:
        counts, missed = {"error": str(error)}, 1
    left = live_hooks(subject.model) - before
    return Check("fired", missed == 0 and left == 0, float(missed + left), 0.0, "hooks", {**counts, "left": left})
