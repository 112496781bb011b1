"""The text of single tokens: bytes, spaces, what has none; each distinct id decoded once; and the column of a run."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from dynprobe.models import byte_tokenizer
from dynprobe.protocols._token_text import TokenTexts, _alphabet


class Pieces:
    """A tokenizer of pieces that decodes as SentencePiece does: the space before a first word is lost."""

    def __init__(self, *pieces):
        self.pieces, self.asked = pieces, []

    def decode(self, ids, **_):
        self.asked += ids
        name = self.pieces[ids[0]] if ids[0] < len(self.pieces) else ""
        return "\ufffd" if name.startswith("<0x") else name.replace("\u2581", " ").removeprefix(" ")

    def convert_ids_to_tokens(self, token):
        return self.pieces[token] if token < len(self.pieces) else None


def test_a_byte_that_is_part_of_a_character_is_escaped_and_a_whole_one_is_not():
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    given = "a é\n\t\x00~"
    ids = tokenizer(given).input_ids
    assert texts.of(ids) == ["a", " ", "\\xc3", "\\xa9", "\n", "\t", "\x00", "~"]
    raw = b"".join(bytes([int(t[2:], 16)]) if t.startswith("\\x") else t.encode() for t in texts.of(ids))
    assert raw.decode() == given


def test_the_alphabet_is_that_of_byte_level_tokenizers():
    from tokenizers import pre_tokenizers

    assert set(_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_alphabet().values()) == list(range(256))
    before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):  # a character of one byte is its own byte
        [(name, _)] = before.pre_tokenize_str(chr(byte))
        assert _alphabet()[name] == byte
    for sign in "éÿ本🤖":
        [(name, _)] = before.pre_tokenize_str(sign)
        assert bytes(_alphabet()[c] for c in name) == sign.encode()


def test_spaces_bytes_and_unknown_ids_of_a_tokenizer_of_pieces():
    tokenizer = Pieces("\u2581the", "the", "\u2581", "<0xE2>", "\ufffd", "<s>")
    assert TokenTexts(tokenizer).of([0, 1, 2, 3, 4, 5]) == [" the", "the", " ", "\\xe2", "\ufffd", "<s>"]
    assert TokenTexts(tokenizer).of([99, -1]) == [None, None]


def test_every_id_is_decoded_once_and_without_tokenizer_none_is():
    tokenizer = Pieces("a", "b")
    texts = TokenTexts(tokenizer)
    table = pd.DataFrame({"token_id": np.array([1, 0, 1, -1, 1], np.int32)})
    found = texts.into(table)["token_text"]
    assert found.isna().tolist() == [False, False, False, True, False]
    assert found.dropna().tolist() == ["b", "a", "b", "b"]
    texts.into(table)
    assert sorted(tokenizer.asked) == [0, 1]
    assert "token_text" not in table
    assert TokenTexts(None).into(table)["token_text"].isna().all()
    assert TokenTexts(tokenizer).into(table.iloc[:0])["token_text"].tolist() == []


def test_an_id_beyond_a_strict_tokenizer_has_no_text_and_stops_nothing():
    strict = SimpleNamespace(decode=lambda ids, **_: ["a", "b"][ids[0]])
    assert TokenTexts(strict).of([1, 5]) == ["b", None]


def test_a_tokenizer_that_can_only_decode_is_enough():
    only = SimpleNamespace(decode=lambda ids, **_: {7: "x", 8: ""}[ids[0]])
    assert TokenTexts(only).of([7, 8]) == ["x", None]


def test_a_run_stores_the_text_of_every_token(full_run, llama):
    tokens = full_run.tokens
    assert full_run.manifest.schema_version == "1.1"
    assert isinstance(tokens["token_text"].dtype, pd.CategoricalDtype)
    assert (tokens["phase"] == "decode").any()
    expected = [llama.tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in tokens["token_id"]]
    whole = [(a, b) for a, b in zip(tokens["token_text"], expected, strict=True) if "\ufffd" not in b]
    assert len(whole) > len(tokens) // 2
    assert all(a == b for a, b in whole)
    assert tokens["token_text"].notna().all()
