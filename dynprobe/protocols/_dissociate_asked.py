"""What a study of dissociation is asked: which items, and which noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynprobe.errors import UsageError
from dynprobe.prompts import Item, load_items
from dynprobe.prompts._prompt import in_turn
from dynprobe.protocols._dissociate_config import ALPHAS, DissociateConfig

__all__ = ["items_of", "noise_of"]


def items_of(source: str | Path | Sequence[Item] | None, settings: dict[str, Any]) -> list[Item]:
    """Return the items of a study: of some categories, and of these a few in turn.

    Raises:
        PromptError: If there are no such items, or a line of theirs is malformed.
        UsageError: If what was given are no items, or none are left.
    """
    if source is None or isinstance(source, str | Path):
        found = load_items("cloze" if source is None else source)
        category = settings.get("category") or ()
        names = [category] if isinstance(category, str) else list(category)
        if names:
            kept = {i.item_id for name in names for i in load_items(source or "cloze", category=name)}
            found = [i for i in found if i.item_id in kept]
    else:
        found = list(source)
        if not all(isinstance(i, Item) for i in found):
            raise UsageError("items are dynprobe.prompts.Item objects, or the name of a file of them")
    if not found:
        raise UsageError("there are no items to answer")
    limit = settings.get("limit")
    return [found[place] for place in in_turn([i.category for i in found], limit)]


def noise_of(perturb: Any, settings: dict[str, Any]) -> tuple[Any, bool]:
    """Return the noise as it was asked for, and whether its dose is fixed.

    Raises:
        UsageError: If a strength, a scale or a place is named twice.
    """
    if perturb is not None and perturb != ():
        for name in ("layers", "scale"):
            if settings.get(name) is not None:
                raise UsageError(f"--perturb says where and what is written; leave --{name} out, or write it there")
        return perturb, True
    scale, layers = settings.get("scale", "relnorm"), settings.get("layers", "50%")
    asked = DissociateConfig.build(alphas=settings.get("alphas", ALPHAS))
    assert isinstance(asked, DissociateConfig)
    return (f"alpha={asked.alphas[-1]:g},scale={scale},layers={layers},phase=decode",), False
