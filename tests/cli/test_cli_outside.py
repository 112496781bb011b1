"""What leaves the screen: pipes, figures, full disks, interruptions."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynprobe.cli import main


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """One finished run and the words that made it."""
    out = tmp_path_factory.mktemp("runs")
    words = [
        "run",
        "--model",
        model,
        "--perturb",
        "alpha=0.2",
        "--prompt",
        "Hello there",
        "--prompt",
        "A longer one here",
    ]
    words += ["--max-new-tokens", "4", "--out", str(out), "--quiet"]
    assert main(words) == 0
    (folder,) = [p for p in out.iterdir() if p.is_dir()]
    return folder, words


def refused(capsys, *words, code=2):
    """Run a command that must fail; return its message after checking that it is one and not a traceback."""
    assert main(list(words)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dynprobe: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_dry_run_and_plan_write_nothing(model, tmp_path, capsys):
    words = ["--model", str(model), "--perturb", "alpha=0.1", "--out", str(tmp_path / "runs"), "--json"]
    assert main(["run", *words, "--dry-run"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["plan", *words]) == 0
    other = json.loads(capsys.readouterr().out)
    for cost in (one, other):
        assert cost.pop("free_bytes") > 0
        del cost["seconds"]
    assert one == other
    assert one["samples"] == 24 * 4
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_said_and_nothing_is_half_written(model, tmp_path, capsys, monkeypatch):
    real, count = os.fsync, [0]

    def full(descriptor):
        count[0] += 1
        if count[0] > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    words = [
        "run",
        "--model",
        model,
        "--prompt",
        "Hello there",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "runs"),
    ]
    message = refused(capsys, *words, "--quiet", code=1)
    assert "No space left" in message or "full" in message
    monkeypatch.setattr(os, "fsync", real)
    listed = {part["path"] for m in tmp_path.rglob("manifest.json") for part in json.loads(m.read_text())["parts"]}
    assert main([*words, "--json"]) == 0  # with space again the same command continues
    folder = Path(json.loads(capsys.readouterr().out)["run"])
    assert listed <= {str(p.relative_to(folder)) for p in folder.rglob("*.parquet")}
    assert not list(folder.rglob("*.tmp*"))


def test_interruption_leaves_130_and_the_same_command_continues(model, tmp_path, capsys, monkeypatch):
    from dynprobe.protocols import _batch

    words = [
        "run",
        "--model",
        model,
        "--perturb",
        "alpha=0.2",
        "--batch-size",
        "1",
        "--prompt",
        "One",
        "--prompt",
        "Two more",
    ]
    words += ["--max-new-tokens", "3", "--out", str(tmp_path / "runs"), "--quiet"]
    real, calls = _batch.BatchRunner.run, []

    def stop_at_second(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(_batch.BatchRunner, "run", stop_at_second)
    assert main(words) == 130
    assert "continues" in capsys.readouterr().err
    assert main(words) == 0
    assert len(calls) == 3  # the first batch was not run again
    assert main(["ls", str(tmp_path / "runs"), "--json"]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out[out.rindex("[\n {") :])
    assert row["status"] == "complete"


def test_show_prints_a_run_its_columns_and_its_figure(done, tmp_path, capsys):
    folder, _ = done
    assert main(["show", str(folder)]) == 0
    assert "perturbed.forced" in capsys.readouterr().out
    assert main(["show", str(folder), "--columns"]) == 0
    assert "kappa.phase/1" in capsys.readouterr().out
    assert main(["show", str(folder), "--figure", str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["run", "plan", "doctor", "calibrate", "fetch", "show", "metrics", "ls"])
def test_every_command_has_help(command, capsys):
    assert main([command, "-h"]) == 0
    assert "Usage: dynprobe" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error():
    piped = f"{sys.executable} -m dynprobe metrics | head -n 1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", piped], capture_output=True, text=True, timeout=120)
    assert found.stdout.startswith("kappa.phase/1")
    assert found.stderr == ""
