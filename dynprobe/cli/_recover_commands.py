"""What ``recover`` does: one call of the protocol, then printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynprobe.cli import _render_recover
from dynprobe.cli._carry_out import carry_out
from dynprobe.cli._commands import settings_of
from dynprobe.cli._progress import Listener
from dynprobe.errors import UsageError

if TYPE_CHECKING:
    from dynprobe.protocols import Progress

__all__ = ["recover_command", "watch_command"]


class _WithDetector(Listener):
    """Prints the detector's power as soon as it is known, long before the modes have run."""

    def __call__(self, progress: Progress) -> None:
        """Show one message of the protocol."""
        if progress.stage == "detector" and progress.summary is not None and self._on:
            self._console.print(_render_recover.detector_table(progress.summary["detector"]))
            return
        super().__call__(progress)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    from dynprobe.protocols import RecoverConfig

    settings = settings_of(given, RecoverConfig)
    asked = settings.get("perturb")
    if isinstance(asked, str):
        asked = settings["perturb"] = (asked,)
    if asked is not None and tuple(asked) in (("none",), ("",)):
        settings["perturb"] = None
    elif asked is not None and "none" in asked:
        raise UsageError("--perturb none leaves the text clean and stands alone; drop it or the others")
    return settings


def recover_command(given: dict[str, Any]) -> None:
    """``dynprobe recover``."""
    from dynprobe.protocols import recover

    given.pop("watch", None)
    carry_out(recover, given, _settings, kind=_WithDetector)


def watch_command(given: dict[str, Any]) -> None:
    """``dynprobe recover --watch``."""
    from dynprobe.cli._render_watch import show
    from dynprobe.protocols import watch

    given.pop("watch")
    if given.pop("json", False):
        raise UsageError("--watch is for people; without --watch, --json prints the numbers of a whole run")
    settings = _settings(given)
    show(watch(settings.pop("model"), **settings))
