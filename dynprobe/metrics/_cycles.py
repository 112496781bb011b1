"""COLLAPSE–RIVALRY cycles: a model that settles on one continuation, and whether it opens up again.

A COLLAPSE run is a stretch of at least w tokens at which the model is sure (the margin between its two best next tokens
is high), a RIVALRY run one at which it is torn (the margin is low). Tokens in between, and stretches shorter than w,
carry no label and end a run. If the last label were held over them instead, every collapse that ends would be followed
by a rivalry, and the reopening rate would be 1 by construction.

The rate is the share of COLLAPSE runs whose next labelled run is RIVALRY, among those that have a next one: a collapse
that lasts to the end of the text has not failed to reopen. Intervals and the Kaplan–Meier curve of many texts stand in
:mod:`~dynprobe.metrics._reopening`.

Two labellers: on the margin, with fixed limits, and on ct, with calibrated quantiles as limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_series
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Bools, Result
from dynprobe.metrics.statistics._clusters import column

__all__ = ["Cycles", "LabelledRun", "cycles_ct", "cycles_margin"]

NAN = float("nan")
Label: TypeAlias = Literal["COLLAPSE", "RIVALRY"]


class LabelledRun(NamedTuple):
    """A maximal stretch of tokens of one label, from ``start`` up to before ``stop``."""

    label: Label
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Cycles:
    """Cycles of one generated text.

    Args:
        runs: Labelled runs in order of time.
        n_tokens: Tokens.
        n_missing: Tokens without a number; they carry no label.
        times: For each COLLAPSE run, tokens from its first to the first of the next labelled run, or to the end.
        reopened: Whether that next run is RIVALRY.
        censored: Whether there is none.
    """

    runs: tuple[LabelledRun, ...]
    n_tokens: int
    n_missing: int
    times: tuple[int, ...]
    reopened: tuple[bool, ...]
    censored: tuple[bool, ...]

    @property
    def n_collapse(self) -> int:
        """COLLAPSE runs."""
        return len(self.times)

    @property
    def n_rivalry(self) -> int:
        """RIVALRY runs."""
        return len(self.runs) - self.n_collapse

    @property
    def n_reopened(self) -> int:
        """COLLAPSE runs whose next labelled run is RIVALRY."""
        return sum(self.reopened)

    @property
    def n_censored(self) -> int:
        """COLLAPSE runs without a next labelled run."""
        return sum(self.censored)

    @property
    def rate(self) -> float:
        """Reopening rate, NaN without an uncensored COLLAPSE run."""
        n = self.n_collapse - self.n_censored
        return self.n_reopened / n if n else NAN


def cycles_margin(margin: Any, *, low: float = 0.2, high: float = 0.9, w: int = 3) -> Cycles:
    """Cycles of the margin m_t = p1 − p2 of the two most probable next tokens.

    Args:
        margin: m_t of each generated token [token]; NaN carries no label.
        low: At most this is rivalry.
        high: At least this is collapse.
        w: Tokens in a row that make a run.

    Returns:
        The labelled runs and what followed each collapse.

    Raises:
        MetricError: ``low`` is not below ``high``, or w < 1.

    Source:
        ``cycles.margin/1``.

    Example:
        >>> found = cycles_margin([1, 1, 1, 0, 0, 0, 1, 1, 1])
        >>> found.n_collapse, found.n_censored, found.rate
        (2, 1, 1.0)
    """
    m = column(margin, "margin")
    _check(low, high, w)
    return _cycles(m >= high, m <= low, w, int(np.isnan(m).sum()))


def cycles_ct(ct: Any, low: float, high: float, *, w: int = 3) -> Cycles:
    """Cycles of ct: collapse strictly below ``low``, rivalry strictly above ``high``.

    Args:
        ct: ct of each generated token [token]; NaN carries no label.
        low: 10 % quantile of clean calibration values.
        high: Their 90 % quantile.
        w: Tokens in a row that make a run.

    Returns:
        The labelled runs and what followed each collapse.

    Raises:
        MetricError: ``low`` is not below ``high``, or w < 1.

    Source:
        ``cycles.ct/1``.

    Example:
        >>> cycles_ct([0, 0, 0, 2, 2, 2], low=0.5, high=1.5).rate
        1.0
    """
    x = column(ct, "ct")
    _check(low, high, w)
    return _cycles(x < low, x > high, w, int(np.isnan(x).sum()))


def _check(low: float, high: float, w: int) -> None:
    if not low < high:
        raise MetricError(f"Two limits with low < high are needed, found low={low!r}, high={high!r}.")
    if w < 1 or int(w) != w:
        raise MetricError(f"w is a whole number of tokens ≥ 1, found {w!r}.")


def _stretches(flag: Bools, label: Label, w: int) -> list[LabelledRun]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flag.astype(np.int8), [0]])))
    return [LabelledRun(label, int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= w]


def _cycles(collapse: Bools, rivalry: Bools, w: int, n_missing: int) -> Cycles:
    runs = sorted(_stretches(collapse, "COLLAPSE", w) + _stretches(rivalry, "RIVALRY", w), key=lambda r: r.start)
    times, reopened, censored = [], [], []
    for k, run in enumerate(runs):
        after = runs[k + 1] if k + 1 < len(runs) else None
        if run.label == "COLLAPSE":
            times.append((len(collapse) if after is None else after.start) - run.start)
            reopened.append(after is not None and after.label == "RIVALRY")
            censored.append(after is None)
    return Cycles(tuple(runs), len(collapse), n_missing, tuple(times), tuple(reopened), tuple(censored))


def _result(found: Cycles, n_ok: int, n: int, metric_id: str, dtype: str) -> Result:
    reason = "empty" if not n else "coverage" if 2 * n_ok < n else None
    if reason is None and np.isnan(found.rate):
        reason = "zero-denominator"
    extras = {
        "n_collapse": found.n_collapse, "n_rivalry": found.n_rivalry, "n_reopened": found.n_reopened,
        "n_censored": found.n_censored,
    }  # fmt: skip
    value = NAN if reason else found.rate
    return Result(value, reason, n_ok / n if n else NAN, 1, n_ok, metric_id, dtype=dtype, extras=extras)


def _compute(
    inputs: tuple[Any, ...],
    mask: Any,
    params: dict[str, Any],
    metric_id: str,
    low: float | None = None,
    high: float | None = None,
) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    x = np.where(s.ok[0], s.values[0], np.nan)[s.keep[0]]
    if low is None or high is None:
        raise MetricError(f"{metric_id} needs low=… and high=…, the 10 % and 90 % quantiles of clean calibration ct.")
    return _result(cycles_ct(x, low, high, w=params["w"]), int(s.ok.sum()), len(x), metric_id, s.dtype)


def _compute_margin(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    x = np.where(s.ok[0], s.values[0], np.nan)[s.keep[0]]
    return _result(cycles_margin(x, **params), int(s.ok.sum()), len(x), metric_id, s.dtype)


_RULES = (
    "; tokens between the limits and stretches shorter than w carry no label and end a run; ρ = COLLAPSE runs whose "
    "next labelled run is RIVALRY / COLLAPSE runs that have a next labelled run"
)
_SHARED: dict[str, Any] = {
    "value_range": "[0, 1]",
    "unit": "1",
    "source": "dynprobe; the words and two counts are in DOI 10.5281/zenodo.20361289",
    "levels": {"sample": "over the generated tokens"},
    "groups": frozenset({"optional", "recovery"}),
}
register(
    MetricSpec(
        id="cycles.margin/1",
        sentence="Share of stretches of certainty that are followed by a stretch of rivalry, on the margin.",
        formula="COLLAPSE: m_t = p1 − p2 ≥ high for ≥ w tokens; RIVALRY: m_t ≤ low for ≥ w tokens" + _RULES,
        latex=(
            r"\begin{aligned} &\text{COLLAPSE}: p_1-p_2\ge\mathrm{high}, \qquad \text{RIVALRY}: "
            r"p_1-p_2\le\mathrm{low}, \qquad \text{for} \ge w \text{ tokens} \\"
            r"&\rho = \frac{\#\,\text{COLLAPSE runs followed by RIVALRY}}{\#\,\text{COLLAPSE runs followed by any "
            r"run}} \end{aligned}"
        ),
        input="series",
        invariances=frozenset(),
        params={"low": 0.2, "high": 0.9, "w": 3},
        column="cycles_margin",
        vectors=("CCCRRRCCC → 1 (1 of 1, 1 censored)", "CCC––CCCRRR → 1/2", "all RIVALRY → NaN zero-denominator"),
        **_SHARED,
    ),
    _compute_margin,
)
register(
    MetricSpec(
        id="cycles.ct/1",
        sentence="Share of stretches of low ct that are followed by a stretch of high ct.",
        formula="COLLAPSE: ct < low (calibrated q10) for ≥ w tokens; RIVALRY: ct > high (q90) for ≥ w tokens" + _RULES,
        latex=(
            r"\begin{aligned} &\text{COLLAPSE}: \mathrm{ct}<\mathrm{low}, \qquad \text{RIVALRY}: "
            r"\mathrm{ct}>\mathrm{high}, \qquad \text{for} \ge w \text{ tokens} \\"
            r"&\rho = \frac{\#\,\text{COLLAPSE runs followed by RIVALRY}}{\#\,\text{COLLAPSE runs followed by any "
            r"run}} \end{aligned}"
        ),
        input="series, low, high",
        invariances=frozenset(),
        params={"w": 3},
        column="cycles_ct",
        vectors=("CCCRRRCCC → 1 (1 of 1, 1 censored)", "all RIVALRY → NaN zero-denominator"),
        **_SHARED,
    ),
    _compute,
)
