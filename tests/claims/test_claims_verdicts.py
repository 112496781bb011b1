"""Every testable claim on two subjects: one built so that it is true, one so that it is false."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import N, Planted, runs_of, sides_of

from dynprobe import claims
from dynprobe.claims._shapes import analyse
from dynprobe.claims._sides import Side, side_of

TESTABLE = [c for c in claims.load() if c.testable]
FALSE = [(c, i) for c in TESTABLE for i in range(len(c.parts))]
SHAPES = {p.shape: (c, i) for c in TESTABLE for i, p in enumerate(c.parts)}


def verdict(claim: claims.Claim, truths: list[str], out: Path) -> claims.Verdict:
    assert claim.panel is not None
    if claim.panel.at_least is not None:
        return analyse(claim, sides_of(claim, truths))
    return claims.analyse_runs(claim, runs_of(claim, truths, out))


@pytest.mark.parametrize("claim", TESTABLE, ids=lambda c: c.id)
def test_a_subject_for_which_it_is_true_survives(claim: claims.Claim, tmp_path: Path) -> None:
    found = verdict(claim, ["true"] * len(claim.parts), tmp_path)
    assert found.outcome == "survived", found.findings
    assert all(f.outcome == "survived" for f in found.findings)
    assert found.low <= found.effect <= found.high
    assert found.n > 0
    assert math.isfinite(found.effect)


@pytest.mark.parametrize(("claim", "wrong"), FALSE, ids=[f"{c.id}-{i}" for c, i in FALSE])
def test_a_subject_for_which_one_part_is_false_refutes_it(claim: claims.Claim, wrong: int, tmp_path: Path) -> None:
    truths = ["false" if i == wrong else "true" for i in range(len(claim.parts))]
    found = verdict(claim, truths, tmp_path)
    assert found.outcome == "falsified", found.findings


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_noise_across_the_margin_is_inconclusive(shape: str, tmp_path: Path) -> None:
    claim, wrong = SHAPES[shape]
    truths = ["open" if i == wrong else "true" for i in range(len(claim.parts))]
    found = verdict(claim, truths, tmp_path)
    assert found.outcome == "inconclusive", found.findings


def test_five_prompts_decide_nothing() -> None:
    prediction = claims.Prediction(expect="above", margin=0.0)
    ends = (0.2, 0.4)
    said = [claims.judge(claims.Estimate(0.3, *ends, ends, ends, n), prediction)[0] for n in (5, 6)]
    assert said == ["inconclusive", "survived"]


@pytest.mark.parametrize(
    ("expect", "margin", "interval", "inner", "outcome"),
    [
        ("above", 0.0, (0.0, 0.0), (0.0, 0.0), "falsified"),  # exactly no effect is not above it
        ("below", 0.0, (0.0, 0.0), (0.0, 0.0), "falsified"),
        ("above", 0.0, (-1.0, 0.0), (-1.0, 0.0), "falsified"),
        ("above", 0.0, (0.0, 1.0), (0.1, 0.9), "inconclusive"),
        ("within", (-1.0, 1.0), (-1.1, 0.5), (-0.9, 0.4), "survived"),  # two one-sided tests
        ("within", (-1.0, 1.0), (-1.1, 0.5), (-1.0, 0.4), "inconclusive"),
        ("within", (-1.0, 1.0), (1.1, 2.0), (1.2, 1.9), "falsified"),
        ("outside", (-1.0, 1.0), (1.1, 2.0), (1.2, 1.9), "survived"),
        ("outside", (-1.0, 1.0), (-1.1, 0.5), (-0.9, 0.4), "falsified"),
        ("above", 0.0, (0.1, math.inf), (0.2, math.inf), "survived"),  # a censored ratio is known from one side
        ("above", 0.0, (math.nan, math.nan), (math.nan, math.nan), "inconclusive"),
    ],
)
def test_the_rule(
    expect: str, margin: float | tuple[float, float], interval: tuple[float, float], inner: tuple[float, float],
    outcome: str,
) -> None:  # fmt: skip
    estimate = claims.Estimate(interval[0], *interval, inner, interval, 12)
    prediction = claims.Prediction.model_validate({"expect": expect, "margin": margin})
    assert claims.judge(estimate, prediction)[0] == outcome


def test_losses_of_models_with_other_tokens_are_not_compared() -> None:
    claim = claims.find("cem.full_better")
    sides = []
    for role, nll, n in (("treated", 1.0, 7), ("reference", 2.0, 8)):
        frame = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(9)], "nll": nll, "n_prompt": 7})
        frame = frame.assign(condition_id="clean", sample_id=frame["prompt_id"])
        conditions = pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"]})
        sides.append(Side(role, role, {"samples": frame, "conditions": conditions}))
        if role == "reference":
            assert analyse(claim, sides).outcome == "survived"
            frame.loc[0, "n_prompt"] = n
    found = analyse(claim, sides)
    assert found.outcome == "inconclusive"
    assert "different tokens" in found.reason


def test_losses_of_a_population_need_the_same_tokens() -> None:
    claim = claims.find("limen.ratio_perplexity")
    sides = sides_of(claim, ["true"])
    for side in sides:
        side.tables["samples"]["n_prompt"] = 9
    assert analyse(claim, sides).outcome == "survived"
    sides[3].tables["samples"]["n_prompt"] = 8
    found = analyse(claim, sides)
    assert found.outcome == "inconclusive"
    assert "different tokens" in found.reason


def test_tokens_are_not_judged_by_a_model_that_reads_others(tmp_path: Path) -> None:
    claim = claims.find("csm.hard_improve")
    runs = runs_of(claim, ["true"], tmp_path)
    tables = [t for part in claim.parts for t in ("samples", "tokens")]
    assert claim.panel is not None
    sides = [side_of(role, run, tables) for role, run in zip(claim.panel.roles, runs, strict=True)]
    for side, n in zip(sides, (9, 9), strict=True):
        side.tables["samples"]["n_prompt"] = n
    assert analyse(claim, sides).outcome == "survived"
    sides[1].tables["samples"]["n_prompt"] = 8
    found = analyse(claim, sides)
    assert found.outcome == "inconclusive"
    assert "different tokens" in found.reason


def test_among_several_parts_one_refutes_at_a_higher_confidence(tmp_path: Path) -> None:
    several = claims.find("csm.benchmark_gap")  # two parts
    loss = analyse_findings(several, tmp_path / "a")[0].estimate
    assert loss.outer[0] < loss.low < loss.high < loss.outer[1]
    alone = analyse_findings(several.model_copy(update={"parts": several.parts[:1]}), tmp_path / "b")[0].estimate
    assert alone.outer == (alone.low, alone.high)
    fractions = analyse_findings(claims.find("recovery.dissociation"), tmp_path / "c")[0].estimate
    assert fractions.outer[0] < fractions.low < fractions.high < fractions.outer[1]


def analyse_findings(claim: claims.Claim, out: Path) -> tuple[claims.Finding, ...]:
    return claims.analyse_runs(claim, runs_of(claim, ["true"] * len(claim.parts), out)).findings


def test_what_was_not_written_and_what_has_a_remark_count_for_nothing(tmp_path: Path) -> None:
    planted = Planted("subject")
    pushed = {"arm": "perturbed", "decode_mode": "forced"}
    status = ["not-written"] * 10 + ["ok"] * (N - 10)
    reasons = [None] * 10 + ['{"kappa_phase_d": "coverage"}'] * 10 + [None] * (N - 20)
    values = [-9.0] * 20 + [0.5] * (N - 20)
    planted.put("samples", pushed, kappa_phase_d=np.array(values), status=status, reasons=reasons)
    found = claims.analyse_runs("kappa.rises", [planted.write(tmp_path)])
    assert (found.effect, found.n) == (0.5, N - 20)
    planted = Planted("subject")
    labels = ["UNDEFINED"] * 20 + ["ADAPTIVE"] * (N - 20)
    planted.put("samples", {"arm": "clean"}, limen_regime=labels)
    found = claims.analyse_runs("limen.regimes", [planted.write(tmp_path)])
    assert (found.outcome, found.effect, found.n) == ("survived", 1.0, N - 20)
