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
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (pq, "write_table")):
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
    for table in TABLES:
        keys = ["sample_id", "pos", "track", "depth", "prompt_id", "condition_id"]
        frames = []
        for run in (left, right):
            frame = run.table(table)
            frame = frame.astype({c: object for c in frame if isinstance(frame[c].dtype, pd.CategoricalDtype)})
            frames.append(frame.sort_values([k for k in keys if k in frame]).reset_index(drop=True))
        pd.testing.assert_frame_equal(*frames)
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
    # Every point in the two outer cases, every third in the mixed ones, keeps the test short.
    step = 1 if hard == after else 3
    for at in range(1, total + 1, step):
        out = tmp_path / "runs"
        with pytest.MonkeyPatch.context() as patch:
            if hard:  # a killed process cleans nothing up
                for module in (_atomic, _writer):
                    patch.setattr(module, "remove", lambda path: None)
                patch.setattr(_find.shutil, "rmtree", lambda *args, **kwargs: None)
            Cut(patch, at, after)
            with contextlib.suppress(PowerCutError):
                make["write_all"](out)
        half = [p for p in out.iterdir() if (p / "manifest.json").exists() and not p.name.startswith(".")]
        assert len(half) <= 1
        for folder in half:  # what is visible is whole
            run = open_run(folder)
            run.verify()
            for table in TABLES:
                run.table(table)
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
    for at in range(1, total + 1, 5):
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
