"""Which road a resumed forward may take: without the blocks below (fast), or through all of them (slow).

A block may hand more upwards than its state: keys and values that higher blocks share, indices chosen once for several
blocks, a router's memory, something it left on a module. Then a forward that leaves out the lower blocks is wrong, and
no table of model names could say for which models. So it is tried: a text runs whole, another text runs whole, and then
the first is resumed from its own states at every depth, from the top down. Whatever an upper block looks back at is now
missing or of the other text, and the logits move. Both sides run in the same batch shape, so that where the fast road
is right the logits agree to the last bit, but for kernels that do not repeat themselves.

The other text must come first and the depths must fall: a lower block that ran on the first text again would leave
behind just what a wrong forward needs to look right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynprobe.probes._backend import on_backend
from dynprobe.probes._dispatch import attach_to
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import Batch, make_batch
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._outputs import logits_of, ordinary
from dynprobe.probes._roles import Site
from dynprobe.probes._stub import stubbed
from dynprobe.probes._subject import Subject
from dynprobe.probes._trial_calls import vocabulary

__all__ = ["RoadTrial", "try_road", "try_road_unasked"]

#: Lengths of the rows of a trial that has no rows of its own.
_LENGTHS = (12, 9)


@dataclass(frozen=True)
class RoadTrial:
    """What the trial of the fast road found.

    Attributes:
        by_depth: Depth → largest deviation from the whole forward, in standard deviations of the logits.
        limit: What it must not exceed.
        error: What the first forward that failed said, or why nothing could be tried; else empty.
    """

    by_depth: dict[int, float] = field(default_factory=dict)
    limit: float = 0.0
    error: str = ""

    @property
    def worst(self) -> float:
        """The largest deviation; infinite where a forward failed."""
        return float("inf") if self.error else max(self.by_depth.values(), default=float("inf"))

    @property
    def passed(self) -> bool:
        """Whether the fast road is right at every depth."""
        return self.worst <= self.limit

    @property
    def reason(self) -> str:
        """Why the fast road may not be taken; empty where it may."""
        if self.passed:
            return ""
        return self.error or f"logits deviate by {self.worst:.2g} SD where the blocks below do not run"


def limit_for(dtype: torch.dtype, floor: float = 0.0) -> float:
    """Largest deviation, in standard deviations of the logits, that rounding explains in one and the same batch shape.

    Args:
        dtype: The model's.
        floor: Deviation of the whole forward from itself when it is repeated (kernels that add in any order). A model
            that hardly repeats itself does not widen the limit without end: nothing could be shown on it.
    """
    base = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)
    return min(max(10 * floor, base), 4 * base)


def _resumed(subject: Subject, batch: Batch, at: int, start: Tensor) -> Tensor:
    """The logits of a forward in which ``start`` enters block ``at`` and no block below it runs."""
    entry = attach_to(subject.door(0), write=lambda _: start) if at == 0 else None
    try:
        with stubbed(subject, at, lambda index: start if index == at - 1 else None):
            return logits_of(subject.model(**batch.model_inputs(subject)))
    finally:
        if entry is not None:
            entry.remove()


def try_road(subject: Subject, batch: Batch) -> RoadTrial:
    """Resume two versions of the rows from every depth and compare with the whole forward.

    Args:
        subject: The subject.
        batch: The rows.

    Returns:
        The deviations by depth; a forward that fails ends the trial.
    """
    subject = on_backend(subject, "hooks")  # whether blocks may be left out is the model's, whoever reads it
    twice = Batch(batch.input_ids.repeat(2, 1), batch.mask.repeat(2, 1), batch.row_keys * 2, batch.n_prompt * 2)
    other = Batch((twice.input_ids - 1).clamp_min(0).roll(1, 1), twice.mask, twice.row_keys, twice.n_prompt)
    read: list[Site] = [("resid_pre", 0), *(("resid_post", layer) for layer in range(subject.n_layers))]
    by_depth: dict[int, float] = {}
    with evaluating(subject.model), torch.no_grad():
        instrument = Instrument(subject, read, **twice.rows)
        with instrument:
            wanted = ordinary(logits_of(subject.model(**twice.model_inputs(subject)))).clone()
        states = instrument.tape().states
        real = twice.mask.to(wanted.device)
        spread = max(float(wanted[real].double().std()), 1e-12)
        again = logits_of(subject.model(**twice.model_inputs(subject)))
        limit = limit_for(subject.dtype, _deviation(again, wanted, real) / spread)
        subject.model(**other.model_inputs(subject))
        for at in range(subject.n_layers, -1, -1):
            given = states[at].clone() if subject.mutates else states[at]
            try:
                by_depth[at] = _deviation(_resumed(subject, twice, at, given), wanted, real) / spread
            except Exception as error:  # whatever a model says when its lower blocks did not run: no fast road
                by_depth[at] = float("inf")
                return RoadTrial(by_depth, limit, f"resuming at depth {at}: {type(error).__name__}: {error}"[:300])
    return RoadTrial(dict(sorted(by_depth.items())), limit)


def _deviation(a: Tensor, b: Tensor, real: Tensor) -> float:
    difference = (a[real].double() - b[real].double()).abs()
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")


def try_road_unasked(subject: Subject) -> RoadTrial:
    """Try the fast road on two short rows of token ids; where it cannot be tried it is not taken."""
    if len(subject.wrappers) < subject.n_layers:
        return RoadTrial(error="no trial forward was run, so it is not known what the blocks return")
    vocab = vocabulary(subject.model)
    if vocab <= 0:
        return RoadTrial(error="the model has no vocabulary to make a text of")
    rows = [[(7 * i + 3 * j + 1) % vocab for i in range(n)] for j, n in enumerate(_LENGTHS)]
    try:
        return try_road(subject, make_batch(subject, rows))
    except Exception as error:  # a model that cannot run this text may run the user's: then all of it
        return RoadTrial(error=f"{type(error).__name__}: {error}"[:300])
