"""The falsification log: append-only, every line chained to the one before.

A prediction is worth something if it was made before the data. So a test appends a ``registered`` record first, with
the prediction, the analysis plan and the hash of both, and only then runs anything; the ``outcome`` record follows with
the hash of the data and the verdict, whichever way it fell. Nothing is ever taken back: a later test of the same claim
is a new pair of records that names the one it supersedes.

The file is JSON lines. Each line holds the SHA-256 of the line before (``prev``) and of itself (``hash``), and a small
file beside the log (``NAME.head``) holds the last hash and the number of lines, so that an edited, inserted or removed
line is found, the last one too. That is protection against accidents and second thoughts, not against somebody who
rewrites both files whole; for that, put the head's hash where it cannot be changed (a commit, a preprint).

Writers take a lock (``NAME.lock``), check the chain, append, and sync to the device; a broken chain is never added to.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from dynprobe.errors import DynprobeError
from dynprobe.runs._json import dumps

__all__ = ["PILOT_FILE", "ClaimLog", "LogError", "Problem", "history", "plan_hash"]

Kind = Literal["registered", "outcome", "pilot"]
#: The records that come with the package.
PILOT_FILE = Path(__file__).with_name("pilot.jsonl")
#: What stands before the first line.
GENESIS = "0" * 64
_WAIT = 20.0
_FIELDS = (
    "id", "kind", "date", "claim", "test", "statement", "metric_ids", "panel", "prediction", "plan", "plan_hash",
    "data_hash", "outcome", "effect", "low", "high", "n", "deviations", "supersedes",
)  # fmt: skip


class LogError(DynprobeError):
    """The falsification log is damaged, or cannot be written."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a log: the line (from 1; 0 for the log as a whole) and what."""

    line: int
    what: str


def plan_hash(plan: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a plan, whatever the order of its keys.

    Example:
        >>> plan_hash({"a": 1, "b": 2}) == plan_hash({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(dumps(dict(plan), sort_keys=True).encode()).hexdigest()


class ClaimLog:
    """One log file.

    Args:
        path: The file; it need not exist yet.
        clock: Returns the time.
    """

    def __init__(self, path: str | Path, clock: Callable[[], dt.datetime] | None = None) -> None:
        self.path = Path(path)
        self._clock = clock or (lambda: dt.datetime.now(dt.UTC))

    @property
    def head_path(self) -> Path:
        """The file that holds the last hash."""
        return self.path.with_name(self.path.name + ".head")

    def records(self) -> list[dict[str, Any]]:
        """Return all records.

        Raises:
            LogError: A line is no JSON object.
        """
        out = []
        for number, line in enumerate(self._lines(), 1):
            record = _parsed(line)
            if record is None:
                raise LogError(f"{self.path}, line {number} is no record; `dynprobe claims log --verify` says more.")
            out.append(record)
        return out

    def append(self, kind: Kind, **fields: Any) -> dict[str, Any]:
        """Append one record and return it as written.

        Args:
            kind: ``registered``, ``outcome`` or ``pilot``.
            **fields: Fields of the record; those left out are null, but a registration without ``test`` gets the next
                number.

        Raises:
            LogError: The chain is broken, an unknown field, or another process holds the log.
        """
        unknown = sorted(set(fields) - set(_FIELDS))
        if unknown:
            raise LogError(f"a record of the log has no field {unknown[0]!r}; it has {', '.join(_FIELDS)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(str(self.path) + ".lock", timeout=_WAIT):
                return self._append(kind, fields)
        except Timeout as error:
            raise LogError(f"{self.path} is being written by another process; try again") from error

    def verify(self) -> list[Problem]:
        """Return everything that is wrong with the log; an empty list where nothing is."""
        return _problems(self._lines(), self._head(), torn=self._torn())

    def check(self) -> None:
        """Refuse a log that does not hold together.

        Raises:
            LogError: What is wrong first, and what to do.
        """
        wrong = self.verify()
        if wrong:
            raise LogError(
                f"{self.path}: {wrong[0].what} (line {wrong[0].line}); nothing is appended to a log that does not hold "
                "together. Keep the file, and begin a new one with --log FILE."
            )

    def _append(self, kind: Kind, fields: Mapping[str, Any]) -> dict[str, Any]:
        self.check()
        lines = self._lines()
        record: dict[str, Any] = dict.fromkeys(_FIELDS)
        record |= {"id": f"{kind[:1]}{len(lines) + 1:04d}", "date": self._clock().isoformat(), **fields, "kind": kind}
        if kind == "registered" and record["test"] is None:  # numbered here, under the lock
            record["test"] = f"T{sum((_parsed(line) or {}).get('kind') == 'registered' for line in lines) + 1:04d}"
        record["prev"] = _parsed(lines[-1])["hash"] if lines else GENESIS  # type: ignore[index]
        record["hash"] = _hash(record)
        fault = _meaning(record, [_parsed(line) or {} for line in lines])
        if fault is not None:
            raise LogError(f"{self.path}: {fault}")
        if not lines:  # so that a cut between line and head leaves a log that can go on
            _write_synced(self.head_path, dumps({"hash": GENESIS, "lines": 0}) + "\n")
        with self.path.open("ab") as file:
            file.write(dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        _write_synced(self.head_path, dumps({"hash": record["hash"], "lines": len(lines) + 1}) + "\n")
        return record

    def _lines(self) -> list[str]:
        if not self.path.exists() or not self.path.stat().st_size:
            return []
        # Not splitlines: a text may hold separators such as U+2028 that end no record.
        return self.path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")

    def _torn(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")

    def _head(self) -> dict[str, Any] | None:
        try:
            found = _parsed(self.head_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found if found is not None else {}


def history() -> list[dict[str, Any]]:
    """Return the records that come with the package: the pilot that chose the definitions, before this log existed.

    Example:
        >>> [(r["id"], r["outcome"]) for r in history()]
        [('F1', 'survived'), ('F2', 'falsified'), ('F3', 'falsified'), ('F4', 'falsified')]
    """
    return ClaimLog(PILOT_FILE).records()


def _problems(lines: Sequence[str], head: Mapping[str, Any] | None, torn: bool) -> list[Problem]:
    out: list[Problem] = []
    prev, hashes = GENESIS, [GENESIS]
    earlier: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if record is None or "hash" not in record or "prev" not in record:
            out.append(Problem(number, "is no record"))
            prev = ""
            continue
        if _hash(record) != record["hash"]:
            out.append(Problem(number, "was edited: its content does not have its hash"))
        if record["prev"] != prev:
            out.append(Problem(number, "does not follow the line before: one was removed, inserted or edited"))
        fault = _meaning(record, earlier)
        if fault is not None:
            out.append(Problem(number, fault))
        prev = record["hash"]
        hashes.append(prev)
        earlier.append(record)
    if torn:
        out.append(Problem(len(lines), "is not whole: the last write was cut"))
    if lines and head is None:
        out.append(Problem(0, "the head file is gone, so the end of the log cannot be checked"))
    elif head is not None and head.get("hash") not in hashes:
        out.append(Problem(0, f"the last record is gone: the head names line {head.get('lines')}, which is not there"))
    elif head is not None and hashes.index(str(head["hash"])) != head.get("lines"):
        out.append(Problem(0, f"the head counts {head.get('lines')} lines at a record that is another"))
    return out


def _meaning(record: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> str | None:
    """What a record says that cannot be: an outcome without a plan made before it, a plan that is not its hash."""
    same = [r for r in earlier if r.get("kind") == record.get("kind") and r.get("test") == record.get("test")]
    if record.get("kind") == "registered" and plan_hash(record.get("plan") or {}) != record.get("plan_hash"):
        return "registers a plan that does not have its hash"
    if record.get("kind") == "registered" and same:
        return f"registers the test {record.get('test')} a second time"
    if record.get("kind") == "outcome":
        mine = [r for r in earlier if r.get("kind") == "registered" and r.get("test") == record.get("test")]
        if same:
            return f"is a second outcome of the test {record.get('test')}; another try is another registration"
        if not mine:
            return "is an outcome whose prediction was not registered before it"
        if mine[-1].get("plan_hash") != record.get("plan_hash"):
            return "is an outcome of another plan than the registered one"
    return None


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(dumps({k: v for k, v in record.items() if k != "hash"}, sort_keys=True).encode()).hexdigest()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
