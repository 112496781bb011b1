"""What ``attract`` does: one call of the protocol, then printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynprobe.cli import _render_attract
from dynprobe.cli._carry_out import carry_out
from dynprobe.cli._commands import settings_of
from dynprobe.cli._progress import Listener

if TYPE_CHECKING:
    from dynprobe.protocols import Progress

__all__ = ["attract_command"]


class _WithDoses(Listener):
    """Prints the table of doses as soon as it is known, long before the arms have run."""

    def __call__(self, progress: Progress) -> None:
        """Show one message of the protocol."""
        if progress.stage == "doses" and progress.summary is not None and self._on:
            self._console.print(_render_attract.dose_table(progress.summary["doses"]))
            return
        super().__call__(progress)


def attract_command(given: dict[str, Any]) -> None:
    """``dynprobe attract``."""
    from dynprobe.protocols import AttractConfig, attract

    carry_out(attract, given, lambda typed: settings_of(typed, AttractConfig), kind=_WithDoses)
