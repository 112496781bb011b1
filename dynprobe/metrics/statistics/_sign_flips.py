"""Sign flips: the p of a mean of paired differences, without a law of their distribution.

Under the hypothesis that the two sides are exchangeable inside each prompt, the difference of a prompt is as likely to
have the other sign, and every pattern of signs over the prompts is as likely. All 2ⁿ patterns are taken for at most 13
prompts, and drawn ones above: 9,999 for numbers, 1,999 for profiles. p is therefore never below 2/2ⁿ or 1/10,000.

Source: Fisher 1935; the maximum over a profile: Nichols and Holmes 2002.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dynprobe.metrics.statistics._crossing import Array

__all__ = ["flip_p", "flip_p_max", "least_flip_p"]

_EXACT, _DRAWN, _DRAWN_PROFILE = 13, 9999, 1999
#: Two test statistics closer than this, relative, are equal: the sum over another order of the prompts.
_TIE = 1e-9


def flip_p(delta: Array) -> Array:
    """Two-sided p of the mean of each column [prompt, column] under flipped signs."""
    n = len(delta)
    signs = _signs(n, _DRAWN)
    size = np.abs(delta.mean(0))
    hits = np.zeros(delta.shape[1])
    for part in _parts(signs):
        hits += (np.abs(part @ delta) / n >= size * (1 - _TIE)).sum(0)
    return hits / len(signs)


def flip_p_max(delta: Array) -> Array:
    """P of each column against the largest |t| of all columns, one sign per prompt."""
    n = len(delta)
    signs = _signs(n, _DRAWN_PROFILE)
    square = (delta**2).sum(0)
    live = square > 0

    def size(means: Array) -> Array:
        # The sum of squares does not change with the signs, so the SD follows from the mean alone.
        rest = np.maximum(square[live] - n * means**2, _TIE**2 * square[live])
        found: Array = np.abs(means) / np.sqrt(rest)
        return found

    if not live.any():
        return np.ones(delta.shape[1])
    largest = np.concatenate([size(part @ delta[:, live] / n).max(1) for part in _parts(signs)])
    out = np.ones(delta.shape[1])
    found = size(delta[:, live].mean(0)) * (1 - _TIE)
    out[live] = 1 - np.searchsorted(np.sort(largest), found, side="left") / len(largest)
    return out


def least_flip_p(n: int, *, profile: bool = False) -> float:
    """Smallest p that sign flips of n prompts can give; no data, however clear, can go below it.

    Example:
        >>> least_flip_p(4), least_flip_p(20), least_flip_p(20, profile=True)
        (0.125, 0.0001, 0.0005)
    """
    if n < 2:
        return float("nan")
    return 2.0 ** (1 - n) if n <= _EXACT else 1 / ((_DRAWN_PROFILE if profile else _DRAWN) + 1)


@functools.lru_cache(maxsize=8)
def _signs(n: int, drawn: int) -> Any:
    """Patterns of signs [pattern, n] as int8, the unflipped one first."""
    if n <= _EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        bits = np.random.default_rng(0).integers(0, 2, (drawn + 1, n), dtype=np.int8)
        bits[0] = 0
    return (1 - 2 * bits).astype(np.int8)


def _parts(signs: Any, rows: int = 2048) -> list[Array]:
    return [signs[i : i + rows].astype(np.float64) for i in range(0, len(signs), rows)]
