"""``dynprobe claims`` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynprobe.cli import main


def test_the_list_names_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["claims"]
    assert len(rows) >= 60
    assert {r["id"]: r["testable"] for r in rows}["csm.cost"] is False
    assert main(["claims", "--topic", "attractor", "--testable"]) == 0
    said = capsys.readouterr().out
    assert "attractor.snap_back" in said
    assert "attractor.overhead" not in said
    assert "kappa.rises" not in said
    assert main(["claims", "--topic", "atractor"]) == 2
    assert "Did you mean 'attractor'" in capsys.readouterr().err


def test_one_claim_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "show", "csm.delta_at_40"]) == 0
    said = capsys.readouterr().out
    assert "∆ > 0.19 at iteration 40" in said
    assert "above 0.19" in said
    assert "line 17, 36" in said
    assert main(["claims", "show", "csm.cost"]) == 0
    assert "untestable A price" in capsys.readouterr().out
    assert main(["claims", "show", "csm.costs"]) == 2
    assert "Did you mean 'csm.cost'" in capsys.readouterr().err


def test_a_test_runs_logs_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    words = ["claims", "test", "kappa.rises", "--models", "panel/llama-depth2-width32-seed0", "--limit", "6",
             "--out", str(tmp_path / "r"), "--log", str(log), "--perturb", "alpha=0",
             "--set", "max_new_tokens=2"]  # fmt: skip
    assert main([*words, "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["outcome"], verdict["effect"]) == ("falsified", 0.0)
    assert verdict["record"] == "o0002"
    assert main(["claims", "test", "kappa.rises", "--runs", verdict["runs"][0], "--log", str(log)]) == 0
    said = capsys.readouterr().out
    assert verdict["outcome"] in said
    assert "post hoc" in said
    assert main(["claims", "log", "--log", str(log), "--verify"]) == 0
    assert "4 records, the chain holds" in capsys.readouterr().out
    assert main(["claims", "--log", str(log), "--topic", "kappa"]) == 0
    assert verdict["outcome"] in capsys.readouterr().out
    log.write_text(log.read_text().replace(verdict["outcome"], "survived"))
    assert main(["claims", "log", "--log", str(log), "--verify"]) == 1
    assert "was edited" in capsys.readouterr().err
    assert main(["claims", "log", "--log", str(log)]) == 1  # printed, and not as if nothing had happened
    said = capsys.readouterr()
    assert "registered" in said.out
    assert "does not hold together" in said.err


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "test", "csm.cost", "--models", "tiny-csm"]) == 2
    assert "A price" in capsys.readouterr().err
    assert main(["claims", "test", "kappa.rises"]) == 2
    assert main(["claims", "test", "kappa.rises", "--models", "tiny-csm", "--set", "limit"]) == 2
    assert main(["claims", "log", "--log", str(tmp_path / "none.jsonl")]) == 2
    capsys.readouterr()
    assert main(["claims", "log"]) == 0
    assert "pilot" in capsys.readouterr().out
    assert main(["claims", "log", "--verify"]) == 0
