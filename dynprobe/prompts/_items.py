"""Items with choices: a question that ends where its answer begins, and the texts that could follow.

A model answers by likelihood: of the texts ``question + choice``, the one whose choice has the largest summed
log-probability. Nothing is generated, so the number has no parser in it, and an item costs as many short forwards as it
has choices. ``load_items()`` gives the built-in set: four choices, easy for a small model when nothing disturbs it, so
that there is something to lose; ``load_items("mine.jsonl")`` reads any file of the same kind.

A set that is misread gives an accuracy of something else, so a line whose right answer is not beyond doubt (a letter
that is also a choice's text, a choice that occurs twice) is refused with its number.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dynprobe.errors import PromptError, did_you_mean
from dynprobe.prompts._prompt import Prompt, in_turn, with_ids
from dynprobe.prompts._read import decode, half_character, json_rows, missing_file

__all__ = ["Item", "load_items"]

_BUILT_IN = ("cloze",)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FORMATS = '.jsonl (one object a line with "question", "choices" and "answer")'
_EXAMPLE = '{"question": "Two and two make", "choices": [" four", " five"], "answer": 0}'


@dataclass(frozen=True)
class Item:
    """A question with choices, of which one is right.

    Attributes:
        item_id: unique among the items of a set.
        question: a text that ends where the answer begins, without a space at its end.
        choices: the texts that could follow it; ``question + choice`` is the text, so each begins with its space.
        answer: which choice is right, from 0.
        category: for grouping, or None.
    """

    item_id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    category: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The whole text of each choice."""
        return tuple(self.question + choice for choice in self.choices)

    @property
    def chance(self) -> float:
        """Probability of a right answer by guessing."""
        return 1.0 / len(self.choices)


def load_items(
    source: str | os.PathLike[str] = "cloze",
    *,
    category: str | None = None,
    limit: int | None = None,
    delimiter: str = " ",
) -> list[Item]:
    r"""Return items with choices: the built-in ones, or those of a file.

    A line of a file has ``question``, ``choices`` (a list of at least two texts) and ``answer`` (the index of the right
    choice from 0, its letter from A, or its text); ``id`` and ``category`` are optional. White space at the end of a
    question is moved to the front of its choices, since tokenisers attach a space to the word that follows it.

    Args:
        source: ``cloze``, or the path of a ``.jsonl`` file.
        category: Only this category.
        limit: At most so many, taken in turn from the categories, so that a small limit still covers them.
        delimiter: Set before a choice where neither it nor the question has white space there; empty for writing
            systems without spaces.

    Returns:
        The items, in the order of the file.

    Raises:
        PromptError: There is no such set, file or category; the file is empty, not UTF-8, or a line of it is
            malformed. The message says which line.

    Example:
        >>> item = load_items(limit=1)[0]
        >>> len(item.choices), item.chance, item.texts[item.answer].startswith(item.question)
        (4, 0.25, True)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "mine.jsonl"
        ...     _ = path.write_text('{"question": "Two and two make", "choices": ["four", "five"], "answer": "A"}\n')
        ...     load_items(path)[0].texts
        ('Two and two make four', 'Two and two make five')
    """
    if isinstance(source, str) and source in _BUILT_IN:
        items = list(_built_in(source))
    else:
        items = _from_file(source, delimiter)
    if category is not None:
        known = list(dict.fromkeys(item.category for item in items if item.category is not None))
        if category not in known:
            near = did_you_mean(category, known)
            raise PromptError(
                f"There is no item of category {category!r}; there are: {', '.join(known) or 'none'}.{near}"
            )
        items = [item for item in items if item.category == category]
    return [items[place] for place in in_turn([item.category for item in items], limit)]


@functools.cache
def _built_in(name: str) -> tuple[Item, ...]:
    text = resources.files("dynprobe.prompts").joinpath("data", f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(_items(text, name, " "))


def _from_file(source: str | os.PathLike[str], delimiter: str) -> list[Item]:
    file = Path(source).expanduser()
    known = f"{_FORMATS}, or a built-in set: {', '.join(_BUILT_IN)}"
    if not file.exists():
        hint = did_you_mean(str(source), _BUILT_IN)
        raise PromptError(missing_file(file, what="file of items", formats=known) + hint)
    if file.is_dir():
        raise PromptError(f"{file} is a folder, not a file of items. Type a file: {known}.")
    if file.suffix.lower() not in {".jsonl", ".ndjson"}:
        raise PromptError(f"{file} has the ending {file.suffix or '(none)'}; items are read from {known}.")
    try:
        data = file.read_bytes()
    except OSError as exc:
        raise PromptError(f"{file} cannot be read ({exc.strerror}). Check its permissions.") from exc
    return _items(decode(data, str(file), formats=_FORMATS), str(file), delimiter)


def _items(text: str, name: str, delimiter: str) -> list[Item]:
    lines: dict[str, int] = {}
    found: list[tuple[str | None, Item]] = []
    for number, row in json_rows(text, name, _EXAMPLE):
        given, item = _item(row, f"{name}, line {number}", delimiter)
        if given is not None and given in lines:
            raise PromptError(
                f"{name}, line {number}: the id {given!r} stands on line {lines[given]} already. Ids join the tables "
                "of a run, so each must be unique; rename it, or leave the ids out to get automatic ones."
            )
        if given is not None:
            lines[given] = number
        found.append((given, item))
    if not found:
        raise PromptError(f"{name} has no items in it: it is empty. Each line is one object, for example {_EXAMPLE}.")
    named = with_ids([(given, Prompt("", "\n".join((i.question, *i.choices)))) for given, i in found])
    pairs = zip(named, found, strict=True)
    return [Item(p.prompt_id, i.question, i.choices, i.answer, i.category) for p, (_, i) in pairs]


def _item(row: Mapping[str, Any], where: str, delimiter: str) -> tuple[str | None, Item]:
    for key in ("question", "choices", "answer"):
        if row.get(key) is None:
            found = ", ".join(map(repr, row)) or "no keys"
            near = did_you_mean(key, [name for name in row if name not in {"question", "choices", "answer"}])
            raise PromptError(f"{where}: no {key!r}; found {found}.{near} A line is, for example, {_EXAMPLE}.")
    question, choices, category, name = row["question"], row["choices"], row.get("category"), row.get("id")
    if not isinstance(question, str) or not question.strip():
        raise PromptError(f"{where}: 'question' must be a text with at least one character, found {question!r:.60}.")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise PromptError(f"{where}: 'choices' must be a list of texts that are not empty, found {choices!r:.60}.")
    if len(choices) < 2:
        raise PromptError(f"{where}: 'choices' has {len(choices)} of at least two texts; one alone is always right.")
    bare = [choice.strip() for choice in choices]
    double = next((choice for place, choice in enumerate(bare) if choice in bare[:place]), None)
    if double is not None:
        raise PromptError(f"{where}: the choice {double!r:.60} occurs twice, so which is right is undecided.")
    if category is not None and not isinstance(category, str):
        raise PromptError(f"{where}: 'category' must be a text, found {category!r:.60}.")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip()):
        raise PromptError(f"{where}: an id must be a text or a whole number, found {name!r:.60}.")
    if any(half_character(text) for text in (question, *choices, category or "")):
        raise PromptError(f"{where}: a text holds half a character (a lone surrogate).")
    answer = _place(row["answer"], bare, where)
    head = question.rstrip()
    between = question[len(head) :]
    texts = tuple(_joined(choice, between, delimiter) for choice in choices)
    return None if name is None else str(name), Item("", head, texts, answer, category)


def _joined(choice: str, between: str, delimiter: str) -> str:
    """Return a choice with what stands between it and the question."""
    if between:
        return between + choice.lstrip()
    return choice if choice[0].isspace() else delimiter + choice


def _place(answer: Any, choices: list[str], where: str) -> int:
    """Return which choice an index, a letter or a text means."""
    last = len(choices) - 1
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer <= last:
            raise PromptError(
                f"{where}: 'answer' is {answer}, but the {last + 1} choices are counted from 0 to {last}."
            )
        return answer
    if not isinstance(answer, str):
        raise PromptError(
            f"{where}: 'answer' must be an index, a letter or the text of a choice, found {answer!r:.60}."
        )
    letters = _LETTERS[: len(choices)]
    said = answer.strip()
    by_text = choices.index(said) if said in choices else None
    by_letter = letters.index(said) if len(said) == 1 and said in letters else None
    if by_text is not None and by_letter is not None and by_text != by_letter:
        raise PromptError(
            f"{where}: 'answer' {answer!r} is the letter of choice {by_letter} and the text of choice {by_text}. "
            "Give the index, from 0."
        )
    place = by_text if by_text is not None else by_letter
    if place is None:
        near = did_you_mean(said, choices)
        hint = f" Without quotation marks {said} would be an index." if said.isdecimal() else ""
        raise PromptError(
            f"{where}: 'answer' {answer!r:.60} is none of the choices and no letter from A to {letters[-1]}."
            f"{near}{hint}"
        )
    return place
