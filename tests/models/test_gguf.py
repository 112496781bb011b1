from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dynprobe.errors import ModelError
from dynprobe.models import _gguf as gguf_module
from dynprobe.models import load_model, resolve

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

_BLOCK = 32


def _interleave(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order a Llama GGUF file has them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).numpy()


def _byte_alphabet() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=_BLOCK,
        intermediate_size=2 * _BLOCK,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny_gguf(original: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file in float32, with a byte-level vocabulary that splits digits."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_BLOCK)
    writer.add_block_count(3)
    writer.add_feed_forward_length(2 * _BLOCK)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", *_byte_alphabet(), "ĠĠ", "12", "ab"])
    writer.add_token_types([3] + [1] * 259)
    writer.add_token_merges(["Ġ Ġ", "1 2", "a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    state = {name: tensor.detach() for name, tensor in original.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    names = {
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(3):
        for ours, theirs in names.items():
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", state[f"model.layers.{layer}.{ours}.weight"].numpy())
        for letter, heads in (("q", 4), ("k", 2)):
            weight = state[f"model.layers.{layer}.self_attn.{letter}_proj.weight"]
            writer.add_tensor(f"blk.{layer}.attn_{letter}.weight", _interleave(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(
    tiny_gguf: Path, original: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    source = resolve(tiny_gguf)
    assert (source.kind, source.gguf_file, source.weights_id) == ("gguf", "tiny.gguf", "tiny")
    model, tokenizer, facts = load_model(source, progress=lines.append)
    ids = torch.randint(0, 260, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert facts["weights_files"].keys() == {"model.safetensors"}
    assert facts["model_id"] == "tiny"
    record = json.loads((Path(facts["folder"]) / "dynprobe-model.json").read_text())
    assert record["checks"]["n_compared"] == 2 + 3 * 9
    assert facts["gguf_sha256"] == record["gguf_sha256"]
    assert tokenizer.model_max_length == 64
    assert any("expanding" in line for line in lines)
    assert "Converting" not in capfd.readouterr().err
    # The second time nothing is converted.
    monkeypatch.setattr(gguf_module, "convert", None)
    assert load_model(source)[2]["weights_hash"] == facts["weights_hash"]


def test_digits_are_split_one_by_one(tiny_gguf: Path) -> None:
    _, tokenizer, facts = load_model(tiny_gguf)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab  12").input_ids)
    # Without the rule the two spaces would be parted and "12" would be one token.
    assert tokens == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("ab  12\n").input_ids) == "ab  12\n"
    assert facts["tokenizer"]["adds_bos"] is False
    assert any("digits" in note for note in facts["notes"])


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_proj.weight", "model.embed_tokens.weight"])
def test_the_check_sees_a_wrong_tensor(tiny_gguf: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(load_model(tiny_gguf)[2]["folder"])
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    good = tensors[name]
    tensors[name] = good.flip(0).contiguous()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError, match="converted wrongly"):
        gguf_module.check_against_gguf(copy, tiny_gguf)
    tensors[name] = good.index_fill(0, torch.tensor([0]), float("nan"))
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        gguf_module.check_against_gguf(copy, tiny_gguf)


def test_a_failed_conversion_leaves_nothing(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr(gguf_module, "check_against_gguf", fail)
    with pytest.raises(ModelError, match=r"^no$"):
        load_model(tiny_gguf)
    left = [p.name for p in (Path(os.environ["DYNPROBE_CACHE"]) / "models").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(str(path), "no-such-architecture")
    writer.add_tensor("x", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="could not be converted by transformers"):
        load_model(path)


def test_a_missing_package_is_named(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    with pytest.raises(ModelError, match=r"pip install 'dynprobe\[gguf\]'"):
        load_model(tiny_gguf)
