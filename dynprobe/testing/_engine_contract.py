"""Is an engine one? The promises that a run relies on, tried with real workers and work that needs no model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe.engines import Engine, Item, Job, content_key
from dynprobe.errors import PromptError
from dynprobe.testing._suite import Suite

__all__ = ["ENGINE_CHECKS", "check_engine"]

#: What is tried, in this order.
ENGINE_CHECKS = ("bytes", "facts", "again", "killed", "errors", "opening")


def check_engine(make: Callable[[Path], Engine], *, only: str | None = None) -> tuple[str, ...]:
    """Try whether an engine keeps the contract.

    ``bytes`` every item is done once and becomes the same bytes as in this process; ``facts`` who did what is told,
    once; ``again`` a second job, and the first one again, are done by the same engine; ``killed`` a worker that is
    killed costs no item, gives no item twice, and is told as lost; ``errors`` an error of an item is raised as it was,
    and the engine goes on after it; ``opening`` so is an error of opening a job.

    Args:
        make: ``make(folder)`` → a new engine; the folder is for what it shares between its workers.
        only: One check, by name.

    Returns:
        The checks that were made.

    Raises:
        SelfTestError: If one fails; the message says which and why.

    Example:
        >>> from dynprobe.engines import Local
        >>> check_engine(lambda folder: Local(1, threads=1), only="bytes")  # doctest: +SKIP
        ('bytes',)
    """
    with tempfile.TemporaryDirectory() as folder:
        return _Suite(make, Path(folder)).run(only)


class _Suite(Suite):
    kind, checks = "engines", ENGINE_CHECKS

    def __init__(self, make: Callable[[Path], Engine], folder: Path) -> None:
        self._make, self._folder, self._count = make, folder, 0

    def engine(self) -> Engine:
        self._count += 1
        engine = self._make(self._folder / f"shared-{self._count}")
        self.name = getattr(engine, "name", type(engine).__name__)
        return engine

    def job(self, **payload: Any) -> Job:
        self._count += 1
        scratch = self._folder / f"scratch-{self._count}"
        scratch.mkdir()
        payload = {"scratch": str(scratch), **payload}
        key = content_key({name: str(value) for name, value in payload.items()})
        return Job("dynprobe.testing._engine_jobs:open_job", payload, key)

    def items(self, n: int) -> list[Item]:
        return [Item(number, number, content_key("item", number)) for number in range(n)]

    def done(self, check: str, engine: Engine, job: Job, items: Sequence[Item]) -> dict[int, Mapping[str, bytes]]:
        """Items by number, each done once, with the bytes that this process makes of them."""
        found: dict[int, Mapping[str, bytes]] = {}
        for done in engine.map(job, items):
            if done.item.number in found:
                self.fail(check, f"item {done.item.number} is given twice")
            found[done.item.number] = {name: bytes(data) for name, data in done.files.items()}
        if missing := {item.number for item in items} - set(found):
            self.fail(check, f"{len(missing)} of {len(items)} items are never given, {min(missing)} among them")
        for item in items:
            wanted = {"square": str(item.unit**2).encode(), "bytes": bytes(range(256)) * (item.unit + 1)}
            if found[item.number] != wanted:
                self.fail(check, f"item {item.number} becomes other bytes than in this process")
        return found

    # The checks

    def bytes(self) -> None:
        job = self.job()
        with self.engine() as engine:
            self.done("bytes", engine, job, self.items(5))

    def facts(self) -> None:
        with self.engine() as engine:
            self.done("facts", engine, self.job(), self.items(4))
            told, again = engine.facts(), engine.facts()
        if told.get("name") != engine.name or sum(worker.get("items", 0) for worker in told["workers"]) != 4:
            self.fail("facts", f"4 items were done, and it tells {told}")
        if again["workers"] or told["lost"]:
            self.fail("facts", "it tells the work of before again, or workers as lost that were not")

    def again(self) -> None:
        first, second = self.job(), self.job()
        with self.engine() as engine:
            for job in (first, second, first):
                self.done("again", engine, job, self.items(3))

    def killed(self) -> None:
        job = self.job(deadly={2: 1})
        with self.engine() as engine:
            self.done("killed", engine, job, self.items(4))
            lost = engine.facts()["lost"]
        if not lost:
            self.fail("killed", "a worker was killed, and none is told as lost")

    def errors(self) -> None:
        with self.engine() as engine:
            self._raises("errors", engine, self.job(wrong=1), "unit 1 has no prompt")
            self.done("errors", engine, self.job(), self.items(2))

    def opening(self) -> None:
        with self.engine() as engine:
            self._raises("opening", engine, self.job(broken=True), "nothing to open")
            self.done("opening", engine, self.job(), self.items(2))

    def _raises(self, check: str, engine: Engine, job: Job, words: str) -> None:
        try:
            engine.begin(job)
            list(engine.map(job, self.items(3)))
        except PromptError as error:
            if words not in str(error):
                self.fail(check, f"the error said {words!r}, and what comes back says {error}")
        except Exception as error:
            self.fail(check, f"a PromptError comes back as {type(error).__name__}: {error}")
        else:
            self.fail(check, "an error of a worker does not come back")
