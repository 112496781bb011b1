"""What is said before a run, and the yardsticks it uses."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynprobe as dp
from dynprobe.errors import PromptError, SiteError, UsageError
from dynprobe.models import cache_root
from dynprobe.probes import Calibration, discover, load_calibration
from dynprobe.protocols import doctor
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._selfchecks import model_checks
from dynprobe.protocols._summary import summarise
from dynprobe.protocols._weights import weights_of
from dynprobe.testing import byte_tokenizer, tiny_llama

SIZES = {"n_layers": 3, "dim": 8, "vocab": 50}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    size=st.one_of(st.just("auto"), st.integers(1, 9)),
    exact=st.booleans(),
    new=st.integers(0, 40),
)
@settings(max_examples=80, deadline=None)
def test_a_plan_is_a_partition_in_order_of_length(lengths, size, exact, new):
    plan = plan_batches(lengths, max_new_tokens=new, batch_size=size, exact=exact, **SIZES)
    flat = [i for batch in plan for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    assert all(plan)
    if size != "auto":
        assert max(map(len, plan)) <= size
        if not exact:
            assert all(len(batch) == size for batch in plan[:-1])
    if exact:
        assert all(len({lengths[i] for i in batch}) == 1 for batch in plan)


def test_wide_rows_make_small_batches():
    huge = plan_batches([10_000] * 4, max_new_tokens=0, n_layers=30, dim=4096, vocab=150_000)
    assert [len(b) for b in huge] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {}, {"perturb": "alpha=0.2"}, {"perturb": "alpha=0.2", "num_samples": 2, "temperature": 1.0},
        {"perturb": "alpha=0.2", "max_new_tokens": 0}, {"max_new_tokens": 1},
        {"perturb": "alpha=0.2", "states": True, "where": "layers=1:3,component=resid_post+mlp_out"},
    ],
)  # fmt: skip
def test_a_plan_counts_what_the_run_then_writes(llama, texts, tmp_path, change):
    asked = {"max_new_tokens": 3, "stop_at_eos": False, **change}
    cost = dp.plan(llama, texts[:3], measure=False, **asked)
    run = dp.run(llama, texts[:3], out=tmp_path, **asked)
    rows = run.manifest.rows()
    assert cost.samples == rows["samples"]
    assert cost.token_rows == rows["tokens"]
    assert cost.depth_rows == rows["depths"]
    assert cost.state_bytes == rows.get("states", 0) * 32 * 4
    assert cost.seconds is None
    forwards = sum(len(r) for r in run.prompts["token_ids"])
    assert cost.forward_tokens > forwards


def test_a_plan_writes_nothing_and_takes_the_measure_of_the_machine(llama, texts, tmp_path):
    cost = dp.plan(llama, texts, perturb="alpha=0.1", out=tmp_path / "runs")
    assert cost.seconds > 0
    assert not (tmp_path / "runs").exists()
    assert set(cost.as_dict()) >= {"samples", "metric_bytes", "memory_bytes", "seconds"}
    with pytest.raises(SiteError):
        dp.plan(llama, texts, perturb="alpha=0.1,layers=5", measure=False)


def test_the_estimate_of_bytes_is_of_the_right_order(llama, texts, full_run):
    cost = dp.plan(llama, texts, perturb="alpha=0.3", max_new_tokens=6, states=True, measure=False)
    tables = sum(p.bytes for p in full_run.manifest.parts if p.batch is not None and p.table != "states")
    states = sum(p.bytes for p in full_run.manifest.parts if p.table == "states")
    assert 1 / 2 < cost.metric_bytes / tables < 2
    assert 1 / 5 < cost.state_bytes / states < 5  # a tiny file is mostly header


def test_a_calibration_is_what_the_states_say(llama):
    """Against states captured one text at a time."""
    from dynprobe.prompts import load_prompts

    made = dp.calibrate(llama)
    kept = [[] for _ in range(4)]
    for prompt in load_prompts(source="calibration"):
        tape = dp.capture(llama, [prompt.text], logits=None)
        for depth, state in enumerate(tape.states):
            kept[depth].append(state[0, 1:].double().numpy())  # position 0 takes no part
    for depth, pieces in enumerate(kept):
        x = np.concatenate(pieces)
        np.testing.assert_allclose(made.tensors["mean"][depth], x.mean(0), atol=1e-5)
        np.testing.assert_allclose(made.tensors["std"][depth], x.std(0, ddof=1), rtol=1e-5)
        middle = np.median(x, axis=0)
        np.testing.assert_allclose(made.tensors["mad"][depth], np.median(np.abs(x - middle), axis=0), rtol=1e-4)
    assert made.header["n_tokens"] == len(x)
    assert made.header["n_prompts"] == 36
    assert made.header["weights"] == llama.facts["weights_hash"]
    assert made.quantile("limen_ct", 0.1) < made.quantile("limen_ct", 0.9)


def test_calibrations_are_cached_copied_and_remade_when_damaged(llama, full_run):
    made = dp.calibrate(llama)
    folder = cache_root() / "calibrations" / made.hash
    file = folder / "calibration.safetensors"
    written = file.stat().st_mtime_ns
    assert dp.calibrate(llama).hash == made.hash
    assert file.stat().st_mtime_ns == written  # read, not made again
    copy = load_calibration(full_run.path / "calibration" / made.hash)
    assert torch.equal(copy.tensors["std"], made.tensors["std"])
    for damaged in (file, folder / "calibration.json"):
        damaged.unlink()  # a new file: the tensors in memory may still be mapped to the old one
        damaged.write_bytes(b"{")
        again = dp.calibrate(llama)
        assert torch.equal(again.tensors["std"], made.tensors["std"])
        assert load_calibration(folder).hash == made.hash  # whole again
    older = Calibration({k: v for k, v in made.tensors.items() if k != "str_sigma"}, made.signals, made.header)
    older.save(folder)  # of a version that had no use for it
    assert torch.equal(dp.calibrate(llama).tensors["str_sigma"], made.tensors["str_sigma"])
    assert "str_sigma" in load_calibration(folder).tensors
    with pytest.raises(dp.DynprobeError, match="made with weights"):
        made.check("another", "float32")


def test_covariance_is_kept_where_asked(llama):
    made = dp.calibrate(llama, cov_layers=[1])
    assert made.hash != dp.calibrate(llama).hash
    basis, root = made.tensors["cov_basis.2"].double(), made.tensors["cov_sqrt.2"].double()
    np.testing.assert_allclose(((basis * root**2) @ basis.T).diagonal().sqrt(), made.tensors["std"][2], rtol=1e-4)
    with pytest.raises(SiteError):
        dp.calibrate(llama, cov_layers=[3])


def test_calibration_takes_texts_or_ids_and_says_what_is_too_little(llama):
    one = dp.calibrate(llama, ["a text of some length", "and another one"])
    assert one.header["n_prompts"] == 2
    same = [llama.tokenizer(t)["input_ids"] for t in ("a text of some length", "and another one")]
    ids = dp.calibrate(llama, same)
    assert torch.equal(ids.tensors["mean"], one.tensors["mean"])
    with pytest.raises(UsageError, match="longer or more prompts"):
        dp.calibrate(llama, ["x", "y"])
    with pytest.raises(PromptError):
        dp.calibrate(llama, [])


def test_a_cache_that_cannot_be_written_stops_nothing(texts, tmp_path, monkeypatch):
    blocked = tmp_path / "a-file"
    blocked.write_text("in the way")
    monkeypatch.setenv("DYNPROBE_CACHE", str(blocked / "cache"))
    subject = discover(tiny_llama(vocab=259).model, tokenizer=byte_tokenizer(), name="no-cache")
    with pytest.warns(UserWarning, match="could not be kept"):
        run = dp.run(subject, texts[:2], perturb="alpha=0.1,scale=coordstd", max_new_tokens=0, out=tmp_path / "runs")
    assert run.status == "complete"


def test_without_a_tokenizer_debts_are_missing_with_their_reason(tmp_path):
    run = dp.run(tiny_llama(), [[5, 6, 7, 8, 9], [3, 1, 4, 1, 5]], perturb="alpha=0.2", max_new_tokens=0, out=tmp_path)
    row = run.samples.iloc[0]
    assert math.isnan(row["debt_cusum"])
    assert math.isnan(row["debt_excess"])
    reasons = json.loads(row["reasons"])
    assert reasons["debt_cusum"] == reasons["debt_excess"] == "no-calibration"
    forced = run.samples[run.samples["condition_id"] == "perturbed.forced"].iloc[0]
    assert json.loads(forced["reasons"])["alpha_coordstd"] == "no-calibration"
    assert run.manifest.calibration_hash is None


def test_doctor_finds_the_parts_and_runs_five_tests(llama, gpt2):
    for subject, blocks in ((llama, "model.layers.*"), (gpt2, "transformer.h.*")):
        found = doctor(subject)
        assert found.healthy
        assert list(found.checks) == ["null", "alone", "resume", "fired", "readout"]
        assert found.checks["null"].value == 0
        assert found.found["blocks"].startswith(blocks)
        assert found.found["attn_out"]
        json.dumps(found.as_dict(), allow_nan=False)


def test_verdicts_about_a_model_do_not_depend_on_the_prompts_of_a_run(no_positions):
    """They are kept: a first run over single tokens would otherwise say that padding is harmless."""
    weights_of(no_positions)
    before = set((cache_root() / "selftests").iterdir())
    assert not model_checks(no_positions, [[5]], fresh=True)["alone"].passed
    assert not model_checks(no_positions, [[7, 8, 9]])["alone"].passed  # from the cache
    for file in set((cache_root() / "selftests").iterdir()) - before:
        file.write_text("damaged")
    assert not model_checks(no_positions, [[5]])["alone"].passed


def test_intervals_need_three_prompts_and_cover_the_mean():
    import pandas as pd

    def rows(n):
        return pd.DataFrame({
            "condition_id": "a", "prompt_id": [f"p{i}" for i in range(n)], "status": "ok", "reasons": None,
            "kappa_phase": np.linspace(0, 1, n), "nll": [math.nan] * n,
        })  # fmt: skip

    entry = summarise(rows(2))["a"]["kappa_phase"]
    assert math.isnan(entry["low"])
    assert entry["mean"] == 0.5
    entry = summarise(rows(200))["a"]["kappa_phase"]
    half = 1.96 * np.linspace(0, 1, 200).std() / math.sqrt(200)
    assert entry["high"] - 0.5 == pytest.approx(half, rel=0.1)
    assert 0.5 - entry["low"] == pytest.approx(half, rel=0.1)
    assert "nll" not in summarise(rows(5))["a"]
    partly = rows(5)
    partly.loc[0, "kappa_phase"] = math.nan
    partly.loc[0, "reasons"] = '{"kappa_phase": "coverage"}'
    entry = summarise(partly)["a"]["kappa_phase"]
    assert (entry["n"], entry["missing"], entry["reasons"]) == (4, 1, {"coverage": 1})
