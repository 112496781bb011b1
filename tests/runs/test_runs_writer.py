from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from dynprobe.errors import RunFolderError
from dynprobe.runs import RunWriter, _atomic, open_run
from dynprobe.runs._lock import is_held


def test_layout(run_folder):
    assert run_folder.name == "2026-11-21T23-15-02_tiny_0123abcd"
    names = {p.name for p in run_folder.iterdir()}
    assert names == {
        "manifest.json",
        "manifest.previous.json",
        "prompts.parquet",
        "conditions.parquet",
        "samples",
        "tokens",
        "depths",
        "states",
        "events.jsonl",
        "summary.json",
        "README.md",
    }
    assert [p.name for p in sorted((run_folder / "samples").iterdir())] == ["part-00000.parquet", "part-00001.parquet"]
    assert json.loads((run_folder / "summary.json").read_text()) == {"samples": 4}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("../../etc/passwd", "passwd"),
        ("/abs/path/my model/", "my-model"),
        ("..", "model"),
        ("", "model"),
        ("a\\..\\b\0c", "b-c"),
        ("org/SmolLM2-135M", "SmolLM2-135M"),
        ("x" * 300, "x" * 60),
        ("模型", "model"),
    ],
)
def test_model_name_cannot_lead_anywhere(tmp_path, make, name, slug):
    out = tmp_path / "deep" / "runs"
    writer = make["begin"](out, model_name=name)
    assert writer.folder.parent == out
    assert writer.folder.name == f"2026-11-21T23-15-02_{slug}_0123abcd"
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_finished_run_is_found_and_closed(run_folder, make):
    for out in (run_folder.parent, run_folder):
        writer = make["begin"](out)
        assert (writer.folder, writer.status, writer.finished) == (run_folder, "complete", {0, 1})
        with pytest.raises(RunFolderError, match="complete and closed"):
            writer.write_batch(2, {})
    assert len([p for p in run_folder.parent.iterdir() if p.is_dir()]) == 1


def test_renamed_folder_is_found(run_folder, make):
    moved = run_folder.rename(run_folder.parent / "my favourite")
    assert make["begin"](moved.parent).folder == moved


def test_continuation_skips_finished_batches_and_keeps_the_record(tmp_path, make):
    with make["begin"](tmp_path, manifest_fields={"seeds": {"noise": 0}}) as writer:
        writer.write_batch(0, make["batch"](0))
        before = (writer.folder / "samples/part-00000.parquet").stat().st_mtime_ns
        writer.interrupt("Ctrl-C")
    assert open_run(writer.folder).status == "interrupted"
    again = make["begin"](tmp_path, manifest_fields={"seeds": {"noise": 9}, "noise_floor": 1e-6})
    assert again.folder == writer.folder
    assert again.finished == {0}
    assert again.status == "running"
    assert again.manifest.seeds == {"noise": 0}
    assert again.manifest.noise_floor == 1e-6
    assert [n["reason"] for n in again.manifest.interruptions] == ["Ctrl-C"]
    assert len(again.manifest.continuations) == 1
    with pytest.raises(RunFolderError, match=r"Batch 0 .* finished already"):
        again.write_batch(0, make["batch"](0))
    again.write_batch(1, make["batch"](1))
    again.finish({})
    assert (writer.folder / "samples/part-00000.parquet").stat().st_mtime_ns == before
    assert len(open_run(writer.folder).samples) == 4
    assert list(open_run(writer.folder).events()["kind"]) == ["begin", "interrupt", "continue", "finish"]


def test_another_run_in_the_folder_is_refused(run_folder, make):
    with pytest.raises(RunFolderError, match=r"id is 0123abcd.*has the id ffffffff"):
        make["begin"](run_folder, ident="ffffffff")
    assert make["begin"](run_folder.parent, ident="ffffffff").folder != run_folder


def test_other_library_version_needs_force(tmp_path, make):
    make["begin"](tmp_path).close()
    newer = {"versions": {"dynprobe": "0.2.0"}}
    with pytest.raises(RunFolderError, match=r"begun by dynprobe 0\.1\.0, and this is dynprobe 0\.2\.0.*--force"):
        make["begin"](tmp_path, manifest_fields=newer)
    writer = make["begin"](tmp_path, manifest_fields=newer, force=True)
    assert writer.manifest.continuations[-1]["forced"] is True
    assert writer.manifest.versions["dynprobe"] == "0.1.0"


def test_finished_batch_whose_file_is_gone_is_done_again(tmp_path, make):
    writer = make["begin"](tmp_path)
    for number in (0, 1):
        writer.write_batch(number, make["batch"](number), {"n": number})
    writer.close()
    (writer.folder / "tokens/part-00001.parquet").write_bytes(b"short")
    again = make["begin"](tmp_path)
    assert again.finished == {0}
    assert list(again.manifest.batch_facts) == ["0"]
    assert again.manifest.continuations[-1]["redone_batches"] == [1]
    assert not (writer.folder / "samples/part-00001.parquet").exists()


def test_files_of_the_user_are_left_alone(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.write_batch(0, make["batch"](0))
    writer.close()
    mine = [writer.folder / "notes.txt", writer.folder / "samples/mine.csv", writer.folder / "figures/a.png"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    make["begin"](tmp_path).close()
    assert all(path.exists() for path in mine)


def test_table_written_again_with_other_content(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.write_table("fits", {"fit_id": ["a"], "threshold_kl": [0.5]})
    inode = (writer.folder / "fits.parquet").stat().st_ino
    writer.write_table("fits", {"fit_id": ["a"], "threshold_kl": [0.5]})
    assert (writer.folder / "fits.parquet").stat().st_ino == inode
    writer.write_table("fits", {"fit_id": ["a", "b"], "threshold_kl": [0.5, 0.6]})
    run = open_run(writer.folder)
    assert run.verify() == 1
    assert run.table("fits")["threshold_kl"].tolist() == [0.5, 0.6]


def test_wrong_road_for_a_table(tmp_path, make):
    writer = make["begin"](tmp_path)
    with pytest.raises(RunFolderError, match="use write_table"):
        writer.write_batch(0, {"prompts": {"prompt_id": ["a"]}})
    with pytest.raises(RunFolderError, match="use write_states"):
        writer.write_batch(0, {"states": {}})
    with pytest.raises(RunFolderError, match="'pos'"):
        writer.write_batch(0, {"samples": make["batch"](0)["samples"], "tokens": {"sample_id": ["a"]}})
    assert not (writer.folder / "samples").exists()


def test_run_cannot_be_called_complete_with_batches_missing(tmp_path, make):
    writer = make["begin"](tmp_path)
    writer.write_batch(0, make["batch"](0))
    with pytest.raises(RunFolderError, match="1 of 2 batches"):
        writer.finish({})


def test_states_need_their_batch_and_come_first(tmp_path, make):
    writer = make["begin"](tmp_path)
    keys = {"sample_id": ["a"], "pos": [0], "track": ["r"], "depth": [0]}
    writer.write_states(0, keys, [[1.0, 2.0]], "float64")
    assert not open_run(writer.folder).manifest.parts
    writer.write_batch(0, {})
    writer.write_batch(1, {})
    assert open_run(writer.folder).states()[1].tolist() == [[1.0, 2.0]]
    with pytest.raises(RunFolderError, match="before write_batch"):
        writer.write_states(0, keys, [[1.0]], "float64")
    writer.write_states(2, keys, [[1.0]], "float64")
    with pytest.raises(RunFolderError, match="States of batch 2"):
        writer.finish({})


def test_exception_inside_with_is_recorded(tmp_path, make):
    with pytest.raises(ValueError, match="boom"), make["begin"](tmp_path) as writer:
        raise ValueError("boom")
    run = open_run(writer.folder)
    assert run.status == "interrupted"
    assert run.manifest.interruptions[-1]["reason"] == "ValueError: boom"
    make["begin"](tmp_path).close()


def test_event_after_a_line_cut_short(tmp_path, make):
    writer = make["begin"](tmp_path)
    with (writer.folder / "events.jsonl").open("a") as file:
        file.write('{"kind": "hal')
    writer.event("oom", rows=3)
    assert open_run(writer.folder).events()["kind"].tolist() == ["begin", "oom"]


def test_full_disk_names_folder_bytes_and_what_to_type(tmp_path, make, monkeypatch):
    writer = make["begin"](tmp_path)

    def full(path, data):
        if path.name != "part-00000.parquet" or path.parent.name != "tokens":
            return real(path, data)
        raise OSError(errno.ENOSPC, "No space left on device")

    real = _atomic.write_bytes
    monkeypatch.setattr("dynprobe.runs._open.write_bytes", full)
    with pytest.raises(
        RunFolderError, match=r"tokens/part-00000\.parquet in .*: No space left.* needed, .* free.*--out"
    ):
        writer.write_batch(0, make["batch"](0))
    assert not list((writer.folder / "samples").iterdir())
    assert open_run(writer.folder).samples.empty
    monkeypatch.undo()
    writer.write_batch(0, make["batch"](0))
    assert writer.finished == {0}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_states_are_streamed(tmp_path, make, monkeypatch):
    writer = make["begin"](tmp_path)
    real = _atomic.write_stream
    full = lambda path, produce: real(path, lambda temporary: produce("/dev/full"))  # noqa: E731
    monkeypatch.setattr("dynprobe.runs._writer.write_stream", full)
    keys = {"sample_id": ["a"], "pos": [0], "track": ["r"], "depth": [0]}
    with pytest.raises(RunFolderError, match=r"states/part-00000-00\.parquet.*No space left"):
        writer.write_states(0, keys, [[1.0] * 100_000], "float64")
    assert not list((writer.folder / "states").iterdir())


def test_read_only_parent(tmp_path, make, monkeypatch):
    out = make["write_all"](tmp_path / "runs").parent

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", lambda self, *a, exist_ok=False, **k: None if exist_ok else refuse())
    monkeypatch.setattr("dynprobe.runs._lock.os.open", refuse)
    assert make["begin"](out).status == "complete"
    with pytest.raises(RunFolderError, match=r"Permission denied.*Make it writable, or choose another"):
        make["begin"](out, ident="ffffffff")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_read_only_folder_for_an_ordinary_user(tmp_path, make):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="Make it writable"):
        make["begin"](tmp_path / "runs")


def test_out_that_is_no_place_for_a_run(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        make["begin"](tmp_path / "file")
    half = tmp_path / "half"
    half.mkdir()
    (half / "events.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"manifest\.json is missing"):
        make["begin"](half)


HOLDER = """
import sys, time
from dynprobe.runs import RunWriter
writer = RunWriter.begin(sys.argv[1], model_name="m", config={}, ident="0123abcd")
print(writer.folder, flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_write_one_folder(tmp_path):
    code = textwrap.dedent(HOLDER)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        folder = process.stdout.readline().strip()
        for out in (tmp_path, folder):
            with pytest.raises(RunFolderError, match=f"process {process.pid} on .*Wait until"):
                RunWriter.begin(out, model_name="m", config={}, ident="0123abcd")
        assert open_run(folder).status == "running"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert open_run(folder).status == "interrupted"
    writer = RunWriter.begin(tmp_path, model_name="m", config={}, ident="0123abcd")
    assert str(writer.folder) == folder
    assert is_held(writer.folder)


def test_killed_for_real_at_a_random_moment(tmp_path, make):
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest, pathlib
        writer = conftest.begin(pathlib.Path(sys.argv[1]), manifest_fields={{"batch_plan": None}})
        print("go", flush=True)
        for number in range(10_000):
            writer.write_batch(number, conftest.batch(number % 2))
    """)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.37)
    process.kill()
    process.wait()
    process.stdout.close()
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    run = open_run(folder)
    assert run.manifest.finished == list(range(len(run.manifest.finished)))
    assert run.verify() == 3 * len(run.manifest.finished)
    assert len(run.samples) == 2 * len(run.manifest.finished)
    assert make["begin"](tmp_path).finished == set(run.manifest.finished)


def test_card_says_what_and_how(tmp_path, make):
    writer = make["begin"](
        tmp_path,
        model_name="org/<b>|pipe",
        columns={"nll": {"id": "nll.token/1", "unit": "nat", "description": "a | b"}},
        manifest_fields={"command": ["dynprobe", "run", "--prompt", "it's"]},
    )
    for number in (0, 1):
        writer.write_batch(number, make["batch"](number))
    writer.finish({})
    text = (writer.folder / "README.md").read_text()
    assert "dynprobe run --prompt 'it'\"'\"'s'" in text
    assert "| samples | nll | float32 | nat | nll.token/1 | a \\| b |" in text
    assert "org/&lt;b&gt;\\|pipe" in text
    assert "alpha=0.1" in text


def test_writer_and_frames_do_not_change_what_they_are_given(tmp_path, make):
    frame = make["batch"](0)["samples"]
    copy = frame.copy()
    make["begin"](tmp_path).write_batch(0, {"samples": frame})
    pd.testing.assert_frame_equal(frame, copy)
    part = next(tmp_path.rglob("samples/*.parquet"))
    assert pq.read_schema(part).metadata[b"dynprobe.table"] == b"samples"
