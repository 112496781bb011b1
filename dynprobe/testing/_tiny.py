"""Tiny decoders with random weights and a tokenizer made of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynprobe.models import byte_tokenizer
from dynprobe.probes import Subject, discover

__all__ = ["byte_tokenizer", "save_tiny_model", "tiny_gpt2", "tiny_llama"]


def _build(kind: str, layers: int, dim: int, vocab: int, seed: int) -> Any:
    import transformers

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "gpt2":
            config: Any = transformers.GPT2Config(
                n_layer=layers, n_embd=dim, n_head=4, vocab_size=vocab, n_positions=512, **ids
            )
            return transformers.GPT2LMHeadModel(config)
        config = transformers.LlamaConfig(
            num_hidden_layers=layers, hidden_size=dim, intermediate_size=2 * dim, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=512, initializer_range=0.2, **ids,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def tiny_llama(layers: int = 3, dim: int = 32, vocab: int = 96, seed: int = 0) -> Subject:
    """Return a random Llama of a few thousand parameters as a subject without tokenizer.

    Example:
        >>> tiny_llama().n_layers
        3
    """
    return discover(_build("llama", layers, dim, vocab, seed), name="tiny-random-llama")


def tiny_gpt2(layers: int = 3, dim: int = 32, vocab: int = 96, seed: int = 0) -> Subject:
    """Return a random GPT-2 (learned positions, so padding mistakes show) as a subject without tokenizer."""
    return discover(_build("gpt2", layers, dim, vocab, seed), name="tiny-random-gpt2")


def save_tiny_model(folder: str | Path, kind: str = "llama", *, layers: int = 3, dim: int = 32, seed: int = 0) -> Path:
    """Write a tiny random model with a byte tokenizer as a transformers folder.

    Args:
        folder: Where to write; created.
        kind: ``"llama"`` or ``"gpt2"``.
        layers: Number of blocks.
        dim: Width.
        seed: Seed of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    tokenizer = byte_tokenizer()
    _build(kind, layers, dim, len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
