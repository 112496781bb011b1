"""Prompts: the built-in ones, the ones for calibration, and the user's own.

``load_prompts`` gives the built-in prompts, ``read_prompts`` reads a file, ``from_texts`` takes texts as they are. All
return ``Prompt`` objects whose ids are unique and do not depend on their order; ``content_hash`` identifies a list.
``synthetic_items`` makes tasks whose number of steps is known by construction. ``load_items`` gives questions with
choices, ``load_stories`` stories with questions, ``passages`` beginnings with the text that follows them;
``exact_match`` decides whether a generated answer is right.
"""

from dynprobe.prompts._answers import exact_match, normalise_answer
from dynprobe.prompts._builtin import CATEGORIES, load_prompts
from dynprobe.prompts._items import Item, load_items
from dynprobe.prompts._prompt import Prompt, content_hash, from_texts
from dynprobe.prompts._read import read_prompts
from dynprobe.prompts._stories import Question, Story, load_stories, passages
from dynprobe.prompts._synthetic import (
    SYNTHETIC_TASKS,
    SyntheticItem,
    synthetic_item,
    synthetic_items,
    synthetic_prompts,
)

__all__ = [
    "CATEGORIES",
    "SYNTHETIC_TASKS",
    "Item",
    "Prompt",
    "Question",
    "Story",
    "SyntheticItem",
    "content_hash",
    "exact_match",
    "from_texts",
    "load_items",
    "load_prompts",
    "load_stories",
    "normalise_answer",
    "passages",
    "read_prompts",
    "synthetic_item",
    "synthetic_items",
    "synthetic_prompts",
]
