"""Bad files and values through the command itself: exit code 1, 2 or 3, one message, and never a traceback.

What a reader refuses (:mod:`fuzz_targets` says which bytes it does) is typed as a user would type it. A layer of an
attractor has no command that reads its file; its two targets are left out.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz
import fuzz_targets
import pytest

from dynprobe.cli import main
from dynprobe.errors import DynprobeError

#: Inputs of each target that are typed; commands are typed for every one of them.
CASES = 3
#: Seconds are spent by loading a model, or by writing folders, before these are refused.
FEW = {"sidecar", "calibration", "manifest", "part", "model_folder", "gguf_raw"}
_RUN = ("run", "--model", "tiny-llama", "--limit", "1", "--max-new-tokens", "0", "--quiet")


def files(command: str, name: str) -> Callable[[str, Path], Iterator[list[str]]]:
    """One command on the file that a target leaves behind."""
    return lambda _, scratch: iter([[w.format(scratch / name) for w in command.split()]])


def texts(*words: str) -> Callable[[str, Path], Iterator[list[str]]]:
    """One command on the text itself; ``{}`` stands for it."""
    return lambda text, _: iter([[w.replace("{}", text) for w in words]])


def states(suffix: str) -> Callable[[str, Path], Iterator[list[str]]]:
    """Both commands that read states."""
    return lambda _, scratch: iter([[command, str(scratch / f"states{suffix}")] for command in ("validate", "import")])


def folders(_: str, scratch: Path) -> Iterator[list[str]]:
    """The commands that look at a run; a part that nobody reads is no obstacle to some of them."""
    run = str(scratch / "run")
    yield ["doctor", run]
    yield ["export", run, str(scratch / "exported")]


TYPED: dict[str, Callable[[str, Path], Iterator[list[str]]]] = {
    "where": texts(*_RUN, "--states", "--where={}"),
    "perturb": texts(*_RUN, "--perturb={}"),
    "perturb_file": files(" ".join(_RUN) + " --perturb=@{}", "spec.yaml"),
    "strengths": texts("sweep", "--model", "tiny-llama", "--limit", "1", "--alphas={}", "--quiet"),
    "settings": files(" ".join(_RUN) + " --config {}", "config.yaml"),
    "panel": files("panel {} --dry-run", "panel.yaml"),
    **{
        f"prompts{middle}": files(" ".join(_RUN) + " --prompts {}", f"prompts{suffix}")
        for middle, suffix in (
            ("_txt_raw", ".txt"), ("_jsonl_raw", ".jsonl"), ("_parquet_raw", ".parquet"), ("_parquet", ".parquet"),
        )
    },
    "items_raw": files("dissociate --model tiny-llama --items {} --quiet", "items.jsonl"),
    **{
        name: states("." + name.removesuffix("_raw"))
        for name in ("npz_raw", "npz", "npy_raw", "pt_raw", "safetensors_raw", "safetensors", "parquet_raw", "parquet")
    },
    "activations": files("validate {}", "dumps"),
    "direction_npy_raw": files(" ".join(_RUN) + " --perturb=alpha=1,kind=direction --direction {}", "direction.npy"),
    "direction_safetensors_raw": files(
        " ".join(_RUN) + " --perturb=alpha=1,kind=direction --direction {}", "direction.safetensors"
    ),
    "manifest_raw": folders, "manifest": folders, "part": folders,
    "sidecar": files("import {}", "export"),
    "model_folder": files("doctor {}", "model"),
    "gguf_raw": files("run --model {} --limit 1 --quiet", "model.gguf"),
    "calibration": files(
        "recover --model tiny-llama --mode slerp --perturb alpha=0.5 --limit 1 --calibration {}", "calibration"
    ),
}  # fmt: skip


def refused(target: str, wanted: int, scratch: Path) -> Iterator[bytes]:
    """Inputs that a reader of dynprobe's refuses, kept ones first."""
    draw = random.Random(f"typed/{target}")
    known = fuzz.stored(fuzz.FOUND, target) + fuzz.stored(fuzz.CORPUS, target)
    seeds = known or fuzz_targets.seeds(target)
    draw.shuffle(known)
    for data in [*known, *(fuzz.mutated(seeds, draw) for _ in range(400))]:
        if wanted == 0:
            return
        if "\x00" in data.decode("utf-8", "replace") and target in ("where", "perturb", "strengths"):
            continue  # no argument of a program can hold it
        try:
            fuzz_targets.TARGETS[target](data, scratch)
        except DynprobeError:
            wanted -= 1
            yield data


@pytest.fixture(autouse=True)
def silent():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_reader_that_a_command_has_is_typed():
    assert fuzz_targets.TARGETS.keys() - TYPED.keys() == {"attractor", "attractor_raw"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TYPED)
def test_what_a_reader_refuses_is_one_message(target, tmp_path, monkeypatch, capsys):
    scratch, here = tmp_path / "scratch", tmp_path / "here"
    scratch.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    typed = 0
    for data in refused(target, 2 if target in FEW else CASES, scratch):
        for words in TYPED[target](data.decode("utf-8", "replace"), scratch):
            capsys.readouterr()
            code = main(words)
            said = capsys.readouterr()
            assert code in (1, 2, 3), f"{words} ended with {code}\n{data!r}"
            assert "Traceback" not in said.out + said.err, f"{words}\n{data!r}"
            messages = [t for t in said.err.splitlines() if t.startswith("dynprobe: ") and "warning: " not in t]
            assert len(messages) == 1, f"{words}\n{data!r}\n{said.err}"
            assert len(messages[0]) > len("dynprobe: ") + 10
            assert "No such option" not in said.err, f"{words} never reached the reader"
            typed += 1
    assert typed >= 2
    # A command that refuses leaves nothing behind, but for the run that an unreadable part was found in.
    assert not [p for p in here.rglob("*") if p.name == "manifest.json"]


@pytest.mark.parametrize(
    ("target", "data"),
    [
        ("where", b"layers=50%%"),
        *(pytest.param(target, data, marks=pytest.mark.long) for target, data in (
            ("panel", b"models: [tiny-llama\n"), ("safetensors_raw", b"\xff" * 16), ("gguf_raw", b"GGUF\x03\x00\x00"),
            ("prompts_jsonl_raw", b'{"text": 1e999}\n[]'))),
    ],
)  # fmt: skip
def test_the_program_itself(target, data, tmp_path):
    with pytest.raises(DynprobeError):
        fuzz_targets.TARGETS[target](data, tmp_path)
    for words in TYPED[target](data.decode("utf-8", "replace"), tmp_path):
        found = subprocess.run(
            [sys.executable, "-m", "dynprobe", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert found.returncode in (1, 2, 3)
        assert found.stderr.startswith("dynprobe: ")
        assert "Traceback" not in found.stderr
        assert found.stdout == ""


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TYPED)
def test_a_hundred_of_each(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "CASES", 100)
    monkeypatch.setattr(sys.modules[__name__], "FEW", set())
    test_what_a_reader_refuses_is_one_message(target, tmp_path, monkeypatch, capsys)
