"""Block Influence and angular distance: how much a block, or a stretch of n blocks, turns the residual stream.

Both come from pruning work and both are functions of the step angle θ. Angular distance with n = 1 over all tokens *is*
``kappa.phase``; its own default is the last token alone. Block Influence is 1 − cos θ, which is not a function of the
mean angle: the two rank layers differently. Neither says how much a layer matters to the output; a layer with a tiny
change of direction can cost most of the accuracy when it is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms_and_validity, pair_angle
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import Terms, mean_of_profile
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores
from dynprobe.metrics._walk import Walk, walk

__all__ = ["angular_distance", "block_influence", "last_units"]


def block_influence(w: Walk) -> Scores:
    """1 − cos θ of every step of a walk."""
    # 2·sin²(θ/2), which has digits where 1 − cos θ has none
    influence = 2.0 * np.sin(0.5 * w.angle) ** 2
    terms = w.step_terms
    return mean_of_profile(
        terms.mean(influence), terms, short=len(w.norm) < 2, per_unit=terms.mean_steps(influence),
        extras={"n_invalid": w.n_invalid, "n_nonfinite": w.n_nonfinite},
    )  # fmt: skip


def last_units(keep: Bools) -> Bools:
    """Keep only the last unmasked unit of each row, [D, B, T] → [D, B, T]."""
    anywhere: Bools = np.logical_or.reduce(keep, axis=0)
    order = np.cumsum(anywhere, axis=-1)
    last = anywhere & (order == order[:, -1:])
    chosen: Bools = keep & last
    return chosen


def angular_distance(
    states: Sequence[torch.Tensor], norm: Array, valid: Bools, keep: Bools, *, n: int, tokens: str,
    dtype: torch.dtype = torch.float64,
) -> Scores:  # fmt: skip
    """Angle between the states n depths apart as a fraction of a half-turn, for every row.

    Args:
        states: D tensors [B, T, dim].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        n: Depths apart.
        tokens: ``last`` unmasked unit, or ``all``.
        dtype: Arithmetic.
    """
    if n < 1 or n != int(n):
        raise MetricError(f"influence.angular/1: n is a whole number of at least 1, found {n}.")
    if tokens not in ("last", "all"):
        raise MetricError(f"influence.angular/1: tokens is 'last' or 'all', found {tokens!r}.")
    chosen = last_units(keep) if tokens == "last" else keep
    terms = Terms(valid[n:] & valid[:-n], chosen[n:] & chosen[:-n], chosen.sum((0, 2)))
    lag = np.zeros(terms.keep.shape)
    with torch.no_grad():
        for low in range(len(lag)):
            a, b = states[low].detach().to(dtype), states[low + n].detach().to(dtype)
            lag[low] = pair_angle(a, b, norm[low], norm[low + n]) / np.pi
    lag = np.where(terms.ok, lag, 0.0)
    return mean_of_profile(
        terms.mean(lag), terms, short=len(keep) < n + 1, short_text=f"depth<{n + 1}",
        extras={"n_invalid": (chosen & ~valid).sum((0, 2)), "n_nonfinite": (chosen & np.isnan(norm)).sum((0, 2))},
    )  # fmt: skip


def _compute_block(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    return block_influence(walk(t.states, t.keep, t.keep, eps=t.eps)).result(0, metric_id, dtype=t.dtype)


def _compute_angular(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    norm, valid = norms_and_validity(t.states, t.keep)
    return angular_distance(t.states, norm, valid, t.keep, **params).result(0, metric_id, dtype=t.dtype)


register(
    MetricSpec(
        id="influence.block/1",
        sentence="Block Influence: one minus the mean cosine between a unit's states before and after a block.",
        formula="BI_l = 1 − mean_n cos(x_{l,n}, x_{l+1,n}) = mean_n 2·sin²(θ_{l,n}/2), θ of kappa.phase/1; value = "
        "mean over l",
        latex=(
            r"\mathrm{BI}_l = 1-\operatorname*{mean}_{n}\cos(x_{l,n},\,x_{l+1,n}) = "
            r"\operatorname*{mean}_{n}\,2\sin^2\frac{\theta_{l,n}}{2}, \qquad \operatorname*{mean}_{l}\mathrm{BI}_l"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, 2]",
        unit="1",
        invariances=frozenset({"R", "S", "S_l", "P", "T", "scale-per-state"}),
        source="ShortGPT (arXiv 2403.03853)",
        column="influence_block",
        levels={"profile": "mean over units", "sample": "mean over units, then over steps"},
        vectors=("e₁, e₂ → 1", "e₁, −e₁ → 2", "rotation by π/3 per step → 1/2", "D = 1 → NaN depth<2"),
        groups=frozenset({"optional"}),
    ),
    _compute_block,
    score=lambda c, p: block_influence(c.w),
)
register(
    MetricSpec(
        id="influence.angular/1",
        sentence="Angular distance between the states of the last token n depths apart, as a fraction of a half-turn.",
        formula=(
            "d(l, l+n) = (1/π)·angle(x_l, x_{l+n}), chord form; tokens=last: the last unmasked unit; tokens=all: mean "
            "over units (at n = 1 this is kappa.phase/1); value = mean over l = 0..D−1−n"
        ),
        latex=(
            r"\begin{aligned} d(l,\,l+s) &= \begin{cases} "
            r"\frac{1}{\pi}\operatorname{angle}(x_{l,\mathrm{last}},\,x_{l+s,\mathrm{last}}) & \text{tokens=last} \\"
            r"\frac{1}{\pi}\operatorname*{mean}_{j}\ \operatorname{angle}(x_{l,j},\,x_{l+s,j}) & \text{tokens=all} "
            r"\end{cases}, \qquad s = \mathrm{n} \\"
            r"\mathrm{value} &= \operatorname*{mean}_{l=0,\dots,D-1-s} d(l,\,l+s) \end{aligned}"
        ),
        input="trajectory[depth,unit,dim], units in order of time",
        value_range="[0, 1]",
        unit="half-turns",
        invariances=frozenset({"R", "S", "S_l", "T", "scale-per-state"}),
        source="Gromov et al. (arXiv 2403.17887)",
        params={"n": 1, "tokens": "last"},
        column="influence_angular",
        levels={"profile": "last token, or mean over units", "sample": "mean over steps"},
        vectors=(
            "rotation by φ per step → n·φ/π while n·φ ≤ π",
            "tokens=all, n=1 = kappa.phase/1",
            "D = n → NaN depth<n+1",
        ),
        groups=frozenset({"optional"}),
    ),
    _compute_angular,
    score=lambda c, p: angular_distance(c.states, c.w.norm, c.w.valid, c.w.keep, dtype=c.dtype, **p),
)
