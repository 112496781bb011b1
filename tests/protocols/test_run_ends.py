"""Runs at their ends: logits of no token, one token, thousands of them; and the same bytes from another process."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.testing import save_tiny_model

PADDED = 37


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model with more rows in its head than its tokenizer has tokens, and the likeliest of them among those."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "padded")
    subject = dp.load(str(folder))
    model, n = subject.model, len(subject.tokenizer)
    model.resize_token_embeddings(n + PADDED, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[n:] = 4 * torch.randn(PADDED, 32, generator=torch.manual_seed(3))
    model.save_pretrained(folder)
    return dp.load(str(folder))


def test_columns_beyond_the_tokenizer_are_part_of_the_distribution(padded, texts, tmp_path):
    """The model's own probabilities, padding rows too, by hand; and such a token can be drawn and written down."""
    n = len(padded.tokenizer)
    run = dp.run(padded, texts, perturb="alpha=0.3", max_new_tokens=5, stop_at_eos=False, out=tmp_path, lens=True)
    tokens = run.tokens
    prefill = tokens[tokens["phase"] == "prefill"]
    above = 0
    for _, prompt in run.prompts.iterrows():
        ids = torch.tensor([list(prompt["token_ids"])])
        with torch.no_grad():
            p = padded.model(ids).logits.double().softmax(-1)[0]
        rows = prefill[prefill["sample_id"] == f"{prompt['prompt_id']}|clean|0"].sort_values("pos")
        entropy = -(p * p.clamp_min(1e-300).log()).sum(-1).numpy()
        assert len(rows) == len(entropy)
        np.testing.assert_allclose(rows["entropy"].to_numpy(), entropy, rtol=1e-4, atol=1e-5)
        top = p.topk(2, -1).values.numpy()
        np.testing.assert_allclose(rows["margin"].to_numpy(), top[:, 0] - top[:, 1], rtol=1e-3, atol=1e-5)
        above += int((p.argmax(-1) >= n).sum())
    assert above  # otherwise nothing was tried
    drawn = tokens[tokens["phase"] == "decode"]["token_id"]
    assert (drawn >= n).any()
    made = run.samples[run.samples["sample_id"].astype(str).str.contains("|clean|", regex=False)]
    assert len(made)
    assert made["text"].notna().all()


def folder_digests(folder):
    """SHA-256 of every part of the run below ``folder``; a calibration by its bytes, not by the id of its folder."""
    parts = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".parquet", ".safetensors") and p.is_file())
    return {
        (p.name if "calibration" in p.parts else p.relative_to(folder).as_posix()): hashlib.sha256(
            p.read_bytes()
        ).hexdigest()
        for p in parts
    }


ONCE = """
import json, sys
import torch
torch.set_num_threads(1)
import dynprobe as dp
model, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
texts = json.loads(sys.argv[4])
run = dp.run(model, texts, perturb="alpha=0.3", max_new_tokens=6, temperature=0.8, states=True, lens=True,
             batch_size=size, out=out)
print(run.path)
"""


def in_a_process(folder, out, size, texts):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(size)}
    done = subprocess.run(
        [sys.executable, "-c", ONCE, str(folder), str(out), str(size), json.dumps(texts)],
        env=environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return Path(done.stdout.strip().splitlines()[-1])


def test_the_same_run_again_writes_the_same_bytes(llama, texts, tmp_path):
    settings = {"perturb": "alpha=0.3", "max_new_tokens": 6, "temperature": 0.8, "states": True}
    one, two = (folder_digests(dp.run(llama, texts, out=tmp_path / n, **settings).path) for n in ("one", "two"))
    assert len(one) > 3
    assert one == two


@pytest.mark.long
def test_two_processes_write_the_same_bytes(llama_folder, texts, tmp_path):
    one, two = (folder_digests(in_a_process(llama_folder, tmp_path / name, 3, texts)) for name in ("one", "two"))
    assert len(one) > 3
    assert one == two


def test_another_batch_shape_stays_within_rounding(llama, texts, tmp_path, table):
    """float32 sums in another order: κ and the read-outs of the output move by rounding only, and no token flips."""
    settings = {"max_new_tokens": 6, "temperature": 0.8, "stop_at_eos": False}
    runs = [dp.run(llama, texts, batch_size=n, out=tmp_path / str(n), **settings) for n in (1, 2, len(texts))]
    first = table(runs[0], "tokens")
    for other in runs[1:]:
        rows = table(other, "tokens").loc[first.index]
        assert (rows["token_id"] == first["token_id"]).all()
        for column in ("kappa_phase", "entropy", "nll", "margin"):
            np.testing.assert_allclose(
                rows[column].to_numpy(float), first[column].to_numpy(float), rtol=2e-4, atol=2e-5
            )


def test_a_prompt_of_one_token(llama, tmp_path):
    run = dp.run(llama, ["x"], perturb="alpha=0.3", max_new_tokens=0, out=tmp_path)
    assert list(map(len, run.prompts["token_ids"])) == [1]
    # the one token is the sink, which no aggregate takes
    clean = run.samples[run.samples["sample_id"] == f"{run.prompts['prompt_id'].iloc[0]}|clean|0"].iloc[0]
    reasons = json.loads(clean["reasons"])
    for column in ("limen_ct", "kappa_phase", "kappa_xcorr", "kappa_geom", "delta_rms", "norm"):
        assert math.isnan(clean[column])
        assert reasons[column] == "empty"
    assert np.isfinite(run.tokens["entropy"].to_numpy(float)).all()


@pytest.mark.long
def test_a_prompt_of_eight_thousand_tokens(tmp_path):
    """Windows, quadratic metrics and the cache of keys over 8,192 tokens, against the model called by hand."""
    folder = save_tiny_model(tmp_path / "model", layers=2)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 9000
    (folder / "config.json").write_text(json.dumps(config))
    subject = dp.load(str(folder))
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(8192))
    run = dp.run(subject, [text], max_new_tokens=2, stop_at_eos=False, out=tmp_path / "run")
    ids = list(run.prompts["token_ids"].iloc[0])
    assert len(ids) >= 8192
    with torch.no_grad():
        p = subject.model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    rows = run.tokens[run.tokens["phase"] == "prefill"].sort_values("pos")
    np.testing.assert_allclose(rows["entropy"].to_numpy(float), -(p.exp() * p).sum(-1).numpy(), rtol=1e-3, atol=1e-4)
    assert not any(math.isinf(v) for v in run.samples.select_dtypes("number").to_numpy(float).ravel())
