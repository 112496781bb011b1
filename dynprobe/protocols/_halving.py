"""Do a unit of work in as many parts as memory asks for.

Units are planned once and stored, so they are the same on every machine; how many of a unit's rows go through the
model together is decided here, at the moment when it is done. A unit that would not fit by the memory plan is cut
before it is begun; one that runs out of memory all the same is halved and redone, down to single rows, and the smaller
size is kept for the units that follow. Noise, sampling and metrics belong to a row and not to its batch, so the parts
of a unit hold the rows that the whole would have held, within the batch's arithmetic noise; the tables are joined, and
what was cut stands in the events and in the facts of the batch.

A unit whose rows learn from each other (one posterior over all prompts, a memory that goes from text to text) has no
parts. An experiment says so by giving no rows for it, and then memory that runs out is an error at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import pandas as pd
import torch

from dynprobe.probes._chunks import halving, out_of_memory
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._memory import MemoryPlan, held, memory_plan, rows_fitting, too_large
from dynprobe.protocols._prepare import Prepared

__all__ = ["Divisible", "Halving", "in_parts", "joined", "state_bytes"]

Made = TypeVar("Made")
Early = Callable[[pd.DataFrame], None] | None


@runtime_checkable
class Divisible(Protocol):
    """An experiment whose units can be done in parts."""

    def rows_of(self, unit: Any) -> Sequence[int]:
        """Return the prompts of a unit; none where it has no parts."""

    def with_rows(self, unit: Any, rows: Sequence[int]) -> Any:
        """Return the unit of some of its prompts."""


class _Works(Protocol):
    def work(self, unit: Any, early: Early) -> Produced:
        """Do one unit."""


class Halving:
    """Does the units of an experiment in parts that fit into memory.

    Args:
        ready: What is known before the run.
        experiment: The experiment; one that is not :class:`Divisible` is done in whole units.
        note: Told of every cut, as ``note("halved", rows=…, kept=…)``; a run's ``writer.event``.
        sharers: Workers that share what is free.

    Attributes:
        most: Rows that go together at most; None while nothing was too large.
        kept: Bytes that a token of a finished unit holds until it is on the disk: of states by count, of tables as
            found in the units before.
    """

    def __init__(
        self, ready: Prepared, experiment: _Works, note: Callable[..., object] = lambda *_, **__: None,
        sharers: int = 1,
    ) -> None:  # fmt: skip
        self.ready, self.experiment, self.note, self.sharers = ready, experiment, note, sharers
        self.most: int | None = None
        self.kept = state_bytes(ready)

    def plan(self, units: Sequence[Any]) -> MemoryPlan:
        """Say what the largest unit needs and what is free."""
        lengths = [self.lengths(self._rows(unit)) for unit in units]
        return memory_plan(
            self.ready.subject, lengths, generated=self._writes, kept=self.kept, sharers=self.sharers
        )  # fmt: skip

    def work(self, unit: Any, early: Early = None) -> Produced:
        """Do one unit, in parts where it does not fit whole.

        Args:
            unit: From the experiment's plan.
            early: Wants the first samples as soon as there are any; told once.

        Raises:
            ModelError: If one row alone, or a unit that has no parts, does not fit.
        """
        rows, tell = self._rows(unit), _Once(early)
        if not rows:
            return self._whole(unit, tell)
        size = min(len(rows), self.most or len(rows), self.fitting(rows))
        cut: list[int] = []

        def part(some: Sequence[int]) -> Produced:
            whole = len(some) == len(rows)
            made = self.experiment.work(
                unit if whole else self.experiment.with_rows(unit, some),  # type: ignore[attr-defined]
                tell.asked,
            )
            tell.done()
            return made

        def halved(tried: int) -> None:
            cut.append(tried)
            self.most = max(tried // 2, 1)
            self.note("halved", rows=tried, kept=self.most, why="out of memory")

        if size < min(len(rows), self.most or len(rows)):
            self.note("cut", rows=len(rows), kept=size, why="memory plan")
        try:
            parts = list(halving(rows, size, part, halved))
        except MemoryError as error:
            raise too_large(self.ready.subject, self.lengths(rows)) from error
        made = parts[0] if len(parts) == 1 else joined(parts)
        found = held([*made.tables.values(), *(keys for keys, _ in made.states)], [values for _, values in made.states])
        self.kept = max(self.kept, found / max(sum(self.lengths(rows)), 1))
        if len(parts) == 1:
            return made
        made.facts |= {"parts": len(parts), **({"halved_rows": cut} if cut else {})}
        return made

    def _whole(self, unit: Any, tell: _Once) -> Produced:
        try:
            return self.experiment.work(unit, tell.asked)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failed = error
        raise too_large(self.ready.subject, self.lengths(range(len(self.ready.rows))), whole=True) from failed

    def _rows(self, unit: Any) -> Sequence[int]:
        return self.experiment.rows_of(unit) if isinstance(self.experiment, Divisible) else ()

    @property
    def _writes(self) -> bool:
        return self.ready.config.max_new_tokens > 0

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of prompts with what is written after them."""
        return [len(self.ready.rows[i]) + self.ready.config.max_new_tokens for i in rows]

    def fitting(self, rows: Sequence[int]) -> int:
        """How many of some rows go together, by the count."""
        return rows_fitting(
            self.ready.subject, len(rows), max(self.lengths(rows)), generated=self._writes, kept=self.kept,
            sharers=self.sharers,
        )  # fmt: skip


def state_bytes(ready: Prepared) -> float:
    """Return the bytes of the states of one token that a run writes, over all arms that are stored."""
    if not ready.saved:
        return 0.0
    config, subject = ready.config, ready.subject
    item = torch.empty(0, dtype=subject.state_dtype or subject.dtype).element_size()
    arms = 1 + bool(ready.perturbs) * (1 + (config.max_new_tokens > 0))
    return float(arms * config.num_samples * len(ready.saved) * subject.width * item)


def in_parts(ready: Prepared, rows: Sequence[int], work: Callable[[Sequence[int]], Made]) -> Iterator[Made]:
    """Yield what ``work`` makes of prompts, in parts that fit: for what is found out before the first unit.

    Args:
        ready: What is known before the run.
        rows: Numbers of the prompts.
        work: Does some of them.

    Raises:
        ModelError: If one row alone does not fit.
    """
    alone = Halving(ready, _Nothing())
    try:
        yield from halving(rows, alone.fitting(rows), work)
    except MemoryError as error:
        raise too_large(ready.subject, alone.lengths(rows)) from error


class _Nothing:
    def work(self, unit: Any, early: Early) -> Produced:
        """Make nothing."""
        return Produced({})


class _Once:
    """Tells a listener of the first samples, and of no others when they are made again."""

    def __init__(self, early: Early) -> None:
        self._early = early

    @property
    def asked(self) -> Early:
        return None if self._early is None else self._tell

    def _tell(self, samples: pd.DataFrame) -> None:
        if self._early is not None:
            self._early(samples)
        self.done()

    def done(self) -> None:
        self._early = None


def joined(parts: Sequence[Produced]) -> Produced:
    """Join what the parts of a unit gave: rows under each other, facts that agree as one, others in a list.

    Example:
        >>> a = Produced({"samples": pd.DataFrame({"x": [1]})}, facts={"roads": [1], "deep": True})
        >>> b = Produced({"samples": pd.DataFrame({"x": [2]})}, facts={"roads": [2], "deep": True})
        >>> made = joined([a, b])
        >>> made.tables["samples"]["x"].tolist(), made.facts
        ([1, 2], {'roads': [1, 2], 'deep': True})
    """
    names = dict.fromkeys(name for part in parts for name in part.tables)
    tables = {
        name: pd.concat([part.tables[name] for part in parts if name in part.tables], ignore_index=True)
        for name in names
    }
    facts = {name: _together([p.facts[name] for p in parts if name in p.facts]) for name in _names(parts)}
    return Produced(tables, [pair for part in parts for pair in part.states], facts)


def _names(parts: Sequence[Produced]) -> Mapping[str, None]:
    return dict.fromkeys(name for part in parts for name in part.facts)


def _together(values: Sequence[Any]) -> Any:
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    return values[0] if all(value == values[0] for value in values) else list(values)
