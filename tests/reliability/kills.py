"""Studies that are killed and continued: the harness, and ``python tests/reliability/kills.py`` for the long version.

A study runs in a child process of its own. It is killed with SIGKILL either at a random moment, or just before or after
one of its calls of ``os.fsync``, ``os.replace`` and ``os.rename``. After every kill whatever is visible must be whole:
each listed part opens and has its checksum, and no row of an unfinished batch is seen. Then the same call is made
again; at the end every table must equal, byte for byte, what an uninterrupted study wrote.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dynprobe as dp

#: Small studies of a zoo model with several batches each.
STUDIES: dict[str, Callable[[Path], Any]] = {
    "run": lambda out: dp.run(
        "tiny-llama", limit=4, batch_size=1, max_new_tokens=3, perturb="alpha=0.2", states=True, where="layers=-1",
        out=out, quiet=True,
    ),
    "sweep": lambda out: dp.sweep(
        "tiny-llama", layers="all", alphas="0.1,1", limit=2, batch_size=1, tables="all", out=out, quiet=True
    ),
    "recover": lambda out: dp.recover(
        "tiny-llama", mode="slerp", perturb="alpha=0.6,layers=2,phase=decode", limit=2, batch_size=1,
        max_new_tokens=4, decode="forced", out=out, quiet=True,
    ),
}  # fmt: skip

_FORK = multiprocessing.get_context("fork")


@dataclass
class Tally:
    """What happened to one study."""

    study: str
    moments: str
    killed: int = 0
    #: Children that had ended by themselves when the signal came.
    too_late: int = 0
    #: Kills that left a folder in which a run could be seen.
    visible: int = 0
    bad: list[str] = field(default_factory=list)


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all parts of a finished run by path, after each file was read and compared with its own."""
    run = dp.open(folder)
    run.verify()
    return {part.path: part.sha256 for part in run.manifest.parts}


def visible(out: Path) -> list[Path]:
    """Run folders under ``out`` that a reader would find."""
    return [p.parent for p in out.glob("*/manifest.json") if not p.parent.name.startswith(".")]


def half_seen(folder: Path) -> str:
    """What is wrong with an interrupted run; an empty text where every visible row belongs to a finished batch."""
    run = dp.open(folder)
    run.verify()
    batches = {part.batch for part in run.manifest.parts} - {None}
    if not batches <= set(run.manifest.finished):
        return f"parts of batches {sorted(batches - set(run.manifest.finished))} are listed and not finished"
    plan = run.manifest.batch_plan
    if isinstance(plan, list) and len(run.manifest.finished) > len(plan):
        return "more batches are finished than were planned"
    return ""


def child(study: str, out: Path, cut: tuple[int, bool] | None = None) -> None:
    """Do the study; with ``cut`` kill this process at the n-th call that touches the disk, before or after it."""
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if cut is not None:
        arm(*cut)
    STUDIES[study](out)


def suicide() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(at: int, after: bool, counted: Any = None, do: Callable[[], Any] = suicide) -> None:
    """Count the calls of ``fsync``, ``replace`` and ``rename``; at number ``at`` do something, by default die."""
    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if counted is not None:
                counted.value = calls
            now = calls
            if now == at and not after:
                do()
            result = function(*args, **kwargs)
            if now == at:
                do()
            return result

        return wrapped

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, wrap(getattr(os, name)))


def count_boundaries(study: str, out: Path) -> int:
    """Calls that touch the disk in an uninterrupted study."""
    counted = _FORK.Value("i", 0)

    def work() -> None:
        arm(-1, False, counted)
        child(study, out)

    process = _FORK.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0, f"the uninterrupted {study} ended with {process.exitcode}"
    return int(counted.value)


def attempt(study: str, out: Path, cut: tuple[int, bool] | None = None, seconds: float | None = None) -> int:
    """One try in a child process, killed at a boundary or after some seconds; returns its exit code."""
    process = _FORK.Process(target=child, args=(study, out, cut))
    process.start()
    if seconds is not None:
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join(300)
    if process.is_alive():
        process.kill()
        return 99
    return process.exitcode or 0


class Kills:
    """One study with its uninterrupted twin."""

    def __init__(self, study: str, scratch: Path, tell: Callable[[Tally], object] = lambda _: None) -> None:
        self.study, self.scratch, self.tell = study, scratch, tell
        STUDIES[study](scratch / "warm")  # imports and caches: forked children then do nothing but the study
        began = time.perf_counter()
        assert attempt(study, scratch / "whole") == 0
        self.seconds = time.perf_counter() - began
        (folder,) = visible(scratch / "whole")
        self.whole = contents(folder)

    def random_moments(self, kills: int, seed: int) -> Tally:
        """Kill at random moments, one to three times in the life of a study."""
        draw, tally = random.Random(seed), Tally(self.study, "random")
        while tally.killed < kills:
            with tempfile.TemporaryDirectory(dir=self.scratch) as out:
                for _ in range(min(draw.randint(1, 3), kills - tally.killed)):
                    moment = draw.uniform(0, self.seconds)
                    code = attempt(self.study, Path(out), seconds=moment)
                    self._after(tally, Path(out), code, f"seed {seed}, after {moment:.3f} s")
                self._ended(tally, Path(out), f"seed {seed}, kill {tally.killed}")
        return tally

    def boundaries(self, step: int = 1) -> Tally:
        """Kill before and after every ``step``-th call that touches the disk."""
        tally = Tally(self.study, "boundaries")
        total = count_boundaries(self.study, self.scratch / "count")
        for at in range(1, total + 1, step):
            for after in (False, True):
                with tempfile.TemporaryDirectory(dir=self.scratch) as out:
                    code = attempt(self.study, Path(out), cut=(at, after))
                    self._after(tally, Path(out), code, f"call {at} of {total}, {'after' if after else 'before'}")
                    self._ended(tally, Path(out), f"call {at} of {total}, {'after' if after else 'before'}")
        return tally

    def _after(self, tally: Tally, out: Path, code: int, when: str) -> None:
        """Look at what a killed child left."""
        if code == -signal.SIGKILL:
            tally.killed += 1
        elif code == 0:
            tally.too_late += 1
        else:
            tally.bad.append(f"{when}: the study ended with {code}")
        for folder in visible(out):
            tally.visible += 1
            try:
                wrong = half_seen(folder)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                tally.bad.append(f"{when}: {wrong}")

    def _ended(self, tally: Tally, out: Path, when: str) -> None:
        """Continue to the end and compare."""
        code = attempt(self.study, out)
        folders = visible(out)
        if code != 0 or len(folders) != 1:
            tally.bad.append(f"{when}: continuing ended with {code} and left {len(folders)} runs")
            return
        try:
            found = contents(folders[0])
        except Exception as error:
            tally.bad.append(f"{when}: {type(error).__name__}: {error}")
            return
        different = sorted(p for p in found.keys() | self.whole.keys() if found.get(p) != self.whole.get(p))
        if different:
            tally.bad.append(f"{when}: {different[:4]} differ from the uninterrupted study")
        leftovers = [str(p.relative_to(out)) for p in out.rglob(".tmp-*")]
        if leftovers:
            tally.bad.append(f"{when}: {leftovers[:3]} were left")
        self.tell(tally)


def main() -> int:
    """Print a line for each study and write the tallies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=70, help="at random moments, of each study")
    parser.add_argument("--step", type=int, default=1, help="kill at every step-th boundary; 0: none")
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tallies: list[Tally] = []

    def tell(tally: Tally) -> None:
        """Write down how far it is: a long version that is stopped has its figures."""
        if not any(known is tally for known in tallies):
            tallies.append(tally)
        if args.json:
            args.json.write_text(json.dumps([asdict(t) for t in tallies], indent=1), encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        for study in args.studies:
            kills = Kills(study, Path(scratch) / study, tell)
            print(f"{study}: {kills.seconds:.2f} s alone", flush=True)
            if args.step:
                print(kills.boundaries(args.step), flush=True)
            print(kills.random_moments(args.kills, args.seed), flush=True)
    return int(any(t.bad for t in tallies))


if __name__ == "__main__":
    raise SystemExit(main())
