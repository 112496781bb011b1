"""One row that is asked for, and rows that were run: the question and the answer of a trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dynprobe.metrics import Result
from dynprobe.probes import Perturb
from dynprobe.probes._tape import States
from dynprobe.protocols._arms import Passage

__all__ = ["Branch", "Request", "rows_of"]


@dataclass(frozen=True)
class Request:
    """One row that is asked for.

    Attributes:
        text: Number of the text on the trunk.
        perturb: What is written; α = 0 is the sham write.
        label: Whatever the caller wants to find the row by.
    """

    text: int
    perturb: Perturb
    label: Any = None


@dataclass(eq=False)
class Branch:
    """Rows that were run in one batch, measured against the trunk.

    Attributes:
        requests: The rows.
        source: Text of each row, ``[rows]``.
        affected_from: First position of each row at which an effect can show: max(1, first written position).
        affected: ``[rows, pos]`` real positions from there on.
        outputs: ``kl_clean_pert`` (nats) and ``flip`` ``[rows, pos]``, 0 before the first column that was run.
        passport: Size of the write in every unit, per row.
        right: 1 where every token of a row's continuation is the top-1 token, else 0; NaN without continuation.
        passage: The measured rows, where metrics were asked for.
        clean: The clean rows beside them, likewise.
        paired: Δκ of each row, likewise.
        divergence: Angle to the clean state ``[depth, rows, pos]``, likewise.
    """

    requests: Sequence[Request]
    source: np.ndarray
    affected_from: np.ndarray
    affected: np.ndarray
    outputs: dict[str, np.ndarray]
    passport: dict[str, np.ndarray]
    right: np.ndarray
    passage: Passage | None = None
    clean: Passage | None = None
    paired: Sequence[Result] | None = None
    divergence: np.ndarray | None = None

    def mean(self, name: str) -> np.ndarray:
        """Mean of ``kl_clean_pert`` or ``flip`` over the affected positions, ``[rows]``; NaN where there is none."""
        grid = self.outputs[name]
        count = self.affected.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(count > 0, np.where(self.affected, grid, 0.0).sum(1) / count, np.nan)


def rows_of(passage: Passage, source: np.ndarray) -> Passage:
    """The rows of a passage that an index names, repeated where it repeats them."""
    index = torch.from_numpy(source)
    tape = passage.tape
    by_depth = {
        depth: tape.states[depth].index_select(0, index.to(tape.states[depth].device)) for depth in tape.states.depths
    }
    picked: Mapping[str, Any] = {
        "states": States(by_depth, tape.states.last),
        "mask": tape.mask[index],
        "positions": tape.positions[index],
        "token_ids": None if tape.token_ids is None else tape.token_ids[index],
        "n_prompt": tape.n_prompt[index],
        "row_keys": tuple(tape.row_keys[i] for i in source),
    }
    return Passage(
        [passage.texts[i] for i in source],
        replace(tape, **picked, logits=None, updates={}, passport={}),
        passage.mask[index],
        passage.positions[source],
        passage.measured.take(source),
        {name: grid[source] for name, grid in passage.outputs.items()},
    )
