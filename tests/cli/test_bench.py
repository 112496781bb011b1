"""``bench``: every arm is there, what peers captured is what we captured, and nothing is said of how fast."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import shlex
from pathlib import Path

import pytest

import dynprobe as dp
from dynprobe.protocols._bench import _sections
from dynprobe.protocols._bench_peers import chosen

SMALL = ("--batch", 2, "--length", 16, "--rounds", 2, "--new-tokens", 4, "--strengths", 4, "--layers", 2,
         "--megabytes", 2)  # fmt: skip
PACKAGES = {
    "raw hooks": "torch", "nnsight": "nnsight", "TransformerLens": "transformer_lens", "pyvene": "pyvene",
    "torchlens": "torchlens",
}  # fmt: skip
OURS = {
    "capture": {"bare forward", "dynprobe"},
    "metrics": {"bare forward", "core", "default"},
    "states": {"write and fsync", "states to Parquet", "read as views"},
    "disk": {"bare forward", "dynprobe, a file per layer", "dynprobe, one file"},
    "generation": {"plain generate", "our loop alone", "every depth read", "inactive controller", "all of it"},
    "sweep": {"raw hooks", "dynprobe"},
    "attractor": {"plain generate", "bare forward", "layer", "layer, commit_every=64", "commit_every=1"},
}


def finite(cases):
    """Every ratio is the median of its raw times' ratios, finite and positive."""
    for case in cases:
        for name, arm in case["arms"].items():
            assert len(arm["seconds"]) == 2
            over = case["arms"][arm["over"]]["seconds"]
            ratios = sorted(a / b for a, b in zip(arm["seconds"], over, strict=True))
            assert arm["ratio"] == pytest.approx(sum(ratios) / 2), name
            assert 0 < arm["low"] <= arm["ratio"] <= arm["high"] < math.inf, name


def test_bench_has_every_arm_and_what_peers_capture_is_what_we_capture(cli, here):
    done = cli("bench", "--model", "tiny-llama", *SMALL, "--json", "--out", here / "b.json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    written = json.loads((here / "b.json").read_text())
    assert found == written | {"path": str(here / "b.json")}
    assert found["left_out"] == {}
    assert found["machine"]["threads"] >= 1
    assert found["model"]["layers"] == 4
    assert {"torch", "transformers", "dynprobe"} <= set(found["versions"])
    assert [path.name for path in here.iterdir()] == ["b.json"]
    finite(found["cases"])
    arms = {section: set() for section in OURS}
    for case in found["cases"]:
        arms[case["section"]] |= set(case["arms"])
    for section, names in OURS.items():
        assert names <= arms[section], section
    peers = {name: importlib.util.find_spec(package) is not None for name, package in PACKAGES.items()}
    for case in found["cases"]:
        if case["section"] in ("capture", "disk", "sweep"):
            there = {name.split(" →")[0] for name in case["arms"]}
            for name, installed in peers.items():
                if case["section"] == "sweep" and name == "torchlens":
                    continue  # it has no loop of its own to write
                if name == "torchlens":  # what it leaves behind would meet the tests that follow
                    assert name not in there
                    assert ("puts wrappers around torch" if installed else "not installed") in case["absent"][name]
                    continue
                assert (name in there) == installed, (case["section"], name, case["absent"])
                assert installed or "not installed" in case["absent"][name]
        apart = {name: arm["difference"] for name, arm in case["arms"].items() if arm["difference"] is not None}
        if case["section"] in ("capture", "disk"):
            assert all(difference < 1e-3 for difference in apart.values()), apart
            assert next(v for k, v in apart.items() if k.startswith("raw hooks")) == 0.0
        if case["section"] == "disk":
            assert apart["dynprobe, a file per layer"] == apart["dynprobe, one file"] == 0.0
            assert case["facts"]["bytes"] == 2 * 16 * 4 * 128 * 4
        if case["section"] == "sweep":
            assert max(case["facts"]["difference_sd"].values()) < 1e-4
            assert set(apart) == set(case["arms"]) - {"dynprobe"}
        if case["section"] == "states":
            assert apart == {"read as views": 0.0}
            assert case["facts"]["read_without_copy"] is True
        if case["section"] == "generation":
            assert case["facts"]["texts_that_differ"] == 0
            assert case["facts"]["fired"] is False


def test_bench_prints_a_table_and_names_what_is_not_installed(cli, here, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchlens" else real(name, *a))
    done = cli("bench", "--model", "tiny-llama", *SMALL, "--only", "capture", "--peers", "hooks,torchlens")
    assert done.code == 0, done.err
    assert "torchlens: not installed: pip install torchlens" in done.out
    for words in ("capture: 2 × 16", "raw hooks", "ratio", "quartiles", "threads"):
        assert words in done.out
    (file,) = here.glob("bench-tiny-llama-*.json")
    assert f"written: {file.name}" in done.out
    (case,) = json.loads(file.read_text())["cases"]
    assert set(case["arms"]) == {"bare forward", "dynprobe", "raw hooks"}
    assert "nnsight" not in case["absent"]


def test_a_looped_model_is_measured_and_says_why_no_peer_reads_it(cli, here):
    done = cli(
        "bench", "--model", "tiny-cem", *SMALL, "--only", "capture,disk,sweep", "--json", "--out", here / "b.json"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    capture, disk = found["cases"]
    assert set(capture["arms"]) == {"bare forward", "dynprobe"}
    assert "run in a loop" in capture["absent"]["raw hooks"]
    assert disk["arms"]["dynprobe, one file"]["difference"] == 0.0
    assert "raw hooks" in found["left_out"]["sweep"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "captur"), "capture"),
        (("--peers", "nnsigth"), "nnsight"),
        (("--rounds", 0), "rounds=0"),
        (("--length", 1), "length=1"),
        (("--megabytes", 0), "megabytes"),
        (("--only", ","), "names no section"),
        (("--out", "nowhere/b.json"), "no folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(cli, words, said):
    done = cli("bench", "--model", "no-such-model", *words)
    assert done.code == 2
    assert said in done.err


def test_the_commands_of_the_page_are_understood(cli, monkeypatch):
    page = Path(dp.__file__).parents[1] / "docs" / "bench.md"
    if not page.is_file():
        pytest.skip("the pages lie beside the package in its repository only")
    asked, known = [], set(inspect.signature(dp.bench).parameters)

    class Found:
        path = None

        def as_dict(self):
            return {}

    def bench(model, **settings):
        assert _sections(settings.get("only"))
        chosen(settings.get("peers", "auto"))
        assert set(settings) <= known
        asked.append(model)
        return Found()

    monkeypatch.setattr("dynprobe.protocols.bench", bench)
    lines = re.findall(r"^dynprobe (bench .*)$", page.read_text(encoding="utf-8"), re.M)
    for line in lines:
        done = cli(*shlex.split(line), *([] if "--json" in line else ["--json"]))
        assert done.code == 0, done.err
    assert asked == ["smollm2-135m", "smollm2-135m", "tiny-llama", "tiny-llama"]
