"""``norm.*``: three readings of "RAW vs CLIPPED_MAD", with the reference they clip against declared.

``ref=self`` takes median and MAD from the series itself: it bounds the ratio mechanically and erases exactly the spikes
that make a run chaotic. ``ref=calib`` takes them from a reference series handed in as ``reference=``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_series
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result
from dynprobe.metrics._series import MAD_FACTOR, Values

__all__ = ["location_scale", "winsorised"]


def location_scale(v: Values, ref: str, reference: Any, metric_id: str) -> tuple[Array, Array]:
    """Median and scaled MAD per row, from the series or from the declared reference."""
    if ref == "self":
        if reference is not None:
            raise MetricError(f"{metric_id} was given a reference but ref=self; write ref='calib' to use it.")
        return v.median, MAD_FACTOR * v.mad
    if ref != "calib":
        raise MetricError(f"{metric_id}: ref is 'self' or 'calib', found {ref!r}.")
    if reference is None:
        raise MetricError(f"{metric_id} with ref=calib needs reference=, the series of the calibration.")
    r = as_series(reference, None, metric_id)
    calibration = Values(r.values, r.ok, r.keep)
    ones = np.ones(len(v.x))
    return calibration.median * ones, MAD_FACTOR * calibration.mad * ones


def winsorised(v: Values, c: float, m: Array, s: Array) -> tuple[Values, Bools]:
    """Cap values at m + c·s; rows with s = 0 stay as they are and are flagged."""
    flat = s == 0
    with np.errstate(invalid="ignore"):
        cap = np.where(flat, np.inf, m + c * s)
        return Values(np.minimum(v.x, cap[:, None]), v.ok, v.keep, v.tokens), flat


def _raw(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    v = Values(s.values, s.ok, s.keep)
    series = np.where(v.ok, v.x, np.nan)
    return v.scores(v.mean, v.reasons(), series, {"max": v.max}).result(0, metric_id, dtype=s.dtype)


def _winsor(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, reference: Any = None
) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    v = Values(s.values, s.ok, s.keep)
    m, scale = location_scale(v, params["ref"], reference, metric_id)
    capped, flat = winsorised(v, params["c"], m, scale)
    reason = [r or ("zero-mad" if f else None) for r, f in zip(v.reasons(), flat, strict=True)]
    scores = v.scores(
        capped.mean,
        v.reasons(),
        np.where(v.ok, capped.x, np.nan),
        {"median": m, "scale": scale, "cap": m + params["c"] * scale, "max": capped.max, "flagged": flat},
    )
    scores.reason = reason
    return scores.result(0, metric_id, dtype=s.dtype)


def _zmad(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, reference: Any = None) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    v = Values(s.values, s.ok, s.keep)
    m, scale = location_scale(v, params["ref"], reference, metric_id)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.clip((v.x - m[:, None]) / scale[:, None], -params["c"], params["c"])
    z = np.where(v.ok & (scale > 0)[:, None], z, np.nan)
    scored = Values(np.nan_to_num(z), v.ok, v.keep)
    extras = {"median": m, "scale": scale, "max": np.where(scale > 0, scored.max, np.nan)}
    return scored.scores(scored.mean, v.reasons((scale == 0, "zero-mad")), z, extras).result(
        0, metric_id, dtype=s.dtype
    )


_SOURCE = "reading by dynprobe of the names RAW and CLIPPED_MAD in DOI 10.5281/zenodo.20361289"
register(
    MetricSpec(
        id="norm.raw/1",
        span=True,
        sentence="The series as it is.",
        formula="ct'_t = ct_t; value = mean",
        latex=r"\mathrm{ct}'_t = \mathrm{ct}_t, \qquad \operatorname*{mean}_{t}\mathrm{ct}'_t",
        input="series",
        value_range="range of the series",
        unit="as the series",
        invariances=frozenset({"P", "T"}),
        source=_SOURCE,
        vectors=("(1,2,3,4,100): ratio 100/22",),
        groups=frozenset({"optional"}),
    ),
    _raw,
)
register(
    MetricSpec(
        id="norm.winsor_mad/1",
        span=True,
        sentence="The series with its high values capped at c scaled median absolute deviations above the median.",
        formula=(
            "ct'_t = min(ct_t, m + c·s), m = median, s = 1.4826·median|ct − m| of the declared reference; "
            "s = 0: unchanged and flagged zero-mad; value = mean"
        ),
        latex=(
            r"\mathrm{ct}'_t = \min(\mathrm{ct}_t,\ m+c\,s), \qquad m = \operatorname{median}(\mathrm{ct}), \quad "
            r"s = 1.4826\cdot\operatorname{median}|\mathrm{ct}-m|, \qquad \operatorname*{mean}_{t}\mathrm{ct}'_t"
        ),
        input="series",
        value_range="range of the series",
        unit="as the series",
        invariances=frozenset({"P", "T"}),
        source=_SOURCE,
        params={"c": 5.0, "ref": "self"},
        vectors=("mad-1: (1,2,3,4,100) → max 10.413, ratio 10.413/4.0826", "(1,1,1,1,9): flagged, unchanged"),
        groups=frozenset({"optional"}),
    ),
    _winsor,
)
register(
    MetricSpec(
        id="norm.zmad/1",
        span=True,
        sentence="The series centred and scaled by median and MAD, clipped at ±c; for detection only.",
        formula=(
            "z_t = clip((ct_t − m)/s, −c, c), m and s as norm.winsor_mad/1; s = 0: NaN zero-mad; value = mean; "
            "limen.ratio refuses it"
        ),
        latex=(
            r"z_t = \operatorname{clip}\Bigl(\frac{\mathrm{ct}_t-m}{s},\,-c,\,c\Bigr), \qquad m = "
            r"\operatorname{median}(\mathrm{ct}), \quad "
            r"s = 1.4826\cdot\operatorname{median}|\mathrm{ct}-m|, \qquad \operatorname*{mean}_{t} z_t"
        ),
        input="series",
        value_range="[−c, c]",
        unit="1",
        invariances=frozenset({"P", "T", "S", "shift"}),
        source=_SOURCE,
        params={"c": 5.0, "ref": "self"},
        vectors=("(1,1,1,1,9) → NaN zero-mad", "(1,2,3,4,100) → (−2,−1,0,1)/1.4826, 5"),
        groups=frozenset({"optional"}),
    ),
    _zmad,
)
