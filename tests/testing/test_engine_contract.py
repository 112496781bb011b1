"""The suite of engines: ours pass it, and each of its checks fails an engine that is wrong."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from dynprobe.engines import ENGINES, Done, Engine, Local, Seat
from dynprobe.engines._contract import Worker
from dynprobe.errors import SelfTestError
from dynprobe.testing import ENGINE_CHECKS, check_engine

SETTINGS = {"workers": 2, "worker_threads": 1, "address": None, "worker_gpus": None, "slurm": ("cluster=local",)}


@pytest.mark.long
def test_local_passes():
    assert check_engine(lambda folder: Local.made(SETTINGS, folder)) == ENGINE_CHECKS


@pytest.mark.long
@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_the_others_pass(name):
    pytest.importorskip("ray" if name == "ray" else "submitit")

    def make(folder: Any) -> Engine:
        if name == "slurm":
            return ENGINES["slurm"](2, folder=folder, cluster="local", poll_seconds=0.1, parameters={"timeout_min": 2})
        return ENGINES["ray"](2)

    assert check_engine(make) == ENGINE_CHECKS


class Here(Engine):
    """Does the work in this process, so that nothing can be killed: good enough for the checks that kill nothing."""

    name = "here"
    workers = 1

    def begin(self, job: Any) -> None:
        self.worker = Worker(Seat())
        self._joined("here", self.worker.open(job))

    def map(self, job: Any, items: Any) -> Iterator[Any]:
        self.begin(job)
        for item in items:
            yield self._did(Done(item, *self.worker.work(item.unit)[:1], "here", 0.0))

    def close(self) -> None:
        pass


HARMLESS = tuple(check for check in ENGINE_CHECKS if check != "killed")


@pytest.mark.parametrize("check", HARMLESS)
def test_as_an_author_writes_it(check):
    check_engine(lambda folder: Here(), only=check)


class Spoils(Here):
    def map(self, job: Any, items: Any) -> Iterator[Any]:
        for done in super().map(job, items):
            yield Done(done.item, {**done.files, "square": b"7"}, done.worker, done.seconds)


class Twice(Here):
    def map(self, job: Any, items: Any) -> Iterator[Any]:
        for done in super().map(job, items):
            yield from (done, done)


class Silent(Here):
    def facts(self) -> Any:
        return {"name": self.name, "workers": [], "lost": []}


class Stuck(Here):
    """Opens the first job and believes that every other one is it."""

    def begin(self, job: Any) -> None:
        if not hasattr(self, "first"):
            self.first = job
            super().begin(job)

    def map(self, job: Any, items: Any) -> Iterator[Any]:
        if hasattr(self, "first") and self.first is not job:
            return
        yield from super().map(job, items)


class Swallows(Here):
    def map(self, job: Any, items: Any) -> Iterator[Any]:
        try:
            yield from super().map(job, items)
        except Exception as error:
            raise RuntimeError(str(error)) from error


class SwallowsOpening(Here):
    def begin(self, job: Any) -> None:
        try:
            super().begin(job)
        except Exception:
            self.worker = None

    def map(self, job: Any, items: Any) -> Iterator[Any]:
        self.begin(job)
        return iter(())


class Deaf(Local):
    """Does what is asked and tells of no loss."""

    def facts(self) -> Any:
        return {**super().facts(), "lost": []}


WRONG = {
    "bytes": Spoils, "facts": Silent, "again": Stuck, "killed": lambda: Deaf(1, threads=1), "errors": Swallows,
    "opening": SwallowsOpening,
}  # fmt: skip


@pytest.mark.parametrize("check", ENGINE_CHECKS)
def test_each_check_fails_what_is_wrong(check):
    with pytest.raises(SelfTestError, match=rf"breaks the contract of engines \({check}\)"):
        check_engine(lambda folder: WRONG[check](), only=check)


def test_an_item_given_twice_is_found():
    with pytest.raises(SelfTestError, match="item 0 is given twice"):
        check_engine(lambda folder: Twice(), only="bytes")
    assert "dynprobe.testing._engine_jobs" in sys.modules
