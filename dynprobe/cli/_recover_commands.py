"""What ``recover`` does: one call of the protocol, then printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynprobe.cli import _render, _render_recover
from dynprobe.cli._commands import print_json, settings_of
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
    if asked is not None and tuple(asked) in (("none",), ("",)):
        settings["perturb"] = None
    elif asked is not None and "none" in asked:
        raise UsageError("--perturb none leaves the text clean and stands alone; drop it or the others")
    return settings


def recover_command(given: dict[str, Any]) -> None:
    """``dynprobe recover``."""
    from dynprobe.protocols import recover

    as_json, quiet = bool(given.pop("json", False)), bool(given.get("quiet", False))
    given.pop("watch", None)
    settings = _settings(given)
    listener = _WithDetector(quiet=quiet or as_json, tables=False)
    with listener:
        done = recover(settings.pop("model"), listener=listener, **settings)
    if as_json:
        print_json({"run": str(done.path), "status": done.status, "summary": done.summary})
    else:
        _render.run(done)


def watch_command(given: dict[str, Any]) -> None:
    """``dynprobe recover --watch``."""
    from dynprobe.cli._render_watch import show
    from dynprobe.protocols import watch

    given.pop("watch")
    if given.pop("json", False):
        raise UsageError("--watch is for people; without --watch, --json prints the numbers of a whole run")
    settings = _settings(given)
    show(watch(settings.pop("model"), **settings))
