from __future__ import annotations

import re
from collections import Counter

import pytest

from dynprobe.errors import PromptError
from dynprobe.prompts import SYNTHETIC_TASKS, synthetic_item, synthetic_items, synthetic_prompts

KNOWN = [
    "chase h2: g>b f>d b>e e>h d>g h>c c>a a>f = a\n",
    "parity 02: 111111101010 = 0\n",
    "close: ((<[(({<<{(({} = )\n",
]
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def solve(prompt: str) -> str:
    """Solve an item from its text alone, with no knowledge of how it was made."""
    if prompt.startswith("chase"):
        begin, hops = re.match(r"chase (.)(\d):", prompt).groups()
        arrows = dict(arrow.split(">") for arrow in re.findall(r"\w>\w", prompt))
        for _ in range(int(hops)):
            begin = arrows[begin]
        return begin
    if prompt.startswith("parity"):
        count, bits = re.match(r"parity (\d\d): ([01]{12}) = $", prompt).groups()
        return str(sum(map(int, bits[: int(count)])) % 2)
    word = re.match(r"close: (\S+) = $", prompt).group(1)
    open_ = []
    for char in word:
        if char in PAIRS:
            open_.append(char)
        else:
            assert PAIRS[open_.pop()] == char
    return PAIRS[open_[-1]]


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(task: str, split: str) -> None:
    most, chance = SYNTHETIC_TASKS[task]
    for item in synthetic_items(task, 12 * most, split=split):
        assert solve(item.prompt) == item.answer
        assert item.answer in item.choices
        assert len(item.choices) == round(1 / chance)
        assert item.text == item.prompt + item.answer + "\n"


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
def test_steps_are_the_only_difference(task: str) -> None:
    most = SYNTHETIC_TASKS[task][0]
    items = synthetic_items(task, 20 * most)
    assert len({len(item.prompt) for item in items}) == 1
    assert Counter(item.steps for item in items) == dict.fromkeys(range(1, most + 1), 20)
    assert len({item.prompt for item in items}) == len(items)


def test_chase_never_comes_back() -> None:
    for item in synthetic_items("chase", 70):
        assert item.answer != item.prompt.split()[1][0]


def test_brackets_steps_are_cancelled_pairs() -> None:
    for item in synthetic_items("brackets", 60):
        word = item.prompt.split()[1]
        pairs = 0
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", word)) != word:  # one round takes the innermost pair
            word, pairs = shorter, pairs + 1
        assert pairs + 1 == item.steps


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
def test_answers_are_balanced(task: str) -> None:
    items = synthetic_items(task, 600)
    share = max(Counter(item.answer for item in items).values()) / len(items)
    expected = {"chase": 1 / 8, "parity": 1 / 2, "brackets": 1 / 4}[task]
    assert share < expected + 0.08


def test_pure_function_of_arguments() -> None:
    assert synthetic_item("chase", 3, seed=5, index=9) == synthetic_item("chase", 3, seed=5, index=9)
    assert synthetic_item("chase", 3, seed=5, index=9) != synthetic_item("chase", 3, seed=6, index=9)
    assert synthetic_items("parity", 5) == synthetic_items("parity", 9)[:5]


def test_known_items_do_not_move() -> None:
    """The zoo's cards report accuracies on this series."""
    assert [synthetic_item(t, 2, index=1, split="train").text for t in SYNTHETIC_TASKS] == KNOWN


def test_splits_share_no_prompt() -> None:
    for task in SYNTHETIC_TASKS:
        seen = {item.prompt for item in synthetic_items(task, 400, split="train")}
        assert not seen & {item.prompt for item in synthetic_items(task, 200, split="test")}


def test_prompts_carry_answer_and_steps() -> None:
    items = synthetic_items("brackets", 3)
    prompts = synthetic_prompts(items)
    assert [(p.text, p.answer, p.category) for p in prompts] == [
        (i.prompt, i.answer, f"brackets/{i.steps}") for i in items
    ]
    assert len({p.prompt_id for p in prompts}) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthetic_item("chased", 1), "Did you mean 'chase'"),
        (lambda: synthetic_item("chase", 8), "1 to 7 steps"),
        (lambda: synthetic_item("chase", 0), "1 to 7 steps"),
        (lambda: synthetic_item("chase", 1, split="valid"), "train or test"),
        (lambda: synthetic_items("chases", 3), "Did you mean 'chase'"),
        (lambda: synthetic_items("parity", 600, steps=(1,), split="test"), "different items"),
    ],
)
def test_wrong_calls(call, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        call()
