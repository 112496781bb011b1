"""Ray actors: from a laptop to a cluster with the same command.

An actor keeps its model loaded and does one item after another. What it made comes back through Ray's object store, so
no folder need be shared; dynprobe and the model's files must be there on every node. A share of a GPU packs several
small models onto one; Ray only counts such shares, so the worker also limits the memory it takes. An actor that dies is
replaced by a new one, which opens the job again.
"""

from __future__ import annotations

import signal
import socket
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynprobe.engines._contract import Done, Engine, Item, Job, Seat, Worker
from dynprobe.engines._schedule import Schedule
from dynprobe.errors import EngineError, UsageError

__all__ = ["Ray"]

#: Seconds after which it is said that an actor waits for its place.
_PATIENCE = 20.0

#: Seconds in which a cluster answers that was named by its host and port.
_ANSWERS = 5.0


@dataclass(eq=False)
class _Actor:
    name: str
    handle: Any
    job: str | None = None


class Ray(Engine):
    """Actors of a Ray cluster, or of one that is started here.

    Args:
        workers: Number of actors, or ``"auto"``: as many as the cluster's GPUs (or, without any, its cores) hold.
        address: ``"auto"`` or ``ray://…`` joins a running cluster; None starts one on this machine and ends it after.
        gpus: GPUs per actor, e.g. 0.25; None takes one where the cluster has any.
        threads: Cores, and threads, of each actor.
        max_restarts: Workers that one item may cost before the run ends.
    """

    name = "ray"
    takes = frozenset({"address", "worker_gpus"})

    def __init__(
        self, workers: int | str = "auto", *, address: str | None = None, gpus: float | None = None,
        threads: int | None = None, max_restarts: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        try:
            import ray
        except ImportError as error:
            raise UsageError("the engine ray needs Ray; type: pip install 'dynprobe[ray]'") from error
        self._ray: Any = ray
        why = ray.exceptions  # a node that dies, or has no memory left, takes its actors along under other names
        self._gone: tuple[type[Exception], ...] = (
            why.RayActorError, why.OutOfMemoryError, why.NodeDiedError, why.WorkerCrashedError, why.ObjectLostError,
        )  # fmt: skip
        self._owns = not ray.is_initialized()
        self._max_restarts = max_restarts
        if self._owns:
            self._connect(address)
        resources = ray.cluster_resources()
        self._gpus = (1.0 if resources.get("GPU") else 0.0) if gpus is None else gpus
        self._threads = threads or 1
        self.workers = self._room(resources) if workers == "auto" else int(workers)
        self._refuse_too_many(resources)
        self._crew: dict[int, _Actor] = {}
        self._started = 0

    @classmethod
    def made(cls, settings: Mapping[str, Any], out: Path) -> Ray:
        """Make it of a run's settings."""
        return cls(
            settings["workers"], address=settings["address"], gpus=settings["worker_gpus"],
            threads=settings["worker_threads"],
        )  # fmt: skip

    def begin(self, job: Job) -> None:
        """Start the actors that are missing and open the job in all of them, side by side."""
        for seat in range(self.workers):
            if seat not in self._crew:
                self._crew[seat] = self._actor()
        asked = [actor for actor in self._crew.values() if actor.job != job.key]
        sent = self._ray.put(job) if asked else None
        for actor, reference in [(actor, actor.handle.open.remote(sent)) for actor in asked]:
            self._opened(actor, reference, job)

    def map(self, job: Job, items: Sequence[Item]) -> Generator[Done, None, None]:
        """Yield the items as they are done."""
        self.begin(job)
        schedule = Schedule(items, self.workers, self._max_restarts)
        held: dict[Any, tuple[int, Item]] = {}
        try:
            for seat in range(self.workers):
                self._next(seat, schedule, held)
            while held:
                (ready, *_), _ = self._ray.wait(list(held), num_returns=1)
                seat, item = held.pop(ready)
                actor = self._crew[seat]
                try:
                    files, seconds = self._get(ready)
                except self._gone as gone:
                    self._replace(seat, job, schedule, item, gone)
                    self._next(seat, schedule, held)
                    continue
                self._next(seat, schedule, held)
                yield self._did(Done(item, files, actor.name, seconds))
        finally:
            for reference in held:
                self._ray.cancel(reference)

    def close(self) -> None:
        """End the actors, and the cluster where it was started here."""
        for actor in self._crew.values():
            self._ray.kill(actor.handle)
        self._crew.clear()
        if self._owns and self._ray.is_initialized():
            self._ray.shutdown()

    def seat(self, number: int = 0) -> Seat:
        """Return where an actor sits. Ray may put them all on one node, as many as its cores hold."""
        cores = max((node.get("Resources", {}).get("CPU", 1) for node in self._ray.nodes() if node["Alive"]), default=1)
        here = max(1, min(self.workers, int(cores / self._threads)))
        return Seat("auto", self._threads, self._gpus if 0 < self._gpus < 1 else None, here)

    def facts(self) -> dict[str, Any]:
        """Return what a run records."""
        return {**super().facts(), "version": self._ray.__version__}

    def _connect(self, address: str | None) -> None:
        try:
            _knock(address or "")
            with _our_handler_stays():
                self._ray.init(
                    address=address, log_to_driver=False, logging_level="error", configure_logging=False,
                    **({} if address else {"include_dashboard": False}),
                )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"no Ray cluster answers at --address {address}" if address else "Ray could not be started here"
            raise EngineError(
                f"{where}: {str(error).rstrip('.')}. Start one with: ray start --head, or leave --address out to start "
                "one here"
            ) from error

    def _room(self, resources: dict[str, float]) -> int:
        by_cores = int(resources.get("CPU", 1) / self._threads)
        by_gpus = int(resources.get("GPU", 0) / self._gpus) if self._gpus else by_cores
        return max(1, min(by_cores, by_gpus))

    def _refuse_too_many(self, resources: dict[str, float]) -> None:
        """More actors than fit would wait for ever."""
        needed = {"CPU": self.workers * self._threads, "GPU": self.workers * self._gpus}
        for kind, number in needed.items():
            there = resources.get(kind, 0)
            if number > there + 1e-9:
                close_here = self._ray.shutdown if self._owns else None
                if close_here is not None:
                    close_here()
                raise UsageError(
                    f"{self.workers} workers need {number:g} {kind}, and the cluster has {there:g}. Ask for fewer "
                    "--workers, fewer --worker-threads, or a smaller --worker-gpus"
                )

    def _actor(self) -> _Actor:
        kind = self._ray.remote(num_cpus=self._threads, num_gpus=self._gpus, max_restarts=0)(_RayWorker)
        name = f"ray-{self._started}"
        self._started += 1
        return _Actor(name, kind.remote(self.seat()))

    def _opened(self, actor: _Actor, reference: Any, job: Job) -> None:
        self._say_if_crowded(reference)
        try:
            facts = self._get(reference)
        except self._gone as gone:
            raise EngineError(f"{actor.name} ended while it loaded its model: {gone}") from gone
        actor.job = job.key
        self._joined(actor.name, facts)

    def _say_if_crowded(self, reference: Any) -> None:
        """Warn where an actor waits for cores or GPUs that others hold: a cluster may grow, this machine does not."""
        if self._ray.wait([reference], timeout=_PATIENCE)[0]:
            return
        free = self._ray.available_resources()
        if free.get("CPU", 0) < self._threads or free.get("GPU", 0) < self._gpus:
            warnings.warn(
                f"waiting for Ray: a worker needs {self._threads} CPU and {self._gpus:g} GPU, and "
                f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU are free. "
                "If other work holds them, fewer --workers could begin at once; if not, the worker is still loading",
                stacklevel=4,
            )

    def _get(self, reference: Any) -> Any:
        """What an actor answers; its own error is raised as it was."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, Exception) else error) from None

    def _next(self, seat: int, schedule: Schedule, held: dict[Any, tuple[int, Item]]) -> None:
        item = schedule.take(seat)
        if item is not None:
            held[self._crew[seat].handle.work.remote(item.unit)] = (seat, item)

    def _replace(self, seat: int, job: Job, schedule: Schedule, item: Item, gone: Exception) -> None:
        why = " ".join(str(gone).split()[:12])
        self._died(self._crew[seat].name, why, item)
        self._ray.kill(self._crew[seat].handle)  # one that only cannot be reached would keep its cores from the next
        schedule.give_back(seat, item, why)
        self._crew[seat] = actor = self._actor()
        self._opened(actor, actor.handle.open.remote(job), job)


class _RayWorker:
    """The worker inside an actor."""

    def __init__(self, seat: Seat) -> None:
        self._worker = Worker(seat)

    def open(self, job: Job) -> dict[str, Any]:
        return self._worker.open(job)

    def work(self, unit: Any) -> Any:
        return self._worker.work(unit)


@contextmanager
def _our_handler_stays() -> Iterator[None]:
    """Put a handler of SIGTERM back that Ray replaces: the signal would end the process before a run says so."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _knock(address: str) -> None:
    """Raise ConnectionError where nobody listens: Ray itself tries for minutes, and logs meanwhile.

    Example:
        >>> _knock("auto")
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), min(int(port), 65535)), timeout=_ANSWERS).close()
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from error
