"""Time to an event, when some runs end before it comes.

A run in which nothing happened is not a run in which it took forever, and not one to leave out: it says that the event
took *longer than* the run. The Kaplan–Meier curve uses exactly that (statsmodels). At equal times events come before
censorings.

The median is where the curve falls to one half; where it stays at exactly one half for a while it is the middle of that
while, so without censoring it is the ordinary median. If the curve never falls so far, or stays at one half to the end,
the median is not known: NaN with reason ``"right-censored"`` and the largest time it is known to exceed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._clusters import column
from dynprobe.metrics.statistics._crossing import Status

__all__ = ["KaplanMeier", "kaplan_meier"]

NAN = float("nan")
_HALF = 1e-9


@dataclass(frozen=True, slots=True)
class KaplanMeier:
    """Kaplan–Meier curve.

    Args:
        times: Times at which events happened, ascending.
        survival: Share without the event right after each.
        se: Greenwood's standard error of it.
        at_risk: Runs still under observation right before each.
        events: Events at each.
        median: Median time, or NaN.
        exceeds: Where the median is not known: a time it is known not to lie below; else NaN.
        n: Observations.
        n_events: Events.
        n_censored: Observations that ended without one.
        n_missing: Observations left out because their time is not a number.
        status: ``resolved``, ``right-censored`` (no median) or ``missing``.
        reason: Why there is no median.
    """

    times: tuple[float, ...]
    survival: tuple[float, ...]
    se: tuple[float, ...]
    at_risk: tuple[int, ...]
    events: tuple[int, ...]
    median: float
    exceeds: float
    n: int
    n_events: int
    n_censored: int
    n_missing: int
    status: Status
    reason: str | None


def kaplan_meier(times: Any, events: Any) -> KaplanMeier:
    """Kaplan–Meier curve S(t) = Π_{t_i ≤ t} (1 − d_i/n_i), d_i events among n_i at risk.

    Args:
        times: Time to the event, or to the end of observation, of each run; ≥ 0, NaN left out.
        events: True where the event came, False where the observation ended first.

    Returns:
        The curve with its median; no curve for no observation (``"empty"``).

    Raises:
        MetricError: Lengths differ or a time is negative or infinite.

    Source:
        Kaplan & Meier 1958; reference §14.1.

    Example:
        >>> found = kaplan_meier([2, 3, 3, 5], [True, True, False, True])
        >>> [round(s, 12) for s in found.survival], found.median
        ([0.75, 0.5, 0.0], 4.0)
    """
    t = column(times, "times")
    if hasattr(events, "detach"):
        events = events.detach().cpu().numpy()
    came = np.asarray(events)
    if came.shape != t.shape:
        raise MetricError(f"One event flag per time is needed, found {list(t.shape)} and {list(came.shape)}.")
    if came.dtype.kind not in "biuf" or not np.isin(came, (0, 1)).all():
        raise MetricError("events is True where the event came and False where observation ended first.")
    ok = ~np.isnan(t)
    n_missing = int((~ok).sum())
    t, came = t[ok], came[ok].astype(bool)
    if (t < 0).any() or np.isinf(t).any():
        raise MetricError("Times are ≥ 0 and finite; a run without the event ends at its length with events False.")
    if not len(t):
        return KaplanMeier((), (), (), (), (), NAN, NAN, 0, 0, 0, n_missing, "missing", "empty")
    n_events = int(came.sum())
    counts = (len(t), n_events, len(t) - n_events, n_missing)
    if not n_events:
        return KaplanMeier((), (), (), (), (), NAN, float(t.max()), *counts, "right-censored", "right-censored")
    from statsmodels.duration.survfunc import SurvfuncRight

    with np.errstate(divide="ignore", invalid="ignore"):
        curve = SurvfuncRight(t, came.astype(int))
        happened = np.asarray(curve.n_events) > 0
        at, s = np.asarray(curve.surv_times)[happened], np.asarray(curve.surv_prob)[happened]
        se = np.where(s > 0, np.asarray(curve.surv_prob_se)[happened], NAN)
    shown = (
        tuple(map(float, at)), tuple(map(float, s)), tuple(map(float, se)),
        tuple(map(int, np.asarray(curve.n_risk)[happened])), tuple(map(int, np.asarray(curve.n_events)[happened])),
    )  # fmt: skip
    half = np.flatnonzero(s <= 0.5 + _HALF)
    if not len(half):
        return KaplanMeier(*shown, NAN, float(t.max()), *counts, "right-censored", "right-censored")
    k = int(half[0])
    if s[k] >= 0.5 - _HALF:
        if k + 1 == len(at):
            return KaplanMeier(*shown, NAN, float(at[k]), *counts, "right-censored", "right-censored")
        return KaplanMeier(*shown, float((at[k] + at[k + 1]) / 2), NAN, *counts, "resolved", None)
    return KaplanMeier(*shown, float(at[k]), NAN, *counts, "resolved", None)
