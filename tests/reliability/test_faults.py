"""Disks that are full, broken or read-only, clocks that go back, two processes on one folder, signals, no memory."""

from __future__ import annotations

import ctypes
import datetime as dt
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kills
import pytest
import torch

import dynprobe as dp
from dynprobe.cli import main
from dynprobe.errors import DynprobeError, InterruptedRunError, ModelError
from dynprobe.protocols._halving import Halving
from dynprobe.runs import _start, examine, list_runs
from dynprobe.testing import tiny_llama

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="children are forked, which this system cannot"
)

_FORK = multiprocessing.get_context("fork")
#: The studies of :mod:`kills`, as they are typed.
WORDS = {
    "run": "run --model tiny-llama --limit 4 --batch-size 1 --max-new-tokens 3 --perturb alpha=0.2 --states "
           "--where layers=-1",
    "sweep": "sweep --model tiny-llama --layers all --alphas 0.1,1 --limit 2 --batch-size 1 --tables all",
    "recover": "recover --model tiny-llama --mode slerp --perturb alpha=0.6,layers=2,phase=decode --limit 2 "
               "--batch-size 1 --max-new-tokens 4 --decode forced",
}  # fmt: skip


def studies() -> list[Any]:
    """All of them; one in the ordinary suite."""
    return [s if s == "run" else pytest.param(s, marks=pytest.mark.long) for s in kills.STUDIES]


def plain(out: Path) -> Any:
    """A run without states, for which no room is asked beforehand."""
    return dp.run("tiny-llama", limit=4, batch_size=1, max_new_tokens=0, out=out, quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each study with its uninterrupted twin, made when it is first asked for."""
    made: dict[str, kills.Kills] = {}

    def of(study: str) -> kills.Kills:
        if study not in made:
            made[study] = kills.Kills(study, tmp_path_factory.mktemp(study))
        return made[study]

    return of


def told(work: Callable[[], Any]) -> tuple[int, str]:
    """Do something in a child; return the exit code it would leave with, and what it says."""
    ours, theirs = _FORK.Pipe()

    def child() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            work()
        except DynprobeError as error:
            theirs.send((error.exit_code, str(error)))
        except BaseException as error:  # whatever it is, the test wants to see it
            theirs.send((99, f"{type(error).__name__}: {error}"))
        else:
            theirs.send((0, ""))

    process = _FORK.Process(target=child)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return process.exitcode or 98, "it ended without a word"
    finally:
        process.join(60)


def stands(study: kills.Kills, out: Path) -> None:
    """What is visible is whole, and the same call ends with the right bytes and nothing temporary."""
    for folder in kills.visible(out):
        assert kills.half_seen(folder) == ""
    tally = kills.Tally(study.study, "fault")
    study._ended(tally, out, "after the fault")
    assert tally.bad == []


# Disks


@pytest.mark.parametrize("study", studies())
@pytest.mark.parametrize(("code", "at"), [(errno.ENOSPC, 40), (errno.EIO, 65)], ids=["full", "broken"])
def test_a_disk_that_fails_in_the_middle(study, code, at, whole, tmp_path):
    fails_at(whole(study), tmp_path / "out", at, code)


def fails_at(study: kills.Kills, out: Path, at: int, code: int) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    def work() -> None:
        kills.arm(at, False, do=fail)
        kills.STUDIES[study.study](out)

    exit_code, said = told(work)
    assert exit_code == 1, said
    for words in (os.strerror(code), str(out), "--out FOLDER"):
        assert words in said, f"at call {at}: {said}"
    assert not list(out.rglob(".tmp-*"))
    stands(study, out)


@pytest.mark.long
@pytest.mark.parametrize("study", list(kills.STUDIES))
def test_a_disk_that_fails_anywhere(study, whole, tmp_path):
    total = kills.count_boundaries(study, tmp_path / "count")
    for at in range(1, total + 1, 3):
        fails_at(whole(study), tmp_path / str(at), at, (errno.ENOSPC, errno.EIO)[at % 2])


_NEW_USER, _NEW_MOUNTS, _PRIVATE = 0x10000000, 0x00020000, (1 << 18) | 16384
_BIND, _REMOUNT, _READ_ONLY = 4096, 32, 1
_MOUNTED: set[bytes] = set()


def mounting(folder: Path, size: str | None = None) -> None:
    """Mount a file system of some size on a folder, or the folder on itself to be read alone, for this process only."""
    libc, place = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) != 0:
            raise NotImplementedError(f"{name}: {os.strerror(ctypes.get_errno())}")

    if not _MOUNTED:
        call("unshare", _NEW_MOUNTS | (0 if os.getuid() == 0 else _NEW_USER))
        call("mount", b"none", b"/", None, _PRIVATE, None)
    again = _REMOUNT if place in _MOUNTED else 0
    _MOUNTED.add(place)
    if size is not None:
        call("mount", b"tmpfs", place, b"tmpfs", again, f"size={size}".encode())
    else:
        call("mount", place, place, None, _BIND, None)
        call("mount", b"none", place, None, _BIND | _REMOUNT | _READ_ONLY, None)


def refused_by_the_kernel(work: Callable[[], Any]) -> str:
    """No fault is injected here: the kernel itself says no, to a user who may do everything."""
    code, said = told(work)
    if "NotImplementedError" in said:
        pytest.skip(f"this machine does not let a process mount: {said}")
    assert code == 1, said
    return said


linux = pytest.mark.skipif(sys.platform != "linux", reason="file systems are mounted by Linux's own call")


@linux
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_a_file_system_that_is_read_only(begun, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if begun:
        kills.attempt("run", out, cut=(60, True))
        assert kills.visible(out)

    def work() -> None:
        mounting(out)
        kills.STUDIES["run"](out)

    said = refused_by_the_kernel(work)
    for words in (os.strerror(errno.EROFS), str(out), "The folder cannot be written"):
        assert words in said
    stands(whole("run"), out)


@linux
def test_a_file_system_that_is_full(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    sound = {part.path: part.sha256 for part in plain(tmp_path / "sound").manifest.parts}

    def work() -> None:
        mounting(out, size="330k")
        try:
            plain(out)
        except DynprobeError as error:
            (half,) = kills.visible(out)
            assert kills.half_seen(half) == ""
            assert 0 < len(dp.open(half).manifest.finished) < 4
            mounting(out, size="16m")  # somebody makes room, and the same call goes on
            assert {part.path: part.sha256 for part in plain(out).manifest.parts} == sound
            raise error

    said = refused_by_the_kernel(work)
    for words in (os.strerror(errno.ENOSPC), str(out), "type the same command again"):
        assert words in said


def test_a_folder_in_which_nobody_may_write():
    folder = Path("/sys/dynprobe-runs")  # the kernel makes no folder there for anybody
    if not folder.parent.is_dir():
        pytest.skip("this system has no /sys")
    code, said = told(lambda: plain(folder))
    assert code == 1
    assert "The folder cannot be written" in said


def test_a_manifest_that_cannot_be_read_back(whole, tmp_path, monkeypatch):
    assert kills.attempt("run", tmp_path, cut=(60, True)) == -signal.SIGKILL
    (folder,) = kills.visible(tmp_path)
    read = Path.read_text

    def broken(self, *args, **kwargs):
        if self.name == "manifest.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", broken)
    with pytest.raises(DynprobeError, match="Input/output error"):
        kills.STUDIES["run"](folder)
    monkeypatch.undo()
    stands(whole("run"), tmp_path)


# Clocks


@pytest.mark.parametrize("study", studies())
def test_a_clock_that_goes_back(study, whole, tmp_path, monkeypatch):
    assert kills.attempt(study, tmp_path, cut=(80, True)) == -signal.SIGKILL
    (folder,) = kills.visible(tmp_path)
    began = dp.open(folder).manifest.created
    for path in folder.rglob("*"):
        os.utime(path, (86_400, 86_400))  # files from before the run began
    early = dt.datetime(1999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
    clock = SimpleNamespace(now=lambda *_: early)
    monkeypatch.setattr(_start, "dt", SimpleNamespace(datetime=clock))
    monkeypatch.setattr(time, "time", early.timestamp)
    kills.STUDIES[study](tmp_path)
    assert kills.visible(tmp_path) == [folder]
    run = dp.open(folder)
    assert run.status == "complete"
    assert kills.contents(folder) == whole(study).whole
    assert run.manifest.continuations[-1]["time"] < began
    assert examine(folder).healthy
    dp.run("tiny-llama", limit=1, max_new_tokens=0, out=tmp_path, quiet=True)
    assert list(list_runs(tmp_path)["time"].str[:4]) == ["1999", began[:4]]


# Two processes


@pytest.mark.parametrize("study", studies())
def test_two_processes_on_one_folder(study, whole, tmp_path):
    together, ours = whole(study), _FORK.Barrier(2)
    told_by: Any = _FORK.Queue()

    def work() -> None:
        def both() -> None:
            ours.wait(30)
            kills.STUDIES[study](tmp_path)

        told_by.put(told(both))

    pair = [_FORK.Process(target=work) for _ in range(2)]
    for process in pair:
        process.start()
    answers = sorted(told_by.get(timeout=120) for _ in pair)
    for process in pair:
        process.join(30)
    assert answers[0][0] == 0, answers
    # The other one came while the first wrote, or when it had finished.
    assert answers[1][0] == 0 or "is being written by process" in answers[1][1], answers
    assert len(kills.visible(tmp_path)) == 1
    stands(together, tmp_path)


# Signals


def stopped(words: list[str], what: int, log: Path) -> int:
    """Type a command in a child, send it a signal in the middle of its second unit, and return its exit code."""
    ours, theirs = _FORK.Pipe()

    def child() -> None:
        sys.stdout = sys.stderr = log.open("w", encoding="utf-8")
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL
        )  # as in a fresh process: what ran here before may have left its own
        work, units = Halving.work, []

        def at_the_second(self: Any, *args: Any) -> Any:
            units.append(args)
            if len(units) == 2:
                theirs.send("now")
                time.sleep(60)
            return work(self, *args)

        Halving.work = at_the_second  # type: ignore[method-assign]
        code = main(words)
        sys.stderr.flush()
        os._exit(code)

    process = _FORK.Process(target=child)
    process.start()
    assert ours.poll(60), log.read_text()
    os.kill(process.pid or 0, what)
    process.join(60)
    assert process.exitcode is not None, "it did not stop"
    return process.exitcode


@pytest.mark.parametrize(
    ("study", "what"),
    [
        ("run", signal.SIGTERM),
        *(pytest.param(study, what, marks=pytest.mark.long) for study, what in (
            ("run", signal.SIGINT), ("sweep", signal.SIGINT), ("sweep", signal.SIGTERM), ("recover", signal.SIGINT),
            ("recover", signal.SIGTERM))),
    ],
)  # fmt: skip
def test_a_signal_is_130_and_the_same_command_continues(study, what, whole, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    assert stopped([*WORDS[study].split(), "--out", str(out), "--quiet"], what, log) == 130
    said = log.read_text()
    (folder,) = kills.visible(out)
    assert f"dynprobe: interrupted; the same command continues {folder}" in said
    assert "Traceback" not in said
    assert dp.open(folder).status == "interrupted"
    assert dp.open(folder).manifest.finished == [0]
    stands(whole(study), out)


LONG = {
    "run": "run --model tiny-llama --batch-size 1 --max-new-tokens 16 --perturb alpha=0.2",
    "sweep": "sweep --model tiny-llama --layers all --alphas 0.01:3:9 --seeds 0:8 --batch-size 1 --tables all",
    "workers": "sweep --model tiny-llama --layers all --alphas 0.01:3:9 --seeds 0:8 --batch-size 1 --tables all "
               "--workers 2",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("study", LONG)
def test_a_scheduler_that_ends_a_job(study, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "dynprobe", *LONG[study].split(), "--out", str(out), "--quiet"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(dp.open(folder).manifest.finished for folder in kills.visible(out)):
            break
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=60)  # workers hold the pipe: that it closes says that they are gone
    assert process.returncode == 130, said
    assert "interrupted; the same command continues" in said
    assert "Traceback" not in said
    (folder,) = kills.visible(out)
    left = dp.open(folder)
    assert left.status == "interrupted"
    assert 0 < len(left.manifest.finished) < len(left.manifest.batch_plan)
    assert kills.half_seen(folder) == ""


def test_handlers_of_a_program_are_left_alone(monkeypatch, capsys):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        assert main(["--version"]) == 0
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main(["--version"]) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    capsys.readouterr()


# Memory

OUT_OF_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
@pytest.mark.parametrize("study", list(kills.STUDIES))
def test_memory_that_runs_out_before_the_first_unit(study, kind, tmp_path):
    calls = {
        "run": lambda model: dp.run(model, [[5, 6, 7]], max_new_tokens=0, out=tmp_path),
        "sweep": lambda model: dp.sweep(model, [[5, 6, 7]], alphas="0.1", out=tmp_path),
        "recover": lambda model: dp.recover(
            model, [[5, 6, 7]], mode="slerp", perturb="alpha=0.6,layers=1,phase=decode", max_new_tokens=4, out=tmp_path
        ),
    }
    subject = tiny_llama()

    def full(*_: Any) -> None:
        raise OUT_OF_MEMORY[kind]

    subject.model.register_forward_pre_hook(full)
    with pytest.raises(ModelError, match=r"not fit into the memory of cpu beside .*--device-map auto"):
        calls[study](subject)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_memory_that_runs_out_anywhere_else_is_one_message(kind, monkeypatch, capsys):
    from dynprobe.cli import _commands

    def full(*_: Any) -> None:
        raise OUT_OF_MEMORY[kind]

    monkeypatch.setattr(_commands, "ls_command", full)
    assert main(["ls"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dynprobe: memory ran out. Take less at once")
    assert len(said.splitlines()) == 1


def test_an_interrupted_run_in_python_says_so_too(tmp_path):
    def stop(progress: Any) -> None:
        if progress.stage == "batch" and progress.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background ignores it
    try:
        with pytest.raises(InterruptedRunError, match="the same command continues"):
            dp.run("tiny-llama", limit=3, batch_size=1, max_new_tokens=0, out=tmp_path, listener=stop)
    finally:
        signal.signal(signal.SIGINT, before)
