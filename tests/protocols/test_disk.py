import shutil
from collections import namedtuple

import pytest

import dynprobe as dp
from dynprobe.errors import RunFolderError

Usage = namedtuple("Usage", "total used free")
SETTINGS = {"limit": 4, "max_new_tokens": 0, "states": True, "batch_size": 2}


def room(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))


def stored(run):
    return sum(part.bytes for part in run.manifest.parts if part.table == "states")


def test_states_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    planned = dp.plan("tiny-llama", measure=False, **SETTINGS).state_bytes
    room(monkeypatch, planned - 1)
    with pytest.raises(RunFolderError, match=r"need up to .* GB, and .* has .* GB free.*--where.*--out FOLDER"):
        dp.run("tiny-llama", out=tmp_path / "runs", **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    room(monkeypatch, planned)
    run = dp.run("tiny-llama", out=tmp_path / "runs", **SETTINGS)
    assert planned <= stored(run) <= 1.2 * planned  # keys are stored beside the states


def test_without_states_the_disk_is_not_asked(tmp_path, monkeypatch):
    room(monkeypatch, 0)
    assert dp.run("tiny-llama", out=tmp_path, **{**SETTINGS, "states": False}).status == "complete"


def test_what_a_continued_run_has_written_counts_as_there(tmp_path, monkeypatch):
    def stop(progress):
        if progress.stage == "batch" and progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(dp.DynprobeError, match="the same command continues"):
        dp.run("tiny-llama", out=tmp_path, listener=stop, **SETTINGS)
    planned = dp.plan("tiny-llama", measure=False, **SETTINGS).state_bytes
    (folder,) = tmp_path.glob("*_tiny-llama_*")
    there = sum(file.stat().st_size for file in (folder / "states").iterdir())
    assert there > 0
    room(monkeypatch, planned - there)
    assert dp.run("tiny-llama", out=tmp_path, **SETTINGS).status == "complete"
    room(monkeypatch, 0)
    assert dp.run("tiny-llama", out=tmp_path, **SETTINGS).status == "complete"  # finished: nothing is written
