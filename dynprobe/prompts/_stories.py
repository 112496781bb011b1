"""Stories to be read: the same facts told in about 120 and in about 480 tokens, with questions about them.

Both versions of a story hold the facts that its questions ask for, and the long one tells more around them. What
a model loses from the short to the long version is therefore distance and distraction, not knowledge; what it loses
under a perturbation can be compared between the two. A small model that is asked for a short answer gives a long one,
begins with a phrase of its own, or says nothing; so the prompt holds the beginning of the answering sentence too, and
what the model writes first is the answer or is not. ``passages`` takes the beginnings of the long versions as prompts,
and what follows as the continuation, whose log-likelihood is the plainest measure of whether a model still makes sense.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from dynprobe.errors import PromptError, did_you_mean
from dynprobe.prompts._prompt import Prompt, in_turn

__all__ = ["Question", "Story", "load_stories", "passages"]

_LENGTHS = ("short", "long")
_PASSAGES = 48
# SmolLM2 takes about 1.2 tokens for a word of these stories: some 48 tokens before the cut and at least 80 after it.
_PROMPT_WORDS = 41
_CONTINUATION_WORDS = 90


@dataclass(frozen=True)
class Question:
    """A question about a story.

    Attributes:
        question: the question, with its question mark.
        lead: the beginning of the answering sentence, which the answer ends: ``The name of the donkey was``.
        answers: what counts as right: the answer as it stands in the story, then accepted variants of it.
    """

    question: str
    lead: str
    answers: tuple[str, ...]

    def prompt(self, text: str, *, lead: bool = True) -> str:
        """Return what a model reads: a story, this question, ``Answer:`` and (unless ``lead=False``) the lead."""
        return f"{text}\n\nQuestion: {self.question}\nAnswer:" + (f" {self.lead}" if lead else "")


@dataclass(frozen=True)
class Story:
    """A story in one of its two lengths.

    Attributes:
        story_id: unique among the stories; the same for both lengths.
        category: what kind of story it is.
        text: the story, one paragraph.
        length: ``short`` or ``long``.
        questions: two questions, answered by either version.
    """

    story_id: str
    category: str
    text: str
    length: str
    questions: tuple[Question, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """What a model reads for each question: the story, the question, and the beginning of the answer."""
        return tuple(question.prompt(self.text) for question in self.questions)


def load_stories(length: Literal["short", "long"] = "short", *, limit: int | None = None) -> list[Story]:
    r"""Return the built-in stories in one of their two lengths, in a fixed order.

    Args:
        length: ``short`` (about 120 tokens of SmolLM2) or ``long`` (about 480).
        limit: At most so many, taken in turn from the categories.

    Returns:
        The stories, grouped by category.

    Raises:
        PromptError: There is no such length, or the limit is below 1.

    Example:
        >>> short, long = load_stories("short")[0], load_stories("long")[0]
        >>> short.story_id == long.story_id, short.questions == long.questions, len(short.text) < len(long.text)
        (True, True, True)
        >>> short.prompts[0][len(short.text):]
        '\n\nQuestion: What was the name of the donkey?\nAnswer: The name of the donkey was'
    """
    if length not in _LENGTHS:
        near = did_you_mean(str(length), _LENGTHS)
        raise PromptError(f"There are no stories of length {length!r}.{near} Type one of: {', '.join(_LENGTHS)}.")
    rows = _rows()
    stories = [
        Story(
            row["id"],
            row["category"],
            row[length],
            length,
            tuple(Question(q["question"], q["lead"], tuple(q["answers"])) for q in row["questions"]),
        )
        for row in rows
    ]
    return [stories[place] for place in in_turn([story.category for story in stories], limit)]


def passages(*, limit: int | None = None) -> list[Prompt]:
    """Return 48 beginnings of long stories as prompts, each with the text that really follows as its continuation.

    The cut is the sentence end nearest to 41 words (about 48 tokens of SmolLM2); the continuation is the next
    sentences, at least 90 words of them.

    Args:
        limit: At most so many, taken in turn from the categories.

    Returns:
        The prompts; ``text + continuation`` is the story's beginning as it stands.

    Raises:
        PromptError: The limit is below 1.

    Example:
        >>> prompt = passages(limit=1)[0]
        >>> prompt.text[-1], (prompt.continuation or "")[0]
        ('.', ' ')
    """
    stories = load_stories("long", limit=_PASSAGES)
    chosen = [stories[place] for place in in_turn([story.category for story in stories], limit)]
    return [_passage(story) for story in chosen]


def _passage(story: Story) -> Prompt:
    ends = [match.end() for match in re.finditer(r"[.!?][\"”’]?(?= |$)", story.text)]
    words = [len(story.text[:end].split()) for end in ends]
    cut = min(range(len(ends)), key=lambda i: abs(words[i] - _PROMPT_WORDS))
    stop = next((i for i in range(cut, len(ends)) if words[i] - words[cut] >= _CONTINUATION_WORDS), len(ends) - 1)
    return Prompt(
        f"passage-{story.story_id}",
        story.text[: ends[cut]],
        story.category,
        "builtin",
        continuation=story.text[ends[cut] : ends[stop]],
    )


@functools.cache
def _rows() -> tuple[dict[str, Any], ...]:
    text = resources.files("dynprobe.prompts").joinpath("data", "stories.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())
