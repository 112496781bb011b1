"""Extras are optional: the core imports and runs where none of them is installed, and says what to type for more."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

#: What the extras bring, as Python calls it. jinja2 comes with torch.
MODULES = ("accelerate", "bitsandbytes", "datasets", "duckdb", "gguf", "hmmlearn", "lm_eval", "matplotlib", "nnsight",
           "plotly", "psutil", "pyvene", "ray", "selenium", "sklearn", "submitit", "torchao", "torchlens",
           "transformer_lens", "xarray", "zarr")  # fmt: skip
NAMES = {"bitsandbytes": "bitsandbytes", "lm_eval": "lm-eval", "sklearn": "scikit-learn",
         "transformer_lens": "transformer-lens"}  # fmt: skip

BARE = f"""
import importlib.metadata
import sys
from importlib.machinery import PathFinder

# They are not found, as if they were not there: a finder that raised would be met by libraries that only ask.
found = PathFinder.find_spec.__func__
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest, **more: None if name.split(".")[0] in {MODULES!r} else found(cls, name, *rest, **more)
)
version = importlib.metadata.version


def versions(name):
    if name.replace("-", "_") in {MODULES!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


importlib.metadata.version = versions
sys.argv = ["dynprobe"]
"""


def bare(code, tmp_path):
    return subprocess.run(
        [sys.executable, "-c", BARE + code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )  # fmt: skip


def test_every_extra_is_among_those_that_are_taken_away():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {NAMES.get(m, m) for m in MODULES}
    for extra, needs in project["optional-dependencies"].items():
        if extra in ("demo", "docs", "test", "dev"):
            continue
        names = {n.split(">")[0].split("=")[0].split("<")[0].strip() for n in needs}
        assert names - {"jinja2"} <= wanted, f"{extra} brings {names - wanted}"
        assert not names & {n.split(">")[0].strip() for n in project["dependencies"]}


def test_the_core_runs_without_them(tmp_path):
    done = bare(
        "from dynprobe.cli import main\n"
        "sys.argv += 'run --model tiny-llama --perturb alpha=0.1 --limit 2 --max-new-tokens 2 --states'.split()\n"
        "raise SystemExit(main())\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "perturbed" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    looked = bare(
        f"import dynprobe as dp\nrun = dp.open({str(folder)!r})\nprint(run.verify(), len(run.depths))\n", tmp_path
    )
    assert looked.returncode == 0, looked.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["sweep", "recover", "iterate", "threshold"])
def test_protocols_run_without_them(protocol, tmp_path):
    calls = {
        "sweep": "dp.sweep('tiny-llama', alphas='0.1', layers='1', limit=2, out='o', quiet=True)",
        "threshold": "dp.threshold('tiny-llama', scale='relnorm', limit=2, out='o', quiet=True)",
        "iterate": "dp.iterate('tiny-cem', iterations=[1, 2], limit=2, out='o', quiet=True)",
        "recover": "dp.recover('tiny-llama', mode='slerp', perturb='alpha=0.6,layers=2,phase=decode', limit=2, "
                   "max_new_tokens=4, decode='forced', out='o', quiet=True)",
    }  # fmt: skip
    done = bare(f"import dynprobe as dp\nprint({calls[protocol]}.status)\n", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "complete" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("report {run}", "report"), ("export {run} x --to zarr", "export"),
        ("run --model smollm2-135m", "gguf"), ("run --model tiny-llama --backend nnsight", "nnsight"),
        ("sweep --model tiny-llama --alphas 0.1 --limit 1 --engine ray", "ray"),
        ("sweep --model tiny-llama --alphas 0.1 --limit 1 --engine slurm", "slurm"),
    ],
)  # fmt: skip
def test_what_needs_one_says_what_to_type(words, extra, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNPROBE_CACHE", str(tmp_path / "cache"))
    import dynprobe as dp

    run = (
        dp.run("tiny-llama", limit=1, max_new_tokens=0, out=tmp_path / "made", quiet=True) if "{run}" in words else None
    )
    asked = words.format(run=run.path if run else "").split()
    done = bare(f"from dynprobe.cli import main\nsys.argv += {asked!r}\nraise SystemExit(main())\n", tmp_path)
    assert done.returncode != 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert f"dynprobe[{extra}]" in done.stderr, done.stderr
