"""How many directions the units of a depth use: effective rank, participation ratio, stable rank, matrix entropy.

All read the singular values σ of the matrix whose rows are the units. They differ in the weight of small directions:
``erank.rv`` takes the entropy of σ/Σσ, the matrix entropy that of σ²/Σσ² with rows of unit length,
``erank.participation`` the inverse Simpson index of σ², ``erank.stable`` only the largest σ. Each is at most the number
of units, so values at different numbers of tokens are not comparable; ``entropy.matrix`` has normalisers for that.

The matrix is taken as given. ``centre=mean`` subtracts the mean over units first (before the rows are made unit
vectors); centred and uncentred values are different quantities, and the option is part of the id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms_and_validity
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import Terms, mean_of_profile
from dynprobe.metrics._registry import MetricSpec, Scorer, register
from dynprobe.metrics._result import Array, Bools, Result, Scores
from dynprobe.metrics._spectrum import Spectra, spectra

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = ["RANKS", "rank_scores"]

NORMALISERS = ("raw", "logn", "logd", "lognlogd", "logmin")


def _shannon(p: Array) -> Array:
    """−Σ p ln p over the last axis, 0·ln 0 = 0."""
    entropy: Array = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)
    return entropy


def _shares(weight: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Array = weight / weight.sum(-1, keepdims=True)
    return share


def _effective(s: Spectra, depth: int, params: dict[str, Any]) -> Array:
    return np.asarray(np.exp(_shannon(_shares(s.values[depth]))))


def _participation(s: Spectra, depth: int, params: dict[str, Any]) -> Array:
    return np.asarray(1.0 / (_shares(s.values[depth] ** 2) ** 2).sum(-1))


def _stable(s: Spectra, depth: int, params: dict[str, Any]) -> Array:
    sigma = s.values[depth]
    return np.asarray(((sigma / sigma.max(-1, initial=0.0)[:, None]) ** 2).sum(-1))


def _entropy(s: Spectra, depth: int, params: dict[str, Any]) -> Array:
    p, order = _shares(s.values[depth] ** 2), float(params["order"])
    if order == 1.0:
        entropy = _shannon(p)
    elif math.isinf(order):
        entropy = -np.log(p.max(-1, initial=0.0))
    else:
        entropy = np.log((p**order).sum(-1)) / (1.0 - order)
    log_n, log_d = np.log(s.rows[depth]), math.log(max(s.dims[depth], 1))
    bottom: Any = {
        "raw": 1.0, "logn": log_n, "logd": log_d, "lognlogd": log_n * log_d, "logmin": np.minimum(log_n, log_d),
    }[params["norm"]]  # fmt: skip
    # a rounding of −1e-16 is no negative entropy; a zero normaliser leaves NaN
    return np.asarray(np.maximum(entropy, 0.0) / np.where(np.asarray(bottom) > 0, bottom, np.nan))


#: metric → (how it reads a spectrum, whether rows are unit vectors).
RANKS: dict[str, tuple[Callable[[Spectra, int, dict[str, Any]], Array], bool]] = {
    "erank.rv/1": (_effective, False),
    "erank.participation/1": (_participation, False),
    "erank.stable/1": (_stable, False),
    "entropy.matrix/1": (_entropy, True),
}


def check_params(metric: str, params: dict[str, Any]) -> None:
    """Refuse an order or a normaliser that does not exist."""
    if "norm" in params and params["norm"] not in NORMALISERS:
        raise MetricError(f"{metric}: norm is one of {', '.join(NORMALISERS)}, found {params['norm']!r}.")
    if "order" in params and not params["order"] > 0:
        raise MetricError(f"{metric}: order is a number above 0 (1 = Shannon, inf = min-entropy), found "
                          f"{params['order']!r}.")  # fmt: skip


def rank_scores(
    metric: str, states: Sequence[torch.Tensor], norm: Array, valid: Bools, keep: Bools, *, eps: float,
    params: dict[str, Any], found: Spectra | None = None,
) -> Scores:  # fmt: skip
    """Score every row.

    Args:
        metric: One of :data:`RANKS`.
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        eps: Rounding unit.
        params: Parameters of the metric.
        found: Singular values, where they were made before.
    """
    check_params(metric, params)
    read, unit = RANKS[metric]
    s = found or spectra(states, norm, valid & keep, eps=eps, centre=params["centre"], unit=unit)
    profile = np.full(keep.shape[:2], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        for depth in range(len(profile)):
            profile[depth] = np.where(s.rows[depth] > 0, read(s, depth, params), np.nan)
    scores = mean_of_profile(profile, Terms(valid, keep, keep.sum((0, 2))))
    scores.extras = {"n_invalid": (keep & ~valid).sum((0, 2)), "n_nonfinite": (keep & np.isnan(norm)).sum((0, 2))}
    return scores


def _computer(metric: str) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        (x,) = inputs
        t = as_trajectory(x, mask, metric_id, ragged=True)
        norm, valid = norms_and_validity(t.states, t.keep)
        scores = rank_scores(metric, t.states, norm, valid, t.keep, eps=t.eps, params=params)
        return scores.result(0, metric_id, dtype=t.dtype)

    return compute


def _scorer(metric: str) -> Scorer:
    def score(c: Context, params: dict[str, Any]) -> Scores:
        found = c.spectra(params["centre"], RANKS[metric][1])
        return rank_scores(metric, *c.of_span, eps=c.w.eps, params=params, found=found)

    return score


_MATRIX = (
    "σ: singular values of the matrix of valid units (rows), as given, those ≤ max(N, d)·2⁻⁵²·σ₁ zero; centre=mean: "
    "mean over units subtracted, rows left ≤ 16·eps of the largest norm zero; "
)
_MEAN = "; value = mean over depths"
_COMMON: dict[str, Any] = {
    "input": "trajectory[depth,unit,dim], dim may differ by depth",
    "levels": {"profile": "one matrix per depth", "sample": "mean over depths"},
    "groups": frozenset({"optional"}),
}
_INVARIANCES = frozenset({"R", "R_l", "S", "S_l", "P"})

register(
    MetricSpec(
        id="erank.rv/1",
        span=True,
        sentence="Effective rank of the units' matrix: exponential of the entropy of its normalised singular values.",
        formula=f"{_MATRIX}p_i = σ_i/Σσ; erank = exp(−Σ p_i ln p_i), 0·ln 0 = 0{_MEAN}",
        latex=(
            r"p_i = \frac{\sigma_i}{\sum_j\sigma_j}, \qquad \mathrm{erank}_l = \exp\Bigl(-\sum_i p_i\ln p_i\Bigr), "
            r"\qquad \operatorname*{mean}_{l}\mathrm{erank}_l"
        ),
        value_range="[1, min(N, d)]",
        unit="1",
        invariances=_INVARIANCES,
        source="Roy & Vetterli 2007; RankMe (arXiv 2210.02885)",
        params={"centre": "none"},
        column="erank",
        vectors=(
            "erank-1: σ = (3, 1) → 4/3^{3/4} = 1.7547653506",
            "r equal σ → r",
            "zero matrix → NaN",
            "equal units, centre=mean → NaN zero-denominator",
        ),
        **_COMMON,
    ),
    _computer("erank.rv/1"),
    score=_scorer("erank.rv/1"),
)
register(
    MetricSpec(
        id="erank.participation/1",
        span=True,
        sentence="Participation ratio of the squared singular values of the units' matrix.",
        formula=f"{_MATRIX}λ = σ²; PR = (Σλ)²/Σλ²{_MEAN}",
        latex=(
            r"\lambda_i = \sigma_i^2, \qquad \mathrm{PR}_l = \frac{\bigl(\sum_i\lambda_i\bigr)^2}{\sum_i\lambda_i^2}, "
            r"\qquad \operatorname*{mean}_{l}\mathrm{PR}_l"
        ),
        value_range="[1, min(N, d)]",
        unit="1",
        invariances=_INVARIANCES,
        source="standard (inverse Simpson index)",
        params={"centre": "none"},
        column="erank_participation",
        vectors=("λ = (3, 1) → 1.6", "r equal λ → r", "zero matrix → NaN"),
        **_COMMON,
    ),
    _computer("erank.participation/1"),
    score=_scorer("erank.participation/1"),
)
register(
    MetricSpec(
        id="erank.stable/1",
        span=True,
        sentence="Stable rank of the units' matrix: squared Frobenius norm over squared spectral norm.",
        formula=f"{_MATRIX}‖A‖_F²/σ₁²{_MEAN}",
        latex=(
            r"r_l = \frac{\lVert A_l\rVert_F^2}{\sigma_1^2} = \frac{\sum_i\sigma_i^2}{\sigma_1^2}, \qquad "
            r"\operatorname*{mean}_{l} r_l"
        ),
        value_range="[1, min(N, d)]",
        unit="1",
        invariances=_INVARIANCES,
        source="Rudelson & Vershynin 2007",
        params={"centre": "none"},
        column="erank_stable",
        vectors=("σ = (3, 1) → 10/9", "r equal σ → r", "zero matrix → NaN"),
        **_COMMON,
    ),
    _computer("erank.stable/1"),
    score=_scorer("erank.stable/1"),
)
register(
    MetricSpec(
        id="entropy.matrix/1",
        span=True,
        sentence="Rényi entropy of the spectrum of the trace-normalised Gram matrix of unit-length units.",
        formula=(
            "rows x̂ = x/‖x‖ (centre=mean: mean over units subtracted before); λ = eigenvalues of X̂X̂ᵀ/N, zero below "
            "(max(N, d)·2⁻⁵²)² of the largest; order 1: "
            "S = −Σ λ ln λ; else S = ln(Σ λ^order)/(1 − order); order inf: −ln max λ; norm raw: S; logn: S/ln N; "
            f"logd: S/ln d; lognlogd: S/(ln N·ln d); logmin: S/min(ln N, ln d); N = units left; Gram entries not "
            f"clamped{_MEAN}"
        ),
        latex=(
            r"\lambda = \operatorname{eig}\Bigl(\frac{1}{N}\hat X\hat X^{\mathsf T}\Bigr), \qquad "
            r"S_a = \begin{cases} -\sum_i\lambda_i\ln\lambda_i & a = 1 \\ \dfrac{\ln\sum_i\lambda_i^{a}}{1-a} & "
            r"a\ne 1 \\"
            r"-\ln\max_i\lambda_i & a = \infty \end{cases}, \qquad a = \mathrm{order}, \qquad "
            r"\operatorname*{mean}_{l} S_a"
        ),
        value_range="raw [0, ln min(N, d)]; logmin [0, 1]",
        unit="nat",
        invariances=_INVARIANCES | {"scale-per-state"},
        source="Giraldo et al. 2014; OFSkean/information_flow without its clamp (arXiv 2502.02013)",
        params={"centre": "none", "norm": "raw", "order": 1.0},
        column="entropy_matrix",
        vectors=(
            "N identical units → 0",
            "N orthonormal units → ln N, every order; norm=logn → 1",
            "N = 1, norm=logn → NaN zero-denominator",
        ),
        **_COMMON,
    ),
    _computer("entropy.matrix/1"),
    score=_scorer("entropy.matrix/1"),
)
