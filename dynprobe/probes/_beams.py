"""Follow the rows of a beam search: they change places, and what is remembered of a row must change places with it.

The library puts the rows of the cache into another order between two forwards, through the cache's ``reorder_cache``
(or the model's own ``_reorder_cache``, where it has one); nothing else tells of it. So for the length of a sequence
that method is replaced on the cache's instance by one that also tells whoever remembers rows. Several instruments may
follow one cache, and may leave in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getattr_static
from typing import Any

import numpy as np
from torch import Tensor, nn

from dynprobe.probes._clock import CACHES

__all__ = ["Beams"]

Told = Callable[[np.ndarray], None]


class _Reordering:
    """The ``reorder_cache`` of one cache (or ``_reorder_cache`` of one model), with those who are told."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        self.told: list[Told] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put the rows into another order, and tell."""
        order = args[-1] if args else kwargs.get("beam_idx")
        if isinstance(order, Tensor):
            rows = order.detach().cpu().numpy()
            for told in tuple(self.told):
                told(rows)
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the cache is another sequence's: it reorders itself alone."""
        copied = memo.get(id(self.owner), self.owner)
        return getattr_static(type(copied), self.name).__get__(copied, type(copied))


def _reordering(owner: Any, name: str) -> _Reordering:
    now = getattr(owner, name)
    if not isinstance(now, _Reordering):
        now = _Reordering(owner, name)
        setattr(owner, name, now)
    return now


class Beams:
    """Tell of every change of order of the cache of the running sequence.

    Args:
        root: The model whose ``generate`` may search.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._followed: tuple[_Reordering, Told] | None = None

    def follow(self, output: Any, told: Told) -> None:
        """Follow the cache that a forward returned, and let go of the one before.

        Args:
            output: What the model returned.
            told: Called with the rows in their new order.
        """
        cache = next((c for name in CACHES if (c := getattr(output, name, None)) is not None), None)
        owner, name = (
            (self._root, "_reorder_cache") if hasattr(self._root, "_reorder_cache") else (cache, "reorder_cache")
        )
        if cache is None or not hasattr(owner, name):
            return
        if self._followed is not None and self._followed[0].owner is owner:
            return
        self.release()
        self._followed = _reordering(owner, name), told
        self._followed[0].told.append(told)

    def release(self) -> None:
        """Let go; the last one to leave puts the method back."""
        if self._followed is None:
            return
        followed, told = self._followed
        self._followed = None
        followed.told.remove(told)
        if not followed.told and vars(followed.owner).get(followed.name) is followed:
            delattr(followed.owner, followed.name)  # the instance's own; the class has the original
