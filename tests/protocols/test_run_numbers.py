"""The numbers of a run against a second computation, from its stored states with plain NumPy and the bare model.

Nothing of the package's metrics is used here; the noise is drawn address by address from its public definition.
"""

import json
import math

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.probes._noise import gaussian

ALPHA, LAYER = 0.3, 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def angles(a, b):
    """Angle in radians between vectors of the last axis."""
    a = a / np.linalg.norm(a, axis=-1, keepdims=True)
    b = b / np.linalg.norm(b, axis=-1, keepdims=True)
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))


def ct_series(h):
    """ct of tokens 2 … T − 1 of [T, dim]."""
    unit = h / np.linalg.norm(h, axis=-1, keepdims=True)
    v = np.diff(unit, axis=0)
    return np.linalg.norm(v[1:], axis=-1) * angles(v[:-1], v[1:])


def tail(subject, h):
    """The model's own norm and head, by hand; log-probabilities float64."""
    with torch.no_grad():
        logits = subject.model.lm_head(subject.model.model.norm(torch.from_numpy(np.float32(h))))
    return logits.double().log_softmax(-1).numpy()


def arms(table, run, *names):
    samples = table(run, "samples")
    return samples[samples["arm"].isin(names)].iterrows()


@pytest.fixture(scope="module")
def depth_tables(full_run, table):
    return {name: table(full_run, name) for name in ("tokens", "depths", "samples", "profiles")}


def test_clean_states_are_those_of_the_untouched_model(full_run, llama, table, trajectory):
    for sample, _ in arms(table, full_run, "clean"):
        ids = torch.tensor([[int(i) for i in table(full_run, "tokens").loc[sample]["token_id"]]])
        with torch.no_grad():
            hidden = llama.model(ids, output_hidden_states=True).hidden_states
        states = trajectory(full_run, sample)
        for depth in range(3):  # transformers hands out depth L after the final norm only
            np.testing.assert_allclose(states[depth], hidden[depth][0], **CLOSE)


def test_depth_and_token_metrics(full_run, table, trajectory, depth_tables):
    for sample, _ in arms(table, full_run, "clean", "perturbed.forced", "perturbed.free"):
        x = trajectory(full_run, sample)
        depths = depth_tables["depths"].loc[sample]
        step = np.diff(x, axis=0)
        size, norm = np.linalg.norm(step, axis=-1), np.linalg.norm(x, axis=-1)
        turn = angles(x[:-1], x[1:])
        for depth in range(4):
            rows = depths.xs(("resid", depth), level=("track", "depth"))
            np.testing.assert_allclose(rows["norm"], norm[depth], **CLOSE)
            if depth >= 2:  # depth 0 takes no part
                np.testing.assert_allclose(rows["angle"], turn[depth - 1], **CLOSE)
                np.testing.assert_allclose(rows["delta_rel_prev"], size[depth - 1] / norm[depth - 1], **CLOSE)
                np.testing.assert_allclose(rows["delta_rel_next"], size[depth - 1] / norm[depth], **CLOSE)
                np.testing.assert_allclose(rows["delta_rms"], size[depth - 1] / math.sqrt(x.shape[-1]), **CLOSE)
        tokens = depth_tables["tokens"].loc[sample]
        np.testing.assert_allclose(tokens["kappa_phase"], turn[1:].mean(0) / np.pi, **CLOSE)
        # The first token is the sink: no value reads it.
        ct = np.full(len(tokens), np.nan)
        ct[3:] = ct_series(x[-1][1:])
        np.testing.assert_allclose(tokens["limen_ct"], ct, rtol=1e-4, atol=1e-5)


def test_sample_metrics(full_run, table, trajectory, depth_tables):
    seen = 0
    for sample, row in arms(table, full_run, "clean", "perturbed.forced", "perturbed.free"):
        x = trajectory(full_run, sample)[:, 1:]  # without the sink
        reasons = json.loads(row["reasons"] or "{}")
        if x.shape[1] == 0:
            continue
        step = np.diff(x, axis=0)[1:]
        turn = angles(x[1:-1], x[2:])
        assert row["kappa_phase"] == pytest.approx(turn.mean(1).mean() / np.pi, abs=1e-5)
        assert row["kappa_path"] == pytest.approx(turn.mean(1).mean() * 2, abs=1e-4)  # π(D−1)κ, D = 3
        ratio = np.linalg.norm(step, axis=-1) / np.linalg.norm(x[1:-1], axis=-1)
        assert row["delta_rel_prev"] == pytest.approx(ratio.mean(1).mean(), rel=1e-5)
        assert row["norm"] == pytest.approx(np.linalg.norm(x[1:], axis=-1).mean(1).mean(), rel=1e-5)
        profile = depth_tables["profiles"].loc[sample].droplevel("track")
        np.testing.assert_allclose(profile["kappa_phase"].loc[[2, 3]], turn.mean(1) / np.pi, **CLOSE)
        # Token-axis metrics run over the new tokens, of which the first may be the sink.
        new = trajectory(full_run, sample)[-1][max(int(row["n_prompt"]), 1) :]
        ct = ct_series(new)
        assert row["limen_ct"] == pytest.approx(ct.mean(), rel=1e-4)
        if len(ct) > 1:
            assert row["limen_ratio"] == pytest.approx(ct.max() / ct.mean(), rel=1e-4)
            seen += 1
        assert "kappa_phase" not in reasons
    assert seen == 15


def test_output_metrics_and_the_lens(full_run, llama, table, trajectory, depth_tables):
    for sample, row in arms(table, full_run, "clean", "perturbed.forced", "perturbed.free"):
        x, tokens = trajectory(full_run, sample), depth_tables["tokens"].loc[sample]
        logp = tail(llama, x[-1])
        p = np.exp(logp)
        entropy = -(p * logp).sum(-1)
        nll = -logp[np.arange(len(logp)), tokens["target_id"]]
        top = np.sort(p, axis=-1)
        np.testing.assert_allclose(tokens["entropy"], entropy, **CLOSE)
        np.testing.assert_allclose(tokens["nll"], nll, **CLOSE)
        np.testing.assert_allclose(tokens["margin"], top[:, -1] - top[:, -2], **CLOSE)
        n = int(row["n_prompt"])
        assert row["nll"] == pytest.approx(nll[n - 1 :].mean(), rel=1e-5)
        assert row["ppl"] == pytest.approx(math.exp(nll[n - 1 :].mean()), rel=1e-4)
        assert row["entropy"] == pytest.approx(entropy[n - 1 :].mean(), rel=1e-5)
        if n > 1:  # the prompt's own tokens: the last position of the prompt predicts a generated one
            assert row["nll_prompt"] == pytest.approx(nll[: n - 1].mean(), rel=1e-5)
        else:
            assert math.isnan(row["nll_prompt"])
        depths = depth_tables["depths"].loc[sample]
        for depth in range(4):
            lens = tail(llama, x[depth])
            rows = depths.xs(("resid", depth), level=("track", "depth"))
            np.testing.assert_allclose(rows["lens_entropy"], -(np.exp(lens) * lens).sum(-1), **CLOSE)
            np.testing.assert_allclose(rows["lens_kl"], (p * (logp - lens)).sum(-1), rtol=1e-4, atol=1e-5)
        assert rows["lens_kl"].abs().max() < 1e-6


def test_paired_numbers(full_run, llama, table, trajectory, depth_tables):
    for sample, row in arms(table, full_run, "perturbed.forced"):
        clean = sample.replace("perturbed.forced", "clean")
        x, y = trajectory(full_run, clean), trajectory(full_run, sample)
        theirs, base = depth_tables["tokens"].loc[sample], depth_tables["tokens"].loc[clean]
        assert list(theirs["token_id"]) == list(base["token_id"])  # the same text, token by token
        p, q = tail(llama, x[-1]), tail(llama, y[-1])
        kl = (np.exp(p) * (p - q)).sum(-1)
        flip = p.argmax(-1) != q.argmax(-1)
        np.testing.assert_allclose(theirs["kl_clean_pert"], kl, **CLOSE)
        np.testing.assert_array_equal(theirs["flip"].astype(bool), flip)
        turn = angles(y[1:-1, 1:], y[2:, 1:]) - angles(x[1:-1, 1:], x[2:, 1:])
        assert row["kl_clean_pert"] == pytest.approx(kl[1:].mean(), abs=1e-5)
        assert row["flip_rate"] == pytest.approx(flip[1:].mean(), abs=1e-6)
        assert row["kappa_phase_d"] == pytest.approx(turn.mean(1).mean() / np.pi, abs=1e-6)
        assert row["kappa_phase_d_inj"] == pytest.approx(turn[0].mean() / np.pi, abs=1e-6)  # the step into depth 2
        assert row["kappa_phase_d_down"] == pytest.approx(turn[1:].mean(1).mean() / np.pi, abs=1e-6)
        mine = depth_tables["samples"].loc[clean]
        assert row["nll_d"] == pytest.approx(row["nll"] - mine["nll"], abs=1e-5)
        assert row["limen_ct_d"] == pytest.approx(row["limen_ct"] - mine["limen_ct"], abs=1e-5)
        away = angles(x, y) / np.pi
        depths = depth_tables["depths"].loc[sample]
        for depth in range(4):
            rows = depths.xs(("resid", depth), level=("track", "depth"))
            np.testing.assert_allclose(rows["diverge_angle"], away[depth], atol=1e-6)
        assert row["diverge_angle"] == pytest.approx(away[-1, 1:].mean(), abs=1e-6)
        assert away[:2].max() == 0  # nothing below the write moves
        assert away[:, 0].max() == 0  # nor does the first position


def test_the_write_is_alpha_times_the_norm_in_the_direction_of_the_named_noise(full_run, llama, table, trajectory):
    """The whole perturbed forward once more, with one plain hook."""
    for sample, row in arms(table, full_run, "perturbed.forced", "perturbed.free"):
        ids = torch.tensor([[int(i) for i in table(full_run, "tokens").loc[sample]["token_id"]]])
        noise = [gaussian(0, row["prompt_id"], f"resid_post.{LAYER}", pos, 32) for pos in range(ids.shape[1])]

        def push(_module, _args, output, noise=noise):
            h = output[0] if isinstance(output, tuple) else output
            unit = torch.from_numpy(np.stack([e / np.linalg.norm(e) for e in noise]))[None]
            unit[:, 0] = 0  # position 0 is left alone
            moved = h + ALPHA * h.norm(dim=-1, keepdim=True) * unit
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = llama.model.model.layers[LAYER].register_forward_hook(push)
        try:
            with torch.no_grad():
                logits = llama.model(ids).logits[0]
        finally:
            handle.remove()
        found = tail(llama, trajectory(full_run, sample)[-1])
        np.testing.assert_allclose(found, logits.double().log_softmax(-1), rtol=1e-4, atol=2e-5)
        if ids.shape[1] > 1:
            assert row["alpha_relnorm"] == pytest.approx(ALPHA, rel=1e-6)


def test_a_free_text_under_noise_equals_a_forced_run_of_it(full_run, llama, table, trajectory):
    """Noise is a function of position: prefill and decode write the same."""
    for sample, row in arms(table, full_run, "perturbed.free"):
        fed = [int(i) for i in table(full_run, "tokens").loc[sample]["token_id"]]
        tape = dp.capture(llama, [fed], perturb=f"alpha={ALPHA}", row_keys=[row["prompt_id"]])
        states = trajectory(full_run, sample)
        for depth in range(4):
            np.testing.assert_allclose(states[depth], tape.states[depth][0], rtol=1e-4, atol=2e-5)


def test_the_passport_measures_the_same_write_in_every_unit(full_run, llama, table, trajectory):
    calibration = dp.calibrate(llama)
    sd = calibration.tensors["std"][LAYER + 1].double().numpy()
    for sample, row in arms(table, full_run, "perturbed.forced"):
        x = trajectory(full_run, sample.replace("perturbed.forced", "clean"))[LAYER + 1, 1:]
        u = trajectory(full_run, sample)[LAYER + 1, 1:] - x
        size, norm = np.linalg.norm(u, axis=-1), np.linalg.norm(x, axis=-1)
        middle = np.median(x, axis=-1, keepdims=True)
        mad = 1.4826 * np.median(np.abs(x - middle), axis=-1)
        assert row["alpha_abs"] == pytest.approx((size / math.sqrt(32)).mean(), rel=1e-5)
        assert row["alpha_mad"] == pytest.approx((size / math.sqrt(32) / mad).mean(), rel=1e-5)
        assert row["alpha_coordstd"] == pytest.approx(np.sqrt(((u / sd) ** 2).mean(-1)).mean(), rel=1e-5)
        cosine = (x * (x + u)).sum(-1) / norm / np.linalg.norm(x + u, axis=-1)
        assert row["alpha_cos"] == pytest.approx(cosine.mean(), abs=1e-6)


def test_debts_use_the_clean_quantile_of_the_calibration(full_run, llama, table, trajectory):
    theta = dp.calibrate(llama).quantile("limen_ct", 0.9)
    for sample, row in arms(table, full_run, "clean", "perturbed.forced"):
        ct = ct_series(trajectory(full_run, sample)[-1][max(int(row["n_prompt"]), 1) :])
        assert row["debt_excess"] == pytest.approx(np.maximum(ct - theta, 0).sum(), abs=1e-4)


def test_the_summary_averages_prompts_and_bootstraps_them(full_run):
    samples, summary = full_run.samples, full_run.summary["conditions"]
    forced = samples[samples["condition_id"] == "perturbed.forced"]
    for column in ("kappa_phase_d", "kl_clean_pert", "nll_d"):
        entry, values = summary["perturbed.forced"][column], forced[column].to_numpy(np.float64)
        assert entry["mean"] == pytest.approx(np.nanmean(values), rel=1e-6)
        assert entry["sd"] == pytest.approx(np.nanstd(values, ddof=1), rel=1e-6)
        assert entry["n"] == np.isfinite(values).sum()
        assert entry["low"] <= entry["mean"] <= entry["high"]
    assert summary["sham"]["equal_to"] == {"clean": 5}
    assert summary["clean"]["status"] == {"ok": 5}
