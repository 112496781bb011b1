"""What ``dissociate`` does: one call of the protocol, then printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynprobe.cli import _render_dissociate
from dynprobe.cli._carry_out import carry_out
from dynprobe.cli._commands import settings_of
from dynprobe.cli._progress import Listener

if TYPE_CHECKING:
    from dynprobe.protocols import Progress

__all__ = ["dissociate_command"]


class _WithDose(Listener):
    """Prints the dose–response as soon as it is known, long before the modes have run."""

    def __call__(self, progress: Progress) -> None:
        """Show one message of the protocol."""
        if progress.stage == "dose" and progress.summary is not None and self._on:
            self._console.print(_render_dissociate.dose_table(progress.summary))
            return
        super().__call__(progress)


def dissociate_command(given: dict[str, Any]) -> None:
    """``dynprobe dissociate``."""
    from dynprobe.protocols import DissociateConfig, dissociate

    carry_out(dissociate, given, lambda typed: settings_of(typed, DissociateConfig), kind=_WithDose)
