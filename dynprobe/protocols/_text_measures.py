"""How much a text repeats itself: plain counts over its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["distinct", "longest_repeat"]


def distinct(tokens: Sequence[int], n: int) -> float:
    """Return distinct-n, the share of n-grams that are different: 1 where none occurs twice; NaN without an n-gram.

    Source:
        Li et al. 2016, arXiv:1510.03055.

    Example:
        >>> distinct([1, 2, 1, 2, 1, 2], 2)
        0.4
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def longest_repeat(tokens: Sequence[int]) -> int:
    """Return the length of the longest span of tokens that occurs twice; the two may overlap.

    A text of one token over and over gives n − 1, one without a token that occurs twice 0.

    Example:
        >>> longest_repeat([1, 2, 3, 9, 1, 2, 3]), longest_repeat([7, 7, 7, 7]), longest_repeat([1, 2])
        (3, 3, 0)
    """
    low, high = 0, len(tokens) - 1  # a repeated span has repeated parts, so the lengths that occur are all below one
    while low < high:
        middle = (low + high + 1) // 2
        if _occurs_twice(tokens, middle):
            low = middle
        else:
            high = middle - 1
    return max(low, 0)


def _occurs_twice(tokens: Sequence[int], n: int) -> bool:
    seen: set[tuple[int, ...]] = set()
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        if gram in seen:
            return True
        seen.add(gram)
    return False
