"""From a name or a module to a subject."""

from pathlib import Path

import pytest
import torch
from models import ROWS, Net, build, seeded, subject

from dynprobe.errors import ModelNotFoundError
from dynprobe.probes import capture, load, tokenize
from dynprobe.testing import save_tiny_model, tiny_gpt2, tiny_llama


def test_a_subject_passes_through() -> None:
    assert load(subject("llama")) is subject("llama")


def test_a_module_is_wrapped_with_its_weights_named() -> None:
    model = build("llama").train()
    found = load(model)
    assert found.model is model
    assert not model.training
    assert found.name == "LlamaForCausalLM"
    assert found.facts["source"] == "module"
    assert found.facts["weights_hash"] == load(build("llama")).facts["weights_hash"]
    assert found.facts["weights_hash"] != load(build("gpt2")).facts["weights_hash"]


def test_a_users_module_with_a_pattern() -> None:
    found = load(seeded(Net), layers="stack.*")
    assert found.n_layers == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder(tmp_path: Path, kind: str) -> None:
    folder = save_tiny_model(tmp_path / kind, kind, layers=2)
    found = load(str(folder), device="cpu")
    assert found.n_layers == 2
    assert found.dtype == torch.float32
    assert not found.model.training
    rows = tokenize(found, ["one text", "b"])
    texts, ids = capture(found, ["one text", "b"]), capture(found, rows)
    assert torch.equal(texts.states[:], ids.states[:])
    half = load(str(folder), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=str(tmp_path)):
        load(str(tmp_path))


def test_tiny_models_are_the_same_everywhere_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b = tiny_llama(), tiny_llama()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(capture(a, ROWS[:1]).states[:], capture(b, ROWS[:1]).states[:])
    assert not torch.equal(capture(a, ROWS[:1]).states[:], capture(tiny_llama(seed=1), ROWS[:1]).states[:])
    assert tiny_gpt2(layers=2, dim=16).blocks[0].ln_1.weight.shape == (16,)
