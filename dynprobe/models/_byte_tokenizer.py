"""A tokenizer without a vocabulary to learn: its tokens are the 256 bytes and three special ones (259 ids).

The models of the zoo read bytes, so that no tokenizer stands between two architectures that are compared, nats per
token are nats per byte, and every text can be written. ``<pad>`` is 0, ``<bos>`` 1, ``<eos>`` 2; nothing is added to a
text.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SPECIAL_TOKENS", "byte_tokenizer"]

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def byte_tokenizer() -> Any:
    """Return a fast tokenizer whose tokens are the 256 bytes and three special tokens (259 ids).

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> len(tokenizer), tokenizer.decode(tokenizer("In the beginning").input_ids)
        (259, 'In the beginning')
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
