"""Join what the forwards of one sequence left behind: states into a tape, sizes of writes into one passport.

A prompt is one forward and every new token one more, and rows may leave in between; here everything is laid side by
side again, each row in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dynprobe.probes._clock import Step
from dynprobe.probes._energies import EnergyTap
from dynprobe.probes._outputs import ordinary
from dynprobe.probes._passport import Passport
from dynprobe.probes._roles import HasPassport, Site
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import States, Tape

__all__ = ["joined_passport", "joined_tape", "laid_out"]


def joined_tape(
    subject: Subject,
    steps: Sequence[Step],
    captured: Mapping[Site, Sequence[Tensor]],
    logits: Tensor | None,
    passport: dict[str, np.ndarray],
    tap: EnergyTap | None,
) -> Tape:
    """Return the tape of a sequence, made of ordinary tensors.

    Args:
        subject: The model.
        steps: Its forwards.
        captured: Per site one state ``[batch, columns, dim]`` of each forward.
        logits: To be kept beside.
        passport: Size of what was written.
        tap: Energies of the forwards, where the loop has some.
    """
    by_depth: dict[int, Tensor] = {}
    updates: dict[tuple[str, int], Tensor] = {}
    n = len(steps[0].positions)
    with torch.inference_mode(False):  # joining inside the user's inference mode would make inference tensors
        for (component, layer), held in captured.items():
            if not held:
                continue
            state = held[0]
            if len(held) > 1:
                state = torch.cat([laid_out(x, s.rows, n) for x, s in zip(held, steps, strict=True)], dim=1)
            if component in ("resid_pre", "resid_post"):
                by_depth[layer + (component == "resid_post")] = state
            else:
                updates[component, layer] = state
        positions = torch.cat([laid_out(torch.from_numpy(s.positions), s.rows, n, -1) for s in steps], 1)
        ids = [laid_out(s.token_ids, s.rows, n) for s in steps if s.token_ids is not None]
        energies = {}
        if tap is not None:
            energies = tap.joined(lambda v, i: laid_out(v, steps[i].rows, n, np.nan), subject.n_layers + 1)
        return Tape(
            states=States(by_depth, subject.n_layers),
            mask=positions >= 0,
            positions=positions,
            token_ids=torch.cat(ids, 1) if len(ids) == len(steps) else None,
            n_prompt=torch.from_numpy(steps[0].n_prompt.copy()),
            logits=None if logits is None else ordinary(logits),
            updates=updates,
            row_keys=steps[0].row_keys,
            subject=subject,
            passport=passport,
            energies=energies,
        )


def joined_passport(writers: Sequence[HasPassport], fed: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return the mean size of all writes, per row and unit; empty where nothing was written."""
    total: Passport | None = None
    for note in (writer.passport(fed) for writer in writers):
        if note is not None:
            total = note if total is None else total.add(note)
    if total is None:
        return {}
    counts = [writer.asked(fed) for writer in writers]
    asked, alone = (np.sum([np.broadcast_to(c[i], (len(total.n_states),)) for c in counts], axis=0) for i in (0, 1))
    return {**total.rows(), "n_asked": asked, "n_left_alone": alone}


def laid_out(values: Tensor, rows: np.ndarray | None, n_rows: int, fill: float = 0) -> Tensor:
    """Values of some rows in their place among all rows; ``fill`` stands for the rows that had left."""
    if rows is None:
        return values
    out = values.new_full((n_rows, *values.shape[1:]), fill)
    out[torch.from_numpy(rows).to(values.device)] = values
    return out
