"""``recovery.deadband/1``: a timing and an actuator, joined into one controller.

The prompt is looked at and never acted on. At the end of each forward the timing decides, from tokens up to this one,
what is in force at the next; the actuator then changes the state of the rows that are active, at one depth. That depth
is held from activation until the row is inactive again: the block after the depth where the detector's signal stood,
or the block at 60 % of the depth where the signal belongs to no depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Seen
from dynprobe.controllers.recovery._actuators import Actuator
from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Site, Subject, Where

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["DEFAULT_DEPTH", "Recovery", "Timing"]

#: Share of the depth at which a controller acts where its signal names no depth.
DEFAULT_DEPTH = 0.6


class Timing(Protocol):
    """When to act, and how strongly."""

    @property
    def reads(self) -> str | None:
        """What must be observed."""

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Prepare for a model."""

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows, with ``active``, ``gain``, ``signal`` and ``depth``."""

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Set what is in force at the next token."""


class Recovery(Controller):
    """Act on the state while a timing says so.

    Args:
        timing: When.
        actuator: What is done; None waits and does nothing (``passive``).
        site: Where, in the mini-language; None takes the depth of the signal.
        sham: Go through every computation and write nothing.
        name: Id in tables.
    """

    def __init__(
        self,
        timing: Timing,
        actuator: Actuator | None,
        *,
        site: str | Where | None = None,
        sham: bool = False,
        name: str = "recovery/1",
    ) -> None:
        self.timing, self.actuator, self.sham, self.id = timing, actuator, sham, name
        self.site = Where.parse(site) if site is not None else None
        self._chosen: frozenset[int] = frozenset()
        self._n_layers = 0

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Prepare timing and actuator for a model.

        Raises:
            CalibrationError: If one needs a calibration that is not there.
            SiteError: If the site does not exist.
            UsageError: If the site is no state that a block hands out, or names tokens.
        """
        self.timing.bind(subject, calibration)
        if self.actuator is not None:
            self.actuator.bind(subject, calibration)
        self._n_layers = subject.n_layers
        if self.site is not None:
            named = super().sites_of(subject, str(self.site), writing=True)
            for component, number in named:
                if component not in ("resid_pre", "resid_post"):
                    raise UsageError(f"recovery acts on states of the residual stream; {self.site} names {component}")
                subject.module_at(component, number)
            self._chosen = frozenset(number - (component == "resid_pre") for component, number in named)
            if -1 in self._chosen:
                raise UsageError(
                    f"recovery acts on states that a block hands out; {self.site} names the state before the first one"
                )

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """Every depth may be written where the signal chooses it; depths below are seen where they are needed."""
        every = [("resid_post", number) for number in range(subject.n_layers)]
        if writing:
            if self.actuator is None:
                return []
            return [site for site in every if site[1] in self._chosen] if self.site is not None else every
        if self.actuator is not None and self.actuator.needs_below:
            return [("resid_pre", 0), *every]
        return super().sites_of(subject, self.timing.reads, writing=False)

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows."""
        return self.timing.start(n_rows)

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Let the timing decide."""
        self.timing.decide(seen, memory)

    def idle(self, seen: Seen, memory: Memory) -> bool:
        """Whether no row is active, or the prompt is fed."""
        return not (self.actuator is not None and seen.decoding and memory["active"].any())

    def act(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, seen: Seen, memory: Memory
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Change the active rows whose depth this is."""
        if self.actuator is None or self.idle(seen, memory):
            return state
        number = site[1]
        rows = memory["active"] & (memory["gain"] > 0)
        if self.site is None:
            rows = rows & (self._block(memory["depth"]) == number)
        if not rows.any():
            return state
        below = seen.states.get(("resid_post", number - 1) if number else ("resid_pre", 0))
        gain = torch.from_numpy(memory["gain"]).to(state.device).reshape(-1, *[1] * (state.dim() - 1))
        after = self.actuator(state, below, number + 1, gain)
        wanted = torch.from_numpy(np.asarray(rows & (not self.sham))).to(state.device).reshape(gain.shape)
        # What would not be finite is left alone: a broken depth has no mean to go back to.
        return torch.where(wanted & after.isfinite().all(-1, keepdim=True), after, state)

    def _block(self, depth: Any) -> np.ndarray:
        """The block after a depth (the last one after the last depth); at 60 % of the depth where there is none."""
        default = min(int(DEFAULT_DEPTH * self._n_layers), self._n_layers - 1)
        return np.where(depth < 0, default, np.minimum(depth, self._n_layers - 1))
