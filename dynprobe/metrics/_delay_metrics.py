"""Catalogue entries of delay embedding: one number of one series, by id.

None is a column of a run: a number of these without its surrogates invites the very conclusion that it cannot carry, so
tables hold them only as :func:`dynprobe.delay_diagnostics` writes them. ``extras`` of every result carry the lag-1
autocorrelation, the end mismatch and the number of points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._delay import axis_similarity, delay_pca, lag_autocorrelation, mirror_symmetry
from dynprobe.metrics._false_neighbours import false_neighbours
from dynprobe.metrics._inputs import as_series
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result
from dynprobe.metrics._surrogates import end_mismatch

__all__: list[str] = []

_NAN = float("nan")
_Found = tuple[float, str | None, dict[str, Any]]


def _computer(read: Callable[[Array, dict[str, Any]], _Found]) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        s = as_series(inputs[0], mask, metric_id)
        x, n_ok = s.values[0][s.keep[0]], int(s.ok.sum())
        if len(x) and n_ok == len(x):
            value, reason, extras = read(x, params)
        else:
            # a hole is not closed up: that would make neighbours of steps that are none
            value, reason, extras = _NAN, "nonfinite" if len(x) else "empty", {}
        extras |= {"r1": lag_autocorrelation(x), "end_mismatch": end_mismatch(x) if len(x) else _NAN}
        coverage = n_ok / len(x) if len(x) else _NAN
        return Result(value, reason, coverage, 1, len(x), metric_id, dtype=s.dtype, extras=extras)

    return compute


def _autocorr(x: Array, p: dict[str, Any]) -> _Found:
    value = lag_autocorrelation(x, p["lag"])
    short = len(x) < p["lag"] + 2
    reason = None if not np.isnan(value) else f"steps<{p['lag'] + 2}" if short else "constant"
    return value, reason, {}


def _fnn(x: Array, p: dict[str, Any]) -> _Found:
    (found,) = false_neighbours(x, (p["m"],), p["lag"], p["theiler"], rtol=p["rtol"], atol=p["atol"])
    extras = {k: getattr(found, k) for k in ("by_distance", "by_size", "n_points", "n_equal")}
    return found.share, found.reason, extras


def _axis(part: str) -> Callable[[Array, dict[str, Any]], _Found]:
    def read(x: Array, p: dict[str, Any]) -> _Found:
        k, m = p["k"], p["m"]
        if k != int(k) or not 1 <= k <= m:
            raise MetricError(f"delay.pc_{part}: k is the number of an axis, 1 … m; found k={k}, m={m}.")
        found = delay_pca(x, m, p["lag"])
        values = {
            "share": lambda: found.shares,
            "mirror": lambda: mirror_symmetry(found.axes),
            "cosine": lambda: axis_similarity(found.axes, "cosine")[0],
        }[part]()
        reason = found.reason or ("degenerate" if part != "share" and found.degenerate[k - 1] else None)
        return float(values[k - 1]), reason, {"n_windows": found.n_windows}

    return read


_COMMON: dict[str, Any] = {
    "input": "series",
    "unit": "1",
    "invariances": frozenset({"S", "shift"}),
    "groups": frozenset({"optional"}),
}
_WINDOWS = (
    "windows (x_i, x_{i+lag}, …, x_{i+(m−1)lag}), each coordinate standardised over windows; at least max(20, 10·m) of "
    "them, else NaN windows<k; holes → NaN nonfinite; "
)
_AXIS: dict[str, Any] = {
    "params": {"k": 1, "lag": 1, "m": 2},
    "source": "Broomhead & King 1986; what noise gives: dynprobe",
    **_COMMON,
}
register(
    MetricSpec(
        id="delay.autocorr/1",
        sentence="Correlation of a series with itself some steps later.",
        formula="corr(x_{0…n−1−lag}, x_{lag…n−1}), each side with its own mean and SD; holes → NaN nonfinite",
        latex=(
            r"r_\tau = \operatorname{corr}\bigl(x_{0\dots n-1-\tau},\ x_{\tau\dots n-1}\bigr), \qquad \tau = "
            r"\mathrm{lag}"
        ),
        value_range="[−1, 1]",
        params={"lag": 1},
        source="dynprobe; off-diagonal entry of the standardised two-column delay matrix",
        vectors=("0, 1, 0, 1, 0, 1 → −1", "a ramp → 1", "constant → NaN constant"),
        **_COMMON,
    ),
    _computer(_autocorr),
)
register(
    MetricSpec(
        id="delay.fnn/1",
        sentence="Share of nearest neighbours in m delay coordinates that one more coordinate shows to be false.",
        formula=(
            "i = 0 … n − 1 − m·lag; j nearest (Euclidean, m coordinates) with |i − j| ≥ theiler, the earliest of equal "
            "ones; R its distance, δ = |x_{i+m·lag} − x_{j+m·lag}|; false: δ > rtol·R, or √(R² + δ²) > atol·σ, σ² = "
            "Σ(x − x̄)²/n; at least max(20, ⌈10^{m/2}⌉) points with a neighbour, else NaN points<k"
        ),
        latex=(
            r"\begin{aligned} y_i &= (x_i,\,x_{i+\tau},\dots,x_{i+(m-1)\tau}), \qquad "
            r"j(i) = \operatorname*{argmin}_{j\,:\,|i-j|\ge w}\lVert y_i-y_j\rVert, \qquad "
            r"\tau = \mathrm{lag},\ w = \mathrm{theiler} \\"
            r"R_i &= \lVert y_i-y_{j(i)}\rVert, \qquad \delta_i = |x_{i+m\tau}-x_{j(i)+m\tau}| \\"
            r"\mathrm{FNN} &= \operatorname*{mean}_{i}\ \mathbb{1}\Bigl[\delta_i > \mathrm{rtol}\cdot R_i \ \text{ "
            r"or }\ \sqrt{R_i^2+\delta_i^2} > \mathrm{atol}\cdot\sigma\Bigr] \end{aligned}"
        ),
        value_range="[0, 1]",
        params={"atol": 2.0, "lag": 1, "m": 2, "rtol": 15.0, "theiler": 1},
        source="Kennel, Brown & Abarbanel 1992; needs surrogates: dynprobe.delay_diagnostics",
        vectors=(
            "0, 1, 0, −1 repeated, n = 100: m = 1 → 26/99, m = 2 → 0",
            "n = 21, m = 2 → NaN points<20",
            "constant → NaN constant",
        ),
        **_COMMON,
    ),
    _computer(_fnn),
)
register(
    MetricSpec(
        id="delay.pc_share/1",
        sentence="Share of the variance of delay windows along their k-th principal axis.",
        formula=_WINDOWS + "λ_k/m, λ_k eigenvalues of their correlation matrix; m = 2: (1 ± |r|)/2, r the "
        "autocorrelation at the lag",
        latex=(
            r"\frac{\lambda_k}{m}, \qquad \lambda = \operatorname{eig}\ "
            r"\operatorname*{corr}_{i}\bigl(x_i,\,x_{i+\tau},\dots,x_{i+(m-1)\tau}\bigr), \quad "
            r"\lambda_1\ge\lambda_2\ge\dots"
        ),
        value_range="[0, 1]",
        vectors=("0, 1 repeated, n = 30: m = 2 → 1", "n = 20, m = 2 → NaN windows<20"),
        **_AXIS,
    ),
    _computer(_axis("share")),
)
register(
    MetricSpec(
        id="delay.pc_mirror/1",
        sentence="How nearly the k-th principal axis of delay windows is even or odd.",
        formula=_WINDOWS + "|⟨v_k, v_k reversed⟩|; an eigenvalue equal to another up to rounding → NaN degenerate; "
        "m = 2: 1 for every series",
        latex=(
            r"\bigl|\langle v_k,\,\overleftarrow{v_k}\rangle\bigr|, \qquad \overleftarrow{v}(i) = v(m-1-i), \quad "
            r"v_k \text{ the } k\text{-th principal axis of delay windows}"
        ),
        value_range="[0, 1]",
        vectors=("m = 2, r ≠ 0 → 1", "0, 1 repeated, n = 42: m = 3, k = 2 → NaN degenerate"),
        **_AXIS,
    ),
    _computer(_axis("mirror")),
)
register(
    MetricSpec(
        id="delay.pc_cosine/1",
        sentence="Likeness of the k-th principal axis of delay windows to the nearest cosine, as of a random walk.",
        formula=_WINDOWS + "max_j |⟨v_k, c_j⟩|, c_j(i) ∝ cos(πj(i + ½)/m); an eigenvalue equal to another up to "
        "rounding → NaN degenerate; m = 2: 1 for every series",
        latex=r"\max_{j}\bigl|\langle v_k,\,c_j\rangle\bigr|, \qquad c_j(i)\propto\cos\frac{\pi j\,(i+\frac{1}{2})}{m}",
        value_range="[1/√m, 1]",
        vectors=("m = 2, r ≠ 0 → 1", "a random walk of 20,000 steps, m = 4 → above 0.999"),
        **_AXIS,
    ),
    _computer(_axis("cosine")),
)
