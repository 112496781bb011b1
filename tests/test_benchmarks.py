"""The scripts in benchmarks/ run, and their arithmetic is right; how fast anything is, is not tested."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """A script's module by name, imported as the scripts import each other."""
    if not FOLDER.is_dir():
        pytest.skip("the benchmarks are not beside the tests")
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


def run(*words: object, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    if not FOLDER.is_dir():
        pytest.skip("the benchmarks are not beside the tests")
    name, *rest = map(str, words)
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *rest], capture_output=True, text=True, timeout=timeout, check=False
    )


def bench_file(path: Path, ratio: float, model: str = "m") -> Path:
    arms = {"core": {"ratio": ratio}, "bare": {"ratio": 1.0}}
    found = {
        "model": {"name": model}, "machine": {"processor": "p", "load": 0.1},
        "cases": [{"section": "metrics", "case": "8 × 64", "arms": arms}],
    }  # fmt: skip
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize(
    ("ratio", "said", "code"), [(1.05, "| ok |", 0), (1.9, "| warning |", 0), (2.3, "| TOO SLOW |", 1)]
)
def test_ratios_only_warn_below_twice_their_budget(ratio, said, code, tmp_path):
    budgets = tmp_path / "budgets.json"
    entry = {"model": "m", "section": "metrics", "case": "8 × 64", "arm": "core", "budget": 1.1}
    budgets.write_text(json.dumps({"budgets": [entry]}))
    done = run("ratios.py", bench_file(tmp_path / "b.json", ratio), "--budgets", budgets)
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr
    entry["arm"] = "gone"
    budgets.write_text(json.dumps({"budgets": [entry]}))
    missing = run("ratios.py", tmp_path / "b.json", "--budgets", budgets)
    assert (missing.returncode, "MISSING" in missing.stdout) == (1, True)
    other = run("ratios.py", bench_file(tmp_path / "o.json", 1.0, "other"), "--budgets", budgets)
    assert (other.returncode, "no budget is set for other" in other.stderr) == (1, True)


def test_budgets_name_sections_that_there_are(scripts):
    from dynprobe.protocols._bench import SECTIONS

    budgets = json.loads((FOLDER / "budgets.json").read_text())["budgets"]
    assert {"smollm2-135m", "tiny-llama"} <= {b["model"] for b in budgets}
    for budget in budgets:
        assert budget["section"] in SECTIONS
        assert 0 < budget["budget"] < 100
        assert budget["source"]


def test_the_fit_of_costs_finds_the_coefficients_it_was_made_from(scripts):
    cost = scripts("cost")
    points = [
        {"seconds": 0.5 + 2e-3 * t + 1e-2 * s, "tokens": t, "steps": s}
        for t, s in ((10, 0), (100, 4), (400, 16), (900, 2), (50, 60))
    ]
    found = cost.fit(points, "seconds", ("tokens", "steps"))
    assert found["fixed"] == pytest.approx(0.5)
    assert found["tokens"] == pytest.approx(2e-3)
    assert found["steps"] == pytest.approx(1e-2)
    assert found["worst_error"] < 1e-9
    falling = [{"seconds": 1.0 - 1e-4 * s, "tokens": 5, "steps": s} for s in (0, 10, 20)]
    clipped = cost.fit(falling, "seconds", ("tokens", "steps"))
    assert clipped["steps"] == 0.0
    assert min(clipped["fixed"], clipped["tokens"]) >= 0.0


def test_the_gpu_script_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = run("gpu.py")
    assert done.returncode == 1
    assert "no CUDA device is here, so nothing was measured" in done.stderr


@pytest.mark.parametrize(
    "only",
    [
        pytest.param(("b1", "b2", "b8", "b12"), id="forward"),
        pytest.param(("b3", "b4", "b5", "b6", "b7", "b11"), id="texts", marks=pytest.mark.slow),
    ],
)
def test_the_gpu_script_runs_dry(only, tmp_path):
    done = run(
        "gpu.py", "--size", "tiny", "--device", "cpu", "--dtype", "float32", "--rounds", 1, "--peers", "hooks",
        "--only", *only, "--json", tmp_path / "gpu.json", "--folder", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "A DRY RUN: no GPU is measured here" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["dry"] is True
    size = found["sizes"]["tiny"]
    sections = {case["section"] for case in size.get("prefill", {"cases": []})["cases"]}
    if "b1" in only:
        assert sections == {"capture", "metrics", "disk", "states"}
        assert "B12: attention, forward" in done.stdout
    else:
        assert sections == {"generation", "attractor"}
        assert {"b3", "b4", "b5", "b7"} <= set(size)
        assert "threshold of the population" in done.stdout
    assert ": met" not in done.stdout.split("B12")[0].split("B3")[0]  # a dry run meets no budget of a GPU


@pytest.mark.slow
def test_the_cost_script_runs_small(tmp_path):
    done = run(
        "cost.py", "--quick", "--no-workers", "--models", "panel/llama-depth1-width32-seed0", "--figures", tmp_path,
        "--json", tmp_path / "cost.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "cost.json").read_text())
    assert len(found["runs"]) == 6
    assert all(p["seconds"] > 0 and p["bytes"] > 0 for p in found["runs"])
    assert {"cost-time.png", "cost-bytes.png"} <= {p.name for p in tmp_path.iterdir()}
