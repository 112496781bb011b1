"""Surrogates: series that keep some of what a series is, and are otherwise chance.

A statistic of a series says something only beside its values on series that share what is not of interest. Four kinds,
each a null hypothesis:

| kind | keeps | null hypothesis |
|---|---|---|
| ``ft`` | every Fourier amplitude, hence mean, variance and the circular autocorrelation | linear Gaussian noise |
| ``aaft`` | every value; the spectrum roughly (flattened on short series) | a monotone function of such noise |
| ``iaaft`` | every value; the spectrum as nearly as the values allow | the same |
| ``ar1`` | the fitted lag-1 regression, the size of its residuals, the first value | AR(1) noise, random walks too |

Theiler et al. 1992; Schreiber & Schmitz 1996. What none of them keeps: a trend, and a jump between the last value and
the first, which the Fourier transform takes for part of the series (:func:`end_mismatch`). Of a random walk or a ramp
``ft`` and ``iaaft`` therefore make something else, and ``ar1`` is the one to read.

The draw is a pure function of (seed, key, kind, number): a counter-based generator (Philox) is addressed, so surrogate
7 is the same whether 39 or 999 are made, and however many series are looked at beside it. Give series of one study
keys of their own: with equal keys and lengths they share their noise.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from dynprobe.errors import MetricError, did_you_mean
from dynprobe.metrics._delay import constant, one_series
from dynprobe.metrics._result import Array

__all__ = ["SURROGATES", "SurrogateKind", "ar1_fit", "end_mismatch", "spectrum_error", "surrogates"]

SurrogateKind: TypeAlias = Literal["ft", "aaft", "iaaft", "ar1"]
SURROGATES: Final[tuple[SurrogateKind, ...]] = ("ft", "aaft", "iaaft", "ar1")
_ROUNDS: Final = 1000
#: Fewest values that can be refitted or rearranged into something else.
_LEAST: Final = 8


def surrogates(x: Any, kind: SurrogateKind, n: int = 39, *, seed: int = 0, key: str = "") -> Array:
    """Return surrogates of a series.

    Args:
        x: Series [step] of at least 8 finite values that are not all equal.
        kind: ``ft``, ``aaft``, ``iaaft`` or ``ar1``.
        n: How many.
        seed: Seed of the draw.
        key: Name of the series, part of the draw.

    Returns:
        Surrogates [surrogate, step].

    Raises:
        MetricError: There is no such kind, or the series is too short, constant or has holes.

    Source: Theiler et al. 1992, Physica D 58, 77; Schreiber & Schmitz 1996, Phys. Rev. Lett. 77, 635.

    Example:
        >>> x = np.random.default_rng(0).standard_normal(64).cumsum()
        >>> made = surrogates(x, "iaaft", 3)
        >>> made.shape, bool((np.sort(made) == np.sort(x)).all())
        ((3, 64), True)
        >>> amplitude = np.abs(np.fft.rfft(surrogates(x, "ft", 3)))
        >>> bool(np.allclose(amplitude, np.abs(np.fft.rfft(x)), rtol=1e-9))
        True
    """
    values = one_series(x, "surrogates")
    if kind not in SURROGATES:
        near = did_you_mean(str(kind), SURROGATES)
        raise MetricError(f"There is no surrogate {kind!r}.{near} There are: {', '.join(SURROGATES)}.")
    if len(values) < _LEAST or not np.isfinite(values).all() or constant(values):
        raise MetricError(
            f"surrogates need at least {_LEAST} finite values that are not all equal; found {len(values)} values, "
            f"{int(np.isfinite(values).sum())} finite."
        )
    if n < 1 or seed < 0:
        raise MetricError(f"n is at least 1 and seed at least 0; found {n} and {seed}.")
    drawn = [_drawn(_generator(seed, key, kind, number), len(values)) for number in range(n)]
    noise, phases = np.stack([one for one, _ in drawn]), np.stack([two for _, two in drawn])
    if kind == "ar1":
        return _ar1(values, noise)
    # numbers of ordinary size inside; scaled back, and for values taken from the series itself, at the end
    centre, scale = float(values.mean()), float(np.abs(values - values.mean()).max())
    plain = (values - centre) / scale
    if kind == "ft":
        return centre + scale * _with_phases(plain, phases)
    ordered = np.sort(values)
    if kind == "aaft":
        gauss = np.sort(noise, axis=1)[:, _ranks(plain)]
        made = np.stack([_with_phases(g, p[None])[0] for g, p in zip(gauss, phases, strict=True)])
        return ordered[_ranks(made)]
    return ordered[_iaaft_ranks(plain, noise)]


def _generator(seed: int, key: str, kind: str, number: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{len(key)}:{key}{kind}".encode(), digest_size=8).digest()
    # The number stands in the highest word of the counter: in a lower one neighbours would be shifted copies.
    return np.random.Generator(
        np.random.Philox(key=[seed, int.from_bytes(digest, "big")], counter=[0, 0, 0, number])
    )  # fmt: skip


def _drawn(draw: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Normals [n] and uniform phases of the frequencies 0 … n/2: that of the mean is 0, of an even n's last 0 or π."""
    noise, share = draw.standard_normal(n), draw.random(n // 2 + 1)
    phases = 2.0 * np.pi * share
    phases[0] = 0.0
    if n % 2 == 0:
        phases[-1] = np.pi * float(share[-1] >= 0.5)
    return noise, phases


def _with_phases(x: Array, phases: Array) -> Array:
    """The series with its amplitudes and these phases [surrogate, frequency]."""
    spectrum = np.abs(np.fft.rfft(x)) * np.exp(1j * phases)
    # the mean may be negative, and an amplitude has no sign
    spectrum[:, 0] = x.sum()
    return np.fft.irfft(spectrum, n=len(x))


def _ranks(x: Array) -> np.ndarray:
    return np.argsort(np.argsort(x, axis=-1, kind="stable"), axis=-1, kind="stable")


def _iaaft_ranks(x: Array, noise: Array) -> np.ndarray:
    """Ranks that a surrogate takes: amplitudes and values are put right in turn until the order stays."""
    amplitude, ordered = np.abs(np.fft.rfft(x)), np.sort(x)
    ranks = _ranks(noise)
    live = np.arange(len(ranks))
    for _ in range(_ROUNDS):
        spectrum = np.fft.rfft(ordered[ranks[live]], axis=1)
        size = np.abs(spectrum)
        with np.errstate(divide="ignore", invalid="ignore"):
            turned = np.where(size > 0, spectrum / size, 1.0) * amplitude
        after = _ranks(np.fft.irfft(turned, n=len(x), axis=1))
        moved = (after != ranks[live]).any(1)
        ranks[live] = after
        live = live[moved]
        if not len(live):
            break
    return ranks


def ar1_fit(x: Any) -> tuple[float, float, float]:
    """Return (c, φ, s) of x_{t+1} = c + φ·x_t + s·ε, least squares; s² = Σ e²/(n − 3).

    φ of a short series is too small by about (1 + 3φ)/n (Kendall 1954), and is left so.

    Example:
        >>> [round(v, 6) for v in ar1_fit([1.0, 2.0, 3.0, 4.0, 5.0])]
        [1.0, 1.0, 0.0]
    """
    values = one_series(x, "ar1_fit")
    if len(values) < 5 or constant(values[:-1]):
        raise MetricError(f"ar1_fit needs at least 5 values that are not all equal, found {len(values)}.")
    a, b = values[:-1] - values[:-1].mean(), values[1:] - values[1:].mean()
    phi = float(a @ b / (a @ a))
    residual = b - phi * a
    return (
        float(values[1:].mean() - phi * values[:-1].mean()), phi,
        float(np.sqrt(residual @ residual / (len(residual) - 2))),
    )  # fmt: skip


def _ar1(x: Array, noise: Array) -> Array:
    # around the mean of the predictors: c + φx would lose digits on a series far from 0
    middle, after = float(x[:-1].mean()), float(x[1:].mean())
    _, phi, s = ar1_fit(x - middle)
    out = np.empty_like(noise)
    state = np.full(len(noise), x[0] - middle)
    out[:, 0] = state
    for t in range(1, len(x)):
        state = (after - middle) + phi * state + s * noise[:, t]
        out[:, t] = state
    return out + middle


def spectrum_error(x: Any, made: Any) -> Array:
    """Return how far the amplitudes of surrogates are from those of the series, √(Σ(|X| − |S|)²/Σ|X|²), mean left out.

    Args:
        x: Series [step].
        made: Surrogates [surrogate, step].

    Example:
        >>> x = np.arange(16.0) ** 2
        >>> bool(spectrum_error(x, surrogates(x, "ft", 2)).max() < 1e-12)
        True
    """
    own = np.abs(np.fft.rfft(one_series(x, "spectrum_error")))[1:]
    other = np.abs(np.fft.rfft(np.asarray(made, dtype=np.float64), axis=-1))[..., 1:]
    out: Array = np.sqrt(((other - own) ** 2).sum(-1) / (own**2).sum())
    return out


def end_mismatch(x: Any) -> float:
    """Return (x_{n−1} − x_0)²/Σ(x − x̄)²: the share of a jump that the Fourier transform sees at the ends.

    About 2/n for noise. Where it is much more, ``ft`` and ``iaaft`` make surrogates of the jump.

    Example:
        >>> round(end_mismatch(np.arange(10.0)), 4)
        0.9818
    """
    values = one_series(x, "end_mismatch")
    if constant(values) or not np.isfinite(values).all():
        return float("nan")
    centred = values - values.mean()
    return float((values[-1] - values[0]) ** 2 / (centred @ centred))
