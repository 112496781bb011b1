"""Progress on standard error: stage, rows/s, tokens/s, time left; silent where there is no terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dynprobe.cli import _render
from dynprobe.cli._console import error_console

if TYPE_CHECKING:
    from dynprobe.protocols import Progress

__all__ = ["Listener"]

_STAGES = {"load": "loading the model", "calibrate": "calibration", "self-tests": "self-tests", "batch": "running",
           "workers": "starting the workers"}  # fmt: skip


class Listener:
    """Shows :class:`dynprobe.protocols.Progress` to a person.

    Args:
        quiet: Show nothing.
        tables: Print the table over the prompts finished so far once.
    """

    def __init__(self, *, quiet: bool = False, tables: bool = True) -> None:
        self._console: Console = error_console()
        self._on = not quiet and self._console.is_terminal
        self._tables = tables
        self._status: Any = None
        self.began = datetime.now(UTC).replace(microsecond=0)
        self._before = 0

    def __enter__(self) -> Listener:
        if self._on:
            self._status = self._console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one message of a protocol."""
        if not self._on:
            return
        for note in progress.notes:
            self._console.print(note)
        if progress.stage == "done":
            return
        line = _STAGES.get(progress.stage, progress.stage)
        if progress.stage == "batch" and progress.total:
            line = f"batch {min(progress.done + 1, progress.total)} of {progress.total}"
            if progress.seconds > 0 and progress.rows:
                here = max(progress.done - self._before, 1)  # a continued run found some batches finished
                left = progress.seconds / here * (progress.total - progress.done)
                line += f" · {progress.rows / progress.seconds:.1f} rows/s"
                line += f" · {progress.tokens / progress.seconds:.0f} tokens/s" if progress.tokens else ""
                line += f" · {left:.0f} s left"
                line += " · disk-bound" if progress.disk_bound else ""
            elif not progress.rows and progress.summary is None:
                self._before = progress.done
        if progress.summary is not None and self._tables:
            n = next(iter(progress.summary.values()))["samples"]
            self._console.print(_render.summary_table(progress.summary, f"so far: the forced arms of {n} texts"))
        if self._status is not None:
            self._status.update(line)
