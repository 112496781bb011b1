"""``dynprobe panel`` from the outside: tables, JSON, exit codes."""

from __future__ import annotations

import json

import pandas as pd
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
    assert "R² of the skeletons: none for clean, 2 tokens (– p<1)\n" in said  # a line, no table of refusals
    assert "p<1: no covariate differs between these models" in said
    assert "clusters: none for clean, 2 tokens (– models<3)\n" in said
    assert "models<3: clusters need three models at least" in said
    assert "R² of" not in said.split("R² of the skeletons: none")[0]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "complete"
    assert [row["term"] for row in found["summary"]["variance"]][:2] == ["model", "category"]


def test_reasons_beside_numbers_are_said_once():
    from dynprobe.cli import _render_panel

    front = {"condition": "clean", "alpha": 0.0, "temperature": 0.0, "max_new_tokens": 2}
    rows = [
        {**front, "metric": m, "term": term, "eta2": eta2, "p": p, "reason": why}
        for m, eta2, p, why in (("nll", 0.5, float("nan"), "prompts<2"), ("ppl", float("nan"), float("nan"), "empty"))
        for term in ("model", "prompt")
    ]  # fmt: skip
    lines, shown = [], []

    class Lines:
        def print(self, text, **_):
            lines.append(text)

    _render_panel._each(Lines(), pd.DataFrame(rows), "shares", "eta2", lambda *given: shown.append(given[1]))
    assert shown == ["clean, 2 tokens"]  # one of its metrics has a number
    assert [line.split(":")[0].strip() for line in lines] == ["– empty", "– prompts<2"]


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
