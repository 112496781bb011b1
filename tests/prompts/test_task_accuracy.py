"""What SmolLM2-135M makes of the built-in tasks when nothing disturbs it: the figures of docs/tasks.md."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch

import dynprobe as dp
from dynprobe.errors import ModelNotFoundError, OfflineError
from dynprobe.models import fetch
from dynprobe.prompts import Item, Story, exact_match, load_items, load_stories, passages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject() -> Any:
    try:
        fetch("smollm2-135m")
    except (ModelNotFoundError, OfflineError) as error:
        pytest.skip(f"the weights are not in the cache and cannot be had: {error}")
    return dp.load("smollm2-135m", device="cpu")


def _scores(subject: Any, begin: list[int], ends: list[list[int]]) -> torch.Tensor:
    """Return the summed log-probability of each end after the beginning, ``[ends]``, in nats."""
    longest = max(map(len, ends))
    ids = torch.tensor([begin + end + [0] * (longest - len(end)) for end in ends])
    with torch.inference_mode():
        logits = subject.model(input_ids=ids).logits[:, len(begin) - 1 : -1]  # causal: padding after a row is harmless
    rows = zip(logits.double().log_softmax(-1), ends, strict=True)
    return torch.stack([row[range(len(end)), end].sum() for row, end in rows])


def _choices(subject: Any, item: Item) -> tuple[list[int], list[list[int]]]:
    question = subject.tokenizer(item.question).input_ids
    wholes = [subject.tokenizer(text).input_ids for text in item.texts]
    assert all(whole[: len(question)] == question for whole in wholes), item
    return question, [whole[len(question) :] for whole in wholes]


def test_cloze_items_are_easy_with_their_question_and_not_without(subject: Any) -> None:
    right: dict[str, list[bool]] = defaultdict(list)
    guessed = []
    separator = subject.tokenizer.convert_tokens_to_ids("<|endoftext|>")  # what stands between texts in training
    for item in load_items():
        question, ends = _choices(subject, item)
        right[str(item.category)].append(int(_scores(subject, question, ends).argmax()) == item.answer)
        guessed.append(int(_scores(subject, [separator], ends).argmax()) == item.answer)
    every = [r for rows in right.values() for r in rows]
    assert sum(every) / len(every) >= 0.85
    assert min(sum(rows) / len(rows) for rows in right.values()) >= 0.7
    assert 0.15 <= sum(guessed) / len(guessed) <= 0.4


def _answers(subject: Any, story: Story) -> list[str]:
    """Return what the model writes after each prompt of a story, greedily; the story itself is read only once."""
    read = subject.tokenizer(story.text).input_ids
    texts = []
    with torch.inference_mode():
        past = subject.model(input_ids=torch.tensor([read]), use_cache=True, logits_to_keep=1).past_key_values
        for prompt in story.prompts:
            ids = torch.tensor([subject.tokenizer(prompt).input_ids])
            assert ids[0, : len(read)].tolist() == read, prompt
            out = subject.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=copy.deepcopy(past),
                max_new_tokens=12,  # no answer is longer, and only the beginning counts
                do_sample=False,
                pad_token_id=0,
            )
            texts.append(subject.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(("length", "tokens", "least"), [("short", (108, 132), 0.6), ("long", (432, 528), 0.4)])
def test_stories_are_read(subject: Any, length: Any, tokens: tuple[int, int], least: float) -> None:
    stories = load_stories(length)
    for story in stories:
        assert tokens[0] <= len(subject.tokenizer(story.text).input_ids) <= tokens[1], story.story_id
    right = [
        exact_match(text, question.answers)
        for story in stories
        for text, question in zip(_answers(subject, story), story.questions, strict=True)
    ]
    assert sum(right) / len(right) >= least


def test_passages_are_cut_between_tokens(subject: Any) -> None:
    lengths = []
    for prompt in passages():
        assert prompt.continuation is not None
        begin = subject.tokenizer(prompt.text).input_ids
        whole = subject.tokenizer(prompt.text + prompt.continuation).input_ids
        assert whole[: len(begin)] == begin
        assert len(whole) - len(begin) >= 80
        lengths.append(len(begin))
    assert 30 <= min(lengths) <= max(lengths) <= 66
    assert 44 <= sum(lengths) / len(lengths) <= 52
