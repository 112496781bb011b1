r"""GGUF files as ordinary float32 folders, converted once.

A GGUF file stores weights in blocks of a few bits with a scale each (Q4_1: 32 weights as 4-bit integers with one scale
and one minimum, :math:`w = d\,q + m`). dynprobe measures hidden states in float32, so the blocks are expanded once,
written as safetensors with the tokenizer beside them, and found again by the hash of the file. The result is a model of
its own: not the weights before quantisation, and recorded under its own id.

The conversion is transformers'. What it produced is then read back and compared with the ``gguf`` package's expansion
of the file, tensor by tensor, including the one place where conversions go wrong silently: the rows of the query and
key projections stand in another order in GGUF files of Llama models (rotary pairs interleaved, not in halves), and a
model loaded in the wrong order still speaks, badly.
"""

from __future__ import annotations

import importlib.util
import io
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynprobe.errors import ModelError
from dynprobe.models._cache import Progress, cache_root, locked, new_folder, report
from dynprobe.models._hash import combine_file_hashes, file_sha256

__all__ = ["RECORD_NAME", "check_against_gguf", "convert", "converted_folder", "quiet_transformers", "read_record"]

RECORD_NAME = "dynprobe-model.json"
RECORD_SCHEMA = 1

# Byte-level vocabularies that llama.cpp splits at every single digit before the GPT-2 rule; transformers leaves that
# step out, which moves token boundaries where spaces stand before digits.
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def converted_folder(gguf: Path, *, progress: Progress | None = None) -> Path:
    """Return the float32 folder of a GGUF file, converting it if its hash has not been seen before.

    Args:
        gguf: the file.
        progress: called with one line of text per step.

    Returns:
        A folder in the user's cache, named by the first 16 digits of the file's sha256.

    Raises:
        ModelError: a needed package is missing, the architecture is not known, or the check of the result failed.
    """
    report(progress, f"hashing {gguf.name}")
    digest = file_sha256(gguf)
    target = cache_root() / "models" / f"gguf-{digest[:16]}"
    if (target / RECORD_NAME).is_file():
        return target
    with locked(target, progress):
        if not (target / RECORD_NAME).is_file():
            with new_folder(target) as folder:
                convert(
                    gguf,
                    folder,
                    weights_id=gguf.stem,
                    source={"file": gguf.name},
                    gguf_sha256=digest,
                    progress=progress,
                )
    return target


def convert(
    gguf: Path,
    folder: Path,
    *,
    weights_id: str,
    source: dict[str, Any],
    gguf_sha256: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``gguf`` as ``config.json``, ``model.safetensors``, tokenizer and record into ``folder``.

    Args:
        gguf: the file.
        folder: an empty folder.
        weights_id: the model id to record.
        source: where the file came from, for the record.
        gguf_sha256: hash of the file.
        progress: called with one line of text per step.

    Returns:
        The record, as written to ``dynprobe-model.json``.

    Raises:
        ModelError: a needed package is missing, the architecture is not known, or the check of the result failed.
    """
    require_packages()
    import torch

    report(progress, f"expanding {gguf.name} to float32 (once; about half a minute)")
    notes = []
    # One bar of the GGUF reader ignores transformers' switch and writes to whatever stderr is.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        extra = _dequantize_config(gguf.name)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, **extra
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        except Exception as exc:
            first = str(exc).strip().split("\n")[0]
            raise ModelError(
                f"{gguf} could not be converted by transformers {version('transformers')} ({type(exc).__name__}: "
                f"{first}). Type the original model's hub id or folder instead."
            ) from exc
        notes += _repair_tokenizer(tokenizer, gguf)
        limit = getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int):
            tokenizer.model_max_length = limit
        # The weights are plain float32 now; the marks of quantisation left on the model only forbid saving it.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder, max_shard_size="1000GB")
        tokenizer.save_pretrained(folder)
    n_parameters = sum(p.numel() for p in model.parameters())
    del model
    for path in folder.iterdir():
        path.chmod(0o644)
    report(progress, "comparing the result with the file")
    checks = check_against_gguf(folder, gguf)
    files = {"model.safetensors": file_sha256(folder / "model.safetensors", remember=False)}
    record = {
        "id": weights_id,
        "schema": RECORD_SCHEMA,
        "source": source,
        "gguf_sha256": gguf_sha256,
        "files": files,
        "weights_hash": combine_file_hashes(files),
        "dtype": "float32",
        "n_parameters": n_parameters,
        "checks": checks,
        "notes": notes,
        "versions": {name: version(name) for name in ("transformers", "gguf", "torch", "safetensors", "tokenizers")}
        | {"python": platform.python_version()},
    }
    write_record(folder, record)
    return record


def check_against_gguf(folder: Path, gguf: Path) -> dict[str, Any]:
    """Compare a converted folder with the ``gguf`` package's own reading of the file.

    Every tensor of the folder must be finite. For Llama- and Qwen2-shaped files the embedding, the norms and all
    projections of the first, the middle and the last block must be equal bit for bit, the query and key rows of Llama
    files after undoing the rotary interleaving ``[head, pair, 2] -> [head, 2, pair]``.

    Returns:
        What was checked: number of tensors, number compared, quantisation types.

    Raises:
        ModelError: a tensor is not finite, missing, or differs.
    """
    import gguf as gguf_package
    import torch
    from safetensors import safe_open

    reader = gguf_package.GGUFReader(str(gguf))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    architecture = str(reader.fields["general.architecture"].contents())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    compared = 0
    with safe_open(folder / "model.safetensors", framework="pt") as result:
        names = list(result.keys())
        for name in names:
            if not bool(torch.isfinite(result.get_tensor(name)).all()):
                raise ModelError(f"{gguf} converts to weights that are not finite ({name}); the file is damaged.")
        if architecture in {"llama", "qwen2"}:
            for ours, theirs, heads in _pairs(config, interleaved=architecture == "llama"):
                if theirs not in stored:
                    continue
                tensor = stored[theirs]
                expected = torch.from_numpy(gguf_package.quants.dequantize(tensor.data, tensor.tensor_type).copy())
                if heads:
                    rows, columns = expected.shape
                    expected = expected.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2)
                    expected = expected.reshape(rows, columns)
                if ours not in names or not torch.equal(result.get_tensor(ours), expected):
                    raise ModelError(
                        f"{gguf} was converted wrongly: {ours} does not equal {theirs} as the gguf package expands it. "
                        f"transformers {version('transformers')} and gguf {version('gguf')} disagree; install the "
                        "versions in constraints.txt."
                    )
                compared += 1
    if not compared:
        return {
            "n_tensors": len(names),
            "n_compared": 0,
            "types": kinds,
            "not_compared": f"architecture {architecture}",
        }
    return {"n_tensors": len(names), "n_compared": compared, "types": kinds}


def require_packages() -> None:
    """Refuse early if a package needed for reading GGUF files is not installed."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"Reading a GGUF file needs the package {' and '.join(missing)}, which is not installed. "
            "Type: pip install 'dynprobe[gguf]' accelerate"
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a converted folder, or None where there is none or it is damaged."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a converted folder."""
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' progress bars inside the block: dynprobe reports progress itself."""
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _dequantize_config(gguf_file: str) -> dict[str, Any]:
    # Newer releases can keep the blocks packed and compute in them; hidden states are wanted in float32 throughout.
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=gguf_file, dequantize=True)}


def _pairs(config: dict[str, Any], *, interleaved: bool) -> Iterator[tuple[str, str, int]]:
    """(name in the folder, name in the file, heads whose rotary rows are interleaved or 0) of what is compared."""
    layers = int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"]) if interleaved else 0
    kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"]) if interleaved else 0
    yield "model.embed_tokens.weight", "token_embd.weight", 0
    yield "model.norm.weight", "output_norm.weight", 0
    yield "lm_head.weight", "output.weight", 0
    for layer in sorted({0, layers // 2, layers - 1}):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        yield f"{ours}.self_attn.q_proj.weight", f"{theirs}.attn_q.weight", heads
        yield f"{ours}.self_attn.k_proj.weight", f"{theirs}.attn_k.weight", kv_heads
        yield f"{ours}.self_attn.v_proj.weight", f"{theirs}.attn_v.weight", 0
        yield f"{ours}.self_attn.o_proj.weight", f"{theirs}.attn_output.weight", 0
        yield f"{ours}.mlp.gate_proj.weight", f"{theirs}.ffn_gate.weight", 0
        yield f"{ours}.mlp.up_proj.weight", f"{theirs}.ffn_up.weight", 0
        yield f"{ours}.mlp.down_proj.weight", f"{theirs}.ffn_down.weight", 0
        yield f"{ours}.input_layernorm.weight", f"{theirs}.attn_norm.weight", 0
        yield f"{ours}.post_attention_layernorm.weight", f"{theirs}.ffn_norm.weight", 0


def _repair_tokenizer(tokenizer: Any, gguf: Path) -> list[str]:
    """Split digits one by one where the vocabulary was made that way; returns what was done."""
    import gguf as gguf_package
    from tokenizers import pre_tokenizers

    fields = gguf_package.GGUFReader(str(gguf)).fields
    rule = fields.get("tokenizer.ggml.pre")
    if rule is None or str(rule.contents()) not in _DIGITS_ALONE:
        return []
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return [f"pre-tokenizer {rule.contents()!r}: digits are split one by one, as the vocabulary was trained"]
