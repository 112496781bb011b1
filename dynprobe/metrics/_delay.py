"""Delay embedding of a scalar series, its principal axes, and the axes that any series has.

A delay window of a series x is (x_i, x_{i+τ}, …, x_{i+(m−1)τ}). Principal components of all its windows are often shown
as evidence of a low-dimensional system. What must be known before they are:

**m = 2 is an identity.** The correlation matrix of two columns is [[1, r], [r, 1]]. Its axes are (1, 1)/√2 and
(1, −1)/√2 and its eigenvalues 1 + |r| and 1 − |r|, for every series whatever with r ≠ 0. "Fixed axes" and "a first
variance near 2" are then one number, the autocorrelation at the lag (:func:`lag_autocorrelation`).

**m > 2 is nearly one.** Overlapping windows of one series estimate the same autocorrelations in every row of the
matrix, so it is Toeplitz up to the ends of the series, which matter as 1/n. Every eigenvector of a Toeplitz matrix is
even or odd under reversal of the window (:func:`mirror_symmetry` 1). That is so for white noise too: its matrix is the
identity plus sampling error, and the sampling error is Toeplitz; which even and odd vectors they are is then chance.
For positively correlated noise they are waves with 0, 1, 2, … changes of sign: sines (DST-I) where correlation is
short, cosines (DCT-II) where it is long, and exactly the cosines in the limit of a random walk. Smooth series give the
Legendre polynomials (Gibson et al. 1992), which are close to those cosines.

So agreement with :func:`reference_axes` says that a series is stationary, correlated or smooth. It says nothing about
the system behind it; what may is a difference from surrogates (:mod:`dynprobe.metrics._surrogates`).

Refused: an axis whose eigenvalue is that of another up to rounding (it is any vector of a plane), and windows too few
for their length, :data:`WINDOWS_PER_DIM` per coordinate and at least :data:`LEAST_POINTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from dynprobe.errors import MetricError, did_you_mean
from dynprobe.metrics._geometry import NEAR_ZERO
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._range import in_range
from dynprobe.metrics._result import Array

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "AXES", "LEAST_POINTS", "WINDOWS_PER_DIM", "AxisKind", "DelayPca", "axis_similarity", "check_embedding",
    "constant", "delay_embed", "delay_pca", "lag_autocorrelation", "mirror_symmetry", "one_series", "reference_axes",
]  # fmt: skip

AxisKind: TypeAlias = Literal["cosine", "sine", "legendre"]
AXES: Final[tuple[AxisKind, ...]] = ("cosine", "sine", "legendre")
#: Fewest delay vectors of any number of this room, and fewest windows per coordinate of a principal axis.
LEAST_POINTS: Final = 20
WINDOWS_PER_DIM: Final = 10
_EPS = float(np.finfo(np.float64).eps)


def one_series(x: Any, name: str = "a delay embedding") -> Array:
    """Read one series [step] as float64.

    Raises:
        MetricError: It has another number of axes.
    """
    values, _ = as_array(x, name)
    if values.ndim != 1:
        raise MetricError(f"{name} takes one series[step], found {values.ndim} axes {list(values.shape)}.")
    return values


def check_embedding(dim: int, lag: int, theiler: int = 1) -> None:
    """Refuse dimensions, lags and Theiler windows that are no whole numbers of at least 1."""
    for name, value in (("dim", dim), ("lag", lag), ("theiler", theiler)):
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise MetricError(f"{name} is a whole number of at least 1, found {value!r}.")


def constant(x: Array) -> bool:
    """Whether a series has no variation beyond the rounding of its own numbers."""
    return not len(x) or float(np.ptp(x)) <= NEAR_ZERO * _EPS * float(np.abs(x).max())


def delay_embed(x: Any, dim: int, lag: int = 1) -> Float[np.ndarray, "point dim"]:
    """Return the delay windows of a series.

    Row i is (x_i, x_{i+lag}, …, x_{i+(dim−1)·lag}); there are n − (dim−1)·lag of them, none where that is negative.

    Args:
        x: Series [step].
        dim: Coordinates of a window, m.
        lag: Steps between two coordinates, τ.

    Returns:
        Windows [window, dim], a copy.

    Raises:
        MetricError: The series has another shape, or dim or lag is below 1.

    Source: Takens 1981.

    Example:
        >>> delay_embed([0.0, 1.0, 2.0, 3.0, 4.0], dim=2, lag=2).tolist()
        [[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]]
    """
    check_embedding(dim, lag)
    values = one_series(x)
    n = max(len(values) - (dim - 1) * lag, 0)
    return np.stack([values[j * lag : j * lag + n] for j in range(dim)], axis=-1)


def lag_autocorrelation(x: Any, lag: int = 1) -> float:
    """Return the correlation of a series with itself ``lag`` steps later; NaN where a side is constant.

    r = corr(x_{0…n−1−lag}, x_{lag…n−1}), each side with its own mean and standard deviation: the off-diagonal entry of
    the standardised two-column delay matrix, and not the estimator that divides by the variance of the whole series.

    Args:
        x: Series [step].
        lag: Steps.

    Raises:
        MetricError: The series has another shape, or the lag is below 1.

    Example:
        >>> lag_autocorrelation([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]), lag_autocorrelation([1.0, 1.0, 1.0])
        (-1.0, nan)
    """
    windows = delay_embed(x, 2, lag)
    if len(windows) < 2 or not np.isfinite(windows).all() or any(constant(c) for c in windows.T):
        return float("nan")
    a, b = (in_range(c - c.mean())[0] for c in in_range(windows)[0].T)
    r = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    return min(1.0, max(-1.0, r))


@dataclass(frozen=True, eq=False)
class DelayPca:
    """Principal components of delay windows, largest first.

    Attributes:
        shares: Share of the variance of each component [dim]; they sum to 1. NaN where ``reason`` is given.
        eigenvalues: Of the correlation (``standardise``) or covariance (ddof 1) matrix [dim].
        axes: Unit vectors, one per row [component, coordinate]; the first of the largest entries is positive. NaN where
            undefined.
        degenerate: Axes whose eigenvalue is another's up to rounding, and which are therefore NaN [dim].
        n_windows: Windows that took part.
        reason: Why there are no numbers, None where there are.
    """

    shares: Array
    eigenvalues: Array
    axes: Array
    degenerate: np.ndarray
    n_windows: int
    reason: str | None


def delay_pca(x: Any, dim: int, lag: int = 1, *, standardise: bool = True) -> DelayPca:
    """Return the principal axes of the delay windows of a series, or of the pooled windows of several.

    Args:
        x: Series [step], or a list of series; no window spans two of them.
        dim: Coordinates of a window, m.
        lag: Steps between two coordinates.
        standardise: Divide each coordinate by its own standard deviation over windows, as the follow-up of the
            attractor layer does; otherwise they are only centred.

    Returns:
        Shares, axes, and the number of windows. Reasons: ``nonfinite``, ``constant``, ``windows<k``.

    Raises:
        MetricError: A series has another shape, or dim or lag is below 1.

    Source: Broomhead & King 1986; Gibson et al. 1992 for the axes of smooth series.

    Example:
        >>> noise = np.random.default_rng(0).standard_normal(400)
        >>> found = delay_pca(noise, 2)
        >>> np.abs(found.axes).round(6).tolist()
        [[0.707107, 0.707107], [0.707107, 0.707107]]
    """
    parts = list(x) if isinstance(x, Sequence) and len(x) and np.ndim(x[0]) else [x]
    windows = np.concatenate([delay_embed(part, dim, lag) for part in parts])
    n, needed = len(windows), max(LEAST_POINTS, WINDOWS_PER_DIM * dim)
    nothing = np.full(dim, np.nan)
    reason = (
        "nonfinite"
        if not np.isfinite(windows).all()
        else f"windows<{needed}"
        if n < needed
        else "constant"
        if any(constant(c) for c in windows.T)
        else None
    )
    if reason:
        return DelayPca(nothing, nothing, np.full((dim, dim), np.nan), np.zeros(dim, bool), n, reason)
    centred = windows - windows.mean(0)
    if standardise:
        # a common scale first, so that squares of very small or large numbers stay in range
        centred = centred / np.abs(centred).max(0)
        centred /= np.sqrt((centred**2).sum(0))
        matrix = centred.T @ centred
    else:
        matrix = centred.T @ centred / (n - 1)
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    values, axes = np.maximum(values[::-1], 0.0), np.ascontiguousarray(vectors[:, ::-1].T)
    axes *= np.where(axes[np.arange(dim), np.argmax(np.abs(axes) > np.abs(axes).max(1, keepdims=True) - 1e-9, 1)] < 0,
                     -1.0, 1.0)[:, None]  # fmt: skip
    gaps = np.concatenate([[np.inf], values[:-1] - values[1:], [np.inf]])
    degenerate = np.minimum(gaps[:-1], gaps[1:]) <= NEAR_ZERO * dim * _EPS * values[0]
    axes[degenerate] = np.nan
    return DelayPca(values / values.sum(), values, axes, degenerate, n, None)


def reference_axes(dim: int, kind: AxisKind) -> Array:
    """Return the axes that noise and smooth series have anyway, slowest first.

    ``cosine``: DCT-II, c_k(j) ∝ cos(πk(j + ½)/m), of a random walk. ``sine``: DST-I, ∝ sin(π(k + 1)(j + 1)/(m + 1)), of
    noise with a correlation of one step. ``legendre``: orthonormal polynomials of degree k on the grid, of short
    windows of smooth series.

    Args:
        dim: Coordinates, m.
        kind: Which.

    Returns:
        Orthonormal rows [component, coordinate].

    Raises:
        MetricError: There is no such kind, or dim is below 1.

    Example:
        >>> reference_axes(3, "cosine").round(4).tolist()
        [[0.5774, 0.5774, 0.5774], [0.7071, 0.0, -0.7071], [0.4082, -0.8165, 0.4082]]
    """
    check_embedding(dim, 1)
    if kind not in AXES:
        raise MetricError(f"There are no {kind!r} axes.{did_you_mean(str(kind), AXES)} There are: {', '.join(AXES)}.")
    k, j = np.arange(dim)[:, None], np.arange(dim)[None, :]
    if kind == "sine":
        raw = np.sin(np.pi * (k + 1) * (j + 1) / (dim + 1))
    elif kind == "cosine":
        raw = np.cos(np.pi * k * (j + 0.5) / dim)
    else:
        basis, upper = np.linalg.qr((2.0 * j[0] - (dim - 1))[:, None] ** np.arange(dim) / float(dim) ** np.arange(dim))
        raw = (basis * np.where(np.diag(upper) < 0, -1.0, 1.0)).T
    out: Array = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return out


def axis_similarity(axes: Any, kind: AxisKind) -> tuple[Array, np.ndarray]:
    """Compare unit axes with the nearest axis that noise or a smooth series has.

    a_k = max_j |⟨v_k, c_j⟩| over all m reference axes c_j, in [1/√m, 1]. The order is free, because the axes of
    anticorrelated noise are the same ones in reverse.

    Args:
        axes: Unit rows [component, coordinate]; NaN rows stay NaN.
        kind: Which reference, see :func:`reference_axes`.

    Returns:
        a_k per component, and the number j of the reference axis (−1 for a NaN row).

    Raises:
        MetricError: There is no such kind, or the axes are no table.

    Example:
        >>> walk = np.random.default_rng(1).standard_normal(20_000).cumsum()
        >>> likeness, which = axis_similarity(delay_pca(walk, 4).axes, "cosine")
        >>> bool(likeness.min() > 0.999), which.tolist()
        (True, [0, 1, 2, 3])
    """
    rows, _ = as_array(axes, "axis_similarity")
    if rows.ndim != 2:
        raise MetricError(f"axis_similarity takes axes[component, coordinate], found {list(rows.shape)}.")
    overlap = np.abs(rows @ reference_axes(rows.shape[1], kind).T)
    known = np.isfinite(overlap).all(1)
    value = np.where(known, np.minimum(overlap.max(1, initial=0.0), 1.0), np.nan)
    return value, np.where(known, np.where(np.isnan(overlap), -1.0, overlap).argmax(1), -1)


def mirror_symmetry(axes: Any) -> Array:
    """Return |⟨v_k, reversed v_k⟩| of each axis: 1 for even and odd vectors, the only ones a Toeplitz matrix has.

    Args:
        axes: Unit rows [component, coordinate].

    Example:
        >>> mirror_symmetry([[0.6, 0.8], [0.0, 1.0]]).round(6).tolist()
        [0.96, 0.0]
    """
    rows, _ = as_array(axes, "mirror_symmetry")
    out: Array = np.minimum(np.abs((rows * rows[..., ::-1]).sum(-1)), 1.0)
    return out
