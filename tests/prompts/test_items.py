from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dynprobe.errors import PromptError
from dynprobe.prompts import Item, load_items, normalise_answer

_GOOD = {"question": "Two and two make", "choices": [" four", " five"], "answer": 0}


def _write(folder: Path, *rows: Any, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_the_built_in_set_is_balanced() -> None:
    items = load_items()
    assert len(items) >= 200
    sizes = Counter(i.category for i in items)
    assert len(sizes) >= 6
    assert len(set(sizes.values())) == 1
    for category in sizes:
        places = Counter(i.answer for i in items if i.category == category)
        assert sorted(places) == [0, 1, 2, 3]
        assert max(places.values()) - min(places.values()) <= 1


def test_the_built_in_items_are_well_formed() -> None:
    items = load_items()
    assert len({i.item_id for i in items}) == len(items)
    for item in items:
        assert len(item.choices) == 4
        assert item.question == item.question.strip()
        assert all(c[0] == " " and c == " " + c.strip() for c in item.choices)
        assert item.question[-1] not in ".?!"
        words = [len(c.split()) for c in item.choices]
        assert max(words) - min(words) <= 1, item


def test_no_two_built_in_items_are_alike() -> None:
    items = load_items()
    questions = [normalise_answer(i.question) for i in items]
    assert len(set(questions)) == len(questions)
    pairs = Counter((frozenset(i.choices), i.choices[i.answer]) for i in items)
    assert max(pairs.values()) == 1
    for item in items:
        answer = normalise_answer(item.choices[item.answer])
        assert f" {answer} " not in f" {normalise_answer(item.question)} ", item


def test_no_answer_of_the_built_in_set_is_right_too_often() -> None:
    counts = Counter(i.choices[i.answer] for i in load_items())
    assert counts.most_common(1)[0][1] <= 6


def test_category_and_limit() -> None:
    some = load_items(limit=9)
    assert len({i.category for i in some}) == 8
    assert {i.category for i in load_items(category="animals")} == {"animals"}
    assert [i.category for i in load_items(category="time", limit=2)] == ["time", "time"]
    with pytest.raises(PromptError, match=r"no item of category 'animal'.*Did you mean 'animals'\?"):
        load_items(category="animal")
    with pytest.raises(PromptError, match="leaves no prompt"):
        load_items(limit=0)


@pytest.mark.parametrize(
    ("answer", "place"), [(0, 0), (1, 1), ("A", 0), ("B", 1), (" five", 1), ("four", 0), ("B ", 1)]
)
def test_the_answer_is_an_index_a_letter_or_a_text(tmp_path: Path, answer: object, place: int) -> None:
    assert load_items(_write(tmp_path, {**_GOOD, "answer": answer}))[0].answer == place


def test_letters_that_are_choices_themselves(tmp_path: Path) -> None:
    row = {"question": "After A comes", "choices": ["A", "B"], "answer": "B"}
    assert load_items(_write(tmp_path, row))[0].answer == 1
    with pytest.raises(PromptError, match=r"letter of choice 1 and the text of choice 0.*Give the index"):
        load_items(_write(tmp_path, {**row, "choices": ["B", "A"]}))


def test_the_space_before_a_choice(tmp_path: Path) -> None:
    rows = [
        {"question": "Two and two make", "choices": ["four", " five"], "answer": 0},
        {"question": "Two and two make \n", "choices": ["four", " five"], "answer": 0},
        {"question": "二加二等于", "choices": ["四", "五"], "answer": 0},
    ]
    path = _write(tmp_path, *rows)
    one, two, three = load_items(path)
    assert one.texts == ("Two and two make four", "Two and two make five")
    assert (two.question, two.choices) == ("Two and two make", (" \nfour", " \nfive"))
    assert three.texts[0] == "二加二等于 四"
    assert load_items(path, delimiter="")[2].texts[0] == "二加二等于四"


def test_ids_and_categories(tmp_path: Path) -> None:
    rows = [{**_GOOD, "id": 7, "category": "sums"}, _GOOD, _GOOD, {**_GOOD, "answer": 1, "question": "Five is"}]
    one, two, three, four = load_items(_write(tmp_path, *rows))
    assert one == Item("7", "Two and two make", (" four", " five"), 0, "sums")
    assert two.category is None
    assert three.item_id == two.item_id + "-2"
    assert load_items(_write(tmp_path, rows[3]))[0].item_id == four.item_id
    assert one.chance == 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not json", "line 2: not JSON"),
        ("[1]", "line 2: a JSON object was expected, found a list"),
        ({"choices": [" a", " b"], "answer": 0}, "line 2: no 'question'; found 'choices', 'answer'"),
        ({"query": "x", "choices": [" a", " b"], "answer": 0}, "line 2: no 'question'"),
        ({"question": "x", "choice": [" a", " b"], "answer": 0}, "no 'choices'.*Did you mean 'choice'"),
        ({"question": "x", "choices": [" a", " b"]}, "no 'answer'"),
        ({"question": "x", "choices": [" a", " b"], "answer": None}, "no 'answer'"),
        ({"question": " ", "choices": [" a", " b"], "answer": 0}, "'question' must be a text"),
        ({"question": 3, "choices": [" a", " b"], "answer": 0}, "'question' must be a text .*found 3"),
        ({"question": "x", "choices": " a", "answer": 0}, "'choices' must be a list"),
        ({"question": "x", "choices": [" a", " "], "answer": 0}, "'choices' must be a list of texts"),
        ({"question": "x", "choices": [1, 2], "answer": 0}, "'choices' must be a list of texts"),
        ({"question": "x", "choices": [], "answer": 0}, "has 0 of at least two"),
        ({"question": "x", "choices": [" a"], "answer": 0}, "has 1 of at least two"),
        ({"question": "x", "choices": [" a", "a "], "answer": 0}, "the choice 'a' occurs twice"),
        ({"question": "x", "choices": [" a", " b"], "answer": 2}, "'answer' is 2, but the 2 choices .* from 0 to 1"),
        ({"question": "x", "choices": [" a", " b"], "answer": -1}, "'answer' is -1"),
        ({"question": "x", "choices": [" a", " b"], "answer": True}, "an index, a letter or the text"),
        ({"question": "x", "choices": [" a", " b"], "answer": 0.0}, "an index, a letter or the text"),
        ({"question": "x", "choices": [" a", " b"], "answer": "C"}, "no letter from A to B"),
        ({"question": "x", "choices": [" a", " b"], "answer": "1"}, "Without quotation marks 1 would be an index"),
        ({"question": "x", "choices": [" apple", " b"], "answer": "appel"}, "Did you mean 'apple'"),
        ({**_GOOD, "category": 1}, "'category' must be a text"),
        ({**_GOOD, "id": ""}, "an id must be"),
        ({**_GOOD, "id": "x"}, "line 2: the id 'x' stands on line 1 already"),
        ({**_GOOD, "question": "\ud800"}, "lone surrogate"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_items(_write(tmp_path, {**_GOOD, "id": "x"}, row))


def test_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no items in it: it is empty"):
        load_items(_write(tmp_path, "\n \n"))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(_GOOD).encode() + b"\ncaf\xe9")
    with pytest.raises(PromptError, match="line 2: byte 0xe9 is not UTF-8"):
        load_items(tmp_path / "latin.jsonl")
    with pytest.raises(PromptError, match=r"ending \.json;"):
        load_items(_write(tmp_path, _GOOD, name="mine.json"))
    with pytest.raises(PromptError, match=r"Did you mean 'mine.jsonl'\?"):
        load_items(tmp_path / "mime.jsonl")
    with pytest.raises(PromptError, match=r"Did you mean 'cloze'\?"):
        load_items("clozes")
    with pytest.raises(PromptError, match="is a folder"):
        load_items(tmp_path)
