"""Weights in eight or four bits are other weights, and the instruments read them as they are."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.models import _quantize, weights_hash
from dynprobe.models._hash import module_hash
from dynprobe.models._quantize import QUANTIZATIONS, quantization_config, quantized_hashes
from dynprobe.protocols._model_skeleton import skeleton_of
from dynprobe.protocols._weights import structure_of

ROWS = [[5, 6, 7, 8], [9, 10, 11]]
#: Largest relative change of the last state that each may make in a tiny random model; measured 0.02, 0.04, 0.36, 0.55.
ROUGH = {"torchao-int8wo": 0.05, "int8": 0.1, "nf4": 0.6, "fp4": 0.8}


@pytest.fixture(scope="module")
def folder(llama_of_width_64: Path) -> Path:
    return llama_of_width_64


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return dp.load(str(folder))


@pytest.fixture(scope="module", params=ROUGH)
def quantized(folder: Path, request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("accelerate")
    pytest.importorskip(QUANTIZATIONS[request.param][0])
    return request.param, dp.load(str(folder), quantization=request.param)


def test_what_the_library_says_of_every_matrix_is_said_once(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(_quantize, "_version", lambda package: "1.0")
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **given: given)
    assert [quantization_config("int8", "auto") for _ in range(2)] == [{"load_in_8bit": True}] * 2
    speaker = logging.getLogger("bitsandbytes.autograd._functions")
    for dtype in ("test.one", "test.two", "test.one", "test.one"):
        speaker.warning("inputs will be cast from %s", dtype)
    assert caplog.messages == ["inputs will be cast from test.one", "inputs will be cast from test.two"]


def test_what_was_done_is_recorded_and_is_part_of_what_the_weights_are(
    quantized: Any, plain: Any, folder: Path
) -> None:
    name, subject = quantized
    found = subject.facts["quantization"]
    assert (found["name"], found["stored"]) == (name, False)
    assert found["package"].split()[0] == QUANTIZATIONS[name][0]
    assert subject.facts["weights_hash"] != plain.facts["weights_hash"]
    assert f"quantization: {name}" in subject.facts["weights_files"]
    assert subject.facts["n_parameters"] == plain.facts["n_parameters"]
    assert skeleton_of(subject)["log10_parameters"] == skeleton_of(plain)["log10_parameters"]
    assert plain.facts["quantization"] is None
    again = dp.load(str(folder), quantization=name)
    assert again.facts["weights_hash"] == subject.facts["weights_hash"]
    assert structure_of(again) == structure_of(subject)
    assert weights_hash(again.model) == weights_hash(subject.model) != weights_hash(plain.model)


def test_reading_writing_and_resuming(quantized: Any, plain: Any) -> None:
    name, subject = quantized
    tape, full = (dp.capture(s, ROWS, logits="all") for s in (subject, plain))
    real = full.mask
    off = (tape.states[3] - full.states[3])[real].norm() / full.states[3][real].norm()
    assert 1e-4 < float(off) < ROUGH[name]
    assert tape.states[1].dtype == torch.float32
    pushed = dp.capture(subject, ROWS, perturb="alpha=0.3,layers=1", logits="all")
    assert torch.equal(pushed.states[1], tape.states[1])
    assert not torch.equal(pushed.states[2], tape.states[2])
    again = dp.resume(tape, at=2, states=tape.states[2], logits="all")
    torch.testing.assert_close(again.logits[real], tape.logits[real], rtol=1e-4, atol=1e-4)


def test_a_run_of_quantised_weights(quantized: Any, folder: Path, tmp_path: Path) -> None:
    name, _ = quantized
    run = dp.run(
        str(folder), ROWS, quantization=name, perturb="alpha=0.3,layers=1", max_new_tokens=2, out=tmp_path,
    )  # fmt: skip
    assert run.manifest.config["quantization"] == name
    assert run.manifest.model["quantization"]["name"] == name
    assert run.manifest.self_tests["null"]["passed"]
    whole = dp.run(str(folder), ROWS, perturb="alpha=0.3,layers=1", max_new_tokens=2, out=tmp_path)
    assert whole.manifest.id8 != run.manifest.id8
    assert "quantization" not in whole.manifest.model_extra["identity"]
    assert whole.samples["kl_clean_pert"].notna().any()


def test_a_configuration_object_is_passed_on(folder: Path, plain: Any) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    subject = dp.load(
        str(folder), quantization=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    )
    assert subject.facts["quantization"]["name"] == "torchao"
    assert type(subject.model.lm_head.weight) is type(plain.model.lm_head.weight)
    assert type(subject.model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter


def test_what_is_not_known_is_refused(folder: Path, plain: Any) -> None:
    with pytest.raises(UsageError, match=r"--quantization nf5 is not known. Did you mean 'nf4'\?"):
        dp.load(str(folder), quantization="nf5")
    with pytest.raises(UsageError, match=r"quantization=int is no quantisation of transformers"):
        dp.load(str(folder), quantization=8)
    with pytest.raises(UsageError, match="this model is loaded already"):
        dp.load(plain.model, quantization="nf4")
    assert quantization_config(None, torch.float32) is None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynprobe.models import _quantize

    monkeypatch.setattr(_quantize, "_version", lambda package: None if package == "bitsandbytes" else "1")
    with pytest.raises(UsageError, match="--quantization nf4 needs bitsandbytes: pip install bitsandbytes"):
        quantization_config("nf4", torch.float32)


def test_a_checkpoint_that_is_stored_quantised_is_known_by_its_files() -> None:
    stored = {"name": "gptq", "settings": {"bits": 4}, "stored": True}
    assert quantized_hashes({"a": "b"}, stored) == {"a": "b"}
    four, eight = ({"name": "x", "settings": {"bits": bits}, "stored": False} for bits in (4, 8))
    assert quantized_hashes({"a": "b"}, four) != quantized_hashes({"a": "b"}, eight)


def test_quantised_weights_of_one_shape_are_told_apart() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def pair(seed: int) -> torch.nn.Module:
        torch.manual_seed(0)
        first = torch.nn.Linear(16, 16, bias=False)
        torch.manual_seed(seed)
        model = torch.nn.Sequential(first, torch.nn.Linear(16, 16, bias=False))
        quantize_(model, Int8WeightOnlyConfig())
        return model

    assert module_hash(pair(1)) == module_hash(pair(1))
    assert module_hash(pair(1)) != module_hash(pair(2))  # such weights have no address: all of them say 0
    swapped = torch.nn.Sequential(*reversed(pair(1)))
    assert module_hash(swapped) != module_hash(pair(1))
