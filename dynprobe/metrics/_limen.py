"""``limen.ratio`` and its companions: how bursty a series of ct values is.

ratio = max/mean is published, and needs three warnings. It grows with the length of the series even for structureless
noise (for exponential values the expectation is the harmonic number H_T): compare at equal T only. It usually *falls*
under perturbation, because noise lifts the mean. And it says nothing for a single value. ``limen.qratio`` and
``limen.gini`` are the length-robust companions; ``limen.regime`` names the published bands and leaves the gaps between
them gaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_series
from dynprobe.metrics._norm import location_scale, winsorised
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result, Scores
from dynprobe.metrics._series import Values

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = ["gini", "qratio", "ratio", "regime_of", "regimes"]

WINSOR_C = 5.0


def ratio(v: Values, norm: str = "raw", ref: str = "self", reference: Any = None) -> Scores:
    """max/mean per row, of the series as it is or winsorised."""
    extras: dict[str, Any] = {}
    if norm == "winsor_mad":
        m, s = location_scale(v, ref, reference, "limen.ratio/1{norm=winsor_mad}")
        v, extras["flagged"] = winsorised(v, WINSOR_C, m, s)
    elif norm == "zmad":
        raise MetricError("limen.ratio refuses norm=zmad: after centring the mean is near 0. Use norm=winsor_mad.")
    elif norm != "raw":
        raise MetricError(f"limen.ratio/1: norm is 'raw' or 'winsor_mad', found {norm!r}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = v.max / v.mean
    scores = v.scores(value, v.reasons((v.mean == 0, "zero-denominator")), extras=extras)
    if (v.n == 1).any():
        scores.reason = ["steps<2" if r is None and n == 1 else r for r, n in zip(scores.reason, v.n, strict=True)]
    return scores


def qratio(v: Values) -> Scores:
    """q95/median per row."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = v.quantile(0.95) / v.median
    return v.scores(value, v.reasons((v.median == 0, "zero-denominator")))


def gini(v: Values) -> Scores:
    """Gini coefficient per row."""
    place = np.arange(1, v.x.shape[1] + 1)
    weight = np.where(place <= v.n[:, None], 2 * place - v.n[:, None] - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # the weights sum to zero, so the smallest value can be taken off first: equal values then give exactly 0
        ordered = np.where(weight == 0, 0.0, v.sorted - v.sorted[:, :1])
        value = (weight * ordered).sum(-1) / (v.n.astype(float) ** 2 * v.mean)
    return v.scores(value, v.reasons((v.mean == 0, "zero-denominator")))


def regime_of(value: float) -> str:
    """Name the published band of a ratio, or the gap it falls into.

    Example:
        >>> regime_of(2.5), regime_of(2.0), regime_of(4.42), regime_of(1.7000001)
        ('ADAPTIVE', 'GAP_UA', 'CHAOTIC', 'GAP_UA')
    """
    if np.isnan(value):
        return "UNDEFINED"
    if value < 1.55:
        return "BELOW_RANGE"
    if value <= 1.70:
        return "UNDERACTIVE"
    if value < 2.27:
        return "GAP_UA"
    if value <= 2.92:
        return "ADAPTIVE"
    if value < 4.42:
        return "TRANSITION_OR_GAP"
    return "CHAOTIC" if value <= 35.55 else "ABOVE_RANGE"


def regimes(of: Scores) -> Scores:
    """Label the ratios of a batch; reasons are theirs."""
    return Scores(
        value=[regime_of(x) for x in of.value],
        reason=of.reason,
        coverage=of.coverage,
        n_units=of.n_units,
        n_steps=of.n_steps,
        extras={"ratio": of.value},
    )


def _values(inputs: tuple[Any, ...], mask: Any, metric_id: str) -> tuple[Values, str]:
    s = as_series(inputs[0], mask, metric_id)
    return Values(s.values, s.ok, s.keep), s.dtype


def _compute_ratio(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, reference: Any = None
) -> Result:
    v, dtype = _values(inputs, mask, metric_id)
    return ratio(v, params["norm"], params["ref"], reference).result(0, metric_id, dtype=dtype)


def _compute_qratio(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    v, dtype = _values(inputs, mask, metric_id)
    return qratio(v).result(0, metric_id, dtype=dtype)


def _compute_gini(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    v, dtype = _values(inputs, mask, metric_id)
    return gini(v).result(0, metric_id, dtype=dtype)


def _compute_regime(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    reason, coverage, n_units, n_steps = None, 1.0, 1, 1
    if isinstance(x, Result):
        reason, coverage, n_units, n_steps = x.reason, x.coverage, x.n_units, x.n_steps
    try:
        value = float(x)
    except (TypeError, ValueError):
        raise MetricError(
            "limen.regime/1 takes one ratio. From a series: compute('limen.regime/1', compute('limen.ratio/1', ct))."
        ) from None
    if np.isnan(value) and reason is None:
        reason, coverage = "empty", float("nan")
    return Result(regime_of(value), reason, coverage, n_units, n_steps, metric_id, extras={"ratio": value})


def _score(c: Context, params: dict[str, Any]) -> Scores:
    if params["ref"] != "self":
        raise MetricError("measure computes limen.ratio with ref=self; for ref=calib call compute with reference=.")
    return c.ratio if params["norm"] == "raw" else ratio(c.values, params["norm"])


_SAMPLE = {"sample": "over the ct values inside the span"}
register(
    MetricSpec(
        id="limen.ratio/1",
        span=True,
        sentence="Largest ct value over the mean ct value; not intensive in length.",
        formula=(
            "max(ct_t)/mean(ct_t) over valid t; norm=winsor_mad: of min(ct_t, m + 5·s); one value: 1 with steps<2; "
            "mean 0: NaN zero-denominator"
        ),
        latex=r"\mathrm{ratio} = \frac{\max_t\mathrm{ct}_t}{\operatorname{mean}_t\mathrm{ct}_t}",
        input="series",
        value_range="[1, T]",
        unit="1",
        invariances=frozenset({"S", "P"}),
        source="DOI 10.5281/zenodo.20348878",
        params={"norm": "raw", "ref": "self"},
        column="limen_ratio",
        levels=_SAMPLE,
        vectors=(
            "ratio-1: (1,1,1,5) → 2.5",
            "ratio-2: (0,…,0,1), length T → T",
            "(c,…,c) → 1",
            "() → NaN tokens<3",
            "mad-1: (1,2,3,4,100) winsorised → 10.413/4.0826",
        ),
        groups=frozenset({"core", "default"}),
    ),
    _compute_ratio,
    score=_score,
    needs=("ct",),
)
register(
    MetricSpec(
        id="limen.qratio/1",
        span=True,
        sentence="95th percentile over median of ct; the length-robust companion of the ratio.",
        formula="q95(ct)/median(ct), type-7 quantiles; median 0: NaN zero-denominator",
        latex=r"\frac{q_{95}(\mathrm{ct})}{\operatorname{median}(\mathrm{ct})}",
        input="series",
        value_range="[1, ∞)",
        unit="1",
        invariances=frozenset({"S", "P", "T"}),
        source="dynprobe",
        column="limen_qratio",
        levels=_SAMPLE,
        vectors=("(1,1,1,5) → 4.4",),
        groups=frozenset({"default"}),
    ),
    _compute_qratio,
    score=lambda c, p: qratio(c.values),
    needs=("ct",),
)
register(
    MetricSpec(
        id="limen.gini/1",
        span=True,
        sentence="Gini coefficient of ct.",
        formula="Σ_ij |ct_i − ct_j|/(2T²·mean)",
        latex=r"\frac{\sum_{i,j}|\mathrm{ct}_i-\mathrm{ct}_j|}{2\,T^2\operatorname{mean}(\mathrm{ct})}",
        input="series",
        value_range="[0, 1 − 1/T]",
        unit="1",
        invariances=frozenset({"S", "P", "T"}),
        source="dynprobe",
        column="limen_gini",
        levels=_SAMPLE,
        vectors=("(1,1,1,5) → 0.375",),
        groups=frozenset({"default"}),
    ),
    _compute_gini,
    score=lambda c, p: gini(c.values),
    needs=("ct",),
)
register(
    MetricSpec(
        id="limen.regime/1",
        span=True,
        sentence="Name of the published band a ratio falls into, gaps kept as gaps.",
        formula=(
            "ratio < 1.55 BELOW_RANGE; [1.55, 1.70] UNDERACTIVE; (1.70, 2.27) GAP_UA; [2.27, 2.92] ADAPTIVE; "
            "(2.92, 4.42) TRANSITION_OR_GAP; [4.42, 35.55] CHAOTIC; > 35.55 ABOVE_RANGE; NaN UNDEFINED"
        ),
        latex=(
            r"\begin{cases} \text{BELOW\_RANGE} & r<1.55 \\ \text{UNDERACTIVE} & 1.55\le r\le 1.70 \\ "
            r"\text{GAP\_UA} & 1.70<r<2.27 \\"
            r"\text{ADAPTIVE} & 2.27\le r\le 2.92 \\ \text{TRANSITION\_OR\_GAP} & 2.92<r<4.42 \\"
            r"\text{CHAOTIC} & 4.42\le r\le 35.55 \\ \text{ABOVE\_RANGE} & r>35.55 \\ \text{UNDEFINED} & r\text{ is "
            r"NaN} \end{cases}"
        ),
        input="value",
        value_range="label",
        unit="label",
        invariances=frozenset({"S", "P"}),
        source="bands of DOI 10.5281/zenodo.20348878",
        column="limen_regime",
        levels={"sample": "of limen_ratio"},
        vectors=("2.5 → ADAPTIVE; 2.0 → GAP_UA; 4.42 → CHAOTIC; 1.7000001 → GAP_UA",),
        groups=frozenset({"default"}),
    ),
    _compute_regime,
    score=lambda c, p: regimes(c.ratio),
    needs=("ct",),
)
