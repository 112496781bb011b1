"""The symbolic layer: what a sequence of states spells, exact whatever gave the letters.

Occupancy, transitions with intervals, dwell times, and how far a word is from the path B*A*D*; motifs stand in
:mod:`~dynprobe.metrics._motifs`. A gap (``"?"``) is a step without a label: it counts in no occupancy, no pair spans
it, and it ends a run.

**What a self-transition means.** P(A→A) = 0.91 is a statement about dwell time, a mean run of 1/(1 − 0.91) = 11 steps,
and a twelve-layer model can hardly do more. Before A is called an attractor the number is compared with surrogates of
the same occupancy: ``motifs(…, length=2, order=0)``.

**Distance to the path.** The least number of insertions, deletions and substitutions that turn the word into one of
B*A*D*. Insertions never help, since every part of the path may be empty; a substitution and a deletion cost the same;
so it is an exact dynamic programme over three phases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._result import Array
from dynprobe.metrics.statistics._nonparametric import proportion_interval

__all__ = ["GAP", "Symbols", "check_letters", "path_edit_distance", "symbols", "words"]

GAP = "?"
NAN = float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Symbols:
    """Symbolic statistics of a set of words, over ``alphabet`` in its order.

    Args:
        alphabet: Letters.
        n_words: Words.
        n_steps: Labelled steps.
        n_gaps: Steps without a label.
        occupancy: Share of labelled steps per letter; NaN without any.
        counts: Transitions from row to column [letter, letter].
        transitions: Share of the row [letter, letter]; NaN rows without a transition.
        low: Lower ends of their intervals (Wilson; Clopper–Pearson at 0 and 1).
        high: Upper ends.
        dwell: Lengths of all runs of each letter.
        n_match: Words that match the path B*A*D* (gaps left out).
        distances: Edit distance of each word to the path; NaN for a word of which less than half is labelled.
    """

    alphabet: str
    n_words: int
    n_steps: int
    n_gaps: int
    occupancy: Array
    counts: NDArray[np.int64]
    transitions: Array
    low: Array
    high: Array
    dwell: dict[str, tuple[int, ...]]
    n_match: int
    distances: Array

    def mean_dwell(self, letter: str) -> float:
        """Mean length of the runs of a letter, NaN without one; runs cut off by the end of a word count as they are."""
        runs = self.dwell[letter]
        return float(np.mean(runs)) if runs else NAN

    def probability(self, start: str, end: str) -> float:
        """P(start → end)."""
        return float(self.transitions[self.alphabet.index(start), self.alphabet.index(end)])


def words(labels: Any) -> list[str]:
    """Read labels as words: a string, a list of strings, or an array of letters [step] or [step, unit, …]."""
    if isinstance(labels, str):
        return [labels]
    if isinstance(labels, np.ndarray):
        if labels.ndim == 0 or labels.dtype.kind not in "US":
            raise MetricError(f"Labels are letters [step] or [step, unit], found {labels.dtype} {list(labels.shape)}.")
        flat = labels.astype(str).reshape(len(labels), math.prod(labels.shape[1:]))
        return ["".join(row) for row in flat.T]
    out = list(labels)
    if not all(isinstance(word, str) for word in out):
        raise MetricError("Labels are a string, a list of strings, or an array of letters.")
    return out


def path_edit_distance(word: str, path: str = "BAD") -> int:
    """Least number of edits that turn a word into one of the path, such as B*A*D*.

    Args:
        word: Letters.
        path: Letters of the path in order; each may be repeated or left out.

    Returns:
        The Levenshtein distance to the nearest word of the path.

    Example:
        >>> path_edit_distance("BBAAAD"), path_edit_distance("ABAB"), path_edit_distance("DAB")
        (0, 2, 2)
    """
    cost = [0] * len(path)  # least cost of what was read, ending in each phase or an earlier one
    for letter in word:
        cost = [c + (letter != phase) for c, phase in zip(cost, path, strict=True)]
        for k in range(1, len(cost)):
            cost[k] = min(cost[k], cost[k - 1])
    return min(cost, default=len(word))


def symbols(labels: Any, alphabet: str = "BAD", *, confidence: float = 0.95) -> Symbols:
    """Occupancy, transitions, dwell times and distance to the path B*A*D*.

    Args:
        labels: A word, a list of words, or letters [step, unit] as a labeller gives.
        alphabet: Letters in the order of the path; ``"?"`` is a gap.
        confidence: Nominal coverage of the transition intervals. They take transitions for independent.

    Returns:
        The statistics, transitions of all words together.

    Raises:
        MetricError: A letter is not of the alphabet.

    Source:
        Reference §6.3.

    Example:
        >>> s = symbols("BBAAAD")
        >>> round(s.probability("A", "A"), 6), s.n_match, symbols("ABAB").probability("A", "B")
        (0.666667, 1, 1.0)
    """
    texts = words(labels)
    check_letters(texts, alphabet)
    place = {letter: i for i, letter in enumerate(alphabet)}
    counts = np.zeros((len(alphabet), len(alphabet)), np.int64)
    seen = np.zeros(len(alphabet), np.int64)
    dwell: dict[str, list[int]] = {letter: [] for letter in alphabet}
    distances, n_match = np.full(len(texts), NAN), 0
    for row, word in enumerate(texts):
        for letter in word:
            if letter != GAP:
                seen[place[letter]] += 1
        for a, b in pairwise(word):
            if GAP not in (a, b):
                counts[place[a], place[b]] += 1
        for letter, length in _runs(word):
            dwell[letter].append(length)
        known = word.replace(GAP, "")
        if known and 2 * len(known) >= len(word):
            distances[row] = path_edit_distance(known, alphabet)
            n_match += distances[row] == 0
    total = counts.sum(axis=1)
    low, high, share = (np.full(counts.shape, NAN) for _ in range(3))
    for i, j in np.ndindex(counts.shape):
        p = proportion_interval(int(counts[i, j]), int(total[i]), confidence=confidence)
        share[i, j], low[i, j], high[i, j] = p.value, p.low, p.high
    n = int(seen.sum())
    return Symbols(
        alphabet, len(texts), n, sum(w.count(GAP) for w in texts), seen / n if n else np.full(len(seen), NAN), counts,
        share, low, high, {letter: tuple(runs) for letter, runs in dwell.items()}, int(n_match), distances,
    )  # fmt: skip


def check_letters(texts: Iterable[str], alphabet: str) -> None:
    """Refuse an alphabet that is none, and letters outside it."""
    if len(set(alphabet)) != len(alphabet) or not alphabet or GAP in alphabet:
        raise MetricError(f"An alphabet is different letters other than {GAP!r}, found {alphabet!r}.")
    odd = sorted(set("".join(texts)) - set(alphabet) - {GAP})
    if odd:
        raise MetricError(f"Letters {', '.join(odd)} are not of the alphabet {alphabet!r} (a gap is {GAP!r}).")


def _runs(word: str) -> list[tuple[str, int]]:
    out: list[tuple[str, int]] = []
    for k, letter in enumerate(word):
        if letter != GAP:
            if k > 0 and word[k - 1] == letter:
                out[-1] = (letter, out[-1][1] + 1)
            else:
                out.append((letter, 1))
    return out
