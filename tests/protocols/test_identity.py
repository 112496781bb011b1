"""A run, a calibration and a paired number belong to exactly one model and exactly one set of terms."""

import json

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.probes import capture, check_resume
from dynprobe.protocols._calibrate import calibrated
from dynprobe.protocols._weights import weights_of
from dynprobe.testing import tiny_llama

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18, 19]]


def edit_through_data(subject):
    subject.model.model.layers[1].mlp.down_proj.weight.data.mul_(3)


def replace_a_parameter(subject):
    layer = subject.model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 3)


def change_a_constant(subject):
    subject.model.config.rms_norm_eps = 0.5


def hook_it(subject):
    subject.model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)


@pytest.mark.parametrize("change", [edit_through_data, replace_a_parameter, change_a_constant, hook_it])
def test_another_model_is_another_run(change, tmp_path):
    subject = tiny_llama()
    first = dp.run(subject, ROWS, max_new_tokens=0, out=tmp_path)
    assert dp.run(subject, ROWS, max_new_tokens=0, out=tmp_path).path == first.path
    change(subject)
    second = dp.run(subject, ROWS, max_new_tokens=0, out=tmp_path)
    assert second.path != first.path
    if change is not change_a_constant:  # the modules keep their own copy of that one
        assert not np.allclose(first.samples["kappa_phase"], second.samples["kappa_phase"])


def test_a_run_under_the_callers_own_hook_is_never_reused(tmp_path):
    subject = tiny_llama()
    hook_it(subject)
    runs = [dp.run(subject, ROWS, max_new_tokens=0, out=tmp_path) for _ in range(2)]
    assert runs[0].path != runs[1].path
    assert runs[0].manifest.model_extra["foreign_hooks"] == 1


def test_hooks_that_transformers_leaves_behind_are_not_the_callers_own(tmp_path):
    subject = tiny_llama()
    first = dp.run(subject, ROWS, max_new_tokens=0, out=tmp_path)
    subject.model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in subject.model.modules())
    assert dp.run(subject, ROWS, max_new_tokens=0, out=tmp_path).path == first.path


def test_other_blocks_of_the_same_weights_have_their_own_calibration(llama):
    outer = calibrated(llama)
    inner_subject = dp.load(llama.model, layers="model.layers.*.self_attn.o_proj", tokenizer=llama.tokenizer)
    weights_of(inner_subject)
    inner = calibrated(inner_subject)
    assert outer.hash != inner.hash
    assert not torch.allclose(outer.tensors["std"][1], inner.tensors["std"][1])


def test_norm_steps_leave_the_embedding_out(llama):
    """The step out of the embedding is the largest of all; with it every token's signal would be that step."""
    found = calibrated(llama)
    tape = capture(llama, ["A sentence to look at"], logits=None)
    norms = torch.stack(list(tape.states))[:, 0, 1:].norm(dim=-1).log()
    inside = (norms[2:] - norms[1:-1]).abs().max()
    assert found.quantile("norm_step", 1.0) < 3 * max(float(inside), found.quantile("norm_step", 0.5))


def test_paired_differences_share_their_terms(tmp_path):
    """A position that is not finite in one arm leaves both, in every paired number."""
    subject = tiny_llama()
    broken = ROWS[0][3]
    with torch.no_grad():
        subject.model.model.embed_tokens.weight[broken] = float("nan")
    run = dp.run(subject, ROWS, perturb="alpha=0.3,layers=1", max_new_tokens=0, out=tmp_path)
    tokens, samples = run.tokens, run.samples
    row = samples[(samples["condition_id"] == "perturbed.forced") & (samples["n_nonfinite"] > 0)].iloc[0]
    arm = tokens[tokens["sample_id"] == row["sample_id"]].set_index("pos")
    clean = tokens[tokens["sample_id"] == row["sample_id"].replace("perturbed.forced", "clean")].set_index("pos")
    difference = (arm["nll"] - clean["nll"]).to_numpy()
    difference = difference[arm["target_id"].to_numpy() >= 0]
    if np.isfinite(difference).sum() * 2 >= len(difference):
        assert row["nll_d"] == pytest.approx(np.nanmean(difference), rel=1e-4)
    else:
        assert np.isnan(row["nll_d"])


def test_states_that_cannot_be_written_are_not_perturbed_without_effect(tmp_path):
    run = dp.run(tiny_llama(), ROWS, perturb="alpha=1e38,scale=abs", max_new_tokens=0, out=tmp_path)
    pushed = run.samples[run.samples["condition_id"] == "perturbed.forced"]
    assert (pushed["status"] == "not-written").all()
    assert (pushed["n_left_alone"] == pushed["n_asked"]).all()
    assert pushed["alpha_relnorm"].isna().all()
    assert "kl_clean_pert" not in run.summary["conditions"]["perturbed.forced"]


def test_several_perturbations_have_no_single_strength(tmp_path):
    specs = ["alpha=0.1,layers=1", "alpha=0.3,layers=2,seed=1"]
    run = dp.run(tiny_llama(), ROWS, perturb=specs, max_new_tokens=0, out=tmp_path)
    row = run.conditions.set_index("condition_id").loc["perturbed.forced"]
    assert row[["alpha", "scale", "kind", "where"]].isna().all()
    assert len(json.loads(row["params"])) == 2


def test_nll_of_the_new_tokens_counts_the_first_one(tmp_path):
    run = dp.run(tiny_llama(), ROWS, max_new_tokens=1, stop_at_eos=False, out=tmp_path)
    tokens = run.tokens
    for _, row in run.samples.iterrows():
        last = tokens[(tokens["sample_id"] == row["sample_id"]) & (tokens["pos"] == row["n_prompt"] - 1)]
        assert row["nll"] == pytest.approx(float(last["nll"].iloc[0]), rel=1e-6)


def test_a_model_that_looks_back_is_resumed_on_the_slow_road():
    subject, kept = tiny_llama(), {}
    first, last = (subject.model.model.layers[i] for i in (0, 2))
    first_forward, last_forward = first.forward, last.forward

    def remember(*args, **kwargs):
        kept["state"] = first_forward(*args, **kwargs)
        return kept["state"]

    first.forward = remember
    last.forward = lambda *args, **kwargs: last_forward(*args, **kwargs) + kept["state"]
    tape = capture(subject, ROWS, logits="all")
    assert not check_resume(subject, tape).passed
    assert not subject.resumable
    capture(subject, [[1, 2, 3, 4, 5, 6]] * 3)  # what is remembered now is of another text
    again = dp.resume(tape, 2, tape.states[2])
    assert torch.equal(again.logits[tape.mask], tape.logits[tape.mask])


def test_a_ratio_over_one_step_enters_no_mean(tmp_path):
    """With four new tokens there is one ct value: its ratio is 1 by construction and says nothing."""
    run = dp.run(tiny_llama(), ROWS, max_new_tokens=4, stop_at_eos=False, out=tmp_path)
    assert (run.samples["limen_ratio"] == 1).all()
    assert run.samples["reasons"].map(lambda text: json.loads(text)["limen_ratio"] == "steps<2").all()
    clean = run.summary["conditions"]["clean"]
    assert clean["limen_ratio"]["mean"] is None
    assert clean["limen_ratio"]["reason"] == "steps<2"
    assert "regimes" not in clean
