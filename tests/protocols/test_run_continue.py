"""Interrupted runs continue, finished ones are not repeated, and one folder has one writer."""

import threading

import pytest

import dynprobe as dp
from dynprobe.errors import InterruptedRunError, RunFolderError
from dynprobe.protocols import Progress
from dynprobe.protocols._prepare import prepare

SETTINGS = {"perturb": "alpha=0.3", "max_new_tokens": 3, "states": True, "where": "layers=-1", "batch_size": 1}


class StopAfter:
    """Presses Ctrl-C when so many batches are done."""

    def __init__(self, batches: int) -> None:
        self.batches, self.heard = batches, []

    def __call__(self, progress: Progress) -> None:
        self.heard.append(progress)
        if progress.stage == "batch" and progress.done == self.batches:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def texts(texts):
    return texts[:3]


@pytest.fixture(scope="module")
def whole(llama, texts, tmp_path_factory):
    return dp.run(llama, texts, out=tmp_path_factory.mktemp("whole"), **SETTINGS)


def test_an_interrupted_run_continues_where_it_stopped(whole, llama, texts, tmp_path, same_tables):
    with pytest.raises(InterruptedRunError, match="the same command continues") as stopped:
        dp.run(llama, texts, listener=StopAfter(2), out=tmp_path, **SETTINGS)
    assert stopped.value.exit_code == 130
    (folder,) = tmp_path.iterdir()
    half = dp.open(folder)
    assert half.status == "interrupted"
    assert half.manifest.finished == [0, 1]
    assert len(half.samples) == 2 * 4
    assert half.summary == {}
    assert half.verify() > 0
    heard = []
    settings = {**SETTINGS, "batch_size": 3}  # batches were planned once; another size moves no row
    done = dp.run(llama, texts, listener=heard.append, out=tmp_path, **settings)
    assert done.path == folder
    assert done.status == "complete"
    assert done.manifest.finished == [0, 1, 2]
    assert done.manifest.batch_plan == whole.manifest.batch_plan
    assert len(done.manifest.continuations) == 1
    assert next(p for p in heard if p.stage == "batch").done == 2
    same_tables(whole, done, exact=True)
    assert done.summary["conditions"] == whole.summary["conditions"]
    _, mine = done.states()
    _, theirs = whole.states()
    assert sorted(map(bytes, mine)) == sorted(map(bytes, theirs))


def test_a_finished_run_is_not_repeated(whole, llama, texts):
    written = {p: p.stat().st_mtime_ns for p in whole.path.rglob("*") if p.is_file()}
    heard = []
    again = dp.run(llama, texts, listener=heard.append, out=whole.path.parent, **SETTINGS)
    assert again.path == whole.path
    assert [p.stage for p in heard] == ["load", "done"]
    assert str(whole.path) in heard[-1].notes[0]
    assert {p: p.stat().st_mtime_ns for p in whole.path.rglob("*") if p.is_file()} == written
    assert dp.run(llama, texts, out=whole.path, **SETTINGS).path == whole.path  # --out may be the run itself


def test_other_settings_are_another_run(whole, llama, texts):
    ids = [prepare(llama, texts, {**SETTINGS, **change}).ident for change in (
        {}, {"perturb": "alpha=0.2"}, {"max_new_tokens": 2}, {"seed": 1}, {"states": False}, {"temperature": 0.5},
    )]  # fmt: skip
    ids += [prepare(llama, texts[:2], SETTINGS).ident, prepare(llama, texts[::-1], SETTINGS).ident]
    assert ids[0] == whole.manifest.id8
    before = llama.model.generation_config.eos_token_id
    llama.model.generation_config.eos_token_id = [7]  # texts would end elsewhere
    try:
        ids.append(prepare(llama, texts, SETTINGS).ident)
        silent = prepare(llama, texts, {"max_new_tokens": 0}).ident
    finally:
        llama.model.generation_config.eos_token_id = before
    assert prepare(llama, texts, {"max_new_tokens": 0}).ident == silent  # where nothing is written it does not matter
    assert len(set(ids)) == len(ids)
    with pytest.raises(RunFolderError, match=r"holds another run.*--out"):
        dp.run(llama, texts, out=whole.path, **{**SETTINGS, "perturb": "alpha=0.2"})
    assert whole.refresh().status == "complete"


def test_how_prompts_and_numbers_are_spelt_is_no_other_run(whole, llama, texts, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(texts))
    spelt = {**SETTINGS, "perturb": "scale=relnorm, alpha=0.30, layers=50%", "quiet": True}
    assert dp.run(llama, file, out=whole.path.parent, **spelt).path == whole.path
    as_setting = dp.run(llama, prompt=tuple(texts), limit=3, out=whole.path.parent, **SETTINGS)
    assert as_setting.path == whole.path


def test_one_folder_has_one_writer(llama, texts, tmp_path):
    inside, go_on = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        if progress.stage == "batch":
            inside.set()
            go_on.wait(20)

    worker = threading.Thread(
        target=lambda: dp.run(llama, texts[:1], max_new_tokens=0, out=tmp_path, listener=hold), daemon=True
    )
    worker.start()
    try:
        assert inside.wait(20)
        with pytest.raises(RunFolderError, match="is being written by"):
            dp.run(llama, texts[:1], max_new_tokens=0, out=tmp_path)
    finally:
        go_on.set()
        worker.join(20)
    (folder,) = tmp_path.iterdir()
    assert dp.open(folder).status == "complete"


def test_another_version_continues_only_with_force(llama, texts, tmp_path, monkeypatch):
    from dynprobe.protocols import _prepare

    settings = {"max_new_tokens": 0, "batch_size": 1, "out": tmp_path}
    with pytest.raises(InterruptedRunError):
        dp.run(llama, texts[:2], listener=StopAfter(1), **settings)
    monkeypatch.setattr(_prepare, "__version__", "9.9")
    with pytest.raises(RunFolderError, match="--force"):
        dp.run(llama, texts[:2], **settings)
    done = dp.run(llama, texts[:2], force=True, **settings)
    assert done.status == "complete"
    assert done.manifest.continuations[-1]["forced"] is True


def test_a_full_disk_stops_the_run_and_leaves_whole_batches(whole, llama, texts, tmp_path, monkeypatch, same_tables):
    import errno
    import os

    from dynprobe.runs import _atomic

    replace, written = os.replace, []

    def full(source, target):
        written.append(target)
        if "part-00002" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(_atomic.os, "replace", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        dp.run(llama, texts, out=tmp_path, **SETTINGS)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    half = dp.open(folder)
    assert half.status == "interrupted"
    assert half.manifest.finished == [0, 1]
    listed = {str(folder / part.path) for part in half.manifest.parts}
    assert {str(p) for p in folder.rglob("*.parquet")} - listed <= {str(p) for p in (folder / "states").iterdir()}
    assert not list(folder.rglob(".tmp-*"))
    same_tables(whole, half, part=True, exact=True)
    same_tables(whole, dp.run(llama, texts, out=tmp_path, **SETTINGS), exact=True)


def test_where_the_files_lie_is_no_other_model(llama_folder, texts, tmp_path):
    import shutil

    copy = shutil.copytree(llama_folder, tmp_path / "copy")
    one, other = dp.load(str(llama_folder)), dp.load(str(copy))
    assert prepare(one, texts, SETTINGS).ident == prepare(other, texts, SETTINGS).ident
    assert dp.calibrate(one).hash == dp.calibrate(other).hash
