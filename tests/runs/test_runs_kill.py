"""The power is cut at every call that touches the disk; continuing gives the same tables as never having stopped."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest

from dynprobe.errors import RunFolderError
from dynprobe.runs import _atomic, _find, _writer, open_run

TABLES = ("prompts", "conditions", "samples", "tokens", "depths")


class PowerCutError(BaseException):
    """No handler for ordinary errors may see it."""


class Cut:
    """Raises at the n-th call of any patched function, before or after it has done its work."""

    def __init__(self, monkeypatch, at, after, error=PowerCutError):
        self.calls, self.at, self.after, self.error = 0, at, after, error
        # Syncing does nothing that this test could see, and takes most of its time.
        monkeypatch.setattr(os, "fsync", self.wrap(lambda descriptor: None))
        for module, name in ((os, "replace"), (os, "rename"), (pq, "write_table")):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.calls += 1
            if self.calls != self.at:
                return function(*args, **kwargs)
            if self.after:
                function(*args, **kwargs)
            raise self.error

        return wrapped


def same_tables(left, right):
    for table in TABLES:  # both were written in the order of their batches
        pd.testing.assert_frame_equal(left.table(table), right.table(table))
    keys, states = left.states(depth=[0, 1, 2, 3])
    others, more = right.states(depth=[0, 1, 2, 3])
    assert keys.equals(others)
    assert (states == more).all()


def count_calls(make, path):
    with pytest.MonkeyPatch.context() as patch:
        cut = Cut(patch, -1, False)
        make["write_all"](path)
    return cut.calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("hard", [False, True], ids=["tidy", "hard"])
def test_kill_anywhere_then_continue(tmp_path, make, after, hard):
    total = count_calls(make, tmp_path / "count")
    assert total > 50
    reference = open_run(next(p for p in (tmp_path / "count").iterdir() if p.is_dir()))
    # Every call is cut in the harshest case; a sample of them in the others keeps the test short.
    step = 1 if hard and not after else 5
    for at in range(1, total + 1, step):
        out = tmp_path / "runs"
        with pytest.MonkeyPatch.context() as patch:
            if hard:  # a killed process cleans nothing up
                for module in (_atomic, _writer):
                    patch.setattr(module, "remove", lambda path: None)
                patch.setattr(_find.shutil, "rmtree", lambda *args, **kwargs: None)
            Cut(patch, at, after)
            with contextlib.suppress(PowerCutError):
                make["write_all"](out, tidy=not hard)
        half = [p for p in out.iterdir() if (p / "manifest.json").exists() and not p.name.startswith(".")]
        assert len(half) <= 1
        for folder in half:  # what is visible is whole
            run = open_run(folder)
            run.verify()
            assert len(run.samples) == 2 * len(run.manifest.finished)
        with pytest.MonkeyPatch.context() as patch:
            Cut(patch, -1, False)
            folder = make["write_all"](out)
        run = open_run(folder)
        assert run.status == "complete"
        assert run.verify() == len(reference.manifest.parts)
        same_tables(reference, run)
        listed = {part.path for part in run.manifest.parts}
        present = {str(p.relative_to(folder)) for p in folder.rglob("*.parquet")}
        assert present == listed, f"leftovers after a cut at call {at}"
        assert not list(folder.rglob(".tmp-*")), f"temporary files after a cut at call {at}"
        assert not list(out.glob(".tmp-*"))
        shutil.rmtree(out)


@pytest.mark.parametrize("after", [False, True])
def test_disk_full_anywhere_is_explained_and_continues(tmp_path, make, after):
    total = count_calls(make, tmp_path / "count")
    reference = open_run(next(p for p in (tmp_path / "count").iterdir() if p.is_dir()))
    for at in range(1, total + 1, 7):
        out = tmp_path / "runs"
        with pytest.MonkeyPatch.context() as patch:
            Cut(patch, at, after, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            with pytest.raises(RunFolderError) as caught:
                make["write_all"](out)
            for words in ("No space left", str(out), "type the same command again"):
                assert words in str(caught.value), f"at call {at}"
        for folder in out.iterdir():
            if folder.is_dir():
                open_run(folder).verify()
                assert not list(folder.rglob(".tmp-*"))
        same_tables(reference, open_run(make["write_all"](out)))
        shutil.rmtree(out)


def test_leftovers_of_another_process_are_removed(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.write_batch(0, make["batch"](0))
    writer.close()
    listed = {p for p in writer.folder.rglob("*") if p.is_file()}
    names = [
        ".tmp-1-manifest.json",
        "conditions.parquet",
        "samples/part-00007.parquet",
        "tokens/.tmp-1-part-00000.parquet",
        "states/part-00000-03.parquet",
        "depths/whole.parquet",
    ]
    for name in names:
        (writer.folder / name).parent.mkdir(exist_ok=True)
        (writer.folder / name).write_bytes(b"half")
    make["begin"](tmp_path).close()
    assert {p for p in writer.folder.rglob("*") if p.is_file()} == listed


def test_batch_whose_commit_could_not_be_synced_is_there(tmp_path, make, monkeypatch):
    writer = make["begin"](tmp_path)

    def fail(folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("dynprobe.runs._open.sync_folder", fail)
    with pytest.raises(RunFolderError, match="Input/output error"):
        writer.write_batch(0, make["batch"](0))
    assert writer.finished == {0}
    assert open_run(writer.folder).verify() == 3


def test_table_replaced_and_cut_before_the_manifest(tmp_path, make, monkeypatch):
    writer = make["begin"](tmp_path)
    writer.write_table("fits", {"fit_id": ["a"], "threshold_kl": [0.5]})
    real = os.replace

    def cut(source, target):
        real(source, target)
        if str(target).endswith("fits.parquet"):
            raise PowerCutError

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(PowerCutError):
        writer.write_table("fits", {"fit_id": ["a", "b"], "threshold_kl": [0.5, 0.6]})
    assert open_run(writer.folder).verify() == 0
    assert open_run(writer.folder).table("fits").empty


def test_folder_that_could_not_be_named_leaves_nothing(tmp_path, make, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(RunFolderError, match="No space left"):
        make["begin"](tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())
