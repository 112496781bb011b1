"""Adaptive search for the thresholds of many prompts at once, for responses that are smooth and repeatable.

A response of one prompt, one seed and one direction is a function of α: the same strength gives the same number. Its
first crossing can then be bracketed. All prompts advance together, so that one batch holds the next strengths of all
of them. The first round covers the range from below, evenly in ln α; later rounds look inside each prompt's first
bracket from below, where :mod:`~dynprobe.metrics.statistics._placement` puts them. A prompt leaves when its bracket
is as narrow as asked for, when two successive answers agree inside a narrow bracket, when it is censored, or when
its evaluations are used up; then the remaining uncertainty is said.

The search is a pure function of its settings and of the responses: the order in which they arrive does not matter,
and :meth:`BracketSearch.replay` rebuilds it from its trial list. It is no staircase: answers that are drawn at
random need :class:`~dynprobe.metrics.statistics.PosteriorSearch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._crossing import Array, Crossing, first_crossing
from dynprobe.metrics.statistics._placement import Guess, divide, guess, place

__all__ = ["BracketSearch", "Trial"]

CERTAIN = 4.0
ALONE = 8.0
UNSURE = 2.0


class Trial(NamedTuple):
    """One evaluation: prompt, strength, response, and the round it was asked in."""

    row: int
    alpha: float
    response: float
    round: int


@dataclass
class _Row:
    """What is known about one prompt."""

    pending: list[float]
    known: dict[float, float]
    rounds: dict[float, int]
    round: int = 0
    guess: Guess | None = None
    answers: tuple[float, ...] = ()
    width: float = float("inf")
    certified: bool = False
    done: bool = False


class BracketSearch:
    """Bracket the first crossing of every prompt, all prompts together.

    Args:
        n_prompts: Rows to search; a prompt with several seeds is several rows.
        alpha_min: Lowest strength, > 0.
        alpha_max: Highest strength.
        level: Level to reach, in the unit of the response.
        tolerance: Wanted relative precision of α*; the bracket is narrow enough at half width ln(1 + tolerance).
        per_round: New strengths per open prompt and round; the last entry is repeated. The first includes both ends.
        max_evaluations: Evaluations per prompt, at most.
        floor: Numerical noise floor of the response.
        factor: A level below ``factor × floor`` is not resolved, and nothing is evaluated.

    Raises:
        MetricError: A setting has no meaning.

    Example:
        >>> search = BracketSearch(2, 0.01, 10.0, level=1.0)
        >>> truth = np.array([0.3, 2.0])
        >>> while not search.done:
        ...     rows, alphas = search.propose()
        ...     search.observe(rows, alphas, (alphas / truth[rows]) ** 2)
        >>> [round(c.value, 6) for c in search.result()], search.n_evaluations.tolist()
        ([0.3, 2.0], [5, 5])
    """

    def __init__(
        self,
        n_prompts: int,
        alpha_min: float,
        alpha_max: float,
        level: float,
        *,
        tolerance: float = 0.05,
        per_round: Sequence[int] = (3, 2, 2, 1),
        max_evaluations: int = 8,
        floor: float = 0.0,
        factor: float = 10.0,
    ) -> None:
        if not (0 < alpha_min < alpha_max < np.inf):
            raise MetricError(f"0 < alpha_min < alpha_max is needed, found {alpha_min!r} and {alpha_max!r}.")
        if n_prompts < 0 or not tolerance > 0 or not np.isfinite(level):
            raise MetricError(
                "n_prompts ≥ 0, tolerance > 0 and a finite level are needed, "
                f"found {n_prompts!r}, {tolerance!r}, {level!r}."
            )
        if not per_round or min(per_round) < 1 or per_round[0] < 2 or max_evaluations < per_round[0]:
            raise MetricError(
                "per_round starts with at least 2 (both ends), has no entry below 1, and max_evaluations covers its "
                f"first entry; found per_round={tuple(per_round)}, max_evaluations={max_evaluations}."
            )
        self.settings: dict[str, Any] = {
            "n_prompts": int(n_prompts), "alpha_min": float(alpha_min), "alpha_max": float(alpha_max),
            "level": float(level), "tolerance": float(tolerance), "per_round": tuple(int(k) for k in per_round),
            "max_evaluations": int(max_evaluations), "floor": float(floor), "factor": float(factor),
        }  # fmt: skip
        first_crossing([], [], level, floor=floor, factor=factor)
        self._level, self._floor, self._factor = float(level), float(floor), float(factor)
        self._tolerance, self._width = float(tolerance), float(np.log1p(tolerance))
        self._per_round, self._most = tuple(per_round), int(max_evaluations)
        grid = np.exp(np.linspace(np.log(alpha_min), np.log(alpha_max), per_round[0]))
        grid[0], grid[-1] = alpha_min, alpha_max
        start = [] if abs(level) < factor * floor else grid.tolist()
        self._rows = [_Row(list(start), {}, dict.fromkeys(start, 0), done=not start) for _ in range(n_prompts)]

    @classmethod
    def replay(cls, trials: Iterable[Trial | Sequence[Any]], **settings: Any) -> BracketSearch:
        """Rebuild a search from its trial list, in any order; what is missing is proposed next.

        Args:
            trials: Entries (row, alpha, response, …).
            **settings: The settings of the search, as stored in ``search.settings``.

        Raises:
            MetricError: A trial was never asked for by a search with these settings.
        """
        search = cls(**settings)
        left: dict[int, dict[float, float]] = {}
        for trial in trials:
            left.setdefault(int(trial[0]), {})[float(trial[1])] = float(trial[2])
        for number, answers in left.items():
            if not 0 <= number < len(search._rows):
                raise MetricError(f"A trial names row {number}; the search has {len(search._rows)}.")
            row = search._rows[number]
            while met := [a for a in row.pending if a in answers]:
                search.observe([number] * len(met), met, [answers.pop(a) for a in met])
            if answers:
                raise MetricError(
                    f"Row {number}: α = {min(answers):.17g} was never asked for. These trials belong to a search with "
                    "other settings, or their strengths were rounded; store them as float64."
                )
        return search

    def propose(self) -> tuple[NDArray[np.int64], Array]:
        """Strengths to evaluate now, prompt by prompt ascending; the same ones until they are observed.

        Returns:
            Row numbers and strengths of equal length; empty when the search is done.
        """
        pairs = [(i, a) for i, row in enumerate(self._rows) for a in row.pending]
        rows = np.array([i for i, _ in pairs], dtype=np.int64)
        return rows, np.array([a for _, a in pairs], dtype=np.float64)

    def observe(self, rows: Any, alphas: Any, responses: Any) -> None:
        """Take in responses to proposed strengths, all or some of them, in any order.

        Args:
            rows: Row numbers.
            alphas: Strengths, exactly as proposed.
            responses: Responses; one that is not finite counts as an evaluation and places nothing.

        Raises:
            MetricError: Lengths differ, or a strength was not proposed.
        """
        r, a, y = np.asarray(rows), np.asarray(alphas, dtype=np.float64), np.asarray(responses, dtype=np.float64)
        if r.ndim != 1 or not (r.shape == a.shape == y.shape):
            raise MetricError(
                f"One row and response per strength, found {list(r.shape)}, {list(a.shape)}, {list(y.shape)}."
            )
        seen: set[tuple[int, float]] = set()
        for i, alpha in zip(r.tolist(), a.tolist(), strict=True):
            if not 0 <= i < len(self._rows) or alpha not in self._rows[i].pending or (i, alpha) in seen:
                raise MetricError(
                    f"Row {i}, α = {alpha:.17g} is not waiting for a response; `propose()` lists what is."
                )
            seen.add((i, alpha))
        for i, alpha, response in zip(r.tolist(), a.tolist(), y.tolist(), strict=True):
            row = self._rows[i]
            row.pending.remove(alpha)
            row.known[alpha] = response
            if not row.pending:
                self._advance(row)

    @property
    def done(self) -> bool:
        """True when nothing is left to evaluate."""
        return all(row.done for row in self._rows)

    @property
    def n_evaluations(self) -> NDArray[np.int64]:
        """Evaluations per prompt so far."""
        return np.array([len(row.known) for row in self._rows], dtype=np.int64)

    @property
    def trials(self) -> list[Trial]:
        """Every evaluation so far, ordered by prompt, round and strength."""
        out = [
            Trial(i, alpha, row.known[alpha], row.rounds[alpha])
            for i, row in enumerate(self._rows)
            for alpha in row.known
        ]
        return sorted(out, key=lambda t: (t.row, t.round, t.alpha))

    def result(self) -> list[Crossing]:
        """First crossing per prompt, read off all its evaluations.

        A resolved crossing whose bracket is wider than asked for and whose interpolation is not certified says so in
        ``reason``. A search that is not done gives what is known so far.
        """
        return [self._read(row) for row in self._rows]

    def _read(self, row: _Row) -> Crossing:
        c = first_crossing(
            list(row.known), list(row.known.values()), self._level, floor=self._floor, factor=self._factor
        )
        if abs(self._level) < self._factor * self._floor:
            return replace(c, status="not-resolved", reason=f"level<{self._factor:g}×floor")
        if c.status == "resolved" and c.half_width > self._width and not row.certified:
            return replace(c, reason=f"tolerance not reached: bracket ±{100 * np.expm1(c.half_width):.2g} %")
        return c

    def _advance(self, row: _Row) -> None:
        c = self._read(row)
        bracket = self._bracket(row, c)
        left = self._most - len(row.known)
        if bracket is None or left <= 0:
            row.done = True
            self._certify(row, c)
            return
        if c.status == "resolved":
            self._certify(row, c)
            if row.certified or c.half_width <= self._width:
                row.done = True
                return
        low, high = bracket
        row.round += 1
        k = min(self._per_round[min(row.round, len(self._per_round) - 1)], left)
        row.pending = self._place(row, c, low, high, k)
        row.rounds |= dict.fromkeys(row.pending, row.round)
        row.done = not row.pending

    def _bracket(self, row: _Row, c: Crossing) -> tuple[float, float] | None:
        """The interval to look into, or None when there is nothing more to find."""
        if c.status == "resolved":
            return c.low, c.high
        lost = [a for a, y in row.known.items() if not np.isfinite(y)]
        if c.status == "left-censored":
            below = [a for a in lost if a < c.high]
            return (max(below), c.high) if below else None
        above = [a for a in lost if c.status == "right-censored" and a > c.low]
        return (c.low, min(above)) if above else None

    def _certify(self, row: _Row, c: Crossing) -> None:
        """Interpolation is certified when two successive answers agree inside a narrow bracket."""
        before, row.answers, row.guess = row.answers, (), None
        if c.status == "resolved" and self._level > 0:
            row.guess = guess(*self._axes(row, c))
            now = float(np.log(c.value))
            agree = min((abs(now - x) for x in before), default=np.inf) <= self._width / 2
            narrow = c.half_width <= CERTAIN * self._width
            row.certified = bool(narrow and row.guess.doubt <= self._width / (2 if agree else ALONE))
            row.answers = (now, row.guess.at)

    def _axes(self, row: _Row, c: Crossing) -> tuple[Array, Array, int]:
        pairs = sorted((a, y) for a, y in row.known.items() if np.isfinite(y))
        x, r = np.log([a for a, _ in pairs]), np.array([y for _, y in pairs])
        log = (r > max(self._floor, 0.0)) & (self._level > 0)
        z = np.full(len(r), np.nan)
        z[log] = np.log(r[log] / self._level)
        return x, z, int(np.searchsorted(x, np.log(c.high)) - 1)

    def _place(self, row: _Row, c: Crossing, low: float, high: float, k: int) -> list[float]:
        bisected = 1 / (self._per_round[min(row.round - 1, len(self._per_round) - 1)] + 1)
        slow = row.round > 1 and c.half_width > bisected * row.width
        if row.guess is None or (slow and row.guess.doubt > UNSURE * self._width):
            points = divide(np.log(low), np.log(high), k)
        else:
            x, _, i = self._axes(row, c)
            points = place(x, i, row.guess, k, self._width)
        row.width = c.half_width
        strengths = [float(np.exp(p)) for p in points]
        return [a for a in dict.fromkeys(strengths) if low < a < high and a not in row.known]
