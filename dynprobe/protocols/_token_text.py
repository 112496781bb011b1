r"""The text of single tokens, so that a picture over tokens needs no tokenizer.

Each token is decoded by itself, each distinct id once. Three things go wrong with that, and are put right here: a
token that is part of a character has no text of its own, so its bytes are written as ``\xNN``; a SentencePiece
tokenizer drops the space in front of a word that stands alone; and a token that decodes to nothing is shown by its
name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.prompts import Prompt

__all__ = ["TokenTexts", "prompts_table"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: What SentencePiece writes for a space.
_SPACE = "\u2581"
_REPLACEMENT = "\ufffd"


class TokenTexts:
    r"""Token id → text, remembered.

    Args:
        tokenizer: A tokenizer of transformers, or None: then no token has a text.

    Example:
        >>> from dynprobe.models import byte_tokenizer
        >>> texts = TokenTexts(byte_tokenizer())
        >>> texts.of(byte_tokenizer()("a\nü").input_ids)
        ['a', '\n', '\\xc3', '\\xbc']
        >>> TokenTexts(None).of([1])
        [None]
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._made: dict[int, str | None] = {}

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def of(self, ids: Iterable[int]) -> list[str | None]:
        """Return the text of every id; None where there is no tokenizer, or the id is none of its own."""
        return [self._one(int(i)) for i in ids]

    def into(self, tokens: pd.DataFrame) -> pd.DataFrame:
        """Return the tokens table with the column ``token_text``."""
        distinct, place = np.unique(tokens["token_id"].to_numpy(), return_inverse=True)
        texts = np.array(self.of(distinct), dtype=object)
        return tokens.assign(token_text=texts[place] if len(texts) else None)

    def _one(self, token: int) -> str | None:
        if token not in self._made:
            try:
                self._made[token] = None if self._tokenizer is None or token < 0 else _text(self._tokenizer, token)
            except (LookupError, OverflowError, TypeError, ValueError):
                self._made[token] = None  # some tokenizers answer so where a padded vocabulary is larger than theirs
        return self._made[token]


def prompts_table(prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], texts: TokenTexts) -> pd.DataFrame:
    """Return the prompts table of a run.

    Args:
        prompts: The prompts.
        rows: Their token ids.
        texts: The text of each token; a model without a tokenizer has no column of them.
    """
    columns: dict[str, Any] = {
        "prompt_id": [p.prompt_id for p in prompts], "text": [p.text for p in prompts],
        "token_ids": [list(r) for r in rows], "category": [p.category for p in prompts],
        "source": [p.source for p in prompts],
    }  # fmt: skip
    if texts.known:
        columns["token_texts"] = [[text or "" for text in texts.of(row)] for row in rows]
    return pd.DataFrame(columns)


def _text(tokenizer: Any, token: int) -> str | None:
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    named = getattr(tokenizer, "convert_ids_to_tokens", None)
    name = named(token) if named is not None else None
    if isinstance(name, bytes):  # tokenizers whose vocabulary is bytes
        return name.decode("utf-8", "backslashreplace")
    if not isinstance(name, str):
        return text or None
    if _REPLACEMENT in text:
        raw = _bytes_of(name)
        return text if raw is None else raw.decode("utf-8", "backslashreplace")
    if name.startswith(_SPACE) and not text.startswith(" "):
        return f" {text}"
    return text or name


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token by its name in the vocabulary, or None where the name does not tell them."""
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    try:
        return bytes(_alphabet()[sign] for sign in name)
    except KeyError:
        return None


@cache
def _alphabet() -> dict[str, int]:
    """Sign → byte of byte-level BPE: printable Latin-1 stands for itself, the others follow from U+0100 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
