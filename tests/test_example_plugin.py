"""The example package as a user has it: installed beside dynprobe, found by the command line, its own tests green."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import dynprobe as dp

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "dynprobe-plugin"

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def installed(tmp_path: Path) -> Call:
    """What ``pip install`` leaves of the package: its modules and its metadata on the path of a process."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = tmp_path / "site"
    info = site / f"dynprobe_example-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    text = "\n".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in groups)
    (info / "entry_points.txt").write_text(text)
    path = os.pathsep.join(map(str, (site, EXAMPLE / "src", ROOT)))

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, cwd=tmp_path, check=False,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # as a worker has: sums depend on threads
        )  # fmt: skip

    return call


def test_everything_it_brings_loads(installed):
    done = installed("dynprobe", "plugins", "--json")
    assert done.returncode == 0, done.stderr
    found = {(p["group"], p["name"]): p for p in json.loads(done.stdout)}
    assert {group for group, _ in found} == {f"dynprobe.{kind}" for kind in (
        "metrics", "scales", "controllers", "adapters", "exporters", "engines",
    )}  # fmt: skip
    assert all(p["error"] is None and p["package"] == "dynprobe-example" for p in found.values())


@pytest.mark.slow
def test_the_commands_of_its_readme(installed, tmp_path):
    def run(*words):
        done = installed("dynprobe", *words, "--quiet")
        assert done.returncode == 0, done.stderr
        return dp.open(next(path for path in Path(tmp_path / words[-1]).iterdir() if path.is_dir()))

    prompts = ("--prompt", "The sky is blue", "--prompt", "A small dog", "--max-new-tokens", "6")
    model = ("--model", "tiny-llama")
    one = run(
        "run", *model, *prompts, "--perturb", "alpha=0.1,scale=peak", "--metrics", "example.reach/1", "--out", "a"
    )
    used = [(p["group"], p["name"], p["package"], p["version"]) for p in one.manifest.plugins or ()]
    assert used == [
        ("dynprobe.metrics", "example.reach", "dynprobe-example", "0.1.0"),
        ("dynprobe.scales", "peak", "dynprobe-example", "0.1.0"),
    ]
    reach = one.samples.query("condition_id != 'sham'")["example_reach"].astype(float)
    assert ((reach > 0) & (reach < 1)).all()
    assert len(one.columns().query("column == 'example_reach'")["digest"].iloc[0]) == 12

    two = run(
        "run", *model, *prompts, "--perturb", "alpha=0.1,scale=peak", "--metrics", "example.reach/1", "--engine",
        "threads", "--workers", "2", "--out", "b",
    )  # fmt: skip
    assert two.manifest.id8 == one.manifest.id8
    assert [p["name"] for p in two.manifest.plugins or ()] == ["example.reach", "peak", "threads"]
    assert two.samples.equals(one.samples)

    study = run(
        "recover", *model, *prompts, "--perturb", "alpha=0.3", "--mode", "brake", "--timings", "always", "--decode",
        "forced", "--out", "c",
    )  # fmt: skip
    assert [p["name"] for p in study.manifest.plugins or ()] == ["brake"]
    assert (study.samples.query("condition_id.str.contains('brake')")["energy_written"].astype(float) > 0).any()

    export = tmp_path / "export"
    assert installed("dynprobe", "export", one.path, export, "--to", "jsonl").returncode == 0
    assert installed("dynprobe", "import", export, "--out", tmp_path / "d").returncode == 0
    back = dp.open(next((tmp_path / "d").iterdir()))
    for table in one.manifest.rows():
        assert back.table(table).equals(one.table(table)), table


@pytest.mark.slow
def test_its_own_tests(installed):
    done = installed("pytest", "-q", "-p", "no:cacheprovider", EXAMPLE / "tests")
    assert done.returncode == 0, done.stdout
