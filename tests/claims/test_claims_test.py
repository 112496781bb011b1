"""Testing a claim on real models: first the prediction, then the run, then the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planted import runs_of

from dynprobe import claims, protocols
from dynprobe.claims import ClaimLog, LogError
from dynprobe.claims._settings import check_settings
from dynprobe.errors import RunFolderError, UsageError
from dynprobe.testing import tiny_llama

PROMPTS = [[5 + i, 9, 11 + i, 13, 7 + 2 * i, 40 - i] for i in range(6)]
SHORT: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 2}


@pytest.fixture
def model() -> Any:
    return tiny_llama()


def test_a_strong_push_raises_kappa_and_none_does_not(tmp_path: Path, model: Any) -> None:
    log = tmp_path / "log.jsonl"
    pushed = claims.test("kappa.rises", [model], out=tmp_path, log=log, perturb="alpha=3", **SHORT)
    assert pushed.outcome == "survived"
    assert pushed.low > 0
    assert pushed.n == 6
    idle = claims.test("kappa.rises", [model], out=tmp_path, log=log, perturb="alpha=0", **SHORT)
    assert (idle.outcome, idle.effect) == ("falsified", 0.0)
    found = ClaimLog(log).records()
    assert [(r["kind"], r["outcome"]) for r in found] == [
        ("registered", None), ("outcome", "survived"), ("registered", None), ("outcome", "falsified"),
    ]  # fmt: skip
    assert found[3]["supersedes"] == found[1]["id"]
    assert found[0]["supersedes"] is None
    assert found[0]["plan"]["settings"]["perturb"] == "alpha=3"
    assert found[0]["plan_hash"] == found[1]["plan_hash"] != found[2]["plan_hash"]
    assert found[1]["data_hash"] != found[3]["data_hash"]
    assert found[1]["panel"]["small"]
    assert any(d.startswith("perturb='alpha=3' in place of 'alpha=0.75'") for d in found[1]["deviations"])
    assert not any("post hoc" in d for d in found[1]["deviations"])
    assert ClaimLog(log).verify() == []


def test_the_prediction_is_in_the_log_before_the_data_exist(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seen = ClaimLog(tmp_path / "log.jsonl"), []
    real = protocols.run

    def run(*args: Any, **settings: Any) -> Any:
        seen.append(([r["kind"] for r in log.records()], list(tmp_path.glob("*/manifest.json"))))
        return real(*args, **settings)

    monkeypatch.setattr(protocols, "run", run)
    claims.test("kappa.rises", [model], out=tmp_path, log=log, **SHORT)
    assert seen == [(["registered"], [])]
    assert [r["kind"] for r in log.records()] == ["registered", "outcome"]


def test_data_that_were_there_already_are_said_to_be(tmp_path: Path, model: Any) -> None:
    log = tmp_path / "log.jsonl"
    claims.test("kappa.rises", [model], out=tmp_path, log=log, **SHORT)
    again = claims.test("kappa.rises", [model], out=tmp_path, log=log, **SHORT)
    assert any("existed before registration" in note for note in again.notes)
    folder = Path(again.runs[0])
    byrun = claims.test("kappa.rises", runs=[folder], log=log)
    assert byrun.effect == again.effect
    records = ClaimLog(log).records()
    assert [any("existed before registration" in d for d in r["deviations"]) for r in records] == [
        False, False, False, True, True, True,
    ]  # fmt: skip
    assert records[3]["data_hash"] == records[1]["data_hash"] == records[5]["data_hash"]
    assert records[4]["plan"]["post_hoc"] is True


def test_without_a_log_nothing_is_written(tmp_path: Path, model: Any) -> None:
    found = claims.test("kappa.rises", [model], out=tmp_path / "runs", **SHORT)
    assert found.record is None
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert json.dumps(found.to_dict())


def test_what_cannot_be_tested_is_refused_before_anything_is_written(tmp_path: Path, model: Any) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(UsageError, match="cannot be tested here: A price"):
        claims.test("csm.cost", [model], log=log)
    with pytest.raises(UsageError, match="needs 2 models, found 1: deeper: the deeper model"):
        claims.test("kappa.depth_helps", [model], log=log)
    with pytest.raises(UsageError, match="needs 6 models or more; found 2"):
        claims.test("kappa.skeleton_r2", [model, model], log=log)
    with pytest.raises(UsageError, match="name the models"):
        claims.test("kappa.rises", log=log)
    with pytest.raises(UsageError, match="not both"):
        claims.test("kappa.rises", [model], runs=["x"], log=log)
    with pytest.raises(UsageError, match="counts models, and a is named twice"):
        claims.test("kappa.skeleton_r2", "a,b,c,d,e,a", log=log)
    assert not log.exists()


def test_nothing_is_run_for_a_log_that_is_broken(tmp_path: Path, model: Any) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    with pytest.raises(LogError, match="nothing is appended"):
        claims.test("kappa.rises", [model], out=tmp_path / "runs", log=log, **SHORT)
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_protocol_is_refused(tmp_path: Path) -> None:
    other = runs_of(claims.find("cem.full_better"), ["true"], tmp_path)[:1]
    with pytest.raises(UsageError, match="no column 'iterations', which the claim rests on"):
        claims.analyse_runs("csm.delta_at_40", other)
    with pytest.raises(UsageError, match="which the claim rests on"):
        claims.analyse_runs("kappa.threshold_gpt2", other)


def test_a_run_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from dynprobe.runs import RunWriter, open_run

    writer = RunWriter.begin(tmp_path, model_name="m", config={}, ident="0123abcd")
    writer.interrupt("stopped")
    with pytest.raises(RunFolderError, match="claim is tested on whole runs"):
        claims.analyse_runs("kappa.rises", [open_run(writer.folder)])


def test_the_plan_has_everything_that_decides() -> None:
    claim = claims.find("kappa.rises")
    plan = claims.plan_of(claim, {"subject": "m"}, {"limit": 8})
    assert plan["settings"] == {"perturb": "alpha=0.75", "max_new_tokens": 32, "limit": 8}
    assert plan["definitions"].keys() == {"kappa.phase.paired/1"}
    assert plan["prediction"][0]["margin"] == 0.0
    judged = claims.plan_of(claims.find("csm.hard_improve"), {"subject": "m", "judge": "j"}, {})
    assert judged["roles"]["judge"]["settings"] == {"max_new_tokens": 0}
    assert claims.plan_hash(plan) != claims.plan_hash(claims.plan_of(claim, {"subject": "m"}, {}))


def test_a_threshold_of_a_real_model_is_read_from_its_trials(tmp_path: Path, model: Any) -> None:
    found = claims.test("kappa.threshold_gpt2", [model], out=tmp_path, prompts=PROMPTS)
    fit = (
        protocols.threshold(model, prompts=PROMPTS, criterion="kl", scale="relnorm", out=tmp_path).table("fits").iloc[0]
    )
    assert found.effect == pytest.approx(fit["alpha50"])
    assert (found.low, found.high) == pytest.approx((fit["low"], fit["high"]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"foo": 1}, r"kappa\.rises .* protocol run, which has no setting 'foo'\. Settings: .*max_new_tokens"),
        ({"max_new_token": 1}, r"no setting 'max_new_token'\. Did you mean 'max_new_tokens'\?"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
        ({"limit": 0}, "limit=0"),
    ],
)  # fmt: skip
def test_wrong_settings_leave_no_registration(tmp_path: Path, model: Any, settings: dict[str, Any], said: str) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(UsageError, match=said):
        claims.test("kappa.rises", [model], out=tmp_path, log=log, **settings)
    assert not log.exists()


def test_the_settings_of_every_claim_are_such_that_its_protocol_takes_them() -> None:
    for claim in claims.load():
        if claim.testable:
            check_settings(claim, {"limit": 4, "prompts": ["a text", "another"], "seed": 1})


def test_a_value_that_no_text_has_says_why(tmp_path: Path) -> None:
    verdict = claims.test(
        "kappa.rises", "panel/llama-depth1-width32-seed0", out=tmp_path, limit=3, max_new_tokens=2
    )  # fmt: skip
    assert verdict.outcome == "inconclusive"
    assert "no value (no text of panel/llama-depth1-width32-seed0 has kappa_phase_d: depth<2" in verdict.reason
    assert "too few layers" in verdict.reason
    assert "empty" not in verdict.reason
