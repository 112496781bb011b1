"""What a recovery mode is: a maker of controllers, and what they select by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynprobe.controllers._controller import Controller

__all__ = ["Mode"]


@dataclass(frozen=True)
class Mode:
    """Makes the controllers of a mode.

    Args:
        make: ``make(timing, site=None, **options)`` → a controller, or a list in the order in which they act. Each
            call of ``timing`` makes a new timing; ``site`` is where it acts, None leaves it to the signal. Options
            that it does not know it ignores.
        selects: Columns that it works on by what it does itself, whatever detector it follows (a guard keeps likely
            texts, so ``nll_bare``): their recovery is no evidence and is marked as such.

    Example:
        >>> class Idle(Controller):
        ...     pass
        >>> type(Mode(lambda timing, site=None, **_: Idle())(timing=None)).__name__
        'Idle'
    """

    make: Callable[..., Controller | list[Controller]]
    selects: tuple[str, ...] = ()

    def __call__(self, timing: Any, site: str | None = None, **options: Any) -> Controller | list[Controller]:
        """Return new controllers."""
        return self.make(timing=timing, site=site, **options)
