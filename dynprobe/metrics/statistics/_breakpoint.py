"""Is there a kink? Broken sticks, a test for the breakpoint, and the word "non-linear threshold".

A response that grows as a power of α crosses any level smoothly; calling that crossing a non-linear threshold says
more than the data. A kink is a claim about shape: y = a + b·x + c·(x − τ)₊ on x = ln α, with y the response or its
logarithm. The location τ does not exist when c = 0, so no F table applies; the test takes the **supremum** of F over
τ and its p-value from a wild bootstrap that flips whole prompts.

Significance is not prediction. :func:`nonlinear` grants the word only where the broken stick predicts prompts it has
not seen better than a power law does, by more than the prompts' own scatter, and only for a kink that steepens: the
flattening at the top of a saturating response is no threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._bootstrap import check_bootstrap
from dynprobe.metrics.statistics._crossing import Array, Status

__all__ = ["BrokenStick", "Nonlinearity", "broken_stick", "nonlinear"]

NAN = float("nan")
GRID = 101
EXPONENTS = np.linspace(0.25, 6.0, 116)
FEWEST_STRENGTHS, FEWEST_PROMPTS = 5, 4
Scale = Literal["log", "linear"]


@dataclass(frozen=True, slots=True)
class BrokenStick:
    """A continuous two-piece line on ln α.

    Args:
        alpha_break: Strength of the kink, exp(τ), or NaN.
        slope_below: Slope per unit of ln α below it.
        slope_above: Slope above it.
        statistic: Supremum of F(1, df) over τ.
        p_value: Its wild-bootstrap p under a straight line; NaN for fewer than 4 prompts.
        scale: ``log`` (of the response) or ``linear``.
        n: Prompts.
        n_alphas: Strengths that took part.
        n_boot: Replicates.
        seed: Seed of the sign flips.
        status: ``resolved`` or ``missing``.
        reason: Why there is no fit, or no p.
    """

    alpha_break: float
    slope_below: float
    slope_above: float
    statistic: float
    p_value: float
    scale: str
    n: int
    n_alphas: int
    n_boot: int
    seed: int
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class Nonlinearity:
    """Broken stick against power law on prompts that were left out.

    Args:
        granted: True where "non-linear threshold" may be said.
        reason: Why not, else None.
        error_stick: Mean squared error of the broken stick on left-out prompts.
        error_power: The same of the power law.
        gain: ``error_power − error_stick``.
        gain_low: Lower end of its one-sided 95 % interval over prompts; granting needs it above 0.
        alpha_break: Strength of the steepening kink fitted to all prompts.
        slope_below: Slope below it.
        slope_above: Slope above it.
        exponent: Exponent of the power law fitted to all prompts.
        scale: ``log`` or ``linear``.
        n: Prompts.
        n_alphas: Strengths that took part.
        status: ``resolved`` or ``missing``.
    """

    granted: bool
    reason: str | None
    error_stick: float
    error_power: float
    gain: float
    gain_low: float
    alpha_break: float
    slope_below: float
    slope_above: float
    exponent: float
    scale: str
    n: int
    n_alphas: int
    status: Status


class _Line(NamedTuple):
    """Least squares of curves [curve, alpha] on a base and one scanned column."""

    choice: Any
    gain: Array
    fitted: Array
    coefficients: Array


def broken_stick(
    alphas: Any, responses: Any, *, scale: Scale = "log", floor: float = 0.0, n_boot: int = 2000, seed: int = 0
) -> BrokenStick:
    """Fit y_{p,α} = a_p + b·ln α + c·(ln α − τ)₊ and test c = 0 by the supremum of F over τ.

    Args:
        alphas: Strengths [alpha]; 0 is left out.
        responses: Responses [prompt, alpha], or [alpha] for one curve, which has no p.
        scale: ``log`` fits ln(response), ``linear`` the response.
        floor: With ``log``: a strength at which any prompt is at or below it is left out.
        n_boot: Replicates of the wild bootstrap.
        seed: Its seed.

    Returns:
        The fit; NaN with a reason for fewer than 5 strengths.

    Raises:
        MetricError: Shapes do not fit or ``scale`` is unknown.

    Source:
        Reference §10.2; Hansen, Econometrica 64:413 (1996), on unidentified nuisance parameters.

    Example:
        >>> a = np.exp(np.arange(9.0))
        >>> fit = broken_stick(a, np.exp(np.maximum(np.arange(9.0) - 4, 0))[None], n_boot=0)
        >>> round(float(np.log(fit.alpha_break)), 6), round(fit.slope_above - fit.slope_below, 6)
        (4.0, 1.0)
    """
    check_bootstrap(n_boot, 0.95)
    x, y = _curves(alphas, responses, scale, floor, None)
    tail = (scale, len(y), len(x), n_boot, seed)
    if len(x) < FEWEST_STRENGTHS or not len(y):
        why = "empty" if not len(y) else f"strengths<{FEWEST_STRENGTHS}"
        return BrokenStick(NAN, NAN, NAN, NAN, NAN, *tail, "missing", why)
    base, taus = np.stack([np.ones_like(x), x], axis=1), _taus(x)
    hinges = np.maximum(x - taus[:, None], 0.0)
    mean = y.mean(axis=0, keepdims=True)
    line = _scan(base, hinges, mean)
    statistic = _sup_f(y[None], base, hinges)[0]
    tau = taus[line.choice[0]]
    b, c = line.coefficients[0, 1:]
    p: float = NAN
    gap: str | None = f"prompts<{FEWEST_PROMPTS}"
    if len(y) >= FEWEST_PROMPTS and n_boot:
        null = _project(base, mean)[0]
        rest = y - null - (y - null).mean(axis=1, keepdims=True)
        flips = np.random.default_rng(seed).choice([-1.0, 1.0], (n_boot, len(y), 1))
        draws = np.concatenate(
            [_sup_f(null + f * rest, base, hinges) for f in np.array_split(flips, 1 + n_boot // 500)]
        )
        p, gap = (1 + int((draws >= statistic * (1 - 1e-12)).sum())) / (1 + n_boot), None
    elif not n_boot:
        gap = "n_boot=0"
    return BrokenStick(float(np.exp(tau)), float(b), float(b + c), float(statistic), p, *tail, "resolved", gap)


def nonlinear(
    alphas: Any, responses: Any, *, scale: Scale = "log", floor: float = 0.0, ceiling: float | None = None
) -> Nonlinearity:
    """Decide by leave-one-prompt-out whether a steepening broken stick predicts better than a power law.

    ``log``: power law ln r = a + s·ln α, broken stick ln r = a + b·ln α + c·(ln α − τ)₊; a left-out prompt keeps its
    own level a, so that shapes are compared. ``linear``: r = a + C·α^s against r = a + b·ln α + c·(ln α − τ)₊,
    levels as fitted. Granted where the mean over prompts of (error of power law − error of broken stick) minus
    t_{0.95, P − 1} standard errors is positive, and c > 0.

    Args:
        alphas: Strengths [alpha]; 0 is left out.
        responses: Responses [prompt, alpha].
        scale: ``log`` or ``linear``.
        floor: With ``log``: a strength at which any prompt is at or below it is left out.
        ceiling: Strengths at which the median response is above it are left out (saturation is no part of the
            question).

    Returns:
        Both errors and the verdict.

    Raises:
        MetricError: Shapes do not fit or ``scale`` is unknown.

    Source:
        Reference §10.2 ("non-linear threshold" must mean: broken stick beats a smooth power law out of sample).

    Example:
        >>> a = np.geomspace(0.01, 1, 9)
        >>> rng = np.random.default_rng(0)
        >>> power = np.exp(2 * np.log(a) + rng.normal(size=(12, 1)) + 0.1 * rng.normal(size=(12, 9)))
        >>> nonlinear(a, power).granted
        False
    """
    x, y = _curves(alphas, responses, scale, floor, ceiling)
    tail = (scale, len(y), len(x))
    if len(x) < FEWEST_STRENGTHS or len(y) < FEWEST_PROMPTS:
        why = f"strengths<{FEWEST_STRENGTHS}" if len(x) < FEWEST_STRENGTHS else f"prompts<{FEWEST_PROMPTS}"
        return Nonlinearity(False, why, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, *tail, "missing")
    from scipy.stats import t

    one = np.ones_like(x)
    base, taus = np.stack([one, x], axis=1), _taus(x)
    hinges = np.maximum(x - taus[:, None], 0.0)
    powers = np.exp(EXPONENTS[:, None] * (x - x.mean()))
    mean = y.mean(axis=0, keepdims=True)
    train = (len(y) * mean - y) / (len(y) - 1)
    stick, whole = _scan(base, hinges, train, rising=True), _scan(base, hinges, mean, rising=True)
    if scale == "log":
        smooth, exponent = _project(base, train), float(np.linalg.lstsq(base, mean[0], rcond=None)[0][1])
    else:
        smooth = _scan(one[:, None], powers, train, rising=True).fitted
        exponent = float(EXPONENTS[_scan(one[:, None], powers, mean, rising=True).choice[0]])
    errors = []
    for fitted in (stick.fitted, smooth):
        miss = y - fitted
        miss = miss - miss.mean(axis=1, keepdims=True) if scale == "log" else miss
        errors.append((miss**2).mean(axis=1))
    better = errors[1] - errors[0]
    gain = float(better.mean())
    gain_low = gain - float(t.ppf(0.95, len(y) - 1) * better.std(ddof=1) / np.sqrt(len(y)))
    b, c = whole.coefficients[0, 1:]
    granted = gain_low > 0 and c > 0
    reason = None if granted else "no steepening kink" if c <= 0 else "not better than a power law out of sample"
    return Nonlinearity(
        bool(granted), reason, float(errors[0].mean()), float(errors[1].mean()), gain, gain_low,
        float(np.exp(taus[whole.choice[0]])) if c > 0 else NAN, float(b), float(b + c), exponent, *tail, "resolved",
    )  # fmt: skip


def _curves(alphas: Any, responses: Any, scale: str, floor: float, ceiling: float | None) -> tuple[Array, Array]:
    if scale not in ("log", "linear"):
        raise MetricError(f"scale is 'log' or 'linear', found {scale!r}.")
    a, y = np.asarray(alphas, dtype=np.float64), np.asarray(responses, dtype=np.float64)
    y = y[None] if y.ndim == 1 else y
    if a.ndim != 1 or y.ndim != 2 or y.shape[1:] != a.shape:
        raise MetricError(f"responses is [prompt, alpha], found {list(y.shape)} for {list(a.shape)} strengths.")
    order = np.argsort(a, kind="stable")
    a, y = a[order], y[:, order]
    if not (np.isfinite(a).all() and (a >= 0).all() and (np.diff(a) > 0).all()):
        raise MetricError("Strengths are finite, not negative and all different.")
    keep = a > 0
    if scale == "log":
        keep &= ~((y <= floor) & np.isfinite(y)).any(axis=0)
    if ceiling is not None and len(y):
        keep &= ~(np.nanmedian(np.where(np.isfinite(y), y, np.nan), axis=0) > ceiling)
    a, y = a[keep], y[:, keep]
    y = y[np.isfinite(y).all(axis=1)]
    return np.log(a), np.log(y) if scale == "log" else y


def _taus(x: Array) -> Array:
    return np.unique(np.r_[np.linspace(x[1], x[-2], GRID), x[1:-1]])


def _project(base: Array, y: Array) -> Array:
    return y @ (base @ np.linalg.pinv(base)).T


def _scan(base: Array, columns: Array, y: Array, rising: bool = False) -> _Line:
    """Add to the base the one column that explains most; with ``rising`` only columns with a positive coefficient."""
    rest = columns - _project(base, columns)
    size = np.maximum((rest**2).sum(axis=1), 1e-300)
    along = y @ rest.T
    gain = np.where(size > 1e-12 * max(float((columns**2).sum(axis=1).max()), 1e-300), along**2 / size, 0.0)
    if rising:
        gain = np.where(along > 0, gain, -1.0)
    choice = gain.argmax(axis=1)
    rows = np.arange(len(y))
    c = np.where(gain[rows, choice] > 0, along[rows, choice] / size[choice], 0.0)
    straight = np.linalg.lstsq(base, (y - c[:, None] * columns[choice]).T, rcond=None)[0].T
    fitted = straight @ base.T + c[:, None] * columns[choice]
    return _Line(choice, np.maximum(gain[rows, choice], 0.0), fitted, np.column_stack([straight, c]))


def _sup_f(y: Array, base: Array, columns: Array) -> Array:
    """Supremum of F over columns for data [set, prompt, alpha], one level per prompt."""
    mean = y.mean(axis=1)
    n, m = y.shape[1:]
    inner = y - y.mean(axis=2, keepdims=True)
    null = mean - mean.mean(axis=1, keepdims=True)
    residual = mean - _project(base, mean)
    around = (inner**2).sum(axis=(1, 2)) - n * (null**2).sum(axis=1)
    gain = n * _scan(base, columns, mean).gain
    ssr = around + n * (residual**2).sum(axis=1) - gain
    df = n * m - n - 3
    scale = np.maximum((inner**2).sum(axis=(1, 2)), 1e-300)
    return np.asarray(gain / np.maximum(ssr / df, 1e-14 * scale))
