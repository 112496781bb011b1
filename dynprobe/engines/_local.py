"""Worker processes on this machine, one per device.

Each worker is a Python of its own that imports dynprobe and nothing of the caller's script, so a script needs no
``if __name__ == "__main__"``. It talks over a socket that only a holder of this run's key can open, ignores Ctrl-C
(the caller decides what it means), and ends when the caller is gone. A worker that dies is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from dynprobe.engines._contract import Done, Engine, Item, Job, Seat
from dynprobe.engines._schedule import Schedule
from dynprobe.errors import EngineError

__all__ = ["Local"]

#: A worker imports torch before it calls back; on a cold disk that takes a while.
_START_SECONDS = 180.0


class _GoneError(Exception):
    """A worker's line is closed."""


@dataclass(eq=False)
class _Process:
    """One worker: its process, and the line to it."""

    name: str
    seat: int
    process: subprocess.Popen[bytes]
    line: Connection
    job: str | None = None

    def ask(self, *message: Any) -> None:
        # Plain bytes: the line would hand tensors over by shared memory, which another program cannot open.
        self.line.send_bytes(pickle.dumps(message))

    def answer(self) -> Any:
        """Return what it says; an error of its own is raised here.

        Raises:
            _GoneError: It is gone; an ``OSError`` of its own (a model that is not there is one) is no such thing.
        """
        try:
            said = self.line.recv_bytes()
        except (EOFError, OSError) as gone:
            raise _GoneError from gone
        kind, value = pickle.loads(said)  # noqa: S301 (our own child, over a line with a key)
        if kind == "error":
            raise value
        return value

    def why_gone(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "a closed line"
        if code >= 0:
            return f"exit code {code}"
        return f"signal {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


class Local(Engine):
    """Processes on this machine.

    Args:
        workers: Number of processes, or ``"auto"``: one per CUDA device, else one.
        threads: Threads of each; default: the processor's cores shared out.
        devices: Devices of the workers in turn; default the CUDA devices, else ``"auto"``.
    """

    name = "local"

    def __init__(
        self, workers: int | str = "auto", *, threads: int | None = None, devices: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self._devices = list(devices) if devices else _cuda_devices()
        self.workers = max(1, len(self._devices)) if workers == "auto" else int(workers)
        self._threads = threads or max(1, (os.cpu_count() or 1) // self.workers)
        self._crew: dict[int, _Process] = {}
        self._started = 0

    @classmethod
    def made(cls, settings: Mapping[str, Any], out: Path) -> Local:
        """Make it of a run's settings."""
        return cls(settings["workers"], threads=settings["worker_threads"])

    def begin(self, job: Job) -> None:
        """Start what is missing and open the job everywhere; the workers load side by side."""
        for worker in [w for w in self._crew.values() if w.process.poll() is not None]:  # it died between two jobs
            self._died(worker.name, worker.why_gone(), None)
            worker.line.close()
            del self._crew[worker.seat]
        self._start([seat for seat in range(self.workers) if seat not in self._crew])
        asked = [worker for worker in self._crew.values() if worker.job != job.key]
        try:
            for worker in asked:
                with contextlib.suppress(OSError):  # it is gone: reading its line will say so too
                    worker.ask("open", job)
            for worker in asked:
                self._opened(worker, job)
        except BaseException:  # what the others answer would be taken for the answer to the next question
            self.close()
            raise

    def map(self, job: Job, items: Sequence[Item]) -> Generator[Done, None, None]:
        """Yield the items as they are done."""
        self.begin(job)
        schedule = Schedule(items, self.workers)
        held: dict[int, Item] = {}
        left = len(items)
        try:
            for seat in range(self.workers):
                self._next(seat, schedule, held)
            while left:
                lines = {self._crew[seat].line: seat for seat in held}
                for line in wait(list(lines)):
                    seat = lines[line]  # type: ignore[index]
                    worker, item = self._crew[seat], held.pop(seat)
                    try:
                        files, seconds = worker.answer()
                    except _GoneError:
                        self._replace(worker, job, schedule, item)
                        self._next(seat, schedule, held)
                        continue
                    # The worker goes on while what it made is written.
                    self._next(seat, schedule, held)
                    left -= 1
                    yield self._did(Done(item, files, worker.name, seconds))
        finally:
            if held:  # left in the middle of something: what comes back would answer a question of before
                self.close()

    def close(self) -> None:
        """End the workers."""
        for worker in self._crew.values():
            worker.line.close()
            worker.process.terminate()
        for worker in self._crew.values():
            try:
                worker.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._crew.clear()

    def _next(self, seat: int, schedule: Schedule, held: dict[int, Item]) -> None:
        item = schedule.take(seat)
        if item is not None:
            held[seat] = item
            try:
                self._crew[seat].ask("work", item.unit)
            except OSError:  # it is gone: reading its line will say so too
                return

    def _replace(self, worker: _Process, job: Job, schedule: Schedule, item: Item) -> None:
        why = worker.why_gone()
        worker.line.close()
        self._died(worker.name, why, item)
        del self._crew[worker.seat]
        schedule.give_back(worker.seat, item, why)
        self._start([worker.seat])
        replaced = self._crew[worker.seat]
        replaced.ask("open", job)
        self._opened(replaced, job)

    def _opened(self, worker: _Process, job: Job) -> None:
        try:
            facts = worker.answer()
        except _GoneError as gone:
            raise EngineError(f"{worker.name} ended by {worker.why_gone()} while it loaded its model") from gone
        worker.job = job.key
        self._joined(worker.name, facts)

    def _start(self, seats: Sequence[int]) -> None:
        """Start workers, all at once, and wait until each has called back."""
        begun: list[tuple[str, int, subprocess.Popen[bytes], Listener]] = []
        try:
            for seat in seats:
                key = secrets.token_bytes(32)
                listener = Listener(authkey=key)
                name = f"local-{self._started}"
                self._started += 1
                process = self._popen(seat, listener.address, key)
                begun.append((name, seat, process, listener))
            for name, seat, process, listener in begun:
                self._crew[seat] = _Process(name, seat, process, _accepted(listener, process, name))
        except BaseException:
            for _, seat, process, _ in begun:
                if seat not in self._crew:
                    process.kill()
            self.close()
            raise
        finally:
            for *_, listener in begun:
                listener.close()

    def seat(self, number: int = 0) -> Seat:
        """Return where a worker sits: on the devices in turn."""
        devices = len(self._devices)
        where = self._devices[number % devices] if devices else "auto"
        return Seat(where, self._threads, here=self.workers, on_device=-(-self.workers // max(devices, 1)))

    def _popen(self, seat: int, address: Any, key: bytes) -> subprocess.Popen[bytes]:
        threads = str(self._threads)
        where = json.dumps(asdict(self.seat(seat)))
        # A relative place on the path of the caller is the same place there, for the folder is the same.
        path = os.pathsep.join(p or "." for p in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-m", "dynprobe.engines._local_worker", str(address), where],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        assert process.stdin is not None
        process.stdin.write(key.hex().encode())
        process.stdin.close()  # not through the environment, which any process of this user can read
        return process


def _accepted(listener: Listener, process: subprocess.Popen[bytes], name: str) -> Connection:
    """The line of a worker that calls back, or why it does not."""
    found: list[Connection] = []

    def accept() -> None:
        found.append(listener.accept())

    waiting = threading.Thread(target=accept, daemon=True)
    waiting.start()
    for _ in range(int(_START_SECONDS * 10)):
        waiting.join(0.1)
        if found:
            return found[0]
        if process.poll() is not None:
            raise EngineError(f"{name} ended with exit code {process.returncode} before it began; see its words above")
    raise EngineError(f"{name} did not begin within {_START_SECONDS:g} s")


def _cuda_devices() -> list[str]:
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
