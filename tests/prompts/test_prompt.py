from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import PromptError
from dynprobe.prompts import Prompt, content_hash, from_texts, load_prompts

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda t: t.strip())


@given(st.lists(_TEXT, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_automatic_ids_are_unique_and_belong_to_the_text(texts: list[str]) -> None:
    prompts = from_texts(texts)
    assert len({p.prompt_id for p in prompts}) == len(texts)
    assert [p.text for p in prompts] == texts
    distinct = list(dict.fromkeys(texts))
    forward = {p.text: p.prompt_id for p in from_texts(distinct)}
    assert forward == {p.text: p.prompt_id for p in from_texts(distinct[::-1])}


def test_an_automatic_id_avoids_a_given_one() -> None:
    automatic = from_texts(["a"])[0].prompt_id
    prompts = from_texts(["b", "a"], ids=[automatic, None])
    assert [p.prompt_id for p in prompts] == [automatic, f"{automatic}-2"]


def test_repeated_given_ids_are_named() -> None:
    with pytest.raises(PromptError, match="'x'"):
        from_texts(["a", "b"], ids=["x", "x"])


@pytest.mark.parametrize("texts", ["one string", [], ["ok", "  "], ["ok", 3], ["\ud800"]])
def test_what_is_no_list_of_texts_is_refused(texts: object) -> None:
    with pytest.raises(PromptError):
        from_texts(texts)  # type: ignore[arg-type]


def test_lengths_must_agree() -> None:
    with pytest.raises(PromptError, match="2 texts were given with 1 categories"):
        from_texts(["a", "b"], categories=["x"])


def test_content_hash_does_not_confuse_neighbouring_fields() -> None:
    assert content_hash([Prompt("ab", "c")]) != content_hash([Prompt("a", "bc")])
    assert content_hash([Prompt("a", "b", None)]) != content_hash([Prompt("a", "b", "")])
    assert content_hash([Prompt("a", "b", token_ids=(1, 2))]) != content_hash([Prompt("a", "b", token_ids=(12,))])
    assert content_hash([Prompt("a", "b", source="x")]) == content_hash([Prompt("a", "b", source="y")])


def test_content_hash_knows_the_continuation() -> None:
    hashes = [
        content_hash([Prompt("a", "b")]),
        content_hash([Prompt("a", "b", continuation="c")]),
        content_hash([Prompt("a", "b", paraphrase="c")]),
        content_hash([Prompt("a", "b", answer="c")]),
        content_hash([Prompt("a", "b", paraphrase="c", continuation="d")]),
        content_hash([Prompt("a", "b", answer="c", continuation="d")]),
    ]
    assert len(set(hashes)) == len(hashes)


def test_hashes_of_old_runs_still_hold() -> None:
    """A run finds its prompts by this hash, so adding a field to a prompt must not change those without it."""
    assert content_hash(load_prompts()) == "2f790c2322487c1da380cd230f0e5241"
    full = Prompt("a", "b", "c", token_ids=(1, 2), answer="d", paraphrase="e")
    assert content_hash([full]) == "a344afd5cc7d3a79fd67e9a7b223761b"
