"""``diff`` and ``doctor RUN`` on the command line."""

from __future__ import annotations

import json
import shutil

import pytest

import dynprobe as dp
from dynprobe.cli._render_doctor import _continued

OPTIONS = ("--model", "tiny-llama", "--limit", "2", "--batch-size", "1", "--max-new-tokens", "2", "--quiet")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of one run, made once and only copied."""
    return {"out": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def run(cli, kept):
    if "run" not in kept:
        done = cli("run", *OPTIONS, "--states", "--perturb", "alpha=0.1", "--out", kept["out"], "--json")
        assert done.code == 0, done.err
        kept["run"] = json.loads(done.out)["run"]
    return kept["run"]


def test_diff_says_where_two_runs_part(cli, run, tmp_path):
    done = cli("diff", run, run, "--check")
    assert done.code == 0
    assert "verdict: equal bit for bit" in done.out
    half = cli("run", *OPTIONS, "--states", "--dtype", "bfloat16", "--out", tmp_path, "--json")
    other = json.loads(half.out)["run"]
    found = cli("diff", run, other, "--floor", "1e-6", "--figure", tmp_path / "d.png", "--out", tmp_path / "d.json")
    assert found.code == 0, found.err
    for words in ("verdict: part at the embedding (depth 0), token 0", "dtypes.weights", "only in a: condition"):
        assert words in found.out
    assert (tmp_path / "d.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["parts"] is True
    assert content == json.loads(cli("diff", run, other, "--floor", "1e-6", "--json").out)
    assert cli("diff", run, other, "--floor", "1e-6", "--check").code == 1
    assert cli("diff", run, other, "--floor", "-1").code == 2
    assert cli("diff", run, other, "--out", "d.txt").code == 2


def test_doctor_of_a_run_explains_mends_and_the_command_goes_on(cli, run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    whole = cli("doctor", folder)
    assert (whole.code, "are what was written" in whole.out) == (0, True)
    path = folder / "depths" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    shown = cli("compare", folder, run)
    assert shown.code == 1
    assert "depths/part-00001.parquet" in shown.err
    assert "dynprobe doctor" in shown.err
    found = cli("doctor", folder, "--json")
    assert found.code == 1
    assert json.loads(found.out)["damages"][0]["kind"] == "cut"
    assert "dynprobe doctor" in found.err
    assert "--repair" in found.err
    mended = cli("doctor", folder, "--repair")
    assert mended.code == 0, mended.err
    assert "done: batch 1 is to be made again" in mended.out
    assert "the command that made it continues it" in mended.out
    again = cli("run", *OPTIONS, "--states", "--perturb", "alpha=0.1", "--out", folder, "--json")
    assert again.code == 0, again.err
    assert cli("doctor", folder).code == 0
    mine, whole_run = dp.open(folder), dp.open(run)
    parts = [sorted((p.path, p.sha256) for p in r.manifest.parts) for r in (mine, whole_run)]
    assert parts[0] == parts[1]
    calibration = next((folder / "calibration").iterdir())
    shutil.rmtree(calibration)
    lost = cli("doctor", folder, "--json")
    assert json.loads(lost.out)["damages"][0]["kind"] == "calibration"
    assert f"1 damage in {folder}" in lost.err
    mended = cli("doctor", folder, "--repair")  # what is gone cannot be put back by a repair, but by the command
    assert mended.code == 1
    assert "left until the run is continued" in mended.err
    assert "make the run again" not in mended.err
    assert cli("run", *OPTIONS, "--states", "--perturb", "alpha=0.1", "--out", folder, "--json").code == 0
    assert cli("doctor", folder).code == 0


def test_doctor_of_other_folders(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    for code, word in (
        (cli("doctor", tmp_path / "empty"), "no run folder"),
        (cli("doctor", tmp_path / "none"), "none"),
    ):
        assert code.code == 1
        assert word in code.err
        assert "Traceback" not in code.err
    assert cli("doctor", "tiny-llama", "--repair").code == 2


def test_the_command_that_goes_on_names_the_folder_as_it_lies_now():
    assert _continued(["dynprobe", "run", "--out", "runs", "--quiet"], "a b") == "dynprobe run --out 'a b' --quiet"
    assert _continued("dynprobe run --out=runs", "here") == "dynprobe run --out here"
    assert _continued(["dynprobe", "run"], "here") == "dynprobe run --out here"
