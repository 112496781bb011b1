"""What a perturbed arm is read for besides κ: the response map, and the read-outs of the function generator.

Every perturbation has its response map, ‖h′ − h‖/‖h‖ by depth and position. A single ``impulse`` adds its relaxation
rates, a ``sine`` the lock-in of every depth. Both refer to what was really written: the impulse to the place its writer
names, the lock-in to the update that the model received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dynprobe import metrics
from dynprobe.metrics import Lockin, Result
from dynprobe.metrics._inputs import eps_of
from dynprobe.probes import PerturbWriter
from dynprobe.protocols._arms import Passage

__all__ = ["Readout", "read_response"]


@dataclass(frozen=True)
class Readout:
    """What a perturbed passage answered, against its clean passage.

    Attributes:
        rel: Relative displacement [depth, batch, column].
        lockin: Lock-in of a sine, or None.
        sample: Per row, column → result.
    """

    rel: np.ndarray
    lockin: Lockin | None = None
    sample: list[dict[str, Result]] = field(default_factory=list)


def read_response(clean: Passage, arm: Passage, writers: Sequence[PerturbWriter], depth: int) -> Readout:
    """Read the response of an arm.

    Args:
        clean: The clean passage.
        arm: The perturbed one over the same tokens.
        writers: What wrote in it.
        depth: Depth of the first state that was changed.
    """
    rel = metrics.response(list(clean.tape.states), list(arm.tape.states), arm.mask)
    sample: list[dict[str, Result]] = [{} for _ in arm.texts]
    if len(writers) == 1 and writers[0].perturb.kind == "impulse":
        sample = _relaxations(rel, arm, writers[0], depth)
    sines = [w for w in writers if w.perturb.kind == "sine"]
    if len(sines) != 1:
        return Readout(rel, None, sample)
    found = _lockin(clean, arm, sines[0])
    for row, n in zip(sample, found.n_tokens, strict=True):
        row["lockin_n"] = Result(float(n), None, 1.0, int(n), len(rel), "lockin.gain/1")
    return Readout(rel, found, sample)


def _lockin(clean: Passage, arm: Passage, writer: PerturbWriter) -> Lockin:
    period, drive = writer.perturb.period, writer.drive()
    assert period is not None
    assert drive is not None
    n_prompt = np.array([len(t.prompt) for t in arm.texts])
    driven = writer.perturb.where.mask(arm.positions, n_prompt)
    return metrics.lockin(list(clean.tape.states), list(arm.tape.states), drive, driven, period=period)


def _relaxations(rel: np.ndarray, arm: Passage, writer: PerturbWriter, depth: int) -> list[dict[str, Result]]:
    n_prompt, mask = [len(t.prompt) for t in arm.texts], arm.mask.numpy()
    first = writer.first_position(n_prompt, mask.shape[1])
    eps = eps_of(arm.tape.states[0].dtype)
    rows = []
    for i, (real, pos) in enumerate(zip(mask, first, strict=True)):
        if pos < real.sum():
            rows.append(_columns(metrics.relaxation(rel[:, i, real], depth=depth, pos=int(pos), eps=eps)))
            continue
        nothing = Result(float("nan"), "empty", float("nan"), 0, 0, "relax.depth/1", extras={"n": 0, "r2": np.nan})
        rows.append(_columns({"relax_depth": nothing, "relax_token": replace(nothing, metric_id="relax.token/1")}))
    return rows


def _columns(found: dict[str, Result]) -> dict[str, Result]:
    """A rate with its companions, each a column of its own."""
    out = dict(found)
    for name, rate in found.items():
        r2, n = float(rate.extras["r2"]), float(rate.extras["n"])
        missing = (rate.reason or "zero-denominator") if np.isnan(r2) else None
        out[f"{name}_r2"] = replace(rate, value=r2, reason=missing)
        out[f"{name}_n"] = replace(rate, value=n, reason=None)
    return out
