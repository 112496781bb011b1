"""Tasks with a known number of steps: pointer chasing, parity, nested brackets.

Whether more iterations help *hard* inputs can only be asked where hardness was not read off the model's own errors: a
split by the model's first loss shows improvement of the hard half by regression to the mean alone. Here hardness is
construction: an item says how many dependent steps lead to its answer, and within a task every item has the same
length and the same kinds of symbols, so that steps are the only thing that differs.

- ``chase``: eight letters in one secret circle, listed as arrows in random order; follow the arrows k times.
- ``parity``: of the first k of twelve bits, whether the number of ones is odd.
- ``brackets``: the bracket that closes the innermost one still open, after cancelling a nest of k − 1 pairs.

Every item is a pure function of (task, steps, seed, index). An eighth of all items, chosen by the hash of the prompt,
is held out: training draws from the rest, so an item of ``split="test"`` was never seen by the models of the zoo.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dynprobe.errors import PromptError, did_you_mean
from dynprobe.prompts._prompt import Prompt, content_id

__all__ = ["SYNTHETIC_TASKS", "SyntheticItem", "synthetic_item", "synthetic_items", "synthetic_prompts"]

#: Task → (largest number of steps, probability of a right answer by guessing among the possible ones).
SYNTHETIC_TASKS: dict[str, tuple[int, float]] = {
    "chase": (7, 1.0 / 7.0),
    "parity": (12, 1.0 / 2.0),
    "brackets": (6, 1.0 / 4.0),
}
_LETTERS = "abcdefgh"
_PAIRS = ("()", "[]", "{}", "<>")
_BRACKETS = 14
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class SyntheticItem:
    """A prompt with one right next character.

    Attributes:
        task: ``chase``, ``parity`` or ``brackets``.
        prompt: what the model reads; the answer follows it directly.
        answer: the right continuation, one character.
        steps: number of dependent steps from the prompt to the answer.
        choices: the characters an answer can be; guessing among them is right with probability 1 / their number.
        split: ``train`` or ``test``.
    """

    task: str
    prompt: str
    answer: str
    steps: int
    choices: str
    split: str

    @property
    def text(self) -> str:
        """The item as it stands in the training text: one line."""
        return f"{self.prompt}{self.answer}\n"


def synthetic_item(task: str, steps: int, *, seed: int = 0, index: int = 0, split: str = "test") -> SyntheticItem:
    """Return one item.

    Args:
        task: A key of :data:`SYNTHETIC_TASKS`.
        steps: Number of steps, from 1 to the task's largest.
        seed: Seed of the series.
        index: Place in the series.
        split: ``test`` (the held-out eighth) or ``train``.

    Returns:
        The item, the same for the same arguments.

    Raises:
        PromptError: There is no such task, split or number of steps.

    Example:
        >>> item = synthetic_item("parity", 3)
        >>> bits = item.prompt.split(": ")[1].removesuffix(" = ")
        >>> len(bits), item.answer == str(bits[:3].count("1") % 2)
        (12, True)
    """
    if task not in SYNTHETIC_TASKS:
        near = did_you_mean(task, SYNTHETIC_TASKS)
        raise PromptError(f"No synthetic task {task!r}.{near} There are {', '.join(SYNTHETIC_TASKS)}.")
    most = SYNTHETIC_TASKS[task][0]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise PromptError(f"{task} takes 1 to {most} steps, not {steps!r}.")
    if split not in _SPLITS:
        raise PromptError(f"split is train or test, not {split!r}.{did_you_mean(str(split), _SPLITS)}")
    key = [list(SYNTHETIC_TASKS).index(task), steps, seed, index, _SPLITS.index(split)]
    rng = np.random.default_rng(np.random.SeedSequence(key))
    while True:  # ends soon: an eighth (or seven eighths) of thousands of possible prompts qualifies
        prompt, answer, choices = _MAKERS[task](rng, steps)
        if (_number(prompt) % 8 == 0) == (split == "test"):
            return SyntheticItem(task, prompt, answer, steps, choices, split)


def synthetic_items(
    task: str, count: int, *, steps: Iterable[int] | None = None, seed: int = 0, split: str = "test"
) -> list[SyntheticItem]:
    """Return ``count`` different items, the numbers of steps in turn.

    Args:
        task: A key of :data:`SYNTHETIC_TASKS`.
        count: Number of items.
        steps: Numbers of steps to take in turn; None takes all from 1 to the task's largest.
        seed: Seed of the series.
        split: ``test`` or ``train``.

    Returns:
        The items; no prompt occurs twice.

    Raises:
        PromptError: As :func:`synthetic_item`, or there are not that many different items.

    Example:
        >>> [item.steps for item in synthetic_items("brackets", 4, steps=(1, 6))]
        [1, 6, 1, 6]
    """
    turn = list(range(1, SYNTHETIC_TASKS[task][0] + 1) if steps is None and task in SYNTHETIC_TASKS else steps or ())
    found: dict[str, SyntheticItem] = {}
    index = 0
    while len(found) < count:
        item = synthetic_item(task, turn[len(found) % len(turn)] if turn else 1, seed=seed, index=index, split=split)
        found.setdefault(item.prompt, item)
        index += 1
        if index > 20 * count + 1000:
            raise PromptError(
                f"{task} with steps {turn} has only {len(found)} different items; {count} were asked for."
            )
    return list(found.values())


def synthetic_prompts(items: Iterable[SyntheticItem]) -> list[Prompt]:
    """Return items as prompts of a run: category ``task/steps``, the answer as the continuation that counts as right.

    Example:
        >>> [p.category for p in synthetic_prompts(synthetic_items("chase", 2))]
        ['chase/1', 'chase/2']
    """
    return [
        Prompt(content_id(item.prompt), item.prompt, f"{item.task}/{item.steps}", "synthetic", answer=item.answer)
        for item in items
    ]


def _number(text: str) -> int:
    """Return a number that depends on the text alone, by which items are held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def _chase(rng: np.random.Generator, steps: int) -> tuple[str, str, str]:
    circle = [_LETTERS[i] for i in rng.permutation(len(_LETTERS))]
    arrows = [f"{a}>{b}" for a, b in zip(circle, circle[1:] + circle[:1], strict=True)]
    listed = " ".join(arrows[i] for i in rng.permutation(len(arrows)))
    begin = circle[0]
    return f"chase {begin}{steps}: {listed} = ", circle[steps], "".join(c for c in _LETTERS if c != begin)


def _parity(rng: np.random.Generator, steps: int) -> tuple[str, str, str]:
    bits = "".join(str(b) for b in rng.integers(0, 2, SYNTHETIC_TASKS["parity"][0]))
    return f"parity {steps:02d}: {bits} = ", str(bits[:steps].count("1") % 2), "01"


def _brackets(rng: np.random.Generator, steps: int) -> tuple[str, str, str]:
    nested = steps - 1
    before = [_PAIRS[i] for i in rng.integers(0, 4, _BRACKETS - 2 * nested)]
    inside = [_PAIRS[i] for i in rng.integers(0, 4, nested)]
    word = "".join(p[0] for p in before + inside) + "".join(p[1] for p in reversed(inside))
    return f"close: {word} = ", before[-1][1], "".join(p[1] for p in _PAIRS)


_MAKERS = {"chase": _chase, "parity": _parity, "brackets": _brackets}
