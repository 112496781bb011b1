"""Motifs: short words that occur in sequences of states more often, or less often, than chance would have it.

Chance has to be said. A surrogate of order 0 keeps how often each letter occurs in each word and nothing else; one of
order 1 keeps which letter follows which. A motif of two letters against order 0 asks whether transitions matter at all,
one of three or more against order 1 whether there is memory beyond the last step.

Motifs never span a gap (``"?"``), and surrogates have theirs at the same places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._result import Array
from dynprobe.metrics._symbols import check_letters, words

__all__ = ["Motif", "motifs"]


@dataclass(frozen=True, slots=True)
class Motif:
    """How often a motif occurs, and how often it does in surrogates.

    Args:
        motif: Letters.
        count: Occurrences, overlapping ones too.
        expected: Mean over surrogates.
        sd: Standard deviation over surrogates (ddof 1).
        p_more: (1 + #{surrogates with at least as many})/(1 + B).
        p_fewer: (1 + #{surrogates with at most as many})/(1 + B).
    """

    motif: str
    count: int
    expected: float
    sd: float
    p_more: float
    p_fewer: float


def motifs(
    labels: Any,
    length: int = 3,
    alphabet: str = "BAD",
    *,
    order: int = 1,
    n_surrogates: int = 500,
    seed: int = 0,
) -> list[Motif]:
    """Count motifs and compare them with Markov surrogates.

    A surrogate has as many words of the same lengths, gaps at the same places. ``order=1``: each word begins with its
    own first letter and goes on by the transitions of all words together (from a letter that was never left, by the
    occupancy). ``order=0``: the letters of each word in random order, so its occupancy is kept exactly.

    Args:
        labels: A word, a list of words, or letters [step, unit].
        length: Letters of a motif.
        alphabet: Letters.
        order: Order of the surrogate, 0 or 1.
        n_surrogates: Surrogates.
        seed: Seed of the surrogates.

    Returns:
        Every motif that occurs in the words or in a surrogate, most frequent first. Corrections for multiplicity are
        ``statsmodels.stats.multitest.multipletests``.

    Raises:
        MetricError: A setting has no meaning, or a letter is not of the alphabet.

    Source:
        Reference §6.3.

    Example:
        >>> found = motifs(["BBAAAD"] * 5, length=2)
        >>> [(m.motif, m.count) for m in found if m.count]
        [('AA', 10), ('AD', 5), ('BA', 5), ('BB', 5)]
    """
    texts = words(labels)
    check_letters(texts, alphabet)
    if length < 1 or order not in (0, 1) or n_surrogates < 2:
        raise MetricError(
            f"motifs needs length ≥ 1, order 0 or 1 and n_surrogates ≥ 2; found {length}, {order}, {n_surrogates}."
        )
    size = len(alphabet)
    width = max((len(w) for w in texts), default=0)
    grid = np.full((len(texts), width), -1)
    for row, word in enumerate(texts):
        grid[row, : len(word)] = [alphabet.find(letter) for letter in word]
    observed = _count(grid[None], length, size)[0]
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // max(grid.size, 1))
    sizes = [min(chunk, n_surrogates - at) for at in range(0, n_surrogates, chunk)]
    make = _markov if order else _shuffled
    drawn = np.concatenate([_count(make(grid, n, size, rng), length, size) for n in sizes])
    mean, sd = drawn.mean(axis=0), drawn.std(axis=0, ddof=1)
    more, fewer = ((drawn >= observed).sum(axis=0) + 1), ((drawn <= observed).sum(axis=0) + 1)
    out = [
        Motif(
            _spelled(int(code), length, alphabet), int(observed[code]), float(mean[code]), float(sd[code]),
            float(more[code] / (n_surrogates + 1)), float(fewer[code] / (n_surrogates + 1)),
        )
        for code in np.flatnonzero((observed > 0) | (mean > 0))
    ]  # fmt: skip
    return sorted(out, key=lambda m: (-m.count, m.motif))


def _spelled(code: int, length: int, alphabet: str) -> str:
    size = len(alphabet)
    return "".join(alphabet[code // size ** (length - 1 - k) % size] for k in range(length))


def _count(grid: NDArray[np.int64], length: int, size: int) -> Array:
    """Occurrences of every motif in each of n sets of words [n, word, step] → [n, motif]."""
    n = size**length
    if grid.shape[-1] < length:
        return np.zeros((len(grid), n))
    windows = np.lib.stride_tricks.sliding_window_view(grid, length, axis=-1)
    whole = (windows >= 0).all(-1)
    code = windows @ (size ** np.arange(length - 1, -1, -1))
    which = np.broadcast_to(np.arange(len(grid))[:, None, None], code.shape)
    flat = (which * n + code)[whole]
    return np.bincount(flat, minlength=len(grid) * n).reshape(len(grid), n).astype(np.float64)


def _shuffled(grid: NDArray[np.int64], n: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    out = np.broadcast_to(grid, (n, *grid.shape)).copy()
    key = np.where(grid >= 0, rng.random(out.shape), np.inf)
    order = np.argsort(key, axis=-1)  # letters first, in random order
    letters = np.take_along_axis(out, order, -1)
    for row in range(len(grid)):
        here = grid[row] >= 0
        out[:, row, here] = letters[:, row, : here.sum()]
    return out


def _markov(grid: NDArray[np.int64], n: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    a, b = grid[:, :-1], grid[:, 1:]
    both = (a >= 0) & (b >= 0)
    counts = np.bincount(a[both] * size + b[both], minlength=size * size).reshape(size, size).astype(np.float64)
    occupancy = np.bincount(grid[grid >= 0], minlength=size).astype(np.float64)
    counts[counts.sum(1) == 0] = occupancy if occupancy.sum() else 1.0
    steps = np.cumsum(counts / counts.sum(1, keepdims=True), axis=1)
    steps[:, -1] = 1.0
    out = np.broadcast_to(grid, (n, *grid.shape)).copy()
    for t in range(1, grid.shape[1]):
        # After a gap, and at the start, the word's own letter stands.
        goes_on = both[:, t - 1]
        before = out[:, goes_on, t - 1]
        out[:, goes_on, t] = (rng.random(before.shape)[..., None] >= steps[before]).sum(-1)
    return out
