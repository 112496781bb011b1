"""``gate.linear``: is a response proportional to its cause, and over which strengths?

A derivative, a Jacobian or a Lyapunov exponent says something about a finite push only where the response to that push
is linear. The gate decides it from the response itself. Even parts (a curved response, a bias) are removed by central
differences, R(+α) − R(−α); what is not above the floor of the same layer (two independent displacements of rounding
size, a sham) is left out; and the slope of log response against log α has to be 1 ± 0.1, with response/α flat, in every
stretch of half a decade. One good stretch is enough to pass, because linear windows end at both sides: in noise below,
in saturation above.

Refused: strengths that are not positive or occur twice. A response without even one stretch of half a decade above the
floor does not pass; its slope is still told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array, as_series
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result

__all__ = ["Gate", "linear_gate"]

_HALF_DECADE = 0.5 * math.log(10)
_SLACK = 1e-9  # a power law of slope exactly 1.1 on a grid of exactly half a decade is inside


@dataclass(frozen=True, eq=False)
class Gate:
    """What the gate found; strengths in ascending order.

    Args:
        slope: Slope of ln response against ln α, over the linear range, or over all usable strengths without one.
        passes: Whether there is a linear range.
        low: Smallest strength of the linear range, NaN without one.
        high: Its largest.
        gain: Geometric mean of response/α in the linear range, NaN without one.
        alphas: Strengths.
        response: Central-difference response at each.
        usable: Strengths whose response is finite and above the floor.
        even: Size of the even part at each strength, NaN where only one sign was measured.
        reason: Why the slope is NaN, or why no verdict was possible.
    """

    slope: float
    passes: bool
    low: float
    high: float
    gain: float
    alphas: Array
    response: Array
    usable: Bools
    even: Array
    reason: str | None


def _parts(response: Array) -> tuple[Array, Array]:
    """Odd and even size of a response ``[n]``, ``[n, 2]`` or ``[n, 2, m]``."""
    if not len(response):
        return np.zeros(0), np.zeros(0)
    if response.ndim == 1:
        return np.abs(response), np.full(len(response), np.nan)
    plus, minus = response[:, 0].reshape(len(response), -1), response[:, 1].reshape(len(response), -1)
    return np.linalg.norm(plus - minus, axis=1) / 2, np.linalg.norm(plus + minus, axis=1) / 2


def _slope(x: Array, y: Array) -> float:
    x = x - x.mean()
    return float(x @ y / (x @ x))


def _windows(x: Array, y: Array, usable: Bools, tol: float) -> tuple[list[tuple[int, int]], bool]:
    """Maximal index ranges in which every stretch of half a decade is linear, and whether there was any stretch."""
    found: list[tuple[int, int]] = []
    tried = False
    previous = -2
    for i in range(len(x)):
        j = max(i + 2, int(np.searchsorted(x, x[i] + _HALF_DECADE * (1 - _SLACK))))
        if j >= len(x) or not usable[i : j + 1].all():
            continue
        tried = True
        flat = y[i : j + 1] - x[i : j + 1]
        bound = tol * (x[j] - x[i]) * (1 + _SLACK) + _SLACK
        if abs(_slope(x[i : j + 1], flat)) > tol * (1 + _SLACK) + _SLACK or np.ptp(flat) > bound:
            continue
        if previous == i - 1:
            found[-1] = (found[-1][0], j)
        else:
            found.append((i, j))
        previous = i
    return found, tried


def linear_gate(alphas: Array, response: Array, null: Any = None, *, tol: float = 0.1, floor: float = 3.0) -> Gate:
    """Decide over which strengths a response is linear.

    Args:
        alphas: Positive strengths ``[n]``, in any order.
        response: Size of the response ``[n]``; or the response to +α and −α relative to the undisturbed one, as
            numbers ``[n, 2]`` or vectors ``[n, 2, m]``. Only pairs are free of even parts.
        null: Floor of the response, one number or one per strength; None means 0.
        tol: Allowed deviation of the slope from 1.
        floor: Responses up to ``floor · null`` are not used.

    Returns:
        The verdict.

    Raises:
        MetricError: If strengths and responses do not fit each other, or a strength is not positive or occurs twice.

    Example:
        >>> a = np.geomspace(1e-3, 1, 13)
        >>> linear_gate(a, np.stack([2 * a + a**2, -2 * a + a**2], 1)).passes  # the even part cancels
        True
        >>> gate = linear_gate(a, a / (1 + a))  # saturates
        >>> gate.passes, gate.high < 1
        (True, True)
    """
    a, r = np.asarray(alphas, dtype=np.float64), np.asarray(response, dtype=np.float64)
    if a.ndim != 1 or r.shape[:1] != a.shape or r.ndim > 3 or (r.ndim > 1 and r.shape[1] != 2):
        raise MetricError(
            f"gate.linear takes strengths [n] and responses [n], [n, 2] or [n, 2, m]; found {list(a.shape)} and "
            f"{list(r.shape)}. The second axis is the sign: +α, −α."
        )
    if not (np.isfinite(a) & (a > 0)).all() or len(np.unique(a)) != len(a):
        raise MetricError("gate.linear takes positive strengths, each once; average repeats, leave the sham out.")
    order = np.argsort(a)
    low_null = np.zeros(len(a)) if null is None else np.asarray(null, dtype=np.float64)
    if low_null.ndim and low_null.shape != a.shape:
        raise MetricError(f"null is one number or one for each of {len(a)} strengths, found {list(low_null.shape)}.")
    a, r, under = a[order], r[order], np.broadcast_to(low_null, a.shape)[order]
    odd, even = _parts(r)
    finite = np.isfinite(odd)
    usable = finite & (odd > 0) & (odd > floor * under)  # a NaN floor lets nothing pass
    x = np.log(a)
    y = np.log(np.where(usable, odd, 1.0))
    reason = None
    if len(a) == 0:
        reason = "empty"
    elif len(a) < 3:
        reason = "steps<3"
    elif 2 * finite.sum() < len(a):
        reason = "coverage"
    elif usable.sum() < 3:
        reason = "noise-floor"
    if reason is not None:
        return Gate(math.nan, False, math.nan, math.nan, math.nan, a, odd, usable, even, reason)
    ranges, tried = _windows(x, y, usable, tol)
    if not ranges:
        reason = None if tried else "span<half-decade"
        return Gate(_slope(x[usable], y[usable]), False, math.nan, math.nan, math.nan, a, odd, usable, even, reason)
    i, j = max(ranges, key=lambda w: (x[w[1]] - x[w[0]], -w[0]))
    gain = math.exp(float((y[i : j + 1] - x[i : j + 1]).mean()))
    slope = _slope(x[i : j + 1], y[i : j + 1])
    return Gate(slope, True, float(a[i]), float(a[j]), gain, a, odd, usable, even, None)


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, null: Any = None) -> Result:
    alphas = as_series(inputs[0], mask, metric_id)
    response, dtype = as_array(inputs[1], metric_id)
    keep = alphas.keep[0]
    if null is not None:
        null = np.asarray(null, dtype=np.float64)
        null = null if null.ndim == 0 or null.shape != keep.shape else null[keep]
    if len(response) == len(keep):
        response = response[keep]
    gate = linear_gate(alphas.values[0][keep], response, null, **params)
    n = len(gate.alphas)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.where(gate.usable, gate.response, np.nan))
        local = np.diff(logs) / np.diff(np.log(gate.alphas))
        share = np.where(gate.usable, gate.even / gate.response, np.nan)
    extras = {
        "passes": gate.passes,
        "alpha_low": gate.low,
        "alpha_high": gate.high,
        "gain": gate.gain,
        "n_below_floor": int((np.isfinite(gate.response) & ~gate.usable).sum()),
        "n_nonfinite": int((~np.isfinite(gate.response)).sum()),
        "even_share": share,
    }
    coverage = float(np.isfinite(gate.response).mean()) if n else math.nan
    return Result(
        gate.slope, gate.reason, coverage, 1, int(gate.usable.sum()), metric_id,
        dtype=str(dtype).removeprefix("torch."), profile=local, series=gate.response / gate.alphas, extras=extras,
    )  # fmt: skip


register(
    MetricSpec(
        id="gate.linear/1",
        sentence="Slope of log response against log strength, and the range of strengths in which it is 1 ± 0.1.",
        formula="r(α) = ‖R(+α) − R(−α)‖/2 (or the size handed in); usable: finite and r > floor·null; a stretch = the "
        "fewest ≥ 3 neighbouring usable strengths from α_i on that span ≥ half a decade; it is linear iff the least-"
        "squares slope of ln r on ln α is in 1 ± tol and max − min of ln(r/α) ≤ tol·(ln α_j − ln α_i); linear range = "
        "widest union of stretches with consecutive i, all linear; passes iff there is one; value = least-squares "
        "slope over the linear range, else over all usable strengths; gain = geometric mean of r/α over the range",
        latex=(
            r"r(\alpha) = \tfrac{1}{2}\lVert R(+\alpha)-R(-\alpha)\rVert, \qquad \text{slope of } \ln r \text{ on } "
            r"\ln\alpha, \qquad "
            r"\text{passes where it is } 1\pm\mathrm{tol}"
        ),
        input="strengths[n], response[n] or [n, sign] or [n, sign, dim]",
        value_range="(−∞, ∞); passes at 1 ± 0.1",
        unit="1",
        invariances=frozenset({"R", "S"}),
        source="linear-response gate of DOI 10.5281/zenodo.19010889 (abstract); windows and floor by dynprobe",
        params={"floor": 3.0, "tol": 0.1},
        vectors=(
            "r = 3α over 3 decades → slope 1, gain 3, whole range",
            "R(±α) = ±2α + α² → slope 1, gain 2: the even part cancels",
            "r = α² → slope 2, does not pass",
            "r = α/(1 + α) → passes, range ends below α = 1",
            "r = α for α ≥ 0.1, else 0.1, with null 0.05 → range begins above 0.15",
        ),
        groups=frozenset({"optional"}),
    ),
    _compute,
    arity=2,
)
