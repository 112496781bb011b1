"""Put one controller to work: its memory, its order of calls, and its books.

The author of a controller sees the rows that are there. Here the rest is done: rows that leave, beams that change
places, tokens that are taken back, what was written where and how much of the state's energy that was.

What is decided at the end of a forward is done in the next one of the same sequence. Where each token is fed with the
whole text before it (a model without a cache, or ``use_cache=False``), every forward begins a new sequence and it is
never done; that is said in a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Seen, kept_copy, taken
from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Site, Subject
from dynprobe.probes._clock import Step
from dynprobe.probes._outputs import logits_of, replace_logits
from dynprobe.probes._same_model import check_same_model

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Steering"]


class Steering:
    """A controller bound to a subject; a :class:`~dynprobe.probes.Steerer` of instruments.

    Args:
        controller: What decides.
        subject: The model.
        calibration: What it does when left alone.
        remember: Whether tokens may be taken back; then the memory is copied at every step.

    Attributes:
        sites: Where it may write.
        observes: Where it looks.
        memory: What it remembers of the rows that are there.
        remember: Whether tokens may be taken back; to be set before a sequence begins.

    Raises:
        CalibrationError: If the calibration is not this model's, or one is needed and there is none.
        SiteError: If it names a place that the model does not have.
    """

    def __init__(
        self,
        controller: Controller,
        subject: Subject,
        calibration: Calibration | None = None,
        *,
        remember: bool = False,
    ) -> None:
        self.controller = controller
        if calibration is not None:
            check_same_model(subject, calibration)
        controller.bind(subject, calibration)
        self.sites = tuple(controller.sites_of(subject, controller.writes, writing=True))
        self.observes = tuple(controller.sites_of(subject, controller.reads, writing=False))
        for site in (*self.sites, *self.observes):
            subject.module_at(*site)
        self.memory: Memory = {}
        self.remember, self._copies = remember, subject.mutates
        self._decides = type(controller).decide is not Controller.decide
        self._first: Step | None = None
        self._seen: Seen | None = None
        self._idle = False
        self._rows = np.zeros(0, dtype=np.int64)
        self._past: list[Memory] = []
        self._lines: list[_Line] = []
        self._writes: list[list[_Write]] = []

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self.controller.id or type(self.controller).__name__

    def begin(self, step: Step) -> None:
        """A forward begins."""
        n_rows = len(step.positions)
        if step.index == 0:
            if self._decides and self._first is not None and _fed_anew(self._first, step):
                warnings.warn(
                    "the whole text is fed anew with every token, so each forward begins a new sequence, and what "
                    f"{self.name} decides at one token for the next is never done; generate with a cache "
                    "(use_cache=True)",
                    stacklevel=2,
                )
            self._first = step
            self.memory = self.controller.start(n_rows)
            for held in (self._past, self._lines, self._writes):
                held.clear()
            self._check_memory(n_rows)
        elif self.remember:
            self._past.append(kept_copy(self.memory))
        self._rows = np.arange(n_rows) if step.rows is None else step.rows
        self._seen = Seen(step)
        self._idle = self.controller.idle(self._seen, self.memory)
        self._writes.append([])

    def write(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, step: Step
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Let the controller act, and note what it did."""
        if self._idle:
            return state
        assert self._seen is not None
        if torch.is_grad_enabled():
            with torch.no_grad():
                after = self.controller.act(state, site, self._seen, self.memory)
        else:  # once per site and token: a context that changes nothing is worth leaving out
            after = self.controller.act(state, site, self._seen, self.memory)
        if after is state:
            return state
        if after.shape != state.shape:
            raise UsageError(
                f"{self.name} returned {tuple(after.shape)} at {site[0]}.{site[1]}; it must return {tuple(state.shape)}"
            )
        after = after if after.dtype == state.dtype else after.to(state.dtype)
        self._writes[-1].append(_Write(site, self._rows, step.positions, _energy(state, after)))
        return after

    def observe(self, state: Float[Tensor, "batch pos *slot dim"], site: Site, step: Step) -> None:
        """Show the controller a state."""
        assert self._seen is not None
        state = state.detach() if state.requires_grad else state
        self._seen.states[site] = state.clone() if self._copies else state

    def end(self, step: Step, output: Any) -> Any:
        """Let the controller decide, and choose logits."""
        assert self._seen is not None
        seen = replace(self._seen, output=output)
        force = {name: _array(self.memory[name]) for name in ("active", "gain") if name in self.memory}
        with torch.no_grad():
            self.controller.decide(seen, self.memory)
            chosen = self._choose(seen)
        self._check_memory(len(step.positions))
        signal = _array(self.memory["signal"]) if "signal" in self.memory else None
        self._lines.append(
            _Line(self._rows, step.positions.max(axis=1), signal, force.get("active"), force.get("gain"))
        )
        self._seen = None
        return None if chosen is None else replace_logits(output, chosen)

    def _choose(self, seen: Seen) -> Tensor | None:
        if type(self.controller).choose is Controller.choose:
            return None
        logits = logits_of(seen.output)
        chosen = self.controller.choose(logits, seen, self.memory)
        return None if chosen is logits else chosen

    def _check_memory(self, n_rows: int) -> None:
        for name, value in self.memory.items():
            if not isinstance(value, np.ndarray | Tensor):
                found = f"a {type(value).__name__}"
            elif value.ndim == 0 or len(value) != n_rows:
                found = f"{list(value.shape)} for {n_rows} rows"
            else:
                continue
            raise UsageError(
                f"{self.name}: memory {name!r} is {found}; it must be an array or tensor whose first axis is the batch"
            )

    def select(self, kept: np.ndarray) -> None:
        """Go on with some of the rows, in the order given."""
        self.memory = taken(self.memory, kept)
        self._past = [taken(memory, kept) for memory in self._past]

    def rewind(self, columns: int) -> None:
        """Be as before the last ``columns`` decode steps, but for what survives."""
        if columns > len(self._past):
            raise UsageError(f"{columns} tokens were to be taken back; {self.name} remembers {len(self._past)}")
        if not columns:
            return
        missing = [name for name in self.controller.survives() if name not in self.memory]
        if missing:
            raise UsageError(f"{self.name}: {missing[0]!r} is to survive a restart and is not in its memory")
        survivors = {name: self.memory[name] for name in self.controller.survives()}
        self.memory = {**self._past[-columns], **survivors}
        for held in (self._past, self._lines, self._writes):
            del held[-columns:]

    def actions(self, fed: np.ndarray | None = None) -> pd.DataFrame:
        """Return what was done to the latest sequence.

        One row per token with its ``signal`` and the ``active`` and ``gain`` that were in force at it; a token that was
        written at several sites has one row each, with ``site`` and ``energy`` ‖u‖²/‖h‖² of the write u at the state h.
        An active token with energy 0 is one where there was nothing to do (a gain of 0, antipodal states).

        Args:
            fed: Tokens of each row's text ``[batch]``; a row that has ended may stay in the batch for a while, and what
                happened to it there is left out.
        """
        lines = pd.concat([line.table() for line in self._lines], ignore_index=True) if self._lines else _Line.empty()
        writes = pd.concat([w.table() for step in self._writes for w in step] or [_Write.empty()], ignore_index=True)
        table = lines.merge(writes, on=["row", "pos"], how="outer", sort=False)
        table["active"] = table["active"].eq(True)
        table["site"], table["energy"] = table["site"].fillna(""), table["energy"].fillna(0.0)
        if fed is not None:
            table = table[table["pos"].to_numpy() < np.asarray(fed)[table["row"].to_numpy()]]
        return table.sort_values(["row", "pos"], kind="stable", ignore_index=True)


@dataclass(frozen=True)
class _Line:
    """What was in force in one forward, at the last token of each row."""

    rows: np.ndarray
    pos: np.ndarray
    signal: np.ndarray | None
    active: np.ndarray | None
    gain: np.ndarray | None

    def table(self) -> pd.DataFrame:
        n = len(self.rows)
        return pd.DataFrame({
            "row": self.rows, "pos": self.pos,
            "signal": np.full(n, np.nan) if self.signal is None else np.asarray(self.signal, np.float64),
            "active": np.zeros(n, bool) if self.active is None else self.active,
            "gain": np.full(n, np.nan) if self.gain is None else np.asarray(self.gain, np.float64),
        })  # fmt: skip

    @staticmethod
    def empty() -> pd.DataFrame:
        return _Line(np.zeros(0, int), np.zeros(0, int), None, None, None).table()


@dataclass(frozen=True)
class _Write:
    """What was written at one site in one forward; the energies stay on the device until they are asked for."""

    site: Site
    rows: np.ndarray
    positions: np.ndarray
    energy: Tensor

    def table(self) -> pd.DataFrame:
        energy = self.energy.cpu().numpy()
        row, column = np.nonzero((energy > 0) & (self.positions >= 0))
        return pd.DataFrame({
            "row": self.rows[row], "pos": self.positions[row, column], "site": f"{self.site[0]}.{self.site[1]}",
            "energy": energy[row, column],
        })  # fmt: skip

    @staticmethod
    def empty() -> pd.DataFrame:
        nothing = np.zeros(0, int)
        return pd.DataFrame({"row": nothing, "pos": nothing, "site": np.zeros(0, object), "energy": np.zeros(0)})


def _array(value: Any) -> np.ndarray:
    """A copy of an entry of a memory as an array."""
    return value.detach().cpu().numpy().copy() if isinstance(value, Tensor) else np.array(value)


def _fed_anew(before: Step, now: Step) -> bool:
    """Whether a forward that begins a sequence carries the text of another one and one token more."""
    old, new = before.token_ids, now.token_ids
    if old is None or new is None or len(old) != len(new) or old.shape[1] + 1 != new.shape[1]:
        return False
    return torch.equal(old, new[:, :-1])


def _energy(before: Tensor, after: Tensor) -> Tensor:
    """‖u‖²/‖h‖² of a write, ``[batch, columns]`` in float64; slots of one position together."""
    shift = (after.double() - before.double()).flatten(2).pow(2).sum(-1)
    return torch.where(shift > 0, shift / before.double().flatten(2).pow(2).sum(-1), 0.0)
