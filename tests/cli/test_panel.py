"""``dynprobe panel`` from the outside: tables, JSON, exit codes."""

from __future__ import annotations

import json

import pytest

from dynprobe.cli import main

DESIGN = """
models: [panel/llama-depth2-width32-seed0, panel/llama-depth2-width32-seed1]
categories: [factual]
prompts_per_category: 3
max_new_tokens: 2
decompose: [nll]
n_boot: 20
"""


@pytest.fixture
def design(tmp_path):
    file = tmp_path / "panel.yaml"
    file.write_text(DESIGN)
    return file


def test_panel_prints_its_tables_and_is_found_again(design, tmp_path, capsys):
    words = ["panel", str(design), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "2 models, 3 prompts in 1 categories; cells: 2 done" in said
    assert "share of the variance" in said
    assert "too few models per family" in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "complete"
    assert [row["term"] for row in found["summary"]["variance"]][:2] == ["model", "category"]


def test_dry_run_writes_nothing(design, tmp_path, capsys):
    assert main(["panel", str(design), "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 2
    assert main(["panel", str(design), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "2 cells, 0 of them done" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_model_that_is_not_there_fails(design, tmp_path, capsys):
    design.write_text(DESIGN.replace("llama-depth2-width32-seed1", "lama-depth2-width32-seed1"))
    assert main(["panel", str(design), "--out", str(tmp_path / "out"), "--dry-run"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 models would fail: panel/lama-depth2-width32-seed1" in said.err
    assert "Did you mean 'panel/llama-depth2-width32-seed1'" in (said.out + said.err).replace("\n", " ")


def test_exit_codes(design, tmp_path, capsys):
    design.write_text(DESIGN + "seedss: 1\n")
    assert main(["panel", str(design)]) == 2
    assert "line 8: unknown key 'seedss'" in capsys.readouterr().err
    design.write_text(DESIGN.replace("width32-seed1", "width32-seed7"))
    assert main(["panel", str(design), "--out", str(tmp_path / "out"), "--quiet"]) == 1
    assert "1 of 2 cells failed" in capsys.readouterr().err
