"""Warnings that say one thing of many pairs: one line that says it whole, and the list behind it.

Five runs under three conditions read unequal numbers of tokens in up to thirty pairs, and thirty lines that differ in
two names and two numbers hide the other warnings. What a reader must do about them is the same for all, so the line
that stays names the matter and what it forbids, and how often it is so; which pairs these are stands behind it. A grave
warning whose names or numbers *are* the matter (other weights, another setting of one condition) is never put together
with another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["put_together"]

#: So many warnings alike are put together.
FEWEST = 4
#: Beginnings of grave warnings that may be put together: what they forbid does not depend on the pair.
_SAME_FOR_ALL = ("unequal T in ",)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")


def put_together(
    warnings: Sequence[str], n_grave: int, names: Iterable[str]
) -> tuple[list[str], int, dict[str, list[str]]]:
    """Return warnings with those alike put together.

    Args:
        warnings: Texts, the grave first.
        n_grave: How many of them are grave.
        names: Labels of runs and names of conditions, which tell warnings apart that are otherwise alike.

    Returns:
        The texts that stand open, how many of them are grave, and for those that stand for several the several.

    Example:
        >>> texts = [f"pseudo-replication: clean of {run} has {n} rows" for run, n in zip("abcd", (8, 9, 8, 8))]
        >>> put_together(["other weights", *texts], 1, "abcd")[:2]
        (['other weights', '4 times: pseudo-replication: clean of … has … rows'], 1)
    """
    known = sorted({str(name) for name in names if str(name)}, key=len, reverse=True)
    name = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, known))})(?!\w)") if known else None
    groups: dict[tuple[bool, str], list[str]] = {}
    for number, text in enumerate(warnings):
        grave = number < n_grave
        alike = not grave or text.startswith(_SAME_FOR_ALL)
        groups.setdefault((grave, _matter(text, name) if alike else text), []).append(text)
    shown: list[tuple[bool, str]] = []
    several: dict[str, list[str]] = {}
    for (grave, matter), texts in groups.items():
        if len(texts) < FEWEST:
            shown += [(grave, text) for text in texts]
            continue
        said = f"{len(texts)} times: {matter}"
        several[said] = texts
        shown.append((grave, said))
    return [text for _, text in shown], sum(grave for grave, _ in shown), several


def _matter(text: str, name: re.Pattern[str] | None) -> str:
    """A warning without what tells it from its likes."""
    bare = _NUMBER.sub("…", text if name is None else name.sub("…", text))
    return re.sub(r"…(?: …)+", "…", bare)
