"""``kappa.sync``: update coherence, the Kuramoto order parameter of one unit's updates over all depths, debiased.

0 when all depths push the same way, 1 when they are mutually independent, above 1 when they work against each other.
The debiasing makes 1 the null value for every number of depths; the raw order parameter would fall as 1/√M. On deep
Transformers it is close to 1 and almost saturated: report it beside ``kappa.phase``, not instead of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result, Scores, first_reason
from dynprobe.metrics._walk import Walk, walk

__all__ = ["kappa_sync"]


def kappa_sync(w: Walk) -> Scores:
    """Score every row of a walk made with ``sync=True``."""
    batch = w.norm.shape[1]
    ok, keep = w.step_ok & w.step_keep, w.step_keep
    n_ok, n_keep = ok.sum((0, 2)), keep.sum((0, 2))
    if w.sync is None or w.sync_count is None:
        per_unit = np.full(w.norm.shape[1:], np.nan)
    else:
        m = w.sync_count
        with np.errstate(divide="ignore", invalid="ignore"):
            per_unit = np.where(m >= 2, 1.0 - (w.sync / m - 1.0) / (m - 1.0), np.nan)
    used = ~np.isnan(per_unit)
    n_units = used.sum(-1)
    value = share(np.add.reduce(per_unit, axis=-1, where=used, initial=0.0), n_units)
    n_states = w.keep.sum((0, 2))
    short = len(w.norm) < 3
    reason = first_reason(
        batch,
        ((n_states == 0) | ((n_keep == 0) & (not short)), "empty"),
        (short, "depth<3"),
        (2 * n_ok < n_keep, "coverage"),
        (n_units == 0, "zero-denominator"),
    )
    undefined = np.fromiter((r is not None for r in reason), bool, batch)
    return Scores(
        value=np.where(undefined, np.nan, value),
        reason=reason,
        coverage=share(n_ok, n_keep),
        n_units=n_units,
        n_steps=np.full(batch, len(w.diff)),
        per_unit=per_unit,
        extras={
            "n_stall": (ok & ~w.moved).sum((0, 2)),
            "n_invalid": w.n_invalid,
            "n_nonfinite": w.n_nonfinite,
        },
    )


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    return kappa_sync(walk(t.states, t.keep, t.keep, eps=t.eps, sync=True)).result(0, metric_id, dtype=t.dtype)


register(
    MetricSpec(
        id="kappa.sync/1",
        sentence="One minus the mean pairwise cosine of a unit's updates over all depths.",
        formula=(
            "u_{l,n} = (x_{l+1,n} − x_{l,n})/‖·‖ over valid non-zero updates, M_n ≥ 2 of them; "
            "R_n² = ‖(1/M_n) Σ_l u_{l,n}‖²; C_n = (M_n·R_n² − 1)/(M_n − 1); "
            "κ_sync = 1 − mean_n C_n; zero means ≤ 16·eps·max(‖x_l‖, ‖x_{l+1}‖)"
        ),
        latex=(
            r"\begin{aligned} u_{l,n} &= \frac{x_{l+1,n}-x_{l,n}}{\lVert x_{l+1,n}-x_{l,n}\rVert}, \qquad "
            r"R_n^2 = \Bigl\lVert \frac{1}{M_n}\sum_l u_{l,n}\Bigr\rVert^2 \\"
            r"C_n &= \frac{M_n R_n^2-1}{M_n-1}, \qquad \kappa_{\mathrm{sync}} = 1-\operatorname*{mean}_{n} C_n "
            r"\end{aligned}"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, M/(M−1)]",
        unit="1",
        invariances=frozenset({"R", "S", "P", "T", "shift"}),
        source="dynprobe; Kuramoto order parameter",
        column="kappa_sync",
        levels={"sample": "mean over units"},
        vectors=(
            "ksync-1: straight path → 0; orthogonal increments → 1; one zig-zag (M = 2) → 2",
            "D = 2 → NaN depth<3",
        ),
        groups=frozenset({"default"}),
    ),
    _compute,
    score=lambda c, p: kappa_sync(c.w),
    needs=("sync",),
)
