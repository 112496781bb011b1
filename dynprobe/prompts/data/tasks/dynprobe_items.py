"""The built-in items as data sets of lm-evaluation-harness; read by the YAML files beside this one.

The items are made in memory, so that nothing is written into the cache of ``datasets`` and no two processes wait for
each other there. Categories take turns, so that the first items (``--limit``) cover them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dynprobe.prompts import exact_match, load_items, load_stories

__all__ = ["cloze", "graded", "stories_long", "stories_short"]


def cloze(**_: Any) -> dict[str, Any]:
    """Return the cloze items: ``id``, ``category``, ``question``, ``choices``, ``answer``."""
    return _split(
        [
            {
                "id": item.item_id, "category": item.category, "question": item.question, "choices": list(item.choices),
                "answer": item.answer,
            }
            for item in load_items()
        ]
    )  # fmt: skip


def stories_short(**_: Any) -> dict[str, Any]:
    """Return one item per question about the short stories."""
    return _split(_questions("short"))


def stories_long(**_: Any) -> dict[str, Any]:
    """Return one item per question about the long stories."""
    return _split(_questions("long"))


def graded(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return 1 where the generated text begins with an accepted answer, after normalisation."""
    return {"exact_match": float(exact_match(results[0], list(doc["answers"])))}


def _questions(length: Literal["short", "long"]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{story.story_id}-q{number}", "category": story.category, "prompt": question.prompt(story.text),
            "answers": list(question.answers),
        }
        for story in load_stories(length)
        for number, question in enumerate(story.questions)
    ]  # fmt: skip


def _split(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    by_category: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_category[row["category"]].append(row)
    turns = [(place, row) for members in by_category.values() for place, row in enumerate(members)]
    return {"test": Dataset.from_list([row for _, row in sorted(turns, key=lambda turn: turn[0])])}
