"""``iterate``: what stands at T is what a run of T iterations gives, whichever road was taken."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import SiteError, UsageError
from dynprobe.models import CemConfig, CemForCausalLM, CsmConfig, CsmForCausalLM
from dynprobe.probes import NoiseScale, Subject, discover
from dynprobe.probes._scales import SCALES
from dynprobe.prompts import Prompt
from dynprobe.protocols import _iterate, _iterate_split
from dynprobe.protocols._arms import Text
from dynprobe.protocols._iterations import at_iterations
from dynprobe.testing import byte_tokenizer, tiny_llama

TEXTS = ["hello world", "it is raining", "no thank you", "what"]
VOCAB = 260


@pytest.fixture(scope="module")
def csm() -> Subject:
    torch.manual_seed(0)
    model = CsmForCausalLM(CsmConfig.preset("nano", num_iterations=6, vocab_size=VOCAB))
    return discover(model.eval(), tokenizer=byte_tokenizer(), name="csm")


@pytest.fixture(scope="module")
def cem() -> Subject:
    torch.manual_seed(0)
    model = CemForCausalLM(CemConfig.preset("nano", steps_attention=2, steps_mlp=2, vocab_size=VOCAB))
    return discover(model.eval(), tokenizer=byte_tokenizer(), name="cem")


@pytest.fixture(scope="module")
def study(csm: Subject, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dp.iterate(csm, TEXTS, iterations=[1, 2, 5], out=tmp_path_factory.mktemp("iterate"))


@pytest.mark.parametrize("which", ["csm", "cem"])
def test_each_t_is_the_run_of_a_model_that_makes_t_iterations(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    subject: Subject = request.getfixturevalue(which)
    run = dp.iterate(subject, TEXTS, iterations="1,3", out=tmp_path / "a")
    assert run.summary["one_pass"] == (which == "csm")
    for T in (1, 3):
        with at_iterations(subject, T) as other:
            alone = dp.run(other, TEXTS, max_new_tokens=0, out=tmp_path / "b")
        mine = run.samples[run.samples["condition_id"] == f"T{T}"].set_index("prompt_id").sort_index()
        theirs = alone.samples.set_index("prompt_id").sort_index()
        for column in ("nll", "entropy", "kappa_phase", "delta_rel_prev"):
            np.testing.assert_allclose(mine[column], theirs[column], rtol=2e-4, atol=1e-6, err_msg=column)
        last = alone.depths[alone.depths["depth"] == other.n_layers].merge(
            alone.samples[["sample_id", "prompt_id"]], on="sample_id"
        )
        last = last[last["pos"] >= 1].groupby("prompt_id", observed=True)
        np.testing.assert_allclose(mine["delta_last"], last["delta_rel_prev"].mean(), rtol=2e-4)
        np.testing.assert_allclose(mine["energy_last"], last["energy"].mean(), rtol=2e-4)
    assert subject.loop is not None
    assert subject.loop.iterations is not None
    assert subject.loop.iterations(subject.model) == (6 if which == "csm" else 2)  # as it was


def test_a_loop_that_does_not_hold_shorter_runs_is_run_for_each(
    csm: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Any
) -> None:
    monkeypatch.setattr(_iterate._Iterate, "_check_prefix", lambda *_: 1.0)
    slow = dp.iterate(csm, TEXTS, iterations=[1, 2, 5], out=tmp_path)
    assert not slow.summary["one_pass"]
    a, b = (r.samples.set_index("sample_id").sort_index() for r in (study, slow))
    for column in ("nll", "kappa_phase", "delta_last", "energy_last"):
        np.testing.assert_allclose(a[column], b[column], rtol=2e-4, atol=1e-6)
    assert set(slow.depths["sample_id"].astype(str).str.extract(r"\|(T\d)\|")[0]) == {"T1", "T2", "T5"}
    assert set(study.depths["sample_id"].astype(str).str.extract(r"\|(T\d)\|")[0]) == {"T5"}


def test_the_prefix_check_measures_the_deviation(csm: Subject, study: Any) -> None:
    facts = study.manifest.model_dump()
    assert "prefix_deviation" in str(facts)
    assert study.summary["one_pass"]


def test_best_and_converged_stand_side_by_side(study: Any) -> None:
    samples = study.samples
    for _, rows in samples.groupby("prompt_id", observed=True):
        assert set(rows["best_iteration"]) == {float(rows.loc[rows["nll"].idxmin(), "iterations"])}
    # From where on the relative Δ stays below the tolerance for two updates, on the trajectory itself.
    depths = study.depths.merge(samples[["sample_id", "prompt_id"]], on="sample_id")
    depths = depths[depths["pos"] >= 1]
    delta = depths.groupby(["prompt_id", "depth"], observed=True)["delta_rel_prev"].mean().unstack()
    longest = samples[samples["iterations"] == 5].set_index("prompt_id")["converged_at"]
    for prompt, row in delta.iterrows():
        below = (row.to_numpy()[1:] < 0.03).astype(int)
        hits = [k + 1 for k in range(1, len(below)) if below[k - 1] and below[k]]
        assert (math.isnan(longest[prompt]) and not hits) or longest[prompt] in (hits[0] - 1, hits[0])


def test_angle_and_length_make_up_delta(study: Any) -> None:
    """‖h′ − h‖² = ‖h‖² + ‖h′‖² − 2‖h‖‖h′‖cos θ, per slot; over means only roughly, so on the parts' order."""
    samples = study.samples
    assert (samples["delta_last_angle"] > 0).all()
    assert (samples["delta_last_radial"] >= 0).all()
    lower = 2 * np.sin(np.pi * samples["delta_last_angle"] / 2) * 0.5
    assert (samples["delta_last"] > lower).all()


def test_the_radial_part_is_that_of_each_slot(csm: Subject, study: Any) -> None:
    """One slot may grow while another shrinks: the growth of their mean norm is not their mean growth."""
    with at_iterations(csm, 2) as subject:
        for sample, row in study.samples.query("condition_id == 'T2'").set_index("prompt_id").iterrows():
            text = study.prompts.set_index("prompt_id").loc[sample, "text"]
            tape = dp.capture(subject, [text])
            before, after = (tape.states[d][0, 1:].double().norm(dim=-1) for d in (1, 2))
            assert row["delta_last_radial"] == pytest.approx(float((after / before).log().abs().mean()), rel=1e-5)


def test_a_loop_of_two_lengths_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CemForCausalLM(CemConfig.preset("nano", steps_attention=2, steps_mlp=1)).eval()
    run = dp.iterate(model, [[5, 6, 7], [8, 9, 10, 11]], iterations=[1, 3], out=tmp_path)
    assert (model.model.steps_attention, model.model.steps_mlp) == (2, 1)
    assert run.samples["nll"].notna().all()
    # Every layer has a loop of its own: nothing was measured that could converge, so nothing is censored either.
    assert run.summary["converged_at"]["censored"] is None


def test_a_model_that_halts_by_itself_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CsmForCausalLM(CsmConfig.preset("nano", num_iterations=30, halt_tol=0.05)).eval()
    with pytest.raises(UsageError, match=r"made \d+ iterations where 30 were asked for: it halts by itself"):
        dp.iterate(model, [[5, 6, 7], [8, 9, 10, 11]], iterations=[2, 30], out=tmp_path)


def test_an_arm_is_written_at_every_t(csm: Subject, tmp_path: Path) -> None:
    run = dp.iterate(csm, TEXTS, iterations=[2, 4], perturb="alpha=0.3,iterations=1", out=tmp_path)
    assert set(run.samples["condition_id"].astype(str)) == {"T2", "T4", "T2|perturbed", "T4|perturbed"}
    pushed = run.samples[run.samples["condition_id"].astype(str).str.contains("perturbed")]
    np.testing.assert_allclose(pushed["alpha_relnorm"], 0.3, rtol=1e-4)
    assert {row["arm"] for row in run.summary["iterations"]} == {"clean", "perturbed"}
    # A clean run of 2 is the beginning of one of 4 and not stored again; a written one need not be.
    stored = set(run.depths["sample_id"].astype(str).str.split("|", n=1).str[1].str.rsplit("|", n=1).str[0])
    assert stored == {"T4", "T2|perturbed", "T4|perturbed"}


def test_answers_are_right_or_wrong(csm: Subject, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    items = [Prompt(f"{chr(c)}", "abc", "x", answer=chr(c)) for c in range(33, 127)]
    run = dp.iterate(csm, items, iterations=[3], out=tmp_path)
    with torch.no_grad():
        top = int(csm.model(torch.tensor([tokenizer("abc")["input_ids"]]), num_iterations=3).logits[0, -1].argmax())
    right = run.samples.set_index("prompt_id")["right"]
    for name, value in right.items():
        assert value == float(tokenizer("abc" + str(name))["input_ids"][-1] == top)


def test_hardness_is_read_off_another_model(csm: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    other = discover(
        CsmForCausalLM(CsmConfig.preset("nano", num_iterations=2, vocab_size=VOCAB)).eval(),
        tokenizer=byte_tokenizer(), name="other",
    )  # fmt: skip
    monkeypatch.setattr(_iterate_split, "load_subject", lambda _: other)
    run = dp.iterate(csm, TEXTS, iterations=[1, 4], split_by="other", out=tmp_path)
    rows = pd.DataFrame(run.summary["hardness"])
    assert set(rows["split"]) == {"own_loss", "other"}
    theirs = _iterate_split.difficulty("other", csm, run_prompts(TEXTS), texts_of(TEXTS))
    tokens = run.table("tokens")
    at = {T: tokens[tokens["sample_id"].astype(str).str.contains(rf"\|T{T}\|")] for T in (1, 4)}
    joined = [
        t.assign(prompt_id=t["sample_id"].astype(str).str.split("|").str[0]).merge(theirs, on=["prompt_id", "pos"])
        for t in at.values()
    ]
    joined = [t[t["nll"].notna() & t["other"].notna()] for t in joined]
    edge = np.quantile(joined[0]["other"], 2 / 3)
    for T, table in zip((1, 4), joined, strict=True):
        hard = table[table["other"] >= edge]
        row = rows[(rows["split"] == "other") & (rows["bucket"] == "hard") & (rows["iterations"] == T)].iloc[0]
        assert row["n_tokens"] == len(hard)
        assert row["ppl"] == pytest.approx(np.exp(hard["nll"].mean()), rel=1e-5)
    for _, bucket in rows.groupby(["split", "bucket"]):
        one, four = (bucket[bucket["iterations"] == T].iloc[0] for T in (1, 4))
        assert four["change"] == pytest.approx(four["ppl"] / one["ppl"] - 1, rel=1e-4, abs=1e-6)
    monkeypatch.setattr(_iterate_split, "load_subject", lambda _: tiny_llama())
    with pytest.raises(UsageError, match=r"a token is hard or easy only where both models read the same ones"):
        dp.iterate(csm, TEXTS, iterations=[1, 3], split_by="llama", out=tmp_path)


def run_prompts(texts: list[str]) -> list[Prompt]:
    from dynprobe.prompts import from_texts

    return from_texts(texts)


def texts_of(texts: list[str]) -> list[Text]:
    return [Text(t, tuple(byte_tokenizer()(t)["input_ids"])) for t in texts]


def test_a_split_by_the_own_loss_finds_a_gain_in_pure_noise() -> None:
    """Regression to the mean: why the split by the model's own loss is printed as no evidence."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([[f"p{i}" for i in range(20)], range(30)], names=["prompt_id", "pos"])
    difficulty = rng.normal(3, 1, len(index))
    wide = pd.DataFrame({T: difficulty + rng.normal(0, 1, len(index)) for T in (1, 2)}, index=index)
    own = pd.DataFrame(_iterate_split._split(wide, [1, 2], wide[1], "own_loss")).set_index(["bucket", "iterations"])
    other = pd.Series(difficulty + rng.normal(0, 1, len(index)), index=index)
    apart = pd.DataFrame(_iterate_split._split(wide, [1, 2], other, "other")).set_index(["bucket", "iterations"])
    assert own.loc[("hard", 2), "change_high"] < 0 < own.loc[("easy", 2), "change_low"]
    for bucket in ("hard", "easy"):
        assert apart.loc[(bucket, 2), "change_low"] < 0 < apart.loc[(bucket, 2), "change_high"]


def test_a_study_goes_on_where_it_stopped(csm: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynprobe.errors import InterruptedRunError

    settings: dict[str, Any] = {"iterations": [1, 3], "batch_size": 1, "out": tmp_path}
    work, count = _iterate._Iterate.work, [0]

    def stop(self: Any, unit: Any, early: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return work(self, unit, early)

    monkeypatch.setattr(_iterate._Iterate, "work", stop)
    with pytest.raises(InterruptedRunError):
        dp.iterate(csm, TEXTS, **settings)
    monkeypatch.undo()
    done = dp.iterate(csm, TEXTS, **settings)
    whole = dp.iterate(csm, TEXTS, **{**settings, "out": tmp_path / "whole"})
    a, b = (r.samples.set_index("sample_id").sort_index() for r in (done, whole))
    pd.testing.assert_series_equal(a["nll"], b["nll"], check_exact=True)
    assert done.summary["one_pass"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"iterations": "0,3"}, r"from 1 on"),
        ({"iterations": "three"}, r"whole numbers such as 3,5,10"),
        ({"iterations": [1], "states": True}, r"takes no --states"),
        ({"iterations": [1], "max_new_tokens": 3}, r"max_new_tokens"),
        ({"iterations": [2, 5], "perturb": "alpha=0.1,iterations=4"}, r"iterations=4 is out of range"),
        ({"iterations": [2], "perturb": "alpha=0.1,scale=coordstd"}, r"take relnorm, mad or abs"),
    ],
)
def test_what_cannot_be_is_refused(csm: Subject, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises((UsageError, SiteError), match=match):
        dp.iterate(csm, TEXTS, out=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_scale_of_another_package_that_is_calibrated_is_refused(csm: Subject, tmp_path: Path) -> None:
    mine = NoiseScale("mine", "α is in units", "units", lambda h, eps, alpha, stats: alpha * stats.deviations() * eps,
                      needs=frozenset({"calibration"}))  # fmt: skip
    with SCALES.lent("mine", mine), pytest.raises(UsageError, match=r"scale=mine is calibrated at the iterations"):
        dp.iterate(csm, TEXTS, iterations=[2], perturb="alpha=0.1,scale=mine", out=tmp_path)


def test_a_model_without_a_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no loop whose number of iterations can be chosen"):
        dp.iterate(tiny_llama(), [[5, 6, 7]], iterations=[1], out=tmp_path)


def test_the_picture_and_the_table_are_made(study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from dynprobe.cli import _render

    assert (study.path / "figures" / "iterations.png").stat().st_size > 10_000
    _render.run(study)
    said = capsys.readouterr().out
    assert "best_iteration" in said
    assert "no evidence" in said
    assert "perplexity" in said
