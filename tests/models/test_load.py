from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynprobe.errors import ModelError, UsageError
from dynprobe.models import load_model, resolve, weights_hash


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_a_bfloat16_checkpoint_is_loaded_in_float32_and_recorded(llama_folder: Path) -> None:
    model, tokenizer, facts = load_model(resolve(llama_folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert (facts["original_dtype"], facts["dtype"], facts["device"]) == ("bfloat16", "float32", "cpu")
    stored = load_file(llama_folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, stored.float())
    digest = hashlib.sha256((llama_folder / "model.safetensors").read_bytes()).hexdigest()
    assert facts["weights_files"] == {"model.safetensors": digest}
    assert facts["weights_hash"] == weights_hash(llama_folder) == weights_hash(resolve(llama_folder))
    assert facts["n_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["tokenizer"]["adds_bos"] is False
    assert facts["tokenizer"]["eos_token_id"] == 2
    assert tokenizer("a b").input_ids == [3, 4]
    assert facts["model_class"] == "LlamaForCausalLM"
    json.dumps(facts)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("bf16", torch.bfloat16), (torch.float64, torch.float64), ("auto", torch.bfloat16), ("torch.float16", torch.half)],
)
def test_dtypes(llama_folder: Path, dtype: object, wanted: torch.dtype) -> None:
    model, _, facts = load_model(resolve(llama_folder), dtype=dtype, attn_implementation="eager")
    assert next(model.parameters()).dtype == wanted
    assert facts["attn_implementation"] == "eager"


def test_wrong_dtype_and_device(llama_folder: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'bfloat16'"):
        load_model(resolve(llama_folder), dtype="bfloat61")
    with pytest.raises(UsageError, match="is not a device"):
        load_model(resolve(llama_folder), device="gpu")
    with pytest.raises(UsageError, match="CUDA devices"):
        load_model(resolve(llama_folder), device="cuda:99")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(resolve(llama_folder), attn_implementation="no_such_attention")


def test_pickles_are_opened_only_when_asked_and_hold_the_same_numbers(bin_folder: Path) -> None:
    with pytest.raises(ModelError, match="--allow-bin"):
        load_model(bin_folder)
    model, tokenizer, facts = load_model(resolve(bin_folder, allow_bin=True))
    assert tokenizer is None
    assert facts["weights_format"] == "bin"
    assert any("weights_only=True" in note for note in facts["notes"])
    stored = torch.load(bin_folder / "pytorch_model.bin", weights_only=True)
    assert torch.equal(model.transformer.wte.weight, stored["transformer.wte.weight"])


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path(__file__).with_name("ran"),))  # type: ignore[return-value]


def test_a_pickle_with_code_is_not_run(bin_folder: Path, tmp_path: Path) -> None:
    folder = _copy(bin_folder, tmp_path / "evil")
    torch.save({"transformer.wte.weight": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_model(resolve(folder, allow_bin=True))
    assert not Path(__file__).with_name("ran").exists()


def test_weights_the_checkpoint_lacks_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = _copy(llama_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors | {"extra.weight": gone}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 are missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(folder)
    save_file(
        tensors | {"model.layers.1.mlp.up_proj.weight": gone, "extra.weight": gone.clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert any("extra.weight" in note for note in load_model(folder)[2]["notes"])


def test_a_changed_file_of_a_converted_folder_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = _copy(llama_folder, tmp_path / "m")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    record = {"id": "mine", "files": {"model.safetensors": digest}, "notes": ["made by hand"], "gguf_sha256": "f" * 64}
    (folder / "dynprobe-model.json").write_text(json.dumps(record))
    facts = load_model(folder)[2]
    assert (facts["model_id"], facts["gguf_sha256"]) == ("mine", "f" * 64)
    assert "made by hand" in facts["notes"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="not the file that was converted"):
        load_model(folder)


def test_remote_code(llama_folder: Path, tmp_path: Path) -> None:
    folder = _copy(llama_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(folder)
    config["auto_map"] = {"AutoModelForCausalLM": "other/repository--code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="code of another repository"):
        load_model(resolve(folder, trust_remote_code=True))
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(ModelError, match="Did you mean 'llama'"):
        load_model(folder)


def test_remote_code_of_a_folder_runs_when_asked_and_is_hashed(llama_folder: Path, tmp_path: Path) -> None:
    folder = _copy(llama_folder, tmp_path / "m")
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class HomeConfig(LlamaConfig):\n    model_type = 'homemade'\n"
        "class HomeModel(LlamaForCausalLM):\n    config_class = HomeConfig\n"
    )
    (folder / "home.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "architectures": ["HomeModel"]}
    config["auto_map"] = {"AutoConfig": "home.HomeConfig", "AutoModelForCausalLM": "home.HomeModel"}
    (folder / "config.json").write_text(json.dumps(config))
    model, _, facts = load_model(resolve(folder, trust_remote_code=True))
    assert type(model).__name__ == "HomeModel"
    assert facts["remote_code"] == {"home.py": hashlib.sha256(code.encode()).hexdigest()}


def test_a_tokenizer_that_cannot_be_loaded_leaves_a_note(llama_folder: Path, tmp_path: Path) -> None:
    folder = _copy(llama_folder, tmp_path / "m")
    (folder / "tokenizer.json").write_text("{")
    _, tokenizer, facts = load_model(folder)
    assert tokenizer is None
    assert facts["tokenizer"] is None
    assert any("tokenizer could not be loaded" in note for note in facts["notes"])


def test_a_model_without_a_language_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    model, _, facts = load_model(tmp_path / "bert")
    assert type(model).__name__ == facts["model_class"] == "BertModel"
