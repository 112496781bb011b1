"""Where a response first reaches a level: the threshold α* of one prompt.

A dose–response curve is known at a few strengths only. α* is its **first crossing from below** on ascending α,
interpolated between the two strengths that bracket it. Responses that are powers of α (a KL is ∝ α² while the model
answers linearly) are straight lines in log–log, so interpolation is linear in ln(response) against ln α. Where the
lower response is no number to take a logarithm of (≤ 0, or at or below the noise floor), it is linear in the
response against ln α.

What cannot be read off is said, not guessed. A response that is already at the level at the lowest dose is
left-censored (α* < α_min), one that never gets there is right-censored (α* > α_max): α_min and α_max themselves are
never the answer. A level within ``factor`` × the noise floor of the response is not resolved, whatever the curve
looks like. An end of an interval that is open is infinite.

A curve can come back down and cross again. That is a finding, not an error: it is counted in ``n_crossings`` and
marked by ``monotone = False``, and the first crossing stays the answer. A crossing and a return that both lie
between two neighbouring strengths leave no trace; only a finer grid sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError

__all__ = ["Crossing", "Status", "first_crossing"]

Array: TypeAlias = NDArray[np.float64]
Status: TypeAlias = Literal["resolved", "left-censored", "right-censored", "not-resolved", "missing"]

ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Crossing:
    """The first crossing of one curve.

    Args:
        value: α*, or NaN unless ``status`` is ``resolved``.
        low: Largest tested strength known to lie below α*; −inf when there is none.
        high: Smallest tested strength known to lie at or above α*; +inf when there is none.
        status: ``resolved``, ``left-censored`` (α* < ``high``), ``right-censored`` (α* > ``low``), ``not-resolved``
            (the level lies in the noise of the response) or ``missing`` (no finite response).
        reason: Why there is no value, or a remark that stands beside one.
        n_crossings: How often the curve passes the level, upwards and downwards.
        monotone: False when the response falls anywhere by more than its noise, or below the level again; None when
            nothing was measured.
        n_points: Strengths that took part.
        n_dropped: Strengths with a response that is not finite.
    """

    value: float
    low: float
    high: float
    status: Status
    reason: str | None = None
    n_crossings: int = 0
    monotone: bool | None = None
    n_points: int = 0
    n_dropped: int = 0

    @property
    def half_width(self) -> float:
        """Half the width of the bracket in ln α; infinite when an end is open, NaN when there is no bracket."""
        if np.isnan(self.low) or np.isnan(self.high):
            return float("nan")
        if np.isinf(self.low) or np.isinf(self.high):
            return float("inf")
        return float(np.log(self.high / self.low) / 2)


def crossings(log_alpha: Array, responses: Array, level: float, floor: float = 0.0) -> Array:
    """First crossings of many complete curves on one ascending grid, in ln α.

    Args:
        log_alpha: ln α, ascending [A].
        responses: Finite responses [curve, A].
        level: The level to cross.
        floor: Responses at or below it are not taken a logarithm of.

    Returns:
        ln α* per curve; −inf when the curve starts at or above the level, +inf when it never gets there.
    """
    above = responses >= level
    out = np.where(above[:, 0], -np.inf, np.inf)
    rises = ~above[:, :-1] & above[:, 1:]
    rows = np.flatnonzero(~above[:, 0] & rises.any(axis=1)) if rises.shape[1] else np.empty(0, np.int64)
    if len(rows):
        k = rises[rows].argmax(axis=1)
        part = fraction(responses[rows, k], responses[rows, k + 1], level, floor)
        out[rows] = log_alpha[k] + part * (log_alpha[k + 1] - log_alpha[k])
    return out


def fraction(below: Array, above: Array, level: float, floor: float = 0.0) -> Array:
    """Share of the way, in ln α, at which a curve between two responses reaches the level."""
    log = (below > max(floor, 0.0)) & (level > 0)
    a, b = np.where(log, below, 1.0), np.where(log, above, np.e)
    line = (level - below) / (above - below)
    return np.where(log, (np.log(level if level > 0 else 1.0) - np.log(a)) / (np.log(b) - np.log(a)), line)


def first_crossing(alphas: Any, responses: Any, level: float, *, floor: float = 0.0, factor: float = 10.0) -> Crossing:
    """First crossing from below of one dose–response curve.

    With a < level ≤ b the responses at neighbouring strengths α_a < α_b,
    ln α* = ln α_a + (ln level − ln a)/(ln b − ln a)·(ln α_b − ln α_a) if a > max(floor, 0), and
    ln α* = ln α_a + (level − a)/(b − a)·(ln α_b − ln α_a) otherwise.

    Args:
        alphas: Strengths [A], in any order, each once. A strength of 0 is the sham and no point of a log axis: left
            out.
        responses: Response at each strength [A]. Entries that are not finite are dropped and counted; the bracket is
            then as wide as the finite ones around it.
        level: Level to reach, in the unit of the response.
        floor: Numerical noise floor of the response, in its unit.
        factor: A level smaller in size than ``factor × floor`` is not resolved.

    Returns:
        The crossing, or the reason why there is none.

    Raises:
        MetricError: Lengths differ, a strength is negative or not finite, or one occurs twice with two responses.

    Source:
        Reference §7.4 (first crossing from below, log-interpolated) and §10.1 (censoring at both ends).

    Example:
        >>> c = first_crossing([0.1, 0.2, 0.4, 0.8], [0.01, 0.04, 0.16, 0.64], 0.09)
        >>> round(c.value, 12), c.low, c.high, c.status, c.n_crossings, c.monotone
        (0.3, 0.2, 0.4, 'resolved', 1, True)
        >>> first_crossing([0.1, 0.2], [0.01, 0.04], 1.0).status
        'right-censored'
    """
    a, r = _curve(alphas, responses)
    _level(level, floor, factor)
    finite = np.isfinite(r)
    n_dropped = int((~finite).sum())
    a, r = a[finite], r[finite]
    nan = float("nan")
    if not len(a):
        return Crossing(nan, nan, nan, "missing", "nonfinite" if n_dropped else "empty", 0, None, 0, n_dropped)
    above = r >= level
    turns = np.diff(above.astype(np.int8))
    n = int(np.count_nonzero(turns))
    falls = bool((turns < 0).any() or (np.maximum.accumulate(r) - r > _slack(r, floor * factor)).any())
    tail = (n, not falls, len(a), n_dropped)
    if abs(level) < factor * floor:
        return Crossing(nan, nan, nan, "not-resolved", f"level<{factor:g}×floor", *tail)
    if above[0]:
        return Crossing(nan, -np.inf, float(a[0]), "left-censored", f"α*<{a[0]:.4g}", *tail)
    if not above.any():
        return Crossing(nan, float(a[-1]), np.inf, "right-censored", f"α*>{a[-1]:.4g}", *tail)
    k = int(np.argmax(turns > 0))
    value = float(np.exp(crossings(np.log(a), r[None], level, floor)[0]))
    return Crossing(min(max(value, a[k]), a[k + 1]), float(a[k]), float(a[k + 1]), "resolved", None, *tail)


def _slack(r: Array, noise: float) -> Array:
    return np.maximum(noise, ROUNDING * np.abs(np.maximum.accumulate(r)))


def _level(level: float, floor: float, factor: float) -> None:
    if not np.isfinite(level):
        raise MetricError(f"The level is a finite number, found {level!r}.")
    if not (floor >= 0 and np.isfinite(floor) and factor >= 0 and np.isfinite(factor)):
        raise MetricError(f"floor and factor are finite and not negative, found floor={floor!r}, factor={factor!r}.")


def _curve(alphas: Any, responses: Any) -> tuple[Array, Array]:
    a, r = np.asarray(alphas, dtype=np.float64), np.asarray(responses, dtype=np.float64)
    if a.ndim != 1 or a.shape != r.shape:
        raise MetricError(f"One response per strength is needed, found {list(a.shape)} and {list(r.shape)}.")
    if not np.isfinite(a).all() or (a < 0).any():
        bad = a[~(np.isfinite(a) & (a >= 0))][0]
        raise MetricError(
            f"Strengths are finite and not negative, found {bad:g}. A sign flip is another direction: "
            "cross it by itself, with |α|."
        )
    order = np.argsort(a, kind="stable")
    a, r = a[order], r[order]
    a, r = a[a > 0], r[a > 0]
    twice = np.flatnonzero(np.diff(a) == 0)
    if len(twice):
        same = (r[twice] == r[twice + 1]) | (np.isnan(r[twice]) & np.isnan(r[twice + 1]))
        if not same.all():
            k = twice[~same][0]
            raise MetricError(
                f"α = {a[k]:g} occurs twice, with responses {r[k]:g} and {r[k + 1]:g}. Cross each replicate by itself; "
                "`prompt_threshold` then takes the median of ln α* inside the prompt."
            )
        keep = np.r_[True, np.diff(a) > 0]
        a, r = a[keep], r[keep]
    return a, r
