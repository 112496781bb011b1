"""The contract between work and whoever does it.

A *job* says what a worker opens once: a function, named so that another process can import it, and what it is called
with. What it returns is called with one unit of work at a time and gives back files (name → bytes). An *item* is a unit
with a name made of its content: the same name is the same bytes, whoever makes them. What crosses from one process to
another are those files and the job itself, which is pickled on its way and never part of what a run folder holds.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Done", "Engine", "Files", "Item", "Job", "Seat", "Worker", "content_key"]

#: What an item becomes: file name → content.
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Seat:
    """Where a worker sits.

    Attributes:
        device: Device that its model is put on; ``"auto"`` lets the worker choose among what it sees.
        threads: Threads of its processor arithmetic, which the job's opener sets; None leaves the default.
        gpu_share: Share of a GPU's memory it may take; None is all of it.
        here: Workers on its machine, itself included: they share the machine's memory.
        on_device: Workers that the engine gives its device.
    """

    device: str = "auto"
    threads: int | None = None
    gpu_share: float | None = None
    here: int = 1
    on_device: int = 1


@dataclass(frozen=True)
class Job:
    """What a worker opens before its first item.

    Attributes:
        opener: ``"package.module:function"``, called as ``function(payload, seat)``.
        payload: What it is called with; it is pickled on its way.
        key: Name made of its content. A worker that has this job open does not open it again.
    """

    opener: str
    payload: Any
    key: str


@dataclass(frozen=True)
class Item:
    """One unit of work.

    Attributes:
        number: Its place in the plan.
        unit: What to do, as plain data.
        key: Name made of its content.
    """

    number: int
    unit: Any
    key: str


@dataclass(frozen=True)
class Done:
    """An item that was done.

    Attributes:
        item: The item.
        files: What it became.
        worker: Id of the worker that did it.
        seconds: How long that took there.
    """

    item: Item
    files: Files
    worker: str
    seconds: float


def content_key(*parts: Any) -> str:
    """Return the name of plain data, 16 hexadecimal digits: the same data has the same name everywhere.

    Args:
        *parts: Anything that JSON can hold.

    Example:
        >>> content_key("0123abcd", {"prompts": [0, 1]}) == content_key("0123abcd", {"prompts": [0, 1]})
        True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(eq=False)
class Worker:
    """What runs inside a worker process, whichever engine started it."""

    seat: Seat = field(default_factory=Seat)
    _job: str | None = None
    _work: Callable[[Any], Files] | None = None

    def open(self, job: Job) -> dict[str, Any]:
        """Open a job, or find it open; return the worker's facts."""
        if self._job != job.key:
            module, _, name = job.opener.partition(":")
            self._work = self._job = None
            self._work = getattr(importlib.import_module(module), name)(job.payload, self.seat)
            self._job = job.key
        device = getattr(self._work, "device", self.seat.device)  # what "auto" became, where the job says so
        return {"pid": os.getpid(), "host": socket.gethostname(), "device": device, "threads": self.seat.threads}

    def work(self, unit: Any) -> tuple[Files, float]:
        """Do one unit; return its files and the seconds it took."""
        assert self._work is not None, "a job is opened before its units are done"
        begun = time.perf_counter()
        files = self._work(unit)
        return files, time.perf_counter() - begun


class Engine(ABC):
    """Spreads the items of a job; its workers live until :meth:`close` and serve one job after another.

    Example:
        >>> from dynprobe.engines import Local
        >>> with Local(workers=2) as engine:  # doctest: +SKIP
        ...     dp.sweep("tiny-llama", engine=engine)
        ...     dp.sweep("tiny-llama", seeds="0:4", engine=engine)  # the models are loaded already
    """

    #: What ``--engine`` calls it.
    name: ClassVar[str]
    #: Of ``address``, ``worker_gpus`` and ``slurm``, the settings that it looks at; the others are refused beside it.
    takes: ClassVar[frozenset[str]] = frozenset()
    #: How many workers it has.
    workers: int

    def __init__(self) -> None:
        self._facts: dict[str, dict[str, Any]] = {}
        self._lost: list[dict[str, Any]] = []

    @classmethod
    def made(cls, settings: Mapping[str, Any], out: Path) -> Engine:
        """Make the engine of a run's settings, for ``--engine``.

        Args:
            settings: ``workers``, ``worker_threads``, ``address``, ``worker_gpus``, ``slurm`` (texts ``name=value``).
            out: Folder of runs; what is shared between machines lies under it.

        Raises:
            EngineError: If there is no such cluster.
            UsageError: If a library is missing, or the settings do not go together.
        """
        raise NotImplementedError

    @abstractmethod
    def begin(self, job: Job) -> None:
        """Start the workers that are not there yet and have them all open the job; return when they are ready.

        An engine whose workers wait in somebody's queue returns at once.
        """

    @abstractmethod
    def map(self, job: Job, items: Sequence[Item]) -> Generator[Done, None, None]:
        """Yield every item once, as it is done, in any order; closing it before its end stops what is under way.

        Raises:
            EngineError: Workers cannot be started, or one item keeps killing them.
            Exception: Whatever an item raised, as it was raised in the worker.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers."""

    def seat(self, number: int = 0) -> Seat:
        """Return where a worker sits, as far as the engine knows before it is there."""
        return Seat()

    def facts(self) -> dict[str, Any]:
        """Return what a run records: the workers with what each did since the last call, and those that were lost."""
        workers = [{"id": name, **facts} for name, facts in self._facts.items() if facts.get("items")]
        found = {"name": self.name, "workers": [dict(w) for w in workers], "lost": list(self._lost)}
        for facts in self._facts.values():
            facts.update(items=0, seconds=0.0)
        self._lost.clear()
        return found

    def _joined(self, worker: str, facts: Mapping[str, Any]) -> None:
        self._facts.setdefault(worker, {**facts, "items": 0, "seconds": 0.0})

    def _did(self, done: Done) -> Done:
        facts = self._facts[done.worker]
        facts["items"] += 1
        facts["seconds"] = round(facts["seconds"] + done.seconds, 3)
        return done

    def _died(self, worker: str, why: str, item: Item | None) -> None:
        self._lost.append({"id": worker, "why": why, "item": None if item is None else item.number})

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
