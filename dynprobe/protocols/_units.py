"""Working through the units of a plan, here or in the workers of an engine, and writing what each becomes.

Units that need nothing of each other are written behind the work and may be spread. A protocol whose later units read
what earlier ones wrote goes one by one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd

from dynprobe.engines import Engine, Item, Job, content_key
from dynprobe.errors import RunFolderError
from dynprobe.probes import Subject
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._behind import Behind
from dynprobe.protocols._token_text import TokenTexts
from dynprobe.runs import RunWriter
from dynprobe.runs._pack import events_in

__all__ = ["Counts", "Works", "complete_tables", "spread", "work_through"]


class Works(Protocol):
    """What does a unit."""

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Do one unit; ``early`` wants the first samples as soon as there are any."""


@dataclass
class Counts:
    """How far a run is: batches finished in all, rows and token rows made here, and whether the disk holds it up."""

    done: int
    total: int
    rows: int = 0
    tokens: int = 0
    disk_bound: bool = False
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the units began."""
        return time.perf_counter() - self.started


def complete_tables(tables: Mapping[str, pd.DataFrame], texts: TokenTexts) -> dict[str, pd.DataFrame]:
    """Return the tables of a unit with what every protocol stores: the text of each token."""
    return {name: texts.into(rows) if name == "tokens" else rows for name, rows in tables.items()}


def work_through(
    writer: RunWriter,
    subject: Subject,
    experiment: Works,
    tell: Callable[[Counts], None],
    early: Callable[[pd.DataFrame], None] | None,
    *,
    independent: bool = False,
) -> Counts:
    """Do the units that are left in this process.

    Args:
        writer: The open run.
        subject: The subject.
        experiment: What does a unit.
        tell: Told after every unit.
        early: Wants the first samples.
        independent: Whether a unit reads nothing that another one wrote, so that it need not wait for the disk.
    """
    units = writer.manifest.batch_plan
    assert isinstance(units, list)
    finished = writer.finished
    counts = Counts(len(finished), len(units))
    texts, dtype = TokenTexts(subject.tokenizer), str(subject.dtype).removeprefix("torch.")

    def write(number: int, made: Produced, seconds: float) -> None:
        for keys, states in made.states:
            writer.write_states(number, keys, states, dtype)
        writer.write_batch(number, complete_tables(made.tables, texts), facts=made.facts or None)
        writer.event("batch", number=number, rows=len(made.tables.get("samples", ())), seconds=round(seconds, 3))

    with Behind() as behind:
        for number, unit in enumerate(units):
            if number in finished:
                continue
            begun = time.perf_counter()
            made = experiment.work(unit, early)
            early = None
            seconds = time.perf_counter() - begun
            if independent:
                behind.put(lambda number=number, made=made, seconds=seconds: write(number, made, seconds))  # type: ignore[misc]
            else:
                write(number, made, seconds)
            counts.done += 1
            counts.rows += len(made.tables.get("samples", ()))
            counts.tokens += len(made.tables.get("tokens", ()))
            counts.disk_bound = behind.disk_bound
            tell(counts)
    if behind.disk_bound:
        writer.event("disk-bound", seconds=round(behind.waited, 2))
    return counts


def spread(writer: RunWriter, engine: Engine, job: Job, tell: Callable[[Counts], None]) -> Counts:
    """Do the units that are left in the workers of an engine, and record who did them.

    Args:
        writer: The open run.
        engine: The engine; it stays open.
        job: What its workers open.
        tell: Told after every unit.
    """
    units = writer.manifest.batch_plan
    assert isinstance(units, list)
    finished = writer.finished
    items = [Item(n, unit, content_key(job.key, n, unit)) for n, unit in enumerate(units) if n not in finished]
    engine.begin(job)
    counts = Counts(len(finished), len(units))
    recorded = list((writer.manifest.model_extra or {}).get("engine") or [])

    def write(number: int, files: Mapping[str, bytes], worker: str, seconds: float) -> None:
        rows = writer.write_files(number, files)
        for told in events_in(files):
            writer.event(**{**told, "number": number, "worker": worker})
        writer.event("batch", number=number, rows=rows.get("samples", 0), seconds=round(seconds, 3), worker=worker)
        counts.rows += rows.get("samples", 0)
        counts.tokens += rows.get("tokens", 0)

    def record() -> None:
        writer.update(engine=[*recorded, {**engine.facts(), "seconds": round(counts.seconds, 3)}])

    try:
        # Closed at once whatever happens: half-read answers must not meet the next call of an engine that stays open.
        with Behind() as behind, contextlib.closing(engine.map(job, items)) as found:
            for done in found:
                behind.put(lambda d=done: write(d.item.number, d.files, d.worker, d.seconds))  # type: ignore[misc]
                counts.done += 1
                counts.disk_bound = behind.disk_bound
                tell(counts)
    except BaseException:
        with contextlib.suppress(RunFolderError):  # a full disk was the error perhaps; it is the one to be seen
            record()
        raise
    if behind.disk_bound:
        writer.event("disk-bound", seconds=round(behind.waited, 2))
    record()
    return counts
