from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynprobe.errors import PromptError
from dynprobe.prompts import from_texts, read_prompts


def _write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_text_file(tmp_path: Path) -> None:
    prompts = read_prompts(_write(tmp_path / "p.txt", "\ufefffirst\r\n\n  second \nfirst"))
    assert [p.text for p in prompts] == ["first", "second", "first"]
    assert prompts[0].prompt_id == from_texts(["first"])[0].prompt_id
    assert prompts[2].prompt_id == prompts[0].prompt_id + "-2"
    assert {p.source for p in prompts} == {"p.txt"}


def test_a_misspelt_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"txet": "Hello"}\n')
    with pytest.raises(PromptError, match=r"line 1: no 'text'.*found 'txet'\. Is 'txet' meant to be 'text'\?$"):
        read_prompts(tmp_path / "p.jsonl")


def test_jsonl_file_keeps_the_text_exactly(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a\n  b\u2028 ", "id": 7, "category": "x"},
        {"text": "c", "prompt_id": "named", "token_ids": [1, 2]},
        {"text": "d", "more": None},
        {"text": "e", "continuation": " and so on", "answer": " f", "paraphrase": "g"},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    one, two, three, four = read_prompts(_write(tmp_path / "p.jsonl", text))
    assert (one.prompt_id, one.text, one.category) == ("7", "a\n  b\u2028 ", "x")
    assert (two.prompt_id, two.token_ids) == ("named", (1, 2))
    assert three.prompt_id.startswith("p-")
    assert three.continuation is None
    assert (four.answer, four.paraphrase, four.continuation) == (" f", "g", " and so on")


def test_parquet_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "id": ["i", None], "category": ["x", None], "other": [1, 2]}), path)
    one, two = read_prompts(path)
    assert (one.prompt_id, one.category, two.category) == ("i", "x", None)
    pq.write_table(pa.table({"txt": ["a"]}), path)
    with pytest.raises(PromptError, match=r"no column 'text'.*it has txt"):
        read_prompts(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(PromptError, match="no rows"):
        read_prompts(path)
    with pytest.raises(PromptError, match="Parquet"):
        read_prompts(_write(path, "not parquet"))


@pytest.mark.parametrize(("data", "texts"), [("a\nb\n", ["a", "b"]), ('{"text": "a"}\n{"text": "b"}', ["a", "b"])])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, data: str, texts: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data.encode())))
    assert [(p.text, p.source) for p in read_prompts("-")] == [(t, "stdin") for t in texts]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "", "it is empty"),
        ("p.txt", " \n\n", "it is empty"),
        ("p.txt", b"a\0b", "binary"),
        ("p.txt", "ab".encode("utf-16"), "UTF-16"),
        ("p.txt", b"fine\ncaf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": }', "line 3: not JSON .* at character 10"),
        ("p.jsonl", '"text"', "line 1: a JSON object was expected"),
        ("p.jsonl", '{"txt": "a"}', "line 1: no 'text'.*Is 'txt' meant to be 'text'"),
        ("p.jsonl", '{"text": ""}', "at least one character"),
        ("p.jsonl", '{"text": 3}', "at least one character"),
        ("p.jsonl", '{"text": "\\ud800"}', "lone surrogate"),
        ("p.jsonl", '{"text": "a", "id": [1]}', "an id must be"),
        ("p.jsonl", '{"text": "a", "category": 1}', "'category' must be a text"),
        ("p.jsonl", '{"text": "a", "token_ids": [1, -2]}', "'token_ids' must be"),
        ("p.jsonl", '{"text": "a", "continuation": ["b"]}', "'continuation' must be a text"),
        ("p.jsonl", '{"text": "a", "continuation": "\\ud800"}', "'continuation' holds half a character"),
        ("p.jsonl", '{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', "more than once: 'x'"),
        ("p.json", "[]", r"rename it to \.jsonl"),
        ("p.csv", "a", r"ending \.csv"),
    ],
)
def test_unclear_files_are_refused(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_prompts(_write(tmp_path / name, data))


def test_missing_files_suggest_a_neighbour(tmp_path: Path) -> None:
    _write(tmp_path / "prompts.txt", "a")
    with pytest.raises(PromptError, match=r"Did you mean 'prompts.txt'\?"):
        read_prompts(tmp_path / "promts.txt")
    with pytest.raises(PromptError, match="does not exist"):
        read_prompts(tmp_path / "no" / "prompts.txt")
    with pytest.raises(PromptError, match="is a folder"):
        read_prompts(tmp_path)
