from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.errors import PromptError
from dynprobe.prompts import exact_match, normalise_answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red  Boat.", "red boat"),
        ("  a carrot!", "carrot"),
        ("An apple", "apple"),
        ("forget-me-nots", "forget me nots"),
        ("forget‑me‑nots", "forget me nots"),
        ("Mr. Ahlgren's", "mr ahlgrens"),
        ("Ahlgren’s", "ahlgrens"),
        ("1,000.50", "100050"),
        ("at 9, or 10", "at 9 or 10"),
        ("CAFÉ", "café"),
        ("Straße", "strasse"),
        ("the", ""),
        ("anthem theory", "anthem theory"),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@given(st.text(max_size=20))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        (" Pepper.", True),
        ("pepper", True),
        ("\n\n The Pepper, which", True),
        (" Peppers", False),
        (" Pepperoni", False),
        (" named Pepper", False),
        ("\nBruno\nPepper", False),
        ("", False),
        ("  \n", False),
        ("donkey Pepper", False),
        ("GREY-DONKEY", True),
    ],
)
def test_the_answer_stands_at_the_beginning_of_the_first_line(generated: str, right: bool) -> None:
    assert exact_match(generated, ["Pepper", "the grey donkey"]) is right


@pytest.mark.parametrize("answers", [[], [""], ["ok", "the"], "..."])
def test_an_empty_answer_would_match_everything(answers: list[str]) -> None:
    with pytest.raises(PromptError, match="at least one word"):
        exact_match("anything", answers)
