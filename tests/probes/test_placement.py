"""Models that are spread over devices and the disk give the numbers of the plain ones."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import ModelError
from dynprobe.models import weights_hash
from dynprobe.probes._placement import device_of
from dynprobe.probes._selftest import check_null

pytest.importorskip("accelerate")

ROWS = [[5, 6, 7, 8], [9, 10, 11]]
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")
#: Some blocks on the disk, as where a GPU is full; and everything, so that no parameter says where the model runs.
SPREAD = {
    "upper blocks": {part: "disk" if part[-1] in "12" else "cpu" for part in PARTS},
    "all of it": dict.fromkeys(PARTS, "disk"),
}


@pytest.fixture(scope="module")
def folder(llama_of_width_64: Path) -> Path:
    return llama_of_width_64


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return dp.load(str(folder))


@pytest.fixture(scope="module", params=SPREAD)
def spread(folder: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    places = {**SPREAD[request.param], "model.rotary_emb": "cpu"}
    return dp.load(str(folder), device_map=places, offload_folder=tmp_path_factory.mktemp("offload"))


def test_an_offloaded_model_says_where_it_runs(spread: Any) -> None:
    assert any(p.device.type == "meta" for p in spread.model.parameters())
    assert spread.device == torch.device("cpu")
    assert device_of(spread.model) == torch.device("cpu")
    assert spread.n_layers == 3
    assert spread.resumable


def test_capture_perturb_resume_and_readout_are_those_of_the_plain_model(plain: Any, spread: Any) -> None:
    one, other = (dp.capture(s, ROWS, where="layers=all,component=resid_post+mlp_out", logits="all")
                  for s in (plain, spread))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one.states, other.states, strict=True))
    assert torch.equal(one["mlp_out", 2], other["mlp_out", 2])
    assert torch.equal(one.logits, other.logits)
    pushed = [dp.capture(s, ROWS, perturb="alpha=0.3,layers=1") for s in (plain, spread)]
    assert torch.equal(pushed[0].states[3], pushed[1].states[3])
    assert not torch.equal(pushed[1].states[3], other.states[3])
    again = [dp.resume(t, at=2, states=t.states[2] * 1.1, logits="all").logits for t in (one, other)]
    assert torch.equal(*again)
    assert torch.equal(dp.readout(spread, other.states[3]), dp.readout(plain, one.states[3]))


def test_the_null_test_passes_and_every_parameter_is_put_away_again(spread: Any) -> None:
    before = {name: p.device.type for name, p in spread.model.named_parameters()}
    assert check_null(spread, ROWS, dp.Perturb.parse("alpha=0.1,layers=1")).passed
    assert {name: p.device.type for name, p in spread.model.named_parameters()} == before


def test_the_weights_are_the_same_weights(plain: Any, spread: Any) -> None:
    assert spread.facts["weights_files"] == plain.facts["weights_files"]
    assert weights_hash(spread.model) == weights_hash(plain.model)


def test_a_run_of_an_offloaded_model_is_the_run(plain: Any, spread: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"perturb": "alpha=0.3,layers=1", "max_new_tokens": 3}
    runs = [dp.run(s, ROWS, out=tmp_path / str(i), **asked) for i, s in enumerate((plain, spread))]
    one, other = (r.samples.astype({"sample_id": str}).sort_values("sample_id", ignore_index=True) for r in runs)
    numbers = one.select_dtypes("number").columns
    pd.testing.assert_frame_equal(one[numbers], other[numbers], rtol=0, atol=0)
    sweeps = [dp.sweep(s, ROWS, alphas=[0.4], layers=1, out=tmp_path / f"s{i}") for i, s in enumerate((plain, spread))]
    kl = [s.samples.astype({"sample_id": str}).set_index("sample_id")["kl_clean_pert"].sort_index() for s in sweeps]
    pd.testing.assert_series_equal(*kl, rtol=1e-6)


def test_parts_on_the_disk_are_read_from_the_checkpoint_where_no_folder_is_named(folder: Path, plain: Any) -> None:
    subject = dp.load(str(folder), device_map={**SPREAD["upper blocks"], "model.rotary_emb": "cpu"})
    assert any(p.device.type == "meta" for p in subject.model.parameters())
    assert torch.equal(dp.capture(subject, ROWS).logits, dp.capture(plain, ROWS).logits)


def test_a_model_that_was_only_laid_out_is_refused(plain: Any) -> None:
    with torch.device("meta"):
        laid_out = type(plain.model)(plain.model.config)
    with pytest.raises(ModelError, match=r"no weights in place: model.embed_tokens.weight is on the meta device"):
        dp.discover(laid_out)
    with pytest.raises(ModelError, match="cannot be hashed"):
        weights_hash(laid_out)
