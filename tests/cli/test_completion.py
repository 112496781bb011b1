"""Shell completion: the right words, and no library loaded for them."""

import os
import subprocess
import sys

import pytest

from dynprobe import metrics
from dynprobe.claims import load
from dynprobe.cli import _words as words
from dynprobe.controllers.recovery import MODES, SIGNALS
from dynprobe.engines import ENGINES
from dynprobe.models import known_models, panel_models
from dynprobe.probes._perturb_values import KINDS
from dynprobe.probes._scales import SCALES
from dynprobe.protocols import AttractConfig, RunConfig, SweepConfig, ThresholdConfig
from dynprobe.runs._export_formats import FORMATS
from dynprobe.runs._plot import PICTURES

#: pydantic is not among them: newer versions of typer import it themselves.
HEAVY = ("torch", "numpy", "scipy", "pandas", "transformers", "pyarrow", "yaml", "rich")


def test_words_are_those_of_the_code():
    assert words.defined("probes/_scales.py", "SCALES") == list(SCALES)
    assert words.defined("probes/_perturb_values.py", "KINDS") == list(KINDS)
    assert words.defined("controllers/recovery/_modes.py", "MODES") == list(MODES)
    assert words.defined("controllers/recovery/_signals.py", "SIGNALS") == list(SIGNALS)
    assert words.defined("runs/_export_formats.py", "FORMATS") == list(FORMATS)
    assert words.defined("engines/_registry.py", "ENGINES") == list(ENGINES)
    assert words.defined("runs/_plot.py", "PICTURES") == list(PICTURES)
    assert words.claims("") == [claim.id for claim in load()]
    for kind, file, name in (
        (RunConfig, "protocols/_config.py", "dtype"), (RunConfig, "protocols/_config.py", "padding"),
        (SweepConfig, "protocols/_sweep.py", "tables"),
        (ThresholdConfig, "protocols/_threshold_config.py", "null"),
        (AttractConfig, "protocols/_attract_config.py", "task"),
    ):  # fmt: skip
        allowed = kind.model_fields[name].annotation
        assert words.defined(file, name) == list(allowed.__args__)
    with pytest.raises(LookupError, match="does not define"):
        words.defined("protocols/_config.py", "nothing")


def test_metrics_are_all_that_a_run_can_be_asked_for():
    found = set(words.metrics(""))
    assert found <= set(metrics.ids())
    for name in set(metrics.ids()) - found:
        assert name.split(".")[0] in ("crit", "lockin", "plateau", "relax"), name
    assert words.metrics("kappa.phase/") == ["kappa.phase/1"]


def test_models_and_runs_and_files_of_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--org--model").mkdir(parents=True)
    (tmp_path / "my-model").mkdir()
    for name in ("2026-01-01T00-00-00_gpt2_00000000", "2026-01-02T00-00-00_gpt2_11111111"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").touch()
    assert set(known_models()) <= set(words.models(""))
    assert words.models("org/") == ["org/model"]
    assert words.models("my") == ["my-model"]
    assert words.models(panel_models()[0].name[:-1])[0] == panel_models()[0].name
    assert words.runs("runs/2026-01")[0].endswith("11111111")  # the newest first
    (tmp_path / "prompts.txt").touch()
    assert words.files("prom") == ["prompts.txt"]
    assert words.folders("prom") == []


def test_lists_and_perturbations_go_on_after_a_comma():
    assert words.listed("controllers/recovery/_modes.py", "MODES")("slerp,shr") == ["slerp,shrink"]
    assert "slerp,slerp" not in words.listed("controllers/recovery/_modes.py", "MODES")("slerp,")
    assert words.perturbation("alpha=0.1,sca") == ["alpha=0.1,scale="]
    assert words.perturbation("alpha=0.1,scale=rel") == ["alpha=0.1,scale=relnorm"]
    assert words.perturbation("alpha=0.1,kind=r") == ["alpha=0.1,kind=rotate"]
    assert words.perturbation("alpha=0.1,layers=5") == []


def completed(line, tmp_path):
    """What a shell is told, and which heavy libraries the program loaded for it."""
    code = (
        "import sys\nfrom dynprobe.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('loaded', *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    count = len(line.split()) - (0 if line.endswith(" ") else 1)
    told = {
        "_DYNPROBE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(count),
        "_TYPER_COMPLETE_ARGS": line,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **told}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dynprobe thr", ["threshold"]),
        ("dynprobe run --model tiny-l", ["tiny-llama"]),
        ("dynprobe metrics kappa.phase/", ["kappa.phase/1"]),
        ("dynprobe recover --mode slerp,shr", ["slerp,shrink"]),
        ("dynprobe export RUN there --to safe", ["safetensors"]),
    ],
)
def test_a_shell_gets_words_without_a_heavy_import(line, expected, tmp_path):
    out, err = completed(line, tmp_path)
    assert out == expected, err
    assert err.strip() == "loaded"


def test_completion_can_be_installed(capsys, monkeypatch):
    from dynprobe.cli import main

    monkeypatch.setenv("SHELL", "/bin/bash")
    assert "--install-completion" in (main(["--help"]), capsys.readouterr().out)[1]
