"""Adaptive placement for noisy yes-or-no responses, after QUEST+ (Watson, Journal of Vision 17:10, 2017).

The state is a posterior over a grid of (ln α50, ln β, γ, λ). The next strength is the one whose answer is expected
to tell most: the posterior's expected entropy falls by the mutual information h(E ψ) − E h(ψ) between answer and
parameters, which is all that has to be computed. A round asks for several strengths at once, chosen one after the
other; each chosen one is answered in imagination by its expected outcome, so that a round spreads out instead of
repeating one strength.

The search stops on the posterior standard deviation of ln α50, never on a significant result, and keeps every trial.
What it reports is the posterior: a mean of the strengths visited would be biased, because they were chosen by the
answers. Trials are taken as independent given the parameters; with many prompts the posterior is that of the pooled
curve and too narrow, so feed ``search.trials`` with their prompts to
:func:`~dynprobe.metrics.statistics.fit_psychometric` for an interval over prompts.

(The package ``questplus`` does the one-at-a-time part. It is licensed under the GPL and asks for one strength per
step, so it is no dependency here.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._crossing import Array, Status

__all__ = ["Answer", "PosteriorSearch", "PosteriorThreshold"]

NAN = float("nan")


class Answer(NamedTuple):
    """One trial: strength and whether it responded."""

    alpha: float
    response: int


@dataclass(frozen=True, slots=True)
class PosteriorThreshold:
    """Posterior of α50. Open ends are −inf and +inf.

    Args:
        value: Posterior median of α50, or NaN when it lies outside the strengths that can be asked.
        low: Lower end of the credible interval.
        high: Upper end.
        status: ``resolved``, ``left-censored``, ``right-censored`` or ``missing``.
        reason: Why there is no value, or a remark such as ``"trials used up"``.
        sd: Posterior standard deviation of ln α50.
        slope: Posterior median of β.
        confidence: Content of the credible interval.
        n_trials: Trials it rests on.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None
    sd: float
    slope: float
    confidence: float
    n_trials: int


class PosteriorSearch:
    """Place yes-or-no trials where they tell most about α50.

    Args:
        alpha_min: Lowest strength that can be asked, > 0.
        alpha_max: Highest.
        n_strengths: Strengths to choose from, evenly in ln α.
        slopes: Grid of β.
        gammas: Grid of the base rate.
        lapses: Grid of the lapse rate.
        per_round: Trials per round.
        stop_sd: Stop when the posterior SD of ln α50 is at most this.
        max_trials: Stop after this many trials.
        n_grid: Grid points of ln α50; the grid reaches a factor of e beyond the strengths on both sides.

    Raises:
        MetricError: A setting has no meaning.

    Example:
        >>> search = PosteriorSearch(0.01, 10.0, stop_sd=0.15)
        >>> rng = np.random.default_rng(0)
        >>> while not search.done:
        ...     alphas = search.propose()
        ...     search.observe(alphas, rng.random(len(alphas)) < 1 / (1 + (alphas / 0.5) ** -4.0))
        >>> found = search.result()
        >>> found.status, bool(found.low < 0.5 < found.high)
        ('resolved', True)
    """

    def __init__(
        self,
        alpha_min: float,
        alpha_max: float,
        *,
        n_strengths: int = 61,
        slopes: Sequence[float] = (0.7, 1.0, 1.5, 2.2, 3.2, 4.7, 7.0, 10.0, 15.0),
        gammas: Sequence[float] = (0.0,),
        lapses: Sequence[float] = (0.0, 0.02, 0.05, 0.1),
        per_round: int = 4,
        stop_sd: float = 0.05,
        max_trials: int = 400,
        n_grid: int = 181,
    ) -> None:
        if not 0 < alpha_min < alpha_max < np.inf:
            raise MetricError(f"0 < alpha_min < alpha_max is needed, found {alpha_min!r} and {alpha_max!r}.")
        if min(n_strengths, n_grid) < 2 or per_round < 1 or max_trials < 1 or not stop_sd > 0:
            raise MetricError(
                "n_strengths and n_grid are at least 2, per_round and max_trials at least 1, stop_sd above 0."
            )
        rates = [*gammas, *lapses]
        if not len(slopes) or min(slopes) <= 0 or min(rates) < 0 or max(gammas) + max(lapses) >= 1:
            raise MetricError("Slopes are positive; gammas and lapses are rates that add up to less than 1.")
        self.settings: dict[str, Any] = {
            "alpha_min": float(alpha_min), "alpha_max": float(alpha_max), "n_strengths": int(n_strengths),
            "slopes": tuple(slopes), "gammas": tuple(gammas), "lapses": tuple(lapses), "per_round": int(per_round),
            "stop_sd": float(stop_sd), "max_trials": int(max_trials), "n_grid": int(n_grid),
        }  # fmt: skip
        low, high = np.log(alpha_min), np.log(alpha_max)
        self.strengths: Array = np.exp(np.linspace(low, high, n_strengths))
        axes = [np.linspace(low - 1, high + 1, n_grid), np.log(slopes), np.array(gammas), np.array(lapses)]
        m, s, g, w = (part.ravel() for part in np.meshgrid(*axes, indexing="ij"))
        u = np.exp(s) * (np.log(self.strengths)[:, None] - m)
        psi = np.clip(g + (1 - g - w) / (1 + np.exp(-np.clip(u, -700, 700))), 1e-9, 1 - 1e-9)
        self._m, self._s, self._psi = m, s, psi
        self._yes, self._no = np.log(psi), np.log1p(-psi)
        self._doubt = -(psi * self._yes + (1 - psi) * self._no)
        self._count = np.zeros((n_strengths, 2), dtype=np.int64)
        self._log: list[Answer] = []

    @classmethod
    def replay(cls, trials: Iterable[Answer | Sequence[Any]], **settings: Any) -> PosteriorSearch:
        """Rebuild a search from its trial list, in any order."""
        search = cls(**settings)
        pairs = [(float(t[0]), int(t[1])) for t in trials]
        search.observe([a for a, _ in pairs], [r for _, r in pairs])
        return search

    @property
    def trials(self) -> list[Answer]:
        """Every trial, in the order it came in."""
        return list(self._log)

    @property
    def done(self) -> bool:
        """True when ln α50 is known well enough, or the trials are used up."""
        return (
            bool(len(self._log) and self.sd <= self.settings["stop_sd"])
            or len(self._log) >= self.settings["max_trials"]
        )

    @property
    def posterior(self) -> Array:
        """Posterior weights over the grid, from a uniform prior."""
        log = self._count[:, 1] @ self._yes + self._count[:, 0] @ self._no
        weight = np.exp(log - log.max())
        return np.asarray(weight / weight.sum())

    @property
    def sd(self) -> float:
        """Posterior standard deviation of ln α50."""
        w = self.posterior
        mean = w @ self._m
        return float(np.sqrt(w @ (self._m - mean) ** 2))

    def propose(self, k: int | None = None) -> Array:
        """Strengths to try next, in the order they were chosen; empty when the search is done.

        Args:
            k: How many; default ``per_round``.
        """
        if self.done:
            return np.empty(0)
        w, out = self.posterior, []
        for _ in range(self.settings["per_round"] if k is None else k):
            mean = self._psi @ w
            told = -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean)) - self._doubt @ w
            best = int(np.argmax(told))
            out.append(best)
            log = np.log(np.maximum(w, 1e-300)) + mean[best] * self._yes[best] + (1 - mean[best]) * self._no[best]
            w = np.exp(log - log.max())
            w /= w.sum()
        return np.asarray(self.strengths[out])

    def observe(self, alphas: Any, responses: Any) -> None:
        """Take in answers, in any order.

        Args:
            alphas: Strengths from ``search.strengths``.
            responses: Whether each responded.

        Raises:
            MetricError: Lengths differ, a strength is not one of the search's, or an answer is not yes or no.
        """
        a, r = np.atleast_1d(np.asarray(alphas, dtype=np.float64)), np.atleast_1d(np.asarray(responses))
        if a.ndim != 1 or a.shape != r.shape:
            raise MetricError(f"One answer per strength, found {list(a.shape)} and {list(r.shape)}.")
        if not np.isin(r, (0, 1)).all():
            raise MetricError("Answers are 0 or 1; leave out a trial that gave none.")
        index: NDArray[np.int64] = np.abs(np.log(self.strengths)[:, None] - np.log(a)).argmin(axis=0)
        if not np.allclose(self.strengths[index], a, rtol=1e-9, atol=0):
            raise MetricError("A strength was tried that this search does not ask for; `search.strengths` lists them.")
        np.add.at(self._count, (index, r.astype(np.int64)), 1)
        self._log += [Answer(float(x), int(y)) for x, y in zip(self.strengths[index], r, strict=True)]

    def result(self, confidence: float = 0.95) -> PosteriorThreshold:
        """Posterior median of α50 with an equal-tailed credible interval."""
        if not 0 < confidence < 1:
            raise MetricError(f"confidence lies between 0 and 1, found {confidence!r}.")
        if not self._log:
            return PosteriorThreshold(NAN, NAN, NAN, "missing", "empty", NAN, NAN, confidence, 0)
        w = self.posterior
        tail = (1 - confidence) / 2
        low, middle, high = (_quantile(self._m, w, q) for q in (tail, 0.5, 1 - tail))
        bottom, top = np.log(self.strengths[0]), np.log(self.strengths[-1])
        status: Status = "left-censored" if middle < bottom else "right-censored" if middle > top else "resolved"
        short = len(self._log) >= self.settings["max_trials"] and self.sd > self.settings["stop_sd"]
        reason = "trials used up" if short else None
        if status != "resolved":
            reason = f"α50<{self.strengths[0]:.4g}" if status == "left-censored" else f"α50>{self.strengths[-1]:.4g}"
        return PosteriorThreshold(
            float(np.exp(middle)) if status == "resolved" else NAN,
            float("-inf") if low < bottom else float(np.exp(low)),
            float("inf") if high > top else float(np.exp(high)),
            status, reason, self.sd, float(np.exp(_quantile(self._s, w, 0.5))), confidence, len(self._log),
        )  # fmt: skip


def _quantile(x: Array, w: Array, q: float) -> float:
    """Quantile of a discrete distribution, each grid point spread evenly over its cell."""
    points, where = np.unique(x, return_inverse=True)
    mass = np.cumsum(np.bincount(where, weights=w))
    if len(points) == 1:
        return float(points[0])
    edges = np.r_[points[0], (points[1:] + points[:-1]) / 2, points[-1]]
    return float(np.interp(q, np.r_[0.0, mass / mass[-1]], edges))
