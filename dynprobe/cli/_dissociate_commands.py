"""What ``dissociate`` does: one call of the protocol, then printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynprobe.cli import _render, _render_dissociate
from dynprobe.cli._commands import print_json, settings_of
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

    as_json, quiet = bool(given.pop("json", False)), bool(given.get("quiet", False))
    settings = settings_of(given, DissociateConfig)
    listener = _WithDose(quiet=quiet or as_json, tables=False)
    with listener:
        done = dissociate(settings.pop("model"), settings.pop("items", None), listener=listener, **settings)
    if as_json:
        print_json({"run": str(done.path), "status": done.status, "summary": done.summary})
    else:
        _render.run(done)
