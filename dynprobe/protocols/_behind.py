"""Writing behind the work: a thread that puts units on disk while the next one is computed.

At most two units wait. Where the disk is slower than the model the work waits for it, and that time is counted: a run
that spends a tenth of its time so is *disk-bound*, which is said, for no faster model would help it. The first error of
the disk is raised at the next unit, and nothing is written after it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType

__all__ = ["WAITING", "Behind"]

#: Tasks that wait while another one is done.
WAITING = 2
_BOUND_SHARE = 0.1


class Behind:
    """Runs what it is given in order, in one thread of its own; used as a context manager.

    Attributes:
        waited: Seconds that callers of :meth:`put` waited for the disk.

    Example:
        >>> done = []
        >>> with Behind() as behind:
        ...     for number in range(3):
        ...         behind.put(lambda number=number: done.append(number))
        >>> done
        [0, 1, 2]
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._begun = time.perf_counter()
        self._tasks: queue.Queue[Callable[[], object] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dynprobe-writer", daemon=True)

    @property
    def disk_bound(self) -> bool:
        """Whether a tenth of the time so far, and at least a second, was spent waiting for the disk."""
        return self.waited > max(1.0, _BOUND_SHARE * (time.perf_counter() - self._begun))

    def put(self, task: Callable[[], object]) -> None:
        """Hand over the next task; wait while two are waiting.

        Raises:
            BaseException: What an earlier task raised.
        """
        self._raise()
        begun = time.perf_counter()
        self._tasks.put(task)
        waited = time.perf_counter() - begun
        self.waited += waited if waited > 1e-3 else 0.0
        self._raise()

    def __enter__(self) -> Behind:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was computed is written, also when the work was interrupted: it costs a moment and saves a unit.
        self._tasks.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._error is None:
                try:
                    task()
                except BaseException as error:  # noqa: BLE001, RUF100 (raised in the thread that works)
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
