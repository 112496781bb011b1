"""Relaxation: how fast the response to one push dies out along the depth and along the tokens.

A line is fitted to ln ρ, the logarithm of the relative response, over a range that is fixed beforehand, and the rate is
its negative slope: a decay ρ ∝ e^{−λτ} has rate λ > 0, and a response that grows has a *negative* rate. Growth is not
turned into a missing number, because means over the prompts that happened to decay would all be too large.

Along the depth the range is every depth from the written one on, at the written position. Along the tokens it is every
later position, at the last depth; the written position itself is left out, since there the residual connection carries
the push to the end by itself. Responses at or below rounding (16·eps) are no signal and are dropped. Fewer than three
points make no rate (``"points<3"``), and where no response stands above rounding there is nothing to fit
(``"no-response"``). ``r2`` and the number of points stand beside each rate: a rate without them says little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import NEAR_ZERO
from dynprobe.metrics._inputs import as_pair
from dynprobe.metrics._registry import MetricSpec, register, register_column
from dynprobe.metrics._response import response
from dynprobe.metrics._result import Array, Bools, Result

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["relaxation"]

_FEWEST = 3
_FITS = ("ls", "theil")


def relaxation(
    grid: Float[np.ndarray, "depth pos"],
    *,
    depth: int,
    pos: int,
    eps: float = float(np.finfo(np.float32).eps),
    fit: str = "ls",
) -> dict[str, Result]:
    """Fit the relaxation rates of one impulse-response map.

    Args:
        grid: Relative response [depths, tokens] of one row, real tokens only.
        depth: Depth of the state that was written.
        pos: Position that was written.
        eps: Rounding unit of the states; responses up to 16·eps are dropped.
        fit: ``ls`` (least squares) or ``theil`` (Theil–Sen, the median of all pairwise slopes).

    Returns:
        ``relax_depth`` in 1/depth and ``relax_token`` in 1/token; ``r2``, ``n`` and ``intercept`` in ``extras``.

    Raises:
        MetricError: The place is not on the map, or the fit is unknown.

    Example:
        >>> decay = np.exp(-0.5 * np.arange(6.0))
        >>> found = relaxation(0.1 * decay[:, None] * decay[None, :], depth=0, pos=0)
        >>> round(found["relax_depth"].value, 9), round(found["relax_token"].value, 9)
        (0.5, 0.5)
    """
    grid = np.asarray(grid, dtype=np.float64)
    if grid.ndim != 2 or not (0 <= depth < grid.shape[0] and 0 <= pos < grid.shape[1]):
        raise MetricError(f"relax: depth {depth}, position {pos} is no place on a map of shape {list(grid.shape)}.")
    if fit not in _FITS:
        raise MetricError(f"relax: fit is one of {', '.join(_FITS)}, not {fit!r}.")
    suffix = "" if fit == "ls" else f"{{fit={fit}}}"
    return {
        "relax_depth": _rate(grid[depth:, pos], eps, fit, f"relax.depth/1{suffix}"),
        "relax_token": _rate(grid[-1, pos + 1 :], eps, fit, f"relax.token/1{suffix}"),
    }


def _rate(series: Array, eps: float, fit: str, metric_id: str) -> Result:
    finite = np.isfinite(series)
    used = finite & (np.where(finite, series, 0.0) > NEAR_ZERO * eps)
    n, lag = int(used.sum()), np.flatnonzero(used).astype(np.float64)
    coverage = float(finite.mean()) if len(series) else float("nan")
    reason = None
    if not len(series):
        reason = "empty"
    elif 2 * finite.sum() < len(series):
        reason = "coverage"
    elif n == 0:
        reason = "no-response"
    elif n < _FEWEST:
        reason = f"points<{_FEWEST}"
    if reason is not None:
        nothing = {"r2": float("nan"), "n": n, "intercept": float("nan")}
        return Result(float("nan"), reason, coverage, 1, n, metric_id, extras=nothing)
    y = np.log(series[used])
    slope, intercept = _line(lag, y, fit)
    spread = float(((y - y.mean()) ** 2).sum())
    # A constant response is fitted exactly by a rate of 0, and no share of its variance is explained: there is none.
    level = NEAR_ZERO * eps
    flat = spread <= len(y) * level**2
    r2 = float("nan") if flat else 1.0 - float(((y - intercept - slope * lag) ** 2).sum()) / spread
    return Result(-slope, None, coverage, 1, n, metric_id, extras={"r2": r2, "n": n, "intercept": intercept})


def _line(x: Array, y: Array, fit: str) -> tuple[float, float]:
    if fit == "theil":
        i, j = np.triu_indices(len(x), 1)
        slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
        return slope, float(np.median(y - slope * x))
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    return slope, float(y.mean() - slope * x.mean())


def _compute(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, inject: int = 0, pos: int = 0
) -> Result:
    a, b = as_pair(inputs, mask, metric_id)
    keep: Bools = np.logical_and.reduce(a.keep[:, 0], axis=0)
    if not 0 <= pos < len(keep) or not keep[pos]:
        raise MetricError(f"{metric_id}: pos={pos} is no unmasked unit of {len(keep)}.")
    grid = response(a.states, b.states, keep[None])[:, 0][:, keep]
    found = relaxation(grid, depth=inject, pos=int(keep[:pos].sum()), eps=a.eps, fit=params["fit"])
    result = found["relax_depth" if metric_id.startswith("relax.depth") else "relax_token"]
    return Result(**{name: getattr(result, name) for name in Result.__slots__} | {"dtype": b.dtype})


def _define(axis: str, sentence: str, series: str, latex: str, vectors: tuple[str, ...]) -> None:
    column = f"relax_{axis}"
    register(
        MetricSpec(
            id=f"relax.{axis}/1",
            sentence=sentence,
            formula=(
                f"ρ_{{l,n}} = ‖x'_{{l,n}} − x_{{l,n}}‖/‖x_{{l,n}}‖; write at depth m, unit p; series {series}; points "
                "with ρ > 16·eps; value = −slope of ln ρ over τ, by least squares (fit=ls) or Theil–Sen (fit=theil); "
                "fewer than 3 points → NaN; growth is a negative rate; r² = 1 − SS_res/SS_tot of the line"
            ),
            latex=(
                r"\rho_{l,n} = \frac{\lVert x'_{l,n}-x_{l,n}\rVert}{\lVert x_{l,n}\rVert}, \qquad "
                rf"\ln\rho_{{{latex}}}\approx c-\lambda\tau"
            ),
            input="trajectory[depth,unit,dim]×2, clean first, units in order of time",
            value_range="(−∞, ∞)",
            unit=f"1/{axis}",
            invariances=frozenset({"R", "R_l", "S", "S_l", "scale-per-state"}),
            source="dynprobe",
            params={"fit": "ls"},
            column=column,
            levels={"sample": "one impulse"},
            vectors=vectors,
            groups=frozenset({"paired", "response"}),
        ),
        _compute,
        arity=2,
    )
    register_column(f"{column}_r2", f"relax.{axis}/1", "1", {"sample": "r² of the fit"})
    register_column(f"{column}_n", f"relax.{axis}/1", "points", {"sample": "points of the fit"})


_define(
    "depth",
    "Rate at which the response to a push decays along depth at the written unit.",
    "ρ_{m+τ,p}, τ = 0, 1, …",
    r"m+\tau,\,p",
    ("ρ ∝ e^{−λτ} → λ, r² 1", "ρ = α 2^τ → −ln 2"),
)
_define(
    "token",
    "Rate at which the response to a push decays along the later units at the last depth.",
    "ρ_{D,p+τ}, τ = 1, 2, …",
    r"D,\,p+\tau",
    ("ρ ∝ e^{−λτ} → λ, r² 1", "no later response → NaN no-response"),
)
