"""Readiness: how much of the calibrated operating band of a signal is still available.

A band goes from the usual level of a signal (the median of the model left alone) to the edge of what it does by itself
(its 99th percentile). Readiness is 1 at the usual level or better and 0 at the edge or beyond. Several signals are
joined by their geometric mean, so that one exhausted signal is enough for no readiness.

Every signal is oriented so that **larger is worse** and has a band of its own; a signal that is worse when smaller is
handed in with its sign turned, and its band likewise. Readiness is a monotone function of its signals by construction:
a mode that lowers κ cannot lower it. It is never independent evidence of recovery.

What is refused: a band whose edge does not lie above its usual level has no inside (``"degenerate-band"``). A signal
that is not a finite number gives no readiness, and one such signal leaves the product undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._either import Floats, opened
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result, first_reason

__all__ = ["readiness", "readiness_gmean"]


def readiness(signal: Floats, low: float, high: float) -> Any:
    """Share of the band that is left: r = 1 − clip((q − low)/(high − low), 0, 1).

    Args:
        signal: Values of any shape, larger = worse; array or tensor.
        low: Lower edge of the band, the median of clean calibration runs.
        high: Upper edge, their 99th percentile.

    Returns:
        Readiness in [0, 1], same shape and kind; NaN where the signal is not finite, NaN everywhere for a degenerate
        band (``high ≤ low``).

    Source:
        Metric ``readiness.band/1``.

    Example:
        >>> readiness([0.1, 0.2, 0.3, 0.9], low=0.1, high=0.3).round(12).tolist()
        [1.0, 0.5, 0.0, 0.0]
    """
    x, back = opened(signal, "readiness")
    return back(_band(x, torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)))


def readiness_gmean(signals: Floats, low: Any, high: Any) -> Any:
    """Geometric mean of the readiness of several signals: r = (Π_j r_j)^{1/J}.

    Args:
        signals: Values [signal, …], each oriented larger = worse.
        low: Lower edges [signal].
        high: Upper edges [signal].

    Returns:
        Readiness […] in [0, 1]; NaN where any signal is not finite or any band is degenerate.

    Raises:
        MetricError: There is not one band per signal.

    Source:
        Metric ``readiness.gmean/1``.

    Example:
        >>> round(float(readiness_gmean([[0.0], [7.5]], low=[0, 0], high=[1, 10])[0]), 12)
        0.5
    """
    x, back = opened(signals, "readiness_gmean")
    lo, hi = (torch.as_tensor(np.asarray(edge, dtype=np.float64)) for edge in (low, high))
    if x.ndim < 1 or not len(x) or lo.shape != (len(x),) or hi.shape != (len(x),):
        raise MetricError(
            f"readiness.gmean takes signals [signal, …] and one low and high per signal, found {list(x.shape)}, "
            f"{list(lo.shape)} and {list(hi.shape)}."
        )
    shape = (len(x), *[1] * (x.ndim - 1))
    return back(_band(x, lo.reshape(shape), hi.reshape(shape)).prod(0) ** (1.0 / len(x)))


def _band(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    lo, hi = low.to(x.device, torch.float64), high.to(x.device, torch.float64)
    inside = torch.isfinite(x) & (hi > lo) & torch.isfinite(hi - lo)
    r = 1.0 - ((x.double() - lo) / (hi - lo)).clamp(0.0, 1.0)
    return torch.where(inside, r, torch.nan).to(x.dtype)


def _compute(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, low: Any = None, high: Any = None
) -> Result:
    x, dtype = as_array(inputs[0], metric_id)
    several = metric_id.startswith("readiness.gmean")
    if low is None or high is None:
        raise MetricError(f"{metric_id} needs the calibrated band: low=… (median) and high=… (99th percentile).")
    if x.ndim != 1 + several:
        wanted = "series[signal, pos]" if several else "series[pos]"
        raise MetricError(f"{metric_id} takes {wanted}, found shape {list(x.shape)}.")
    x = np.atleast_2d(x)
    lo, hi = (np.atleast_1d(np.asarray(edge, dtype=np.float64)) for edge in (low, high))
    series = readiness_gmean(x, lo, hi)
    keep = np.ones(x.shape[1], bool) if mask is None else np.asarray(mask, bool)
    if keep.shape != x.shape[1:]:
        raise MetricError(f"{metric_id}: the mask has shape {list(keep.shape)}, expected {[x.shape[1]]}.")
    ok = np.isfinite(x).all(0) & keep
    n_ok, n_keep = ok.sum()[None], keep.sum()[None]
    degenerate = ~(np.isfinite(hi - lo) & (hi > lo)).all()
    reason = first_reason(
        1, (n_keep == 0, "empty"), (2 * n_ok < n_keep, "coverage"), (bool(degenerate), "degenerate-band")
    )[0]
    value = float("nan") if reason else float(series[ok].mean())
    series = np.where(keep, series, np.nan)
    name = str(dtype).removeprefix("torch.")
    coverage = float(share(n_ok, n_keep)[0])
    return Result(value, reason, coverage, len(x), int(n_ok[0]), metric_id, dtype=name, series=series)


_SHARED: dict[str, Any] = {
    "value_range": "[0, 1]; 1 = at the usual level or better, 0 = at the edge of the band or beyond",
    "unit": "1",
    "invariances": frozenset({"P", "T"}),
    "levels": {"token": "per token", "sample": "mean over tokens"},
    "groups": frozenset({"optional", "recovery"}),
}
register(
    MetricSpec(
        id="readiness.band/1",
        sentence="Share of the calibrated operating band of a signal that is still available.",
        formula=(
            "r_t = 1 − clip((q_t − low)/(high − low), 0, 1), low = median and high = q99 of clean calibration values; "
            "q oriented larger = worse; high ≤ low → NaN degenerate-band; q_t not finite → NaN; value = mean_t r_t"
        ),
        latex=(
            r"r_t = 1-\operatorname{clip}\Bigl(\frac{q_t-\mathrm{low}}{\mathrm{high}-\mathrm{low}},\,0,\,1\Bigr), "
            r"\qquad \operatorname*{mean}_{t} r_t"
        ),
        input="series, low, high",
        source="dynprobe; readiness is named without a formula in DOI 10.5281/zenodo.20361289",
        column="readiness",
        vectors=("ready-1: q at low / middle / ≥ high → 1 / 0.5 / 0", "high = low → NaN degenerate-band"),
        **_SHARED,
    ),
    _compute,
)
register(
    MetricSpec(
        id="readiness.gmean/1",
        sentence="Geometric mean of the readiness of several signals, each with its own band.",
        formula=(
            "r_t = (Π_j r_{j,t})^{1/J}, r_{j,t} as readiness.band/1; one NaN signal or degenerate band → NaN; "
            "value = mean_t r_t"
        ),
        latex=r"r_t = \Bigl(\prod_{j=1}^{J} r_{j,t}\Bigr)^{1/J}, \qquad \operatorname*{mean}_{t} r_t",
        input="series[signal,pos], low[signal], high[signal]",
        source="dynprobe",
        column="readiness_gmean",
        vectors=("r = (1, 0.25) → 0.5", "one NaN signal → NaN"),
        **_SHARED,
    ),
    _compute,
)
