"""Let every row of a batch carry a write of its own.

A sweep puts all strengths, seeds and directions of one place into one batch. Strengths alone are a number per row,
which :class:`PerturbWriter` takes as its ``magnitude``; what differs in more than strength is a writer of its own, and
this module gives each writer its rows. A writer sees only them, so a row's write is the one it would have had alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes._clock import Step
from dynprobe.probes._passport import Passport
from dynprobe.probes._roles import Site
from dynprobe.probes._writers import PerturbWriter

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["RowsWriter"]


class RowsWriter:
    """Several perturbations, each on rows of its own.

    Args:
        parts: Writers with the rows they write to, ``[n]`` each; a row may stand in several parts or in none.
        n_rows: Rows of the batch.

    Raises:
        UsageError: If a part names a row twice, or one that is not there.
    """

    def __init__(self, parts: Sequence[tuple[PerturbWriter, np.ndarray]], n_rows: int) -> None:
        self.parts = [(writer, np.asarray(rows, dtype=np.int64)) for writer, rows in parts]
        self.n_rows = n_rows
        for writer, rows in self.parts:
            if len(np.unique(rows)) < len(rows) or (len(rows) and not 0 <= rows.min() <= rows.max() < n_rows):
                raise UsageError(
                    f"{writer.perturb} is to write to rows {rows.tolist()} of {n_rows}; name each row once, "
                    f"0…{n_rows - 1}"
                )
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(site for writer, _ in self.parts for site in writer.sites))
        self._step: Step | None = None
        self._steps: list[tuple[np.ndarray, Step]] = []

    def write(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, step: Step
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Return the state with each part written on its rows; the very same object where nothing is."""
        if step is not self._step:  # a writer tells sequences apart by the identity of their steps
            self._step, self._steps = step, [_own(step, rows) for _, rows in self.parts]
        after = state
        for (writer, _), (place, own) in zip(self.parts, self._steps, strict=True):
            if site not in writer.sites or not len(place):
                continue
            if np.array_equal(place, np.arange(len(state))):  # all rows, in their own order
                after = writer.write(after, site, own)
                continue
            index = torch.from_numpy(place).to(state.device)
            before = after.index_select(0, index)
            written = writer.write(before, site, own)
            if written is not before:
                after = after.index_copy(0, index, written)
        return after

    def rewind(self, columns: int) -> None:
        """Forget what was written to the last tokens of every row: they were taken back."""
        for writer, rows in self.parts:
            if len(rows):
                writer.rewind(columns)

    def first_position(self, n_prompt: Sequence[int], length: int) -> np.ndarray:
        """First position that is written in each row, ``[batch]``; ``length`` where there is none."""
        first = np.full(self.n_rows, length)
        for writer, rows in self.parts:
            own = writer.first_position([n_prompt[i] for i in rows], length)
            first[rows] = np.minimum(first[rows], own)
        return first

    def passport(self, fed: np.ndarray | None = None) -> Passport | None:
        """Return the size of what was written, per row and unit; None where nothing was."""
        total: Passport | None = None
        for writer, rows in self.parts:
            note = writer.passport(None if fed is None else fed[rows])
            if note is not None:
                whole = note.spread(rows, self.n_rows)
                total = whole if total is None else total.add(whole)
        return total

    def asked(self, fed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return, per row, how many states were asked to be written and how many were left alone."""
        counts = np.zeros((2, self.n_rows), dtype=np.int64)
        for writer, rows in self.parts:
            for total, own in zip(counts, writer.asked(None if fed is None else fed[rows]), strict=True):
                total[rows] += own
        return counts[0], counts[1]


def _own(step: Step, rows: np.ndarray) -> tuple[np.ndarray, Step]:
    """Where a part's rows stand in the batch of this step, and the step as they see it."""
    if step.rows is None:
        return rows, step.take(rows)
    number = {int(row): i for i, row in enumerate(rows)}
    place = np.array([i for i, row in enumerate(step.rows) if int(row) in number], dtype=np.int64)
    return place, step.take(place, np.array([number[int(step.rows[i])] for i in place], dtype=np.int64))
