"""Slurm, through submitit: an array of jobs over a folder that all nodes share.

Each job takes a stretch of the items and puts what every item became into the shared folder, under the item's name and
by one rename; the caller takes it from there. A job that is pre-empted or dies has lost the item it held: what is left
of its stretch is submitted again. What lies in the folder already is not made again, even by another caller.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dynprobe.engines._contract import Done, Engine, Files, Item, Job, Seat, Worker, content_key
from dynprobe.errors import EngineError, UsageError

__all__ = ["Slurm"]

_FACTS = ".worker"


class Slurm(Engine):
    """An array of Slurm jobs.

    Args:
        workers: Jobs of the array.
        folder: Folder that all nodes see; the jobs' logs and what they made go there.
        cluster: ``"slurm"``, ``"local"`` (processes here) or ``"debug"`` (in this process); None finds out.
        threads: Cores of each job.
        gpus: GPUs of each job.
        parameters: Further parameters of ``submitit``'s executor: ``timeout_min``, ``slurm_partition``, ….
        tries: How often what is left of a job is submitted.
        poll_seconds: How often the folder is looked at.
    """

    name = "slurm"
    takes = frozenset({"slurm", "worker_gpus"})

    def __init__(
        self, workers: int | str = "auto", *, folder: str | Path = "runs/.slurm", cluster: str | None = None,
        threads: int | None = None, gpus: float | None = None, parameters: Mapping[str, Any] | None = None,
        tries: int = 3, poll_seconds: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        try:
            import submitit
        except ImportError as error:
            raise UsageError("the engine slurm needs submitit; type: pip install 'dynprobe[slurm]'") from error
        if gpus is not None and gpus != int(gpus):
            raise UsageError(f"--worker-gpus {gpus:g}: Slurm gives whole GPUs; the engine ray can share one")
        self.workers = 1 if workers == "auto" else int(workers)
        self._folder, self._threads, self._tries, self._poll = Path(folder).resolve(), threads or 1, tries, poll_seconds
        try:
            self._executor: Any = submitit.AutoExecutor(folder=self._folder / "jobs", cluster=cluster)
        except RuntimeError as error:
            raise EngineError(f"no Slurm here: {error}") from error
        except ValueError as error:
            raise UsageError(f"--slurm cluster={cluster}: it is slurm, local (processes here) or debug") from error
        if self._executor.cluster == "local" and cluster is None:
            raise EngineError(
                "the engine slurm found no sbatch on this machine. Run the same command on a login node, or "
                "take --engine local here"
            )
        settings = {"name": "dynprobe", "timeout_min": 240, "cpus_per_task": self._threads, **(parameters or {})}
        if gpus:
            settings["gpus_per_node"] = int(gpus)
        if self._executor.cluster == "slurm":
            settings.setdefault("slurm_array_parallelism", self.workers)
        try:
            self._executor.update_parameters(**settings)
        except (TypeError, ValueError, NameError, AssertionError) as error:  # it asserts the types of values
            raise UsageError(f"submitit does not take these settings: {error}") from error

    @classmethod
    def made(cls, settings: Mapping[str, Any], out: Path) -> Slurm:
        """Make it of a run's settings."""
        pairs = dict(item.split("=", 1) for item in settings["slurm"])
        cluster = pairs.pop("cluster", None)
        parameters = {key.strip(): yaml.safe_load(value) for key, value in pairs.items()}
        return cls(
            settings["workers"], folder=out / ".slurm", cluster=cluster, threads=settings["worker_threads"],
            gpus=settings["worker_gpus"], parameters=parameters,
        )  # fmt: skip

    def begin(self, job: Job) -> None:
        """Nothing: jobs wait in the queue, and load what they need when their turn comes."""

    def map(self, job: Job, items: Sequence[Item]) -> Generator[Done, None, None]:
        """Yield the items as they appear in the shared folder."""
        place = self._folder / job.key
        place.mkdir(parents=True, exist_ok=True)
        for told in place.glob(f"{_ERROR}-*"):  # of a caller that is gone
            told.unlink()
        left = {item.key: item for item in items}
        yield from self._found(place, left)
        for attempt in range(self._tries):
            if not left:
                break
            stretches = _stretches(list(left.values()), self.workers)
            share = _Share(job, str(place), self.seat())
            jobs = self._executor.map_array(share, stretches)
            try:
                yield from self._watch(place, left, jobs)
            except BaseException:
                for one in jobs:
                    one.cancel()
                raise
            for one in jobs:
                self._said(one, place, left, last=attempt == self._tries - 1)
        if left:
            raise EngineError(
                f"{len(left)} of {len(items)} units were left after {self._tries} rounds of jobs; their logs are in "
                f"{self._folder / 'jobs'}. Finished units are kept: the same command goes on from them"
            )
        shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Nothing is left running."""

    def seat(self, number: int = 0) -> Seat:
        """Return where a job sits; which jobs share a node is Slurm's to know, and the job's own limit counts there."""
        return Seat("auto", self._threads, here=self.workers if self._executor.cluster == "local" else 1)

    def facts(self) -> dict[str, Any]:
        """Return what a run records."""
        return {**super().facts(), "cluster": self._executor.cluster}

    def _watch(self, place: Path, left: dict[str, Item], jobs: Sequence[Any]) -> Iterator[Done]:
        while left:
            ended = all(one.done() for one in jobs)  # asked first: what they made lies there before they end
            yield from self._found(place, left)
            if ended:
                return
            time.sleep(self._poll)

    def _found(self, place: Path, left: dict[str, Item]) -> Iterator[Done]:
        for key in [key for key in left if (place / key).is_dir()]:
            item = left.pop(key)
            files = {f.name: f.read_bytes() for f in sorted((place / key).iterdir()) if f.name != _FACTS}
            worker, seconds, facts = _read_facts(place / key / _FACTS)
            self._joined(worker, facts)
            yield self._did(Done(item, files, worker, seconds))

    def _said(self, one: Any, place: Path, left: dict[str, Item], *, last: bool) -> None:
        """Raise the error of a job's own; note a job that was lost."""
        error = one.exception()
        if error is None:
            return
        told = _read_error(place)
        if told is not None:
            raise told
        self._died(f"slurm-{one.job_id}", " ".join(str(error).split()[-12:]), None)
        if last and left:
            raise EngineError(f"job {one.job_id} was lost {self._tries} times: {error}") from error


class _Share:
    """What one job of the array does; submitit calls it with a stretch of items."""

    def __init__(self, job: Job, place: str, seat: Seat) -> None:
        self.job, self.place, self.seat = job, place, seat

    def __call__(self, items: Sequence[Item]) -> int:
        worker, place, done = Worker(self.seat), Path(self.place), 0
        name = f"slurm-{os.environ.get('SLURM_JOB_ID') or os.getpid()}"
        try:
            facts = worker.open(self.job)
            for item in items:
                if (place / item.key).is_dir():
                    continue
                files, seconds = worker.work(item.unit)
                _put(place, item.key, files, {"worker": name, "seconds": seconds, "facts": facts})
                done += 1
        except Exception as error:
            _tell(place, error)
            raise
        return done

    def checkpoint(self, items: Sequence[Item]) -> Any:
        """Before pre-emption: the same stretch again, of which only what is missing is done."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, items)


def _stretches(items: Sequence[Item], workers: int) -> list[list[Item]]:
    cuts = [round(len(items) * at / workers) for at in range(workers + 1)]
    return [list(items[low:high]) for low, high in itertools.pairwise(cuts) if high > low]


def _put(place: Path, key: str, files: Files, facts: Mapping[str, Any]) -> None:
    """Put the files of an item under its name by one rename; who comes second leaves the first."""
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place))
    for name, content in {**files, _FACTS: json.dumps(facts).encode()}.items():
        with (temporary / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    try:
        temporary.rename(place / key)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (place / key).is_dir():
            raise


def _read_facts(path: Path) -> tuple[str, float, dict[str, Any]]:
    told = json.loads(path.read_text(encoding="utf-8"))
    return told["worker"], told["seconds"], told["facts"]


_ERROR = ".error"


def _tell(place: Path, error: Exception) -> None:
    """Leave the words of an error of our own, which ends the run; any other is the node's and is tried again."""
    from dynprobe.errors import DynprobeError

    if isinstance(error, DynprobeError):
        text = json.dumps({"kind": type(error).__name__, "words": str(error)})
        (place / f"{_ERROR}-{content_key(text)}").write_text(text, encoding="utf-8")


def _read_error(place: Path) -> Exception | None:
    from dynprobe import errors

    for file in place.glob(f"{_ERROR}-*"):
        told = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        error: Exception = getattr(errors, told["kind"], EngineError)(told["words"])
        return error
    return None
