"""Who does which item next.

Neighbouring items of a plan share work (a sweep's layers share the clean pass of their prompts), so every seat gets a
stretch of neighbours, and a seat that has run out takes the later half of the longest stretch that is left. An item
whose worker died goes to the front of its seat's stretch again; one that has killed several workers ends the run, since
it would kill the next one too.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence

from dynprobe.engines._contract import Item
from dynprobe.errors import EngineError

__all__ = ["Schedule"]


class Schedule:
    """The items that are left, in one stretch per seat.

    Args:
        items: All of them, in the order of the plan.
        seats: Number of seats.
        tries: Workers that one item may kill before the run ends.

    Example:
        >>> items = [Item(n, None, str(n)) for n in range(5)]
        >>> plan = Schedule(items, 2)
        >>> [plan.take(seat).number for seat in (0, 1, 1, 1, 0)]
        [0, 2, 3, 4, 1]
        >>> plan.take(0) is None
        True
    """

    def __init__(self, items: Sequence[Item], seats: int, tries: int = 3) -> None:
        cuts = [round(len(items) * seat / seats) for seat in range(seats + 1)]
        self._stretches = [deque(items[low:high]) for low, high in itertools.pairwise(cuts)]
        self._tries = tries
        self._kills: Counter[str] = Counter()

    def take(self, seat: int) -> Item | None:
        """Return the next item of a seat; None where nothing is left for anybody to begin."""
        own = self._stretches[seat]
        if not own:
            longest = max(self._stretches, key=len)
            taken = [longest.pop() for _ in range((len(longest) + 1) // 2)]
            own.extend(reversed(taken))
        return own.popleft() if own else None

    def give_back(self, seat: int, item: Item, why: str) -> None:
        """Put back the item of a worker that died.

        Raises:
            EngineError: If it has killed as many workers as it may.
        """
        self._kills[item.key] += 1
        if self._kills[item.key] >= self._tries:
            raise EngineError(
                f"unit {item.number} of the plan ended {self._tries} workers, the last one by {why}. Is the memory too "
                "small? Try --batch-size with a smaller number, or fewer --workers. Finished units are kept: the same "
                "command goes on from them"
            )
        self._stretches[seat].appendleft(item)
