"""Models that break: non-finite states, failing self-tests, prompts they cannot read. Nothing is averaged or hidden."""

import json

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import ModelError, PromptError, SelfTestError, UsageError
from dynprobe.probes import PerturbWriter, discover
from dynprobe.prompts import Prompt
from dynprobe.testing import byte_tokenizer, tiny_gpt2, tiny_llama


def test_a_block_that_gives_nan_is_counted_and_never_averaged(llama_folder, texts, tmp_path, table):
    model = dp.load(str(llama_folder)).model
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    subject = discover(model, tokenizer=byte_tokenizer(), name="nan")
    run = dp.run(subject, texts[:2], perturb="alpha=0.3", max_new_tokens=2, out=tmp_path)
    assert run.status == "complete"
    samples, depths = table(run, "samples"), table(run, "depths")
    assert (samples["status"] == "nonfinite").all()
    assert (samples["n_nonfinite"] == 2 * samples["n_fed"]).all()  # depths 2 and 3 of every token
    rows = samples[samples["arm"] != "sham"]
    for column in ("kappa_phase", "nll", "entropy", "limen_ct"):
        assert rows[column].isna().all(), column
    assert rows["reasons"].map(json.loads).map(lambda r: "kappa_phase" in r and r["nll"] == "nonfinite").all()
    at = depths.index.get_level_values("depth")
    assert depths[at <= 1]["norm"].notna().all()
    assert depths[at >= 2]["norm"].isna().all()
    summary = run.summary["conditions"]
    assert summary["clean"]["kappa_phase"]["mean"] is None
    assert summary["clean"]["kappa_phase"]["reason"]
    assert summary["clean"]["status"] == {"nonfinite": 2}
    assert run.manifest.self_tests["null"]["passed"]  # α = 0 leaves even a NaN as it was
    text = (run.path / "summary.json").read_text()
    assert "NaN" not in text
    with pytest.raises(UsageError, match="readout self-test"):
        dp.run(subject, texts[:2], max_new_tokens=0, lens=True, out=tmp_path / "lens")
    assert not (tmp_path / "lens").exists()


def test_one_infinite_token_spoils_its_own_row_only(llama_folder, tmp_path, table):
    model = dp.load(str(llama_folder)).model
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("A")["input_ids"][0]] = float("inf")
    subject = discover(model, tokenizer=tokenizer, name="inf")
    run = dp.run(subject, ["xxA yy", "Hello there"], perturb="alpha=0.3", max_new_tokens=0, out=tmp_path)
    whole = dp.run(str(llama_folder), ["Hello there"], perturb="alpha=0.3", max_new_tokens=0, out=tmp_path / "whole")
    mine, theirs = table(run, "samples"), table(whole, "samples")
    assert sorted(mine["status"]) == ["nonfinite"] * 3 + ["ok"] * 3
    fine = mine[mine["status"] == "ok"]
    for column in ("kappa_phase", "nll", "kl_clean_pert", "kappa_phase_d"):
        np.testing.assert_allclose(fine[column], theirs[column], rtol=1e-5, atol=1e-6)
    summary = run.summary["conditions"]["perturbed.forced"]
    assert summary["kl_clean_pert"]["n"] == 1
    assert summary["kl_clean_pert"]["missing"] == 1


def test_a_broken_write_path_stops_the_run_and_leaves_nothing(llama, texts, tmp_path, monkeypatch):
    def leaking(self, state, site, step):
        return state + 1e-6  # writes although alpha is 0

    monkeypatch.setattr(PerturbWriter, "write", leaking)
    with pytest.raises(SelfTestError, match="self-test null failed") as refused:
        dp.run(llama, texts[:2], perturb="alpha=0.1", max_new_tokens=0, out=tmp_path / "runs")
    assert refused.value.exit_code == 3
    assert not (tmp_path / "runs").exists()


def test_a_sham_that_differs_stops_the_run(llama, texts, tmp_path, monkeypatch):
    from dynprobe.protocols import _conditions

    honest, batches = _conditions.Push.writers, []

    def sometimes(self, *, sham=False):
        batches.append(sham)
        return [] if not sham else honest(self)  # the sham writes with the real strength

    monkeypatch.setattr(_conditions.Push, "writers", sometimes)
    monkeypatch.setattr(_conditions.Push, "first_position", lambda self, texts, length: np.ones(len(texts)))
    with pytest.raises(SelfTestError, match="sham arm"):
        dp.run(llama, texts[:2], perturb="alpha=0.1", max_new_tokens=0, out=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert dp.open(folder).status == "interrupted"
    assert dp.open(folder).manifest.finished == []


def test_what_a_model_cannot_read_is_named(llama, tmp_path):
    cases = [
        (tiny_llama(), [[5, 500]], PromptError, "token id 500"),
        (tiny_llama(), ["words"], PromptError, "no tokenizer"),
        (tiny_llama(), [[]], PromptError, "empty"),
        (tiny_llama(), [], PromptError, "empty list"),
        (tiny_llama(), ["a", [1, 2]], PromptError, "mixed"),
        (tiny_gpt2(), [[5] * 500], PromptError, "500 tokens and grows by 31.*512 positions"),
        (tiny_llama(), [Prompt("a", "", None, "x", (1, 2))] * 2, PromptError, "2 prompts are called 'a'"),
        (llama, [" "], PromptError, "empty"),
    ]  # fmt: skip
    for subject, prompts, error, message in cases:
        with pytest.raises(error, match=message):
            dp.run(subject, prompts, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    fits = dp.run(tiny_gpt2(), [[5] * 508], max_new_tokens=5, out=tmp_path / "fits")
    assert fits.samples["n_fed"].iloc[0] == 512


def test_what_a_model_cannot_do_is_refused_early(tmp_path):
    model = tiny_llama().model
    bare = discover(model.model, name="backbone")
    with pytest.raises(ModelError, match="no generate"):
        dp.run(bare, [[1, 2, 3]], out=tmp_path / "runs")
    with pytest.raises(UsageError, match="no tokenizer to read"):
        dp.run(tiny_llama(), [[1, 2, 3]], perturb="alpha=0.1,scale=coordstd", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(llama_folder, texts, tmp_path, dtype, table, full_run):
    run = dp.run(
        str(llama_folder), texts[:2], perturb="alpha=0.3", dtype=dtype, max_new_tokens=0, states=True, out=tmp_path
    )
    _, states = run.states(depth=3)
    assert states.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert run.manifest.dtypes["weights"] == dtype
    assert run.manifest.dtypes["low_precision_angles"] == (dtype == "bfloat16")
    assert all(t["passed"] for t in run.manifest.self_tests.values())
    mine = table(run, "samples", "perturbed.forced")
    tolerance = 1e-6 if dtype == "float64" else 2e-3
    np.testing.assert_allclose(mine["alpha_relnorm"], 0.3, rtol=tolerance)
    theirs = table(full_run, "samples").loc[mine.index]
    np.testing.assert_allclose(mine["nll_prompt"], theirs["nll_prompt"], rtol=1e-5 if dtype == "float64" else 0.05)
