"""The prompts that come with dynprobe.

Sixty English beginnings in six categories, written for this project and given away (CC0): long enough (about 18 to 32
tokens) that a hidden state has something to settle on, unfinished so that a model goes on by itself, and without names
of people that a model would know. The first four of each category are the default run's twenty-four. Thirty-six others
on other topics are kept apart for calibration, so that a model is never measured on the texts it was calibrated with.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, Literal

from dynprobe.errors import PromptError, did_you_mean
from dynprobe.prompts._prompt import Prompt, in_turn

__all__ = ["CATEGORIES", "load_prompts"]

CATEGORIES: tuple[str, ...] = ("factual", "narrative", "reasoning", "dialogue", "instruction", "code")
_SOURCES = ("default", "all", "calibration")


def load_prompts(
    category: str | None = None,
    limit: int | None = None,
    source: Literal["default", "all", "calibration"] = "default",
) -> list[Prompt]:
    """Return built-in prompts, in a fixed order.

    Args:
        category: only this category: factual, narrative, reasoning, dialogue, instruction or code.
        limit: at most so many; they are taken in turn from the categories, so that a small limit still covers them.
        source: ``default`` (24 prompts), ``all`` (60) or ``calibration`` (36 others).

    Returns:
        The prompts, grouped by category.

    Raises:
        PromptError: no such category or source, or a limit below 1.

    Example:
        >>> len(load_prompts()), len(load_prompts(source="all")), len(load_prompts(source="calibration"))
        (24, 60, 36)
        >>> load_prompts("code", limit=1)[0].prompt_id
        'code-01'
        >>> [p.category for p in load_prompts(limit=3)]
        ['factual', 'narrative', 'reasoning']
    """
    if source not in _SOURCES:
        raise PromptError(
            f"There are no built-in prompts called {source!r}.{did_you_mean(str(source), _SOURCES)} "
            f"Type one of: {', '.join(_SOURCES)}."
        )
    if category is not None and category not in CATEGORIES:
        raise PromptError(
            f"There is no prompt category {category!r}.{did_you_mean(category, CATEGORIES)} "
            f"Type one of: {', '.join(CATEGORIES)}."
        )
    origin = "calibration" if source == "calibration" else "builtin"
    rows = _rows("calibration.jsonl" if source == "calibration" else "prompts.jsonl")
    chosen = [
        Prompt(row["prompt_id"], row["text"], row["category"], origin, paraphrase=row.get("paraphrase"))
        for row in rows
        if category in (None, row["category"]) and (source != "default" or row["default"])
    ]
    return [chosen[place] for place in in_turn([p.category for p in chosen], limit)]


@functools.cache
def _rows(name: str) -> tuple[dict[str, Any], ...]:
    text = resources.files("dynprobe.prompts").joinpath("data", name).read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())
