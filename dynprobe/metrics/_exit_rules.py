"""Residuals of the output: how much the next-token distribution still changes from one iteration to the next.

A recurrent model may be stopped when its answer, rather than its state, no longer moves. The five rules of the Huginn
code are here as metrics of logits[iteration, pos, vocab]; the profile holds their value after each update, and
``converge.exit/1`` turns such a profile into a number of iterations. In that code the first update is compared with a
uniform distribution; here the first value belongs to the first pair of iterations that exist.

Ouro's exit is learned: the model itself gives a probability of leaving after each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_logits, as_series
from dynprobe.metrics._output import output_metrics, paired_output
from dynprobe.metrics._output_metrics import close_positions
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["entropy_change", "kl_change", "minp_kl_change", "stable_for"]

_SUM = 1e-4
_LEVEL = 1e-12


def entropy_change(logits: torch.Tensor) -> Array:
    """|H_k − H_{k−1}| of every position [K, pos] from logits [K + 1, pos, vocab]."""
    return np.asarray(np.abs(np.diff(output_metrics(logits)["entropy"], axis=0)))


def kl_change(logits: torch.Tensor) -> Array:
    """KL(previous ‖ current) of every position [K, pos]."""
    return paired_output(logits[:-1], logits[1:])["kl_clean_pert"]


def minp_kl_change(logits: torch.Tensor, minp: float = 0.1) -> Array:
    """KL(previous ‖ current) after probabilities below minp times the largest were set to 1/V and all renormalised."""
    x = logits.double()
    x = torch.where(torch.isfinite(x).all(-1, keepdim=True), x, torch.nan)  # such a row has no read-out
    probs = torch.softmax(x, -1)
    floor = 1.0 / x.shape[-1]
    probs = torch.where(probs < minp * probs.amax(-1, keepdim=True), floor, probs)
    probs = probs / probs.sum(-1, keepdim=True)
    return np.asarray((probs[:-1] * (probs[:-1].log() - probs[1:].log())).sum(-1).clamp(min=0).numpy())


def stable_for(logits: torch.Tensor) -> Array:
    """Number of updates in a row that left the top token alone, after each update [K, pos]."""
    flips = paired_output(logits[:-1], logits[1:])["flip"]
    run, out = np.zeros(flips.shape[1:]), np.empty_like(flips)
    for k, flip in enumerate(flips):
        run = np.where(flip == 1, 0.0, np.where(np.isnan(flip), np.nan, run + 1))
        out[k] = run
    return out


def _computer(change: Callable[..., Array], last: bool = False) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        x = as_logits(inputs[0], metric_id, axes=3)
        dtype = str(x.dtype).removeprefix("torch.")
        if len(x) < 2:
            return Result(float("nan"), "depth<2", float("nan"), x.shape[1], 0, metric_id, dtype=dtype)
        found = close_positions(change(x.double(), **params), metric_id, dtype, mask)
        if last and found.reason is None and found.profile is not None:
            end = float(found.profile[-1])
            return replace(found, value=end, reason="coverage" if np.isnan(end) else None)
        return found

    return compute


def _compute_q_exit(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    p = s.values[0][s.keep[0]]
    known = p[np.isfinite(p)]
    if (known < 0).any() or known.sum() > 1 + _SUM:
        raise MetricError(f"{metric_id} takes exit probabilities (≥ 0, sum ≤ 1), found a sum of {known.sum():.6g}.")
    if not 0 < params["q"] <= 1:
        raise MetricError(f"{metric_id}: q lies in (0, 1], found {params['q']}.")
    reached = np.flatnonzero(np.cumsum(p) >= params["q"] - _LEVEL)
    reason = "empty" if not len(p) else "coverage" if len(known) < len(p) else None
    at = None if reason or not len(reached) else int(reached[0]) + 1
    extras = {
        "time": float("nan") if reason else float(len(p) if at is None else at),
        "event": float("nan") if reason else float(at is not None),
    }
    reason = reason or ("censored" if at is None else None)
    return Result(
        float("nan") if at is None else float(at), reason, len(known) / len(p) if len(p) else float("nan"), 1, len(p),
        metric_id, dtype=s.dtype, extras=extras,
    )  # fmt: skip


_GROUPS = frozenset({"optional", "convergence"})
_SHARED: dict[str, Any] = {
    "input": "logits[depth,pos,vocab]",
    "invariances": frozenset({"shift"}),
    "groups": _GROUPS,
}
_MEAN = "; mean over positions, then over k"
_MEANS = r"\operatorname*{mean}_{k}\ \operatorname*{mean}_{\mathrm{pos}}\ "
_HUGINN = "Huginn code (arXiv 2502.05171)"
register(
    MetricSpec(
        id="huginn.entropy_diff/1",
        sentence="Change of the entropy of the next-token distribution per iteration.",
        formula=f"|H_k − H_{{k−1}}|, H = −Σ p ln p{_MEAN}",
        latex=_MEANS + r"|H_k-H_{k-1}|, \qquad H_k = -\sum_v p_{k,v}\ln p_{k,v}",
        value_range="[0, ln V]",
        unit="nat",
        source=f"entropy-diff exit of the {_HUGINN}, without its 1e-10 inside the logarithm",
        column="huginn_entropy_diff",
        vectors=("(.5,.5), (1,0) up to rounding → ln 2", "equal logits → 0"),
        **_SHARED,
    ),
    _computer(entropy_change),
)
register(
    MetricSpec(
        id="huginn.kl/1",
        sentence="KL divergence of the previous iteration's next-token distribution from the current one.",
        formula=f"KL(p_{{k−1}} ‖ p_k){_MEAN}",
        latex=_MEANS + r"\mathrm{KL}(p_{k-1}\,\Vert\,p_k)",
        value_range="[0, ∞)",
        unit="nat",
        source=f"KL exit of the {_HUGINN}",
        column="huginn_kl",
        vectors=("(.75,.25) then (.25,.75) → ½ ln 3", "equal logits → 0"),
        **_SHARED,
    ),
    _computer(kl_change),
)
register(
    MetricSpec(
        id="huginn.minp_kl/1",
        sentence="The same divergence on the min-p set: improbable tokens are first made equal.",
        formula=(f"p̃ = p, or 1/V where p < minp·max p, renormalised; KL(p̃_{{k−1}} ‖ p̃_k){_MEAN}"),
        latex=_MEANS
        + (
            r"\mathrm{KL}(\tilde p_{k-1}\,\Vert\,\tilde p_k), \qquad "
            r"\tilde p_v\propto\begin{cases} p_v & p_v\ge\mathrm{minp}\cdot\max p \\ 1/V & \text{otherwise} "
            r"\end{cases}"
        ),
        value_range="[0, ∞)",
        unit="nat",
        source=f"min-p KL exit of the {_HUGINN}",
        params={"minp": 0.1},
        column="huginn_minp_kl",
        vectors=("(.96,.02,.01,.01) then (.96,.01,.02,.01), minp .1 → 0", "all above minp·max → huginn.kl"),
        **_SHARED,
    ),
    _computer(minp_kl_change),
)
register(
    MetricSpec(
        id="huginn.argmax_stable/1",
        sentence="Number of last iterations in a row that left the most probable token alone.",
        formula=(
            "r_k = r_{k−1} + 1 where the top token of k is that of k−1, else 0, r_0 = 0; value = mean over positions "
            "of the last r; profile = mean over positions of each r_k; ties to the lower id"
        ),
        latex=(
            r"r_0 = 0, \qquad r_k = \begin{cases} r_{k-1}+1 & \arg\max p_k = \arg\max p_{k-1} \\ 0 & "
            r"\text{otherwise} \end{cases}, \qquad \operatorname*{mean}_{\mathrm{pos}} r_{\mathrm{last}}"
        ),
        value_range="[0, D − 1]",
        unit="iterations",
        source=f"argmax-stability exit of the {_HUGINN} (leaves at 5)",
        column="huginn_argmax_stable",
        vectors=("top tokens a,b,b,b → 2", "a,a,a,a → 3", "a,a,a,b → 0"),
        **_SHARED,
    ),
    _computer(stable_for, last=True),
)
register(
    MetricSpec(
        id="ouro.q_exit/1",
        sentence="First step at which the summed exit probabilities reach q.",
        formula="min{t: Σ_{s ≤ t} p_s ≥ q}, t from 1; never → NaN censored, time = T and event 0 beside it",
        latex=r"\min\Bigl\{\,t : \sum_{s\le t} p_s\ge q\,\Bigr\}",
        input="series",
        value_range="[1, T]",
        unit="iterations",
        invariances=frozenset(),
        source="Q-exit of Ouro (arXiv 2510.25741)",
        params={"q": 0.5},
        column="ouro_q_exit",
        vectors=("(.1,.2,.3,.4), q .5 → 3; q .1 → 1; q 1 → 4", "(.1,.2), q .5 → NaN censored, time 2"),
        groups=_GROUPS,
    ),
    _compute_q_exit,
)
