"""``line.shape``: line-shape score, the length of the path in steps of unit length over its end-to-end distance.

1 for a straight path along depth, larger the more its updates turn against each other. It is a function of the Kuramoto
order parameter of the updates, LSS = 1/R, which ``kappa.sync`` debiases; LSS itself grows as √M for unrelated updates,
so models of different depth are not compared by it.

Only differences of states enter. A state that is zero is therefore a point like any other here, unlike in metrics that
divide by its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.metrics._geometry import NEAR_ZERO, norms, norms_and_validity
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores, first_reason

__all__ = ["line_shape"]


def _sum_of_units(
    states: Sequence[torch.Tensor], norm: Array, ok: Bools, eps: float, dtype: torch.dtype
) -> tuple[Array, Array]:
    """Length of the sum of unit updates and their number, per unit [B, T]."""
    count = np.zeros(ok.shape[1:])
    total: torch.Tensor | None = None
    with torch.no_grad(), np.errstate(divide="ignore", invalid="ignore"):
        for step in range(len(ok)):
            update = states[step + 1].detach().to(dtype) - states[step].detach().to(dtype)
            length = norms(update)
            used = ok[step] & (length > NEAR_ZERO * eps * np.maximum(norm[step], norm[step + 1]))
            count += used
            factor = torch.from_numpy(np.where(used, 1.0 / length, 0.0)[..., None]).to(update.device, dtype)
            added = torch.where(torch.from_numpy(used[..., None]).to(update.device), update * factor, 0.0)
            total = added if total is None else total + added
    return (np.zeros(count.shape) if total is None else norms(total)), count


def line_shape(
    states: Sequence[torch.Tensor], norm: Array, keep: Bools, *, eps: float, dtype: torch.dtype = torch.float64
) -> Scores:
    """Score every row.

    Args:
        states: D tensors [B, T, dim].
        norm: Norms [D, B, T], NaN where not finite.
        keep: Unmasked units [D, B, T].
        eps: Rounding unit of the tests for zero updates and closed paths.
        dtype: Arithmetic.
    """
    batch = keep.shape[1]
    finite = ~np.isnan(norm)
    step_keep = keep[1:] & keep[:-1]
    ok = finite[1:] & finite[:-1] & step_keep
    length, m = _sum_of_units(states, norm, ok, eps, dtype)
    closed = (m > 0) & (length <= NEAR_ZERO * eps * m)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_unit = np.where((m > 0) & ~closed, np.maximum(m / length, 1.0), np.nan)
    used = ~np.isnan(per_unit)
    n_ok, n_keep, n_units = ok.sum((0, 2)), step_keep.sum((0, 2)), used.sum(-1)
    short = len(keep) < 2
    reason = first_reason(
        batch,
        ((keep.sum((0, 2)) == 0) | ((n_keep == 0) & (not short)), "empty"),
        (short, "depth<2"),
        (2 * n_ok < n_keep, "coverage"),
        (n_units == 0, "zero-denominator"),
    )
    value = share(np.where(used, per_unit, 0.0).sum(-1), n_units)
    return Scores(
        value=np.where([r is not None for r in reason], np.nan, value),
        reason=reason,
        coverage=share(n_ok, n_keep),
        n_units=n_units,
        n_steps=np.full(batch, len(ok)),
        per_unit=per_unit,
        extras={
            "n_stall": n_ok - m.sum(-1).astype(np.int64),
            "n_closed": closed.sum(-1),
            "n_nonfinite": (keep & ~finite).sum((0, 2)),
        },
    )


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    norm, _ = norms_and_validity(t.states, t.keep)
    return line_shape(t.states, norm, t.keep, eps=t.eps).result(0, metric_id, dtype=t.dtype)


register(
    MetricSpec(
        id="line.shape/1",
        sentence="Line-shape score: number of unit updates along depth over the length of their sum.",
        formula=(
            "u_{l,n} = (x_{l+1,n} − x_{l,n})/‖·‖ over finite states and non-zero updates, M_n ≥ 1 of them; LSS_n = "
            "M_n/‖Σ_l u_{l,n}‖; value = mean_n LSS_n; zero update: ≤ 16·eps·max(‖x_l‖, ‖x_{l+1}‖); units with "
            "‖Σ u‖ ≤ 16·eps·M dropped and counted; a zero state is a point like any other"
        ),
        latex=(
            r"u_{l,n} = \frac{x_{l+1,n}-x_{l,n}}{\lVert x_{l+1,n}-x_{l,n}\rVert}, \qquad "
            r"\mathrm{LSS} = \operatorname*{mean}_{n}\frac{M_n}{\bigl\lVert \sum_l u_{l,n}\bigr\rVert}"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[1, ∞)",
        unit="1",
        invariances=frozenset({"R", "S", "P", "shift"}),
        source="Gai & Zhang 2021",
        column="line_shape",
        levels={"sample": "mean over units"},
        vectors=(
            "(0,0), (1,0), (1,1) → √2",
            "straight path → 1",
            "a, b, a → NaN zero-denominator",
            "D = 1 → NaN depth<2",
        ),
        groups=frozenset({"optional"}),
    ),
    _compute,
    score=lambda c, p: line_shape(c.states, c.w.norm, c.w.keep, eps=c.w.eps, dtype=c.dtype),
)
