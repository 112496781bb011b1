"""Whole numbers as people write them: ``2,16,29`` or ``0:13``, and never more of them than a machine can list."""

from __future__ import annotations

__all__ = ["whole_numbers"]

#: Far more seeds, depths or lags than anything is done for.
_MOST = 100_000


def whole_numbers(text: str, *, closed: bool = False) -> tuple[int, ...]:
    """Return the numbers of a list in which ranges may stand.

    Args:
        text: Items with commas between them; ``a:b`` is a range, ``:b`` one from 0.
        closed: Whether a range contains its end.

    Raises:
        ValueError: An item is no number, or there are more than 100,000.

    Example:
        >>> whole_numbers("0:4"), whole_numbers("2,16, 29"), whole_numbers("1:3,9", closed=True)
        ((0, 1, 2, 3), (2, 16, 29), (1, 2, 3, 9))
    """
    out: list[int] = []
    for item in text.split(","):
        first, colon, last = item.partition(":")
        found = range(int(first or 0), int(last) + closed) if colon else range(int(first), int(first) + 1)
        if len(out) + max(found.stop - found.start, 0) > _MOST:
            raise ValueError(f"{text[:40]!r} stands for more than {_MOST:,} numbers")
        out += found
    return tuple(out)
