"""Prompts: the built-in ones, the ones for calibration, and the user's own.

``load_prompts`` gives the built-in prompts, ``read_prompts`` reads a file, ``from_texts`` takes texts as they are. All
return ``Prompt`` objects whose ids are unique and do not depend on their order; ``content_hash`` identifies a list.
``synthetic_items`` makes tasks whose number of steps is known by construction.
"""

from dynprobe.prompts._builtin import CATEGORIES, load_prompts
from dynprobe.prompts._prompt import Prompt, content_hash, from_texts
from dynprobe.prompts._read import read_prompts
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
    "Prompt",
    "SyntheticItem",
    "content_hash",
    "from_texts",
    "load_prompts",
    "read_prompts",
    "synthetic_item",
    "synthetic_items",
    "synthetic_prompts",
]
