from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dynprobe.errors import ModelError, UsageError
from dynprobe.models import DEFAULT_MODEL, fetch, known_models, load_model, resolve, zoo_folder
from dynprobe.models._zoo import ZOO, make_from_package

LENGTH = 160


@pytest.fixture(scope="module", params=list(ZOO))
def zoo(request: pytest.FixtureRequest) -> tuple[str, Any, Any, dict[str, Any], dict[str, Any]]:
    model, tokenizer, facts = load_model(request.param, device="cpu")
    record = json.loads((zoo_folder(request.param) / "dynprobe-model.json").read_text())
    return request.param, model, tokenizer, facts, record


def snippet() -> bytes:
    return (zoo_folder(DEFAULT_MODEL).parent / "held_out.txt").read_bytes()


@torch.no_grad()
def nll(model: Any, tokenizer: Any, **call: Any) -> float:
    """Nats per byte of the snippet in windows of 160 bytes, each with one byte given."""
    ids = torch.tensor(tokenizer(snippet().decode()).input_ids).view(-1, LENGTH + 1)
    logits = model(input_ids=ids[:, :-1], use_cache=False, **call).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_known_names_need_nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model of the package asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ZOO:
        assert name in known_models()
        source = resolve(name)
        assert (source.kind, source.local_files_only, source.weights_id) == ("known", True, f"dynprobe/{name}")
        assert fetch(name) == Path(source.location) == zoo_folder(name)
        assert load_model(source, device="cpu")[0].config.vocab_size == 259


def test_weights_are_those_of_the_card(zoo: Any) -> None:
    name, model, _, facts, record = zoo
    digest = hashlib.sha256((zoo_folder(name) / "model.safetensors").read_bytes()).hexdigest()
    assert record["files"]["model.safetensors"] == digest == facts["weights_files"]["model.safetensors"]
    assert f"`{digest}`" in (zoo_folder(name) / "README.md").read_text()
    assert record["figures"]["parameters"] == sum(p.numel() for p in model.parameters()) == facts["n_parameters"]
    assert facts["dtype"] == facts["original_dtype"] == "float32"
    assert (zoo_folder(name) / "model.safetensors").stat().st_size < 5_000_000


def test_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(zoo_folder("tiny-llama"), tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="is not the file that was converted and checked"):
        load_model(tmp_path / "copy", device="cpu")


def test_held_out_loss_is_that_of_the_card(zoo: Any) -> None:
    _, model, tokenizer, _, record = zoo
    figures = record["figures"]
    assert hashlib.sha256(snippet()).hexdigest() == figures["snippet_sha256"]
    assert nll(model, tokenizer) == pytest.approx(figures["snippet_nll"], rel=0.01)
    assert figures["snippet_nll"] == pytest.approx(figures["test_nll"], rel=0.2)


def test_it_has_learned_more_than_trigrams(zoo: Any) -> None:
    *_, record = zoo
    figures = record["figures"]
    assert figures["test_nll"] < figures["ngram_nll"]["trigram"] < figures["ngram_nll"]["bigram"]


def test_the_three_are_alike_but_for_the_architecture() -> None:
    records = [json.loads((zoo_folder(name) / "dynprobe-model.json").read_text()) for name in ZOO]
    losses = [r["figures"]["test_nll"] for r in records]
    sizes = [r["figures"]["parameters"] for r in records]
    assert max(losses) / min(losses) < 1.15
    assert max(sizes) / min(sizes) < 1.025
    for same in ("steps", "batch", "length", "warmup", "decay", "clip", "synthetic", "seed"):
        assert len({r["recipe"][same] for r in records}) == 1
    assert len({json.dumps(r["text"]) for r in records}) == 1
    assert len({json.dumps(r["figures"]["ngram_nll"]) for r in records}) == 1


def test_csm_gains_by_iterating() -> None:
    model, tokenizer, _ = load_model("tiny-csm", device="cpu")
    one, trained = nll(model, tokenizer, num_iterations=1), nll(model, tokenizer)
    assert model.config.num_iterations <= model.config.trained_iterations
    assert trained < 0.95 * one


def test_cem_was_trained_with_two_steps() -> None:
    model, tokenizer, _ = load_model("tiny-cem", device="cpu")
    assert (model.config.steps_attention, model.config.steps_mlp) == (2, 2)
    assert nll(model, tokenizer) < nll(model, tokenizer, steps_attention=1, steps_mlp=1)


def test_generates_words_of_its_text(zoo: Any) -> None:
    _, model, tokenizer, *_ = zoo
    ids = torch.tensor([tokenizer("And the LORD said unto ").input_ids])
    out = model.generate(ids, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :])
    assert len(text) == 24
    assert text.isascii()
    vocabulary = {"the", "of", "and", "shall", "be", "him", "his", "in", "unto", "all", "children", "them", "thee"}
    assert vocabulary & set(text.replace(",", " ").split()), text


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_auto_classes_know_the_folders(order: str) -> None:
    imports = ["import dynprobe.models", "from transformers import AutoModelForCausalLM"]
    code = "; ".join(imports if order == "ours first" else imports[::-1])
    folders = [str(zoo_folder(name)) for name in ("tiny-cem", "tiny-csm")]
    code += f"; print(*(type(AutoModelForCausalLM.from_pretrained(f)).__name__ for f in {folders!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["CemForCausalLM", "CsmForCausalLM"], done.stderr[-2000:]


def test_importing_the_room_loads_no_framework() -> None:
    code = "import dynprobe.models, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installation_without_the_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the installation is incomplete"):
        make_from_package(tmp_path)


def test_a_known_model_has_no_revision() -> None:
    with pytest.raises(UsageError, match="has no revisions"):
        resolve("tiny-csm", revision="main")
