"""Batch size, order, padding, neighbours and repetition cannot change a row."""

import numpy as np
import pytest
import transformers

import dynprobe as dp
from dynprobe.probes import discover
from dynprobe.prompts import from_texts
from dynprobe.testing import byte_tokenizer

SPEC = "alpha=0.3"


@pytest.fixture(scope="module")
def reference(ending, texts, tmp_path_factory):
    """GPT-2 with learned positions, and texts that end early: both make mistakes of padding visible."""
    return dp.run(ending, texts, perturb=SPEC, max_new_tokens=8, batch_size=5, out=tmp_path_factory.mktemp("ref"))


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 2}, {"padding": "left"}, {"padding": "none"}],
    ids=lambda s: "-".join(f"{k}-{v}" for k, v in s.items()),
)
def test_batches_and_padding_do_not_move_a_number(settings, reference, ending, texts, tmp_path, same_tables):
    run = dp.run(ending, texts, perturb=SPEC, max_new_tokens=8, out=tmp_path, **settings)
    same_tables(reference, run)
    plan = run.manifest.batch_plan
    if "batch_size" in settings:
        assert max(map(len, plan)) == settings["batch_size"]
        assert run.manifest.id8 == reference.manifest.id8  # how it is spread is no part of what it is
    if settings.get("padding") == "none":
        lengths = [len(r) for r in run.prompts["token_ids"]]
        assert all(len({lengths[i] for i in batch}) == 1 for batch in plan)
        assert run.manifest.exact_length_batches


def test_order_and_neighbours_do_not_move_a_row(reference, ending, texts, tmp_path, same_tables):
    run = dp.run(ending, texts[::-1][:3], perturb=SPEC, max_new_tokens=8, out=tmp_path)
    same_tables(reference, run, part=True)


def test_replicates_are_labelled_and_sampling_is_reproducible(gpt2, texts, tmp_path, table, same_tables):
    settings = {"perturb": SPEC, "max_new_tokens": 4, "temperature": 1.0, "top_p": 0.9, "stop_at_eos": False}
    two = dp.run(gpt2, texts[:3], num_samples=2, out=tmp_path / "two", **settings)
    one = dp.run(gpt2, texts[:3], num_samples=1, batch_size=1, out=tmp_path / "one", **settings)
    same_tables(two, one, part=True)
    samples = table(two, "samples")
    clean = samples[samples["arm"] == "clean"]
    assert sorted(clean["replicate"]) == [0, 0, 0, 1, 1, 1]
    for _, rows in clean.groupby("prompt_id"):
        assert rows["text"].nunique() == 2  # another draw is another text
    first = clean.loc[f"{two.prompts['prompt_id'].iloc[0]}|clean|0", "text"]
    for change in ({"temperature": 0.0}, {"seed": 1}):
        other = dp.run(gpt2, texts[:1], out=tmp_path / "other", **{**settings, **change})
        assert table(other, "samples", "clean")["text"].iloc[0] != first
    # In the summary a prompt counts once, however many texts it has.
    entry = two.summary["conditions"]["clean"]
    assert entry["samples"] == 6
    assert entry["nll"]["n"] == 3
    by_prompt = clean.groupby("prompt_id")["nll"].mean()
    assert entry["nll"]["mean"] == pytest.approx(by_prompt.mean(), rel=1e-6)
    assert entry["nll"]["sd"] == pytest.approx(by_prompt.std(), rel=1e-6)


def test_noise_follows_the_name_of_the_prompt_and_the_seed(llama, texts, tmp_path, table):
    named = from_texts(texts[:2], ids=["a", "b"])
    renamed = from_texts(texts[:2], ids=["a", "c"])
    runs = [
        dp.run(llama, prompts, perturb="alpha=0.3", max_new_tokens=0, seed=seed, out=tmp_path)
        for prompts, seed in ((named, 0), (renamed, 0), (named, 7))
    ]
    assert len({run.path for run in runs}) == 3  # a name is part of the identity
    kl = [table(run, "samples", "perturbed.forced")["kl_clean_pert"].to_numpy() for run in runs]
    assert kl[0][0] == kl[1][0]
    assert kl[0][1] != kl[1][1]
    assert (kl[0] != kl[2]).all()
    assert runs[2].manifest.seeds["noise"] == [7]  # --seed serves a perturbation that names none …
    own = dp.run(llama, named, perturb="alpha=0.3,seed=0", max_new_tokens=0, seed=7, out=tmp_path)
    np.testing.assert_array_equal(table(own, "samples", "perturbed.forced")["kl_clean_pert"], kl[0])  # … and no other


def test_a_model_that_padding_changes_is_run_in_exact_lengths(no_positions, texts, tmp_path, same_tables):
    run = dp.run(no_positions, texts, perturb=SPEC, max_new_tokens=4, out=tmp_path)
    test = run.manifest.self_tests["alone"]
    assert not test["passed"]
    assert test["value"] > test["limit"]
    assert run.manifest.exact_length_batches
    assert "exact-lengths" in set(run.events()["kind"])
    assert sorted(len(batch) for batch in run.manifest.batch_plan) == [1, 1, 1, 2]  # two prompts have 18 tokens
    for text in texts[1:4:2]:
        alone = dp.run(no_positions, [text], perturb=SPEC, max_new_tokens=4, out=tmp_path / "alone")
        same_tables(run, alone, part=True)


def test_a_state_space_model_runs_like_any_other(texts, tmp_path, same_tables):
    import torch

    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=259,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    subject = discover(transformers.MambaForCausalLM(config), tokenizer=byte_tokenizer(), name="mamba")
    run = dp.run(subject, texts[:3], perturb=SPEC, max_new_tokens=3, out=tmp_path)
    alone = dp.run(subject, texts[:1], perturb=SPEC, max_new_tokens=3, out=tmp_path)
    same_tables(run, alone, part=True)


def test_two_models_of_one_shape_are_two_runs(tmp_path):
    """Models built in memory have no files to tell them apart by."""
    from dynprobe.testing import tiny_llama

    runs = [dp.run(tiny_llama(seed=s), [[5, 6, 7]], max_new_tokens=2, out=tmp_path) for s in (0, 1, 0)]
    assert runs[0].path == runs[2].path
    assert runs[0].path != runs[1].path
    assert runs[0].manifest.weights["hash"].startswith("tensors-")


def test_weights_edited_after_loading_are_another_model(llama_folder, texts, tmp_path):
    import torch

    subject = dp.load(str(llama_folder))
    before = dp.run(subject, texts[:1], max_new_tokens=2, out=tmp_path)
    calibrated = dp.calibrate(subject).hash
    with torch.no_grad():
        subject.model.model.layers[0].mlp.down_proj.weight.zero_()
    after = dp.run(subject, texts[:1], max_new_tokens=2, out=tmp_path)
    assert before.path != after.path
    assert before.samples["kappa_phase"].iloc[0] != after.samples["kappa_phase"].iloc[0]
    assert dp.calibrate(subject).hash != calibrated


@pytest.mark.slow
def test_on_real_weights_too(users_cache, tmp_path, table):
    """Thirty layers of rounding stay far below what a perturbation does."""
    from dynprobe.errors import ModelNotFoundError, OfflineError

    try:
        subject = dp.load("smollm2-135m")
    except (ModelNotFoundError, OfflineError) as error:
        pytest.skip(f"the weights are not in the cache and cannot be had: {error}")
    settings = {"perturb": "alpha=0.1", "limit": 3, "max_new_tokens": 4}
    together = dp.run(subject, batch_size=3, out=tmp_path / "a", **settings)
    alone = dp.run(subject, batch_size=1, padding="left", out=tmp_path / "b", **settings)
    a, b = table(together, "samples"), table(alone, "samples")
    assert list(a["text"].dropna()) == list(b["text"].dropna())
    forced = a["arm"] == "perturbed.forced"
    for column, tolerance in (("kappa_phase", 1e-6), ("kappa_phase_d", 1e-6), ("kl_clean_pert", 1e-4), ("nll", 1e-4)):
        np.testing.assert_allclose(a.loc[forced, column], b.loc[forced, column], rtol=0, atol=tolerance)
    assert (a.loc[forced, "kappa_phase_d"] > 1e-5).all()
