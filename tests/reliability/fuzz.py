"""Bad input by the ten thousand: the targets, and ``python tests/reliability/fuzz.py`` for the long version.

A target takes bytes, makes of them what a user could hand to dynprobe (a spec, a settings file, a prompt file, a
trajectory, a manifest …), and lets dynprobe read it. Two outcomes are right: it is read, or it is refused by an error
of dynprobe's own. Anything else is bad: another exception, which the command line would show as a traceback; a case
that takes longer than :data:`SLOW` seconds; a value that is read back other than an independent reader reads it.

The long version guides the bytes by the branches they reach (``pip install atheris``), in a process per target. New
inputs that reach something new are kept in ``corpus/<target>``, bad ones in ``found/<target>``; both are read again by
the fast tests. Without atheris the same targets run on mutations of the corpus drawn at random.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_targets
from fuzz_targets import TARGETS

HERE = Path(__file__).parent
CORPUS, FOUND = HERE / "corpus", HERE / "found"
#: Seconds after which a case counts as a hang.
SLOW = 20
#: Longest input that is tried.
LONGEST = 4096


class HangError(BaseException):
    """A case took longer than :data:`SLOW` seconds."""


@dataclass(frozen=True)
class Bad:
    """A case with a wrong outcome."""

    target: str
    data: bytes
    what: str

    @property
    def name(self) -> str:
        """Name of its file: where it went wrong, so that one defect gives one file."""
        return hashlib.sha256(self.what.encode()).hexdigest()[:12]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`HangError` in the main thread after some seconds."""

    def ring(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def where_it_was(error: BaseException) -> str:
    """Kind of an error and the last line of dynprobe it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/dynprobe/" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.name}: {last.line}"


def tried(target: str, data: bytes, scratch: Path) -> Bad | None:
    """One case; None where its outcome is right."""
    from dynprobe.errors import DynprobeError

    fuzz_targets.load(target)  # an import is no hang
    try:
        with limited(SLOW), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[target](data, scratch)
    except DynprobeError as error:
        if not str(error).strip():
            return Bad(target, data, f"an empty message: {where_it_was(error)}")
    except HangError as error:
        return Bad(target, data, f"more than {SLOW} s: {where_it_was(error)}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return Bad(target, data, where_it_was(error))
    return None


def stored(folder: Path, target: str) -> list[bytes]:
    """Inputs kept for a target."""
    return [path.read_bytes() for path in sorted((folder / target).glob("*")) if path.is_file()]


def mutated(seeds: list[bytes], draw: random.Random) -> bytes:
    """One of the seeds with a few of its bytes changed, cut, doubled, or spliced with another."""
    data = bytearray(draw.choice(seeds) if seeds else draw.randbytes(draw.randint(0, 64)))
    for _ in range(draw.randint(1, 5)):
        at = draw.randint(0, len(data))
        match draw.randrange(5):
            case 0:
                data[at : at + 1] = draw.randbytes(1)
            case 1:
                del data[at : at + draw.randint(1, 8)]
            case 2:
                data[at:at] = draw.randbytes(draw.randint(1, 8))
            case 3:
                data[at:at] = data[at : at + draw.randint(1, 16)]
            case _:
                other = draw.choice(seeds) if seeds else b""
                data[at:] = other[draw.randint(0, len(other)) :]
    return bytes(data[:LONGEST])


def at_random(target: str, cases: int, seed: int, scratch: Path) -> tuple[int, dict[str, Bad]]:
    """Random mutations of the corpus."""
    draw, bad = random.Random(f"{target}/{seed}"), {}
    seeds = stored(CORPUS, target) + stored(FOUND, target) or fuzz_targets.seeds(target)
    for _ in range(cases):
        found = tried(target, mutated(seeds, draw), scratch)
        if found is not None:
            bad.setdefault(found.name, found)
    return cases, bad


def guided(target: str, cases: int, seed: int) -> None:
    """Inputs guided by the branches they reach, until so many were tried; ends the process."""
    import atheris

    from dynprobe.errors import DynprobeError

    with atheris.instrument_imports(include=list(fuzz_targets.MODULES[target]), enable_loader_override=False):
        fuzz_targets.load(target)
    own = Path(tempfile.mkdtemp(prefix="fuzz-"))
    scratch, corpus = own / "scratch", own / "corpus"
    scratch.mkdir()
    corpus.mkdir()
    for i, data in enumerate([*stored(CORPUS, target), *stored(FOUND, target), *fuzz_targets.seeds(target)]):
        (corpus / f"seed-{i:04d}").write_bytes(data)
    warm = fuzz_targets.seeds(target)[0]
    with suppress(DynprobeError):  # what is imported only now is no hang either
        TARGETS[target](warm, scratch)
    count, began = 0, time.perf_counter()

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        found = tried(target, data, scratch)
        if found is not None:
            keep(FOUND, found)
        if count >= cases:  # the library would leave without a word of how many there were
            print(f"FUZZED {target} {count} {time.perf_counter() - began:.1f} {corpus}", flush=True)
            os._exit(0)

    options = ["fuzz", "-runs=-1", f"-seed={seed + 1}", f"-max_len={LONGEST}", "-print_final_stats=0", "-verbosity=0"]
    atheris.Setup([*options, str(corpus)], one, enable_python_coverage=True)
    atheris.Fuzz()


def keep(folder: Path, found: Bad) -> None:
    """Store a bad case; the shortest of those that go wrong in one place."""
    path = folder / found.target / found.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or len(path.read_bytes()) > len(found.data):
        path.write_bytes(found.data)
        print(f"BAD {found.target} {found.name}: {found.what}", flush=True)


def smallest(target: str, inputs: list[bytes], scratch: Path, limit: int = 200) -> list[bytes]:
    """Of many inputs those that together reach every line the whole reaches, short ones first."""
    names = set(fuzz_targets.MODULES[target])
    seen: set[tuple[str, int]] = set()
    chosen = []

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_globals.get("__name__") not in names:
            return None
        if event == "line":
            now.add((frame.f_globals["__name__"], frame.f_lineno))
        return trace

    for data in sorted(inputs, key=len):
        now: set[tuple[str, int]] = set()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            tried(target, data, scratch)
        finally:
            sys.settrace(before)
        if now - seen and len(chosen) < limit:
            seen |= now
            chosen.append(data)
    return chosen


def main() -> int:
    """Fuzz every target; print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--cases", type=int, default=8000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=list(TARGETS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if args.one:
        guided(args.one, args.cases, args.seed)
        return 0
    rows = []
    for target in args.targets:
        before = {p.name for p in (FOUND / target).glob("*")}
        command = [sys.executable, __file__, "--one", target, "--cases", str(args.cases), "--seed", str(args.seed)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        line = next((t for t in done.stdout.splitlines() if t.startswith("FUZZED ")), None)
        if line is None:
            print(done.stdout[-2000:], done.stderr[-4000:])
            raise SystemExit(f"the process of {target} ended with {done.returncode}")
        _, _, cases, seconds, corpus = line.split(maxsplit=4)
        grown = [p.read_bytes() for p in Path(corpus).glob("*")]
        with tempfile.TemporaryDirectory() as scratch:
            chosen = smallest(target, grown, Path(scratch))
        shutil.rmtree(CORPUS / target, ignore_errors=True)
        (CORPUS / target).mkdir(parents=True)
        for data in chosen:
            (CORPUS / target / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
        shutil.rmtree(Path(corpus).parent, ignore_errors=True)
        bad = {p.name for p in (FOUND / target).glob("*")} - before
        told = [t for t in done.stdout.splitlines() if t.startswith("BAD ")]
        rows.append({"target": target, "cases": int(cases), "seconds": float(seconds), "bad": sorted(bad),
                     "kept": len(chosen), "exit": done.returncode})  # fmt: skip
        print(rows[-1], *told, sep="\n  ", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(any(row["bad"] or row["exit"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
