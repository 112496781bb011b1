"""What an instrument can carry: writers, writers with memory, and listeners.

A *writer* changes the state at its sites and forgets. A *steerer* is a writer with memory: it also looks at states,
decides once per forward, and may change what the forward hands out. A *listener* only sees a forward's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from dynprobe.probes._clock import Step
from dynprobe.probes._passport import Passport

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["HasPassport", "Rewinds", "Site", "Steerer", "StepListener", "Writer"]

Site = tuple[str, int]


class Writer(Protocol):
    """What writes at sites: a perturbation, a controller.

    ``write(state, site, step)`` gets the state at one site, ``[batch, columns, dim]``, and returns the state to use
    instead (the very same object for no change).
    """

    @property
    def sites(self) -> Sequence[Site]:
        """The sites it writes at."""

    def write(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, step: Step
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Return the state to use instead."""


@runtime_checkable
class HasPassport(Protocol):
    """A writer that knows how much it wrote."""

    def passport(self, fed: np.ndarray | None = None) -> Passport | None:
        """Return the size of what was written."""

    def asked(self, fed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return how many states of each row were asked to be written, and how many were left alone."""


@runtime_checkable
class Rewinds(Protocol):
    """What keeps notes of a sequence and can take the latest of them back."""

    def rewind(self, columns: int) -> None:
        """Forget the last ``columns`` decode steps: their tokens were taken back."""


@runtime_checkable
class Steerer(Writer, Protocol):
    """A writer with memory: it observes in a forward, decides at its end, and acts in the next.

    In one forward the calls come in this order: ``begin``; at every site ``write`` of all writers, then ``observe``;
    ``end``.
    """

    @property
    def observes(self) -> Sequence[Site]:
        """The sites it looks at, after everything that writes there."""

    def begin(self, step: Step) -> None:
        """A forward begins; ``step.index == 0`` begins a new sequence."""

    def observe(self, state: Float[Tensor, "batch pos *slot dim"], site: Site, step: Step) -> None:
        """Look at a state; it must not be kept beyond the forward without a copy."""

    def end(self, step: Step, output: Any) -> Any:
        """Decide; return the output to hand out instead, or None for no change."""

    def select(self, kept: np.ndarray) -> None:
        """Go on with some of the rows, or with the rows in another order (beams)."""

    def rewind(self, columns: int) -> None:
        """Be as before the last ``columns`` decode steps."""


class StepListener(Protocol):
    """What wants to see the root module's output after each forward."""

    def __call__(self, step: Step, output: Any) -> None:
        """Take note of one forward's output."""
