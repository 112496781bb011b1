"""``export`` and the way back, in this process."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return dp.run(
        "tiny-llama", ["The sky is", "And so on"], perturb="alpha=0.1", max_new_tokens=2, states=True, quiet=True,
        out=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip


def test_a_run_goes_out_and_comes_back(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run.path), str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: hf" in said
    assert "states" in said
    assert f"dynprobe import {out}" in said
    assert main(["import", str(out), "--out", str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    back = dp.open(found["run"])
    for name in ("samples", "tokens", "depths", "profiles", "prompts", "conditions"):
        pd.testing.assert_frame_equal(run.table(name), back.table(name), check_exact=True)
    assert (run.states(raw=True)[1] == back.states(raw=True)[1]).all()
    assert "self-tests" in repr(back)
    assert "null ok" in repr(back)
    assert main(["show", found["run"]]) == 0
    said = capsys.readouterr().out
    assert "tiny-llama" in said
    assert "imported from out (export of a run, format hf)" in said
    assert main(["show", str(run.path)]) == 0
    assert "imported from" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("hf", 'load_dataset("FOLDER", "prompts")'), ("csv", 'read_csv("FOLDER/prompts.csv")'),
        ("arrow", "FOLDER/prompts.arrow"), ("npz", "FOLDER/prompts.npz"), ("safetensors", "FOLDER/prompts.safetensors"),
    ],
)  # fmt: skip
def test_reading_lines_name_a_table_that_is_there(run, tmp_path, capsys, to, words):
    out = tmp_path / "out"
    tables = ["--table", "prompts", "--table", "conditions"]
    assert main(["export", str(run.path), str(out), "--to", to, *tables]) == 0
    said, page = capsys.readouterr().out, (out / "README.md").read_text()
    assert "'samples'" not in said
    assert "samples" not in page.split("## To read it")[1].split("##")[0]
    assert words in page
    if to == "hf":
        assert f"load_dataset({str(out)!r}, 'prompts')" in said


def test_flags_and_refusals(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["export", str(run.path), out, "--to", "npz", "--table", "samples", "--condition", "clean", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"samples": 2}
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["export", str(run.path), str(tmp_path / "x"), "--to", "nzp"]) == 2
    assert "Did you mean 'npz'?" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "x")]) == 1
    assert main(["export", str(run.path), str(tmp_path / "r"), "--redact-text", "--license", "cc0-1.0"]) == 0
    said = capsys.readouterr().out
    assert "removed   prompts.text: replaced by a hash" in said
    assert "The sky is" not in (tmp_path / "r" / "README.md").read_text()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "asked", [[], ["--redact-text"], ["--condition", "clean"], ["--table", "samples", "--table", "prompts"]]
)
def test_doctor_finds_nothing_wrong_with_an_import(run, tmp_path, capsys, asked):
    assert isinstance(run.manifest.calibration_hash, str)
    assert main(["export", str(run.path), str(tmp_path / "out"), *asked, "--quiet"]) == 0
    back = dp.ingest(tmp_path / "out", out=tmp_path / "runs")
    capsys.readouterr()
    assert main(["doctor", str(back.path), "--json"]) == 0, capsys.readouterr()
    found = json.loads(capsys.readouterr().out)
    assert (found["healthy"], found["damages"]) == (True, [])
    part = next((back.path / "samples").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    assert main(["doctor", str(back.path)]) == 1
    said = capsys.readouterr()
    assert "import it again" in said.err
    assert "--repair" not in said.err
