from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from dynprobe.errors import PromptError
from dynprobe.prompts import exact_match, load_stories, normalise_answer, passages

# SmolLM2 takes 1.14 to 1.26 tokens for a word of these texts (the slow test counts the tokens themselves).
_WORDS = {"short": (86, 112), "long": (360, 455)}


def _words(text: str) -> list[str]:
    return normalise_answer(text).split()


def test_both_lengths_hold_the_same_stories() -> None:
    short, long = load_stories("short"), load_stories("long")
    assert len(short) >= 60
    assert [(s.story_id, s.category, s.questions) for s in short] == [
        (s.story_id, s.category, s.questions) for s in long
    ]
    assert len({s.story_id for s in short}) == len(short)
    assert len(set(Counter(s.category for s in short).values())) == 1


@pytest.mark.parametrize("length", ["short", "long"])
def test_stories_are_well_formed(length: str) -> None:
    low, high = _WORDS[length]
    for story in load_stories(length):  # type: ignore[arg-type]
        assert low <= len(story.text.split()) <= high, story.story_id
        assert "\n" not in story.text
        assert "  " not in story.text
        assert len(story.questions) == 2
        for question in story.questions:
            assert question.question.endswith("?")
            assert question.lead == question.lead.strip()
            assert 1 <= len(_words(question.answers[0])) <= 3
            assert exact_match(question.answers[0], question.answers)


@pytest.mark.parametrize("length", ["short", "long"])
def test_answers_are_found_in_the_story_and_not_in_the_question(length: str) -> None:
    for story in load_stories(length):  # type: ignore[arg-type]
        for question in story.questions:
            answer = f" {normalise_answer(question.answers[0])} "
            assert answer in f" {normalise_answer(story.text)} ", (story.story_id, question)
            assert answer not in f" {normalise_answer(question.question + ' ' + question.lead)} ", story.story_id


def test_no_two_stories_share_sentences() -> None:
    """No nine words in a row occur in two stories."""
    owner: dict[tuple[str, ...], str] = {}
    for story in load_stories("short") + load_stories("long"):
        words = _words(story.text)
        for run in zip(*(words[i:] for i in range(9)), strict=False):
            assert owner.setdefault(run, story.story_id) == story.story_id, run


def test_no_story_repeats_itself() -> None:
    for story in load_stories("long"):
        sentences = [normalise_answer(s) for s in re.split(r"[.!?][\"]? ", story.text)]
        long = [s for s in sentences if len(s.split()) >= 5]
        assert len(set(long)) == len(long), story.story_id


def test_answers_are_not_always_the_same() -> None:
    answers = Counter(normalise_answer(q.answers[0]) for s in load_stories() for q in s.questions)
    assert answers.most_common(1)[0][1] <= 3


def test_prompts_end_with_the_lead() -> None:
    story = load_stories("long", limit=1)[0]
    for prompt, question in zip(story.prompts, story.questions, strict=True):
        assert prompt == f"{story.text}\n\nQuestion: {question.question}\nAnswer: {question.lead}"
        assert question.prompt(story.text, lead=False) == f"{story.text}\n\nQuestion: {question.question}\nAnswer:"


def test_a_small_limit_covers_the_categories() -> None:
    assert len({s.category for s in load_stories(limit=6)}) == 6


def test_an_unknown_length_is_refused() -> None:
    with pytest.raises(PromptError, match=r"no stories of length 'shrot'.*Did you mean 'short'\?"):
        load_stories("shrot")  # type: ignore[arg-type]


def test_passages_are_beginnings_of_long_stories() -> None:
    prompts = passages()
    texts = {s.story_id: s.text for s in load_stories("long")}
    assert len(prompts) == 48
    assert len({p.prompt_id for p in prompts}) == 48
    assert set(Counter(p.category for p in prompts).values()) == {8}
    for prompt in prompts:
        assert prompt.continuation is not None
        story = texts[prompt.prompt_id.removeprefix("passage-")]
        assert story.startswith(prompt.text + prompt.continuation)
        assert prompt.continuation[0] == " "
        assert re.search(r"[.!?][\"]?$", prompt.text)
        assert re.search(r"[.!?][\"]?$", prompt.continuation)
        assert 26 <= len(prompt.text.split()) <= 56, prompt.prompt_id
        assert 90 <= len(prompt.continuation.split()) <= 130, prompt.prompt_id


def test_passages_of_a_limit_are_among_them_all() -> None:
    some = passages(limit=6)
    assert len({p.category for p in some}) == 6
    assert set(some) <= set(passages())
    with pytest.raises(PromptError, match="leaves no prompt"):
        passages(limit=0)


def test_no_two_leads_and_answers_are_the_same() -> None:
    asked = [(q.question, q.answers[0]) for s in load_stories() for q in s.questions]
    for one, other in itertools.combinations(asked, 2):
        assert one != other
