"""What a run writes: arms, labels, positions, targets, and which columns stand in which arm."""

import json

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe import metrics
from dynprobe.prompts import Prompt, load_prompts
from dynprobe.protocols import RunConfig

ARMS = ["clean", "sham", "perturbed.forced", "perturbed.free"]
PAIRED = ["kappa_phase_d", "kl_clean_pert", "flip_rate", "nll_d", "diverge_angle", "entropy_d", "limen_ratio_d"]
PASSPORT = ["alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs", "alpha_cos"]


def test_every_prompt_has_one_row_in_every_arm(full_run, texts):
    samples = full_run.samples
    assert full_run.status == "complete"
    assert sorted(samples["condition_id"].unique()) == sorted(ARMS)
    assert (samples.groupby("condition_id", observed=True)["prompt_id"].nunique() == len(texts)).all()
    assert len(samples) == 4 * len(texts)
    assert set(samples["prompt_id"]) == set(full_run.prompts["prompt_id"])
    assert list(full_run.prompts["text"]) == texts
    assert set(samples["condition_id"]) == set(full_run.conditions["condition_id"])
    assert (samples["status"] == "ok").all()


def test_conditions_say_what_was_done(full_run):
    conditions = full_run.conditions.set_index("condition_id")
    assert list(conditions.index) == ARMS
    assert list(conditions["arm"]) == ["clean", "sham", "perturbed", "perturbed"]
    assert list(conditions["decode_mode"]) == ["forced", "forced", "forced", "free"]
    assert list(conditions["alpha"]) == [0, 0, 0.3, 0.3]
    assert conditions["scale"].isna().tolist() == [True, False, False, False]
    assert set(conditions["scale"].dropna()) == {"relnorm"}
    assert conditions.loc["perturbed.forced", "where"] == "layers=50%,positions=1:,phase=all,component=resid_post"
    assert json.loads(conditions.loc["perturbed.free", "params"]) == full_run.manifest.config["perturb"]
    assert (conditions["max_new_tokens"] == 6).all()


def test_paired_columns_only_from_the_forced_arm(full_run):
    samples = full_run.samples.set_index("condition_id")
    for name in PAIRED:
        assert samples.loc["perturbed.forced", name].notna().any(), name
        assert samples.loc[["clean", "sham", "perturbed.free"], name].isna().all(), name
    paired = [c for c in samples if c.endswith(("_d", "_d_inj", "_d_down"))]
    assert samples.loc[["clean", "perturbed.free"], paired].isna().all(axis=None)
    tokens = full_run.tokens.merge(full_run.samples[["sample_id", "condition_id"]], on="sample_id")
    forced = tokens["condition_id"] == "perturbed.forced"
    assert tokens.loc[forced, ["kl_clean_pert", "flip"]].notna().all(axis=None)
    assert tokens.loc[~forced, ["kl_clean_pert", "flip"]].isna().all(axis=None)
    for name in PASSPORT:
        assert samples.loc[["perturbed.forced", "perturbed.free"], name].notna().sum() >= 8, name
        assert samples.loc[["clean", "sham"], name].isna().all(), name


def test_sham_is_a_digest_of_clean(full_run, trajectory):
    import hashlib

    samples = full_run.samples
    sham = samples[samples["condition_id"] == "sham"]
    assert (sham["equal_to"] == "clean").all()
    for name in ("tokens", "depths", "profiles"):
        assert not full_run.table(name)["sample_id"].astype(str).str.contains("sham").any()
    for row in sham.itertuples():
        last = trajectory(full_run, f"{row.prompt_id}|clean|0")[-1].astype(np.float32)
        assert row.digest == hashlib.blake2b(last.tobytes(), digest_size=8).hexdigest()
        clean = samples[samples["sample_id"] == f"{row.prompt_id}|clean|0"].iloc[0]
        assert (row.n_prompt, row.n_new, row.n_fed, row.n_nonfinite) == (
            clean["n_prompt"], clean["n_new"], clean["n_fed"], 0,
        )  # fmt: skip


def test_tokens_positions_phases_and_targets(full_run, llama, table):
    tokens, samples = table(full_run, "tokens"), table(full_run, "samples")
    ids = {p.prompt_id: list(p.token_ids) for p in full_run.prompts.itertuples()}
    for sample, row in samples[samples["arm"] != "sham"].iterrows():
        mine = tokens.loc[sample]
        prompt = ids[row["prompt_id"]]
        assert row["n_new"] == 6
        assert row["n_fed"] == len(prompt) + 5 == len(mine)  # the last generated token is not fed
        assert list(mine.index) == list(range(len(mine)))
        assert list(mine["phase"]) == ["prefill"] * len(prompt) + ["decode"] * 5
        assert list(mine["token_id"][: len(prompt)]) == prompt
        assert list(mine["token_id"][1:]) == list(mine["target_id"][:-1])
        assert (mine["target_id"] >= 0).all()
        assert mine["nll"].notna().all()
        new = [*mine["token_id"][len(prompt) :], mine["target_id"].iloc[-1]]
        assert row["text"] == llama.tokenizer.decode(new)


def test_depth_rows_cover_every_token_and_depth(full_run, table):
    depths, tokens = table(full_run, "depths"), table(full_run, "tokens")
    assert len(depths) == 4 * len(tokens)
    assert (depths["layer"] == depths.index.get_level_values("depth") - 1).all()
    bottom = depths.index.get_level_values("depth") == 0
    assert set(depths[bottom]["component"]) == {"resid_pre"}
    assert set(depths[~bottom]["component"]) == {"resid_post"}
    assert depths[bottom][["angle", "delta_rel_prev"]].isna().all(axis=None)
    first = depths.index.get_level_values("depth") == 1  # depth 0 takes no part, so nothing leads into depth 1
    assert depths[first]["angle"].isna().all()
    assert depths[~(bottom | first)]["angle"].notna().all()
    assert depths["norm"].gt(0).all()
    profiles = table(full_run, "profiles")
    assert len(profiles) == 4 * 15
    assert profiles.loc[profiles["kappa_phase"].isna(), "reason"].notna().all()
    assert profiles["coverage"].dropna().eq(1).all()


def test_without_generation_there_is_no_free_arm(llama, texts, tmp_path, table):
    run = dp.run(llama, texts, perturb="alpha=0.3", max_new_tokens=0, out=tmp_path)
    assert sorted(run.samples["condition_id"].unique()) == sorted(ARMS[:3])
    tokens, samples = table(run, "tokens"), table(run, "samples", "clean")
    assert set(tokens["phase"]) == {"prefill"}
    last = tokens.groupby("sample_id").tail(1)
    assert (last["target_id"] == -1).all()
    assert last["nll"].isna().all()
    assert last["entropy"].notna().all()
    assert (samples["n_new"] == 0).all()
    assert samples["text"].isna().all()
    assert (samples["n_fed"] == samples["n_prompt"]).all()
    np.testing.assert_allclose(samples["nll"].dropna(), samples["nll_prompt"].dropna())  # the span is the prompt
    single = samples[samples["n_prompt"] == 1].iloc[0]
    assert np.isnan(single["nll"])
    assert json.loads(single["reasons"])["nll"] == "empty"


def test_the_span_chooses_the_tokens(llama, texts, tmp_path, table):
    runs = {
        span: table(dp.run(llama, texts[:3], max_new_tokens=4, span=span, out=tmp_path), "samples")
        for span in ("prompt", "new", "all")
    }
    tokens = table(dp.run(llama, texts[:3], max_new_tokens=4, span="all", out=tmp_path), "tokens")
    for sample, row in runs["all"].iterrows():
        nll, n = tokens.loc[sample]["nll"].to_numpy(), int(row["n_prompt"])
        assert runs["prompt"].loc[sample, "nll"] == pytest.approx(nll[: n - 1].mean(), rel=1e-5)
        assert runs["prompt"].loc[sample, "nll"] == pytest.approx(runs["prompt"].loc[sample, "nll_prompt"])
        assert runs["new"].loc[sample, "nll"] == pytest.approx(nll[n - 1 :].mean(), rel=1e-5)  # all generated tokens
        assert row["nll"] == pytest.approx(nll.mean(), rel=1e-5)
        assert len(nll[n - 1 :]) == 4
    for column in ("limen_ct", "kappa_xcorr", "kappa_geom"):
        values = [runs[s][column].to_numpy() for s in runs]
        assert not np.allclose(values[0], values[2], equal_nan=True), column
    for column in ("kappa_phase", "norm", "nll_prompt"):  # these never read the span
        np.testing.assert_array_equal(runs["prompt"][column], runs["new"][column])


def test_without_perturbation_there_is_only_clean(llama, texts, tmp_path):
    run = dp.run(llama, texts[:2], max_new_tokens=3, out=tmp_path)
    assert set(run.samples["condition_id"]) == {"clean"}
    assert list(run.conditions["condition_id"]) == ["clean"]
    assert not [c for c in run.samples if c.startswith("alpha_") or c.endswith("_d") or c == "equal_to"]


def test_texts_that_end_early_have_no_rows_beyond_their_end(ending, texts, tmp_path, table, trajectory):
    run = dp.run(ending, texts, perturb="alpha=0.3", max_new_tokens=8, states=True, batch_size=5, out=tmp_path)
    samples, tokens, depths = (table(run, name) for name in ("samples", "tokens", "depths"))
    ends = set(ending.model.generation_config.eos_token_id)
    kept = samples[samples["arm"] != "sham"]
    assert kept[kept["arm"] == "clean"]["n_new"].nunique() > 1  # or this test would not see anything
    assert kept[kept["arm"] == "perturbed.free"]["n_new"].nunique() > 1
    for sample, row in kept.iterrows():
        mine = tokens.loc[sample]
        fed = int(row["n_prompt"] + row["n_new"] - 1)
        assert len(mine) == row["n_fed"] == fed
        assert len(depths.loc[sample]) == 4 * fed
        assert trajectory(run, sample).shape[:2] == (4, fed)
        new = [*mine["token_id"][int(row["n_prompt"]) :], mine["target_id"].iloc[-1]]
        assert not ends & set(new[:-1])
        assert row["n_new"] == 8 or new[-1] in ends
        # What stands there is the row's own text, whatever the batch was fed after its end.
        logits = _logits(ending, [*mine["token_id"]]) if row["arm"] == "clean" else None
        if logits is not None:
            nll = -logits.log_softmax(-1)[np.arange(fed), mine["target_id"].to_list()]
            np.testing.assert_allclose(mine["nll"], nll, rtol=1e-4, atol=1e-5)


def _logits(subject, ids):
    import torch

    with torch.no_grad():
        return subject.model(torch.tensor([[int(i) for i in ids]])).logits[0].double()


def test_the_defaults_are_those_of_the_bare_command():
    config = RunConfig.build(model="m", perturb="alpha=0.1")
    assert (config.max_new_tokens, config.temperature, config.seed) == (32, 0.0, 0)
    assert (config.dtype, config.chat_template, config.num_samples) == ("float32", "none", 1)
    assert (config.span, config.measured_span) == ("auto", "new")
    assert RunConfig.build(max_new_tokens=0).measured_span == "prompt"
    chosen = load_prompts()
    assert len(chosen) == 24
    assert pd.Series([p.category for p in chosen]).value_counts().eq(4).all()


def test_every_column_says_what_it_is(full_run):
    facts = full_run.columns().set_index(["table", "column"])
    known = set(metrics.ids())
    for column in ("kappa_phase", "limen_ratio", "nll", "kl_clean_pert", "kappa_phase_d", "delta_rel_prev_d"):
        fact = facts.loc[("samples", column)]
        assert fact["id"].split("{")[0] in known
        assert fact["digest"] == metrics.spec(fact["id"].split("{")[0]).digest
        assert fact["unit"]
        assert fact["aggregation"]
    assert facts.loc[("samples", "limen_ratio"), "span"] == "new"
    assert facts.loc[("samples", "kappa_phase"), "span"] == "all"
    assert facts.loc[("samples", "nll_prompt"), "span"] == "prompt"
    assert facts.loc[("tokens", "nll"), "span"] == "all"  # every token has a row
    assert facts.loc[("samples", "diverge_angle"), "aggregation"] == "last depth, mean over tokens"
    assert facts.loc[("depths", "diverge_angle"), "aggregation"] == "per unit"
    undescribed = facts[(facts["description"] == "") & (facts.index.get_level_values("column") != "state")]
    assert undescribed.index.tolist() == []


def test_the_manifest_holds_the_evidence(full_run, llama):
    manifest = full_run.manifest
    assert list(manifest.self_tests) == ["null", "alone", "resume", "fired", "readout"]
    assert all(t["passed"] for t in manifest.self_tests.values())
    assert manifest.self_tests["null"]["value"] == 0
    assert manifest.weights["hash"] == llama.facts["weights_hash"]
    assert manifest.model["structure"]["n_layers"] == 3
    assert manifest.dtypes["weights"] == "float32"
    assert manifest.seeds == {"noise": [0], "sampling": 0}
    assert set(manifest.noise_floor) == {"noise_floor", "kappa_phase"}
    assert (full_run.path / "calibration" / manifest.calibration_hash / "calibration.json").is_file()
    assert sorted(i for batch in manifest.batch_plan for i in batch) == list(range(5))
    assert manifest.config["perturb"] == [
        "alpha=0.3,scale=relnorm,layers=50%,positions=1:,phase=all,component=resid_post,kind=gaussian,seed=0"
    ]
    assert full_run.verify() > 0


@pytest.mark.parametrize("given", ["ids", "tensor", "objects"])
def test_prompts_may_be_token_ids_or_objects(given, tmp_path, table):
    import torch

    from dynprobe.testing import tiny_llama

    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    prompts = {
        "ids": rows, "tensor": torch.tensor(rows),
        "objects": [Prompt(f"p{i}", "", "mine", "here", tuple(r)) for i, r in enumerate(rows)],
    }[given]  # fmt: skip
    run = dp.run(tiny_llama(), prompts, max_new_tokens=2, out=tmp_path)
    assert [list(r) for r in run.prompts["token_ids"]] == rows
    samples = table(run, "samples")
    assert samples["text"].isna().all()  # no tokenizer, no text
    assert json.loads(samples["reasons"].iloc[0])["debt_cusum"] in ("no-calibration", "tokens<3")
    if given == "objects":
        assert set(samples["prompt_id"]) == {"p0", "p1"}
        assert set(samples["category"]) == {"mine"}
