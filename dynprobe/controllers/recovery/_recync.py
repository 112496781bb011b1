"""``recovery.recync/1``: response-level checkpoint restart after Sato's Recync.

The detector is :class:`dynprobe.metrics.RecyncDetector`: a crisis is the third token in a row whose state at the last
depth turned unusually far from the one before, c_t = cos(h_t, h_{t−1}) against the last twenty values that were not
low. Tokens from r = t_crisis − 3 on are discarded and written anew with seed + 10000 · attempt at the run's own
temperature. The states are those before the final norm, as everywhere here.

New tokens are numbered from 0, and c_0 compares the first with the last token of the prompt. A token's state is known
once the token after it is being chosen, so that the earliest crisis, at t = 22, is seen with the 24th new token:
shorter texts cannot have one, which ``min_new_tokens`` tells. The threshold is taken from the run itself, so a run that
is noisy all along fires at a base rate; it is to be read beside that of clean runs. Refused under greedy decoding,
where the same tokens would come again.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Restart, Seen
from dynprobe.controllers.recovery._mode import Mode
from dynprobe.errors import UsageError
from dynprobe.metrics import RecyncDetector, token_cosine
from dynprobe.probes import Site, Subject

__all__ = ["MODE", "Recync"]

_SEED_SHIFT: Final = 10_000
_BACK: Final = 3


class Recync(Controller):
    """Restart from three tokens before a crisis.

    Args:
        max_restarts: Restarts of one row at most; crises beyond are left alone.
    """

    id = "recovery.recync/1"
    restarts = True
    needs_sampling = True
    min_new_tokens = 24

    def __init__(self, max_restarts: int = 1) -> None:
        if max_restarts < 0:
            raise UsageError(f"max_restarts={max_restarts}; it is 0 or more")
        self.max_restarts = max_restarts

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """The last depth is looked at; nothing is written."""
        return [] if writing else [("resid_post", subject.n_layers - 1)]

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows."""
        detectors = np.empty(n_rows, dtype=object)
        detectors[:] = [RecyncDetector() for _ in range(n_rows)]
        return {
            "active": np.zeros(n_rows, bool), "signal": np.full(n_rows, np.nan), "detector": detectors,
            "last": torch.full((n_rows, 1), torch.nan, dtype=torch.float64),
            "restarts": np.zeros(n_rows, dtype=np.int64),
        }  # fmt: skip

    def survives(self) -> tuple[str, ...]:
        """The number of restarts."""
        return ("restarts",)

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Take in this token's cosine; ``active`` says that a crisis waits for its restart."""
        (state,) = seen.states.values()
        now = state[:, -1].flatten(1).to("cpu", torch.float64)
        if seen.decoding:
            cosines = self._cosines(memory["last"], now)
            detectors = copy.deepcopy(memory["detector"])  # rows of a beam search may have been one row
            fired = np.array([d.update(c) for d, c in zip(detectors, cosines, strict=True)])
            memory.update(detector=detectors, signal=cosines, active=fired & (memory["restarts"] < self.max_restarts))
        memory["last"] = now

    @staticmethod
    def _cosines(before: Tensor, now: Tensor) -> np.ndarray:
        return np.asarray(token_cosine(torch.stack([before, now], 1))[:, 0].numpy())

    def restart(self, new: list[int], nll: list[float], memory: Memory) -> Restart | None:
        """Ask for the tokens from three before the crisis on to be taken back."""
        if not memory["active"][0]:
            return None
        attempt = int(memory["restarts"][0]) + 1
        memory["restarts"] = np.array([attempt])
        memory["active"] = np.array([False])
        crisis = len(memory["detector"][0].values) - 1
        return Restart(crisis - _BACK, seed_shift=_SEED_SHIFT * attempt, why=f"{self.id}: crisis at {crisis}")


def _make(timing: Any, site: str | None = None, max_restarts: int | None = None, **_: Any) -> Controller:
    return Recync() if max_restarts is None else Recync(max_restarts)


#: What takes back states that lie apart lowers their turning.
MODE = Mode(_make, selects=("limen_ct",))
