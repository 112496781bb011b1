"""End to end on SmolLM2-135M: the figures that a reader of the documentation will compare with his own."""

import subprocess
import sys

import numpy as np
import pytest

import dynprobe as dp
from dynprobe.errors import ModelNotFoundError, OfflineError
from dynprobe.models import fetch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject():
    try:
        fetch("smollm2-135m")
    except (ModelNotFoundError, OfflineError) as error:
        pytest.skip(f"the weights are not in the cache and cannot be had: {error}")
    return dp.load("smollm2-135m")


@pytest.fixture(scope="module")
def doses(subject, tmp_path_factory):
    """Clean and perturbed prompts (no generation) at three strengths."""
    out = tmp_path_factory.mktemp("runs")
    return {a: dp.run(subject, perturb=f"alpha={a}", max_new_tokens=0, out=out) for a in (0.1, 0.3, 1.0)}


def means(run, condition, column):
    samples = run.samples
    return samples[samples["condition_id"] == condition][column].mean()


def test_the_structure_is_what_the_model_card_says(subject):
    assert (subject.n_layers, subject.dim, subject.vocab_size) == (30, 576, 49152)
    assert subject.block_path == "model.layers.*"
    assert (subject.updates["attn_out"][0], subject.updates["mlp_out"][0]) == ("self_attn", "mlp")


def test_doctor_passes_all_five_and_null_is_exact(subject):
    found = dp.doctor(subject)
    assert {name: check.passed for name, check in found.checks.items()} == dict.fromkeys(
        ("null", "alone", "resume", "fired", "readout"), True
    )
    assert found.checks["null"].value == 0.0


def test_clean_kappa_is_near_the_published_pilot(doses):
    # Reference pilot on six other prompts: 0.098 ± 0.007 (κ_phase), 0.020 ± 0.006 (κ_geom), 0.985 ± 0.007 (κ_sync).
    run = doses[0.1]
    assert means(run, "clean", "kappa_phase") == pytest.approx(0.098, abs=0.01)
    assert means(run, "clean", "kappa_geom") == pytest.approx(0.020, abs=0.01)
    assert means(run, "clean", "kappa_sync") == pytest.approx(0.985, abs=0.015)
    assert means(run, "clean", "kappa_path") == pytest.approx(29 * np.pi * means(run, "clean", "kappa_phase"), rel=1e-5)


def test_kappa_rises_with_noise_at_mid_depth_as_in_the_pilot(doses):
    # Reference pilot: +0.0003 at 0.1, +0.002 at 0.3, +0.010 at 1.0.
    change = {a: means(run, "perturbed.forced", "kappa_phase_d") for a, run in doses.items()}
    for alpha, published in ((0.1, 0.0003), (0.3, 0.002), (1.0, 0.010)):
        assert published / 2 < change[alpha] < published * 2
    kl = [means(doses[a], "perturbed.forced", "kl_clean_pert") for a in (0.1, 0.3, 1.0)]
    assert kl[0] < 0.1 < kl[2]  # 0.1 nat is crossed near 0.23, 1 nat near 0.62
    assert kl[1] < 1 < kl[2]
    assert means(doses[0.3], "perturbed.forced", "alpha_relnorm") == pytest.approx(0.3, rel=1e-5)


def test_decoding_is_the_same_trajectory_as_one_full_forward(subject):
    import torch

    prompt = dp.probes.tokenize(subject, ["The river ran past the old mill and"])
    with dp.record(subject) as tape, dp.perturb(subject, "alpha=0.2", row_keys=["mill"]):
        ids = subject.model.generate(torch.tensor(prompt), max_new_tokens=8, do_sample=False)
    with dp.perturb(subject, "alpha=0.2", row_keys=["mill"]):
        whole = dp.capture(subject, ids[:, :-1])
    for decoded, full in zip(tape.states, whole.states, strict=True):
        assert float((decoded - full).norm() / full.norm()) < 1e-4


def test_the_bare_command_ends_with_a_run_folder(subject, tmp_path):
    words = ["run", "--model", "smollm2-135m", "--perturb", "alpha=0.1", "--limit", "6", "--max-new-tokens", "8"]
    found = subprocess.run(
        [sys.executable, "-m", "dynprobe", *words, "--out", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "smollm2-135m-instruct-q4_1-dequantised" in found.stdout
    assert "equal to clean, bit for bit" in found.stdout
    (folder,) = [p for p in tmp_path.iterdir() if (p / "manifest.json").exists()]
    run = dp.open(folder)
    assert run.status == "complete"
    assert run.manifest.self_tests["null"]["value"] == 0.0
    assert run.verify() == len(run.manifest.parts)
