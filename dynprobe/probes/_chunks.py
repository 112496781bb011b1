"""Work through rows in groups that fit into memory.

How many rows fit is an estimate before the first group and a fact after it. A group that runs out of memory is halved
and tried again, down to single rows; the smaller size is kept for the rest. What a row is worth does not depend on the
group it was in, so halving is a matter of record and not of numbers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

__all__ = ["halving", "out_of_memory"]

Item = TypeVar("Item")
Made = TypeVar("Made")

#: What allocators without an error class of their own say.
_SAYINGS = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(ValueError("shapes differ"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)


def halving(
    items: Sequence[Item],
    size: int,
    work: Callable[[Sequence[Item]], Made],
    note: Callable[[int], object] = lambda _: None,
) -> Iterator[Made]:
    """Yield ``work(group)`` over consecutive groups of at most ``size`` items.

    Args:
        items: What is to be done, in order.
        size: Largest group.
        work: Does one group.
        note: Told the size of each group that did not fit.

    Raises:
        MemoryError: If a single item does not fit; whatever error said so is its cause.

    Example:
        >>> def work(group):
        ...     if len(group) > 2:
        ...         raise MemoryError
        ...     return sum(group)
        >>> list(halving([1, 2, 3, 4, 5], 4, work))
        [3, 7, 5]
    """
    done = 0
    while done < len(items):
        group = items[done : done + max(size, 1)]
        try:
            made = work(group)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(group) == 1:
                raise MemoryError("one row alone does not fit into memory; take shorter texts") from error
        else:
            yield made
            done += len(group)
            continue
        # Only here is the error gone, and with it the frames that held the group's tensors.
        note(len(group))
        size = len(group) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
