"""Mistakes of a user: one message, the right exit code, no traceback, nothing left behind."""

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from dynprobe.cli import main
from dynprobe.testing import save_tiny_model

CASES = [
    (("rn",), 2, "No such command 'rn'. Did you mean 'run'?"),
    (("run", "--modl", "x"), 2, "--modl"),
    (("run", "--model"), 2, "requires an argument"),
    (("recover", "--engine", "ray"), 2, "Commands that have it: run, plan, sweep, "),
    (("sweep", "--backend", "nnsight"), 2, "Commands that have it: run, plan  (see: dynprobe sweep --help)"),
    (("run", "--model", "{model}", "--address", "auto"), 2, "Type --engine ray, or leave --address out"),
    (("run", "--model", "{model}", "--device-map", "autoo"), 1, "Type --device-map auto, balanced or sequential"),
    (
        (
            "run",
            "--model",
            "{model}",
            "--backend",
            "nnsight",
            "--remote-host",
            "local",
            "--max-new-tokens",
            "0",
            "--workers",
            "2",
        ),
        2,
        "--workers was asked for; the service loads the model and does every batch itself",
    ),
    (
        (
            "run",
            "--model",
            "{model}",
            "--backend",
            "nnsight",
            "--remote-host",
            "local",
            "--max-new-tokens",
            "0",
            "--lens",
        ),
        2,
        "--lens was asked for; --remote sends back norms",
    ),
    (("run", "--model", "{model}", "--perturb", "alpha=0.1,scale=relnrom"), 2, "Did you mean 'relnorm'?"),
    (("run", "--model", "{model}", "--perturb", "alpha=0.1,layer=3"), 2, "layer"),
    (("run", "--model", "{model}", "--perturb", "alpha=ten"), 2, "alpha takes one number"),
    (("run", "--model", "{model}", "--perturb", "layers=3"), 2, "alpha, the strength, is missing"),
    (("run", "--model", "{model}", "--perturb", "alpha=0.1,layers=99"), 2, "layers 0…2"),
    (("run", "--model", "{model}", "--perturb", "@none.yaml"), 2, "none.yaml cannot be read"),
    (("run", "--model", "{model}", "--where", "layers=99"), 2, "layers 0…2"),
    (("run", "--model", "{model}", "--batch-size", "many"), 2, "batch_size='many': expected a whole number or 'auto'"),
    (("run", "--model", "{model}", "--batch-size", "0"), 2, "at least 1"),
    (("run", "--model", "{model}", "--dtype", "float31"), 2, "dtype='float31'"),
    (("run", "--model", "{model}", "--temperature", "-1"), 2, "temperature=-1"),
    (("run", "--model", "{model}", "--top-p", "0"), 2, "top_p=0"),
    (("run", "--model", "{model}", "--seed", "-1"), 2, "seed=-1"),
    (("run", "--model", "{model}", "--span", "old"), 2, "span='old'"),
    (("run", "--model", "{model}", "--max-new-tokens", "x"), 2, "Invalid value for '--max-new-tokens'"),
    (("run", "--model", "{model}", "--contrast", "a", "b"), 2, "no perturbation needs it"),
    (("threshold", "--model", "{model}", "--criterion", "kl=2"), 2, "type --criterion kl --level 2"),
    (("run", "--model", "{folder}"), 1, "is a folder, but no model"),
    (("run", "--model", "{folder}/none"), 1, "has no entry 'none'"),
    (("doctor", "{folder}/none"), 1, "has no entry 'none'"),
    (("doctor",), 2, "Missing argument"),
    (("calibrate", "{model}", "--cov-layers", "9"), 2, "layers 0…2"),
    (("calibrate", "{model}", "--prompts", "none.txt"), 2, "no prompt file"),
    (("fetch", "smolm2"), 1, "Did you mean 'smollm2'?"),
    (("show",), 2, "name a run folder"),
    (("show", "nothing-here"), 1, "There is no run folder nothing-here"),
    (("show", "{folder}"), 1, "is no run folder"),
    (("ls", "nothing-here"), 1, "no folder nothing-here"),
]


@pytest.mark.parametrize(("words", "code", "message"), CASES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_a_mistake_is_one_message(cli, model, tmp_path_factory, here, words, code, message):
    folder = tmp_path_factory.mktemp("empty-folder")
    found = cli(*[w.format(model=model, folder=folder) for w in words])
    assert found.code == code
    assert found.out == ""
    assert message in found.err
    assert found.err.startswith("dynprobe: ")
    assert "Traceback" not in found.err
    assert list(here.iterdir()) == []


def test_a_hub_model_without_a_network_is_refused_within_eight_seconds(cli, here, monkeypatch):
    def unreachable(*_args, **_more):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "no-hub-cache"))
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    begun = time.monotonic()
    found = cli("run", "--model", "gpt2", "--perturb", "alpha=0.1")
    assert time.monotonic() - begun < 8
    assert found.code == 1
    assert "cannot be reached" in found.err
    assert "--model smollm2-135m" in found.err
    assert "Traceback" not in found.err
    assert not (here / "runs").exists()


def test_a_folder_that_holds_a_broken_model(cli, here):
    folder = save_tiny_model(here / "broken")
    weights = next(folder.glob("*.safetensors"))
    weights.unlink()
    weights.write_bytes(b"no tensors")
    found = cli("run", "--model", folder, "--prompt", "x")
    assert found.code == 1
    assert found.err.startswith("dynprobe: ")
    assert "Traceback" not in found.err
    assert not (here / "runs").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only(cli, model, here, monkeypatch, code):
    make = Path.mkdir

    def refuse(self, *args, **kwargs):
        if "runs" in self.parts:
            raise OSError(code, os.strerror(code), str(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    found = cli("run", "--model", model, "--prompt", "Hello", "--max-new-tokens", 1, "--out", "runs")
    assert found.code == 1
    assert os.strerror(code) in found.err
    assert "--out" in found.err
    assert "Traceback" not in found.err
    assert not (here / "runs").exists()


def test_a_disk_that_fills_while_a_table_is_written(cli, model, here, monkeypatch):
    from dynprobe.runs import _atomic

    replace = os.replace

    def full(source, target):
        if "depths" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(_atomic.os, "replace", full)
    words = ("run", "--model", model, "--prompt", "Hello", "--max-new-tokens", 1, "--out", "runs", "--quiet")
    found = cli(*words)
    assert found.code == 1
    assert "No space left on device" in found.err
    (run,) = (here / "runs").glob("2*")
    for part in ("samples", "tokens", "depths", "profiles"):
        assert not list(run.glob(f"{part}/*"))
    assert not list(run.rglob(".tmp-*"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert cli(*words).code == 0


def test_out_that_is_a_file(cli, model, here):
    (here / "file").write_text("mine")
    found = cli("run", "--model", model, "--prompt", "Hello", "--max-new-tokens", 0, "--out", "file")
    assert found.code == 1
    assert "file is a file" in found.err
    assert (here / "file").read_text() == "mine"


def test_a_defect_keeps_its_traceback(monkeypatch):
    """A mistake of ours is not dressed up as one of the user's."""
    import dynprobe.cli._commands as commands

    def defect(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "metrics_command", defect)
    with pytest.raises(ZeroDivisionError):
        main(["metrics"])


@pytest.mark.parametrize("where", ["imports", "command"])
def test_a_stop_at_any_moment_is_said(monkeypatch, capsys, where):
    from dynprobe.cli import _commands, _main

    def stop(*_given, **_settings):
        raise KeyboardInterrupt

    if where == "imports":
        monkeypatch.setattr(_main, "_command", stop)
    else:
        monkeypatch.setattr(_commands, "ls_command", stop)
    assert _main.main(["ls"]) == 130
    assert capsys.readouterr().err == "dynprobe: interrupted; the same command continues\n"
