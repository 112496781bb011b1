"""Paired read-outs: what a perturbation changed, on the same tokens.

Absolute κ is dominated by architecture and prompt, so effects are read as differences between two runs that differ in
the perturbation only, teacher-forced on the same tokens. Only (depth, unit) terms valid in both runs count. Only the
step *into* the injection depth has a guaranteed sign (for an acute step angle and noise orthogonal to both states);
later steps are empirical. ``diverge.angle`` compares the states of the two runs directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms, pair_angle, validity
from dynprobe.metrics._inputs import as_pair
from dynprobe.metrics._reduce import Terms, mean_of_profile, share
from dynprobe.metrics._registry import MetricSpec, register, register_column
from dynprobe.metrics._result import Array, Bools, Result, Scores
from dynprobe.metrics._walk import walk

if TYPE_CHECKING:
    from jaxtyping import Float

    from dynprobe.metrics._measure import Measurement

__all__ = ["diverge", "paired", "phase_paired"]


def phase_paired(
    clean: Array, arm: Array, ok: Bools, keep: Bools, *, n_states: Any, inject: int | None = None
) -> Scores:
    """Δκ per row from two angle arrays.

    Args:
        clean: Step angles [S, B, T] in rad.
        arm: The same of the other run.
        ok: Terms valid in both runs.
        keep: Unmasked terms.
        n_states: Unmasked states per row.
        inject: Depth whose state was changed, 0-based on this axis; step ``inject − 1`` leads into it.
    """
    n_steps, batch = clean.shape[:2]
    lag = (arm - clean) / np.pi
    terms = Terms(ok, keep, n_states)
    scores = mean_of_profile(terms.mean(lag), terms, short=n_steps < 1, per_unit=terms.mean_steps(lag))
    if inject is not None:
        if not 0 <= inject <= n_steps:
            raise MetricError(f"inject={inject} is not a depth of a trajectory with {n_steps + 1} depths.")
        assert scores.profile is not None
        into = scores.profile[inject - 1] if inject > 0 else np.full(batch, np.nan)
        after = scores.profile[inject:]
        seen = ~np.isnan(after)
        scores.extras = {
            "delta_inj": into,
            "delta_inj_reason": [("depth<2" if inject == 0 else "coverage") if np.isnan(x) else None for x in into],
            "delta_down": share(np.add.reduce(after, axis=0, where=seen, initial=0.0), seen.sum(0)),
        }
    return scores


def diverge(
    states_clean: Sequence[Float[torch.Tensor, "batch pos *slot dim"]],
    states_arm: Sequence[Float[torch.Tensor, "batch pos *slot dim"]],
    mask: Any,
    *,
    dtype: Any = None,
) -> Float[np.ndarray, "depth batch pos"]:
    """Angle between the states of two runs at every depth, as a fraction of a half-turn.

    Args:
        states_clean: Depths, tensors [B, T, dim], or [B, T, slot, dim].
        states_arm: The same depths of the other run.
        mask: Bool [B, T], True = real token.
        dtype: Arithmetic; float32 or better.

    Returns:
        float64 [depths, B, T], the mean over slots; NaN where masked or where a state is invalid.

    Raises:
        MetricError: The two runs have different numbers of depths or shapes.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> diverge([x, x], [x, y], torch.ones(1, 1, dtype=torch.bool)).ravel().round(6)
        array([0. , 0.5])
    """
    n_depths = len(states_clean)
    if n_depths != len(states_arm):
        raise MetricError(
            f"diverge: {n_depths} depths against {len(states_arm)}; capture the same depths in both runs."
        )
    real = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask, dtype=bool)
    out = np.full((n_depths, *real.shape), np.nan)
    with torch.no_grad():
        for depth in range(n_depths):
            a, b = states_clean[depth].detach(), states_arm[depth].detach()
            if a.shape != b.shape or tuple(a.shape[:2]) != real.shape:
                raise MetricError(
                    f"diverge: depth {depth} has shapes {list(a.shape)} and {list(b.shape)}, mask {list(real.shape)}."
                )
            kind = dtype or (torch.float64 if a.dtype == torch.float64 else torch.float32)
            slots = a.shape[2] if a.dim() == 4 else 1
            units = np.repeat(real, slots, axis=1)
            angle = _diverge_depth(a.to(kind).flatten(1, -2), b.to(a.device, kind).flatten(1, -2), units)
            out[depth] = angle.reshape(*real.shape, slots).mean(-1)
    return out


def _diverge_depth(a: torch.Tensor, b: torch.Tensor, real: Bools) -> Array:
    norm_a, norm_b = norms(a), norms(b)
    ok = validity(norm_a, real, real) & validity(norm_b, real, real)
    return np.where(ok, pair_angle(a, b, norm_a, norm_b) / np.pi, np.nan)


def paired(clean: Measurement, arm: Measurement, inject: int | None = None) -> list[Result]:
    """Δκ of every row from two measurements of the same prompts.

    Args:
        clean: Measurement of the clean run.
        arm: Measurement of the other arm.
        inject: Depth whose state was changed (as in ``tape.states``), or None.

    Returns:
        One ``kappa.phase.paired/1`` per row; with ``inject``, ``delta_inj`` and ``delta_down`` in ``extras``. The
        profile has one entry per step between depths that take part.

    Raises:
        MetricError: The measurements do not cover the same depths and tokens, or lack angles.

    Example:
        >>> import torch
        >>> from dynprobe.metrics import measure
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> states, mask = [torch.randn(1, 3, 8) for _ in range(4)], torch.ones(1, 3, dtype=torch.bool)
        >>> clean = measure(states, mask, metrics=["kappa.phase/1"])
        >>> float(paired(clean, clean)[0])
        0.0
    """
    for m in (clean, arm):
        if "angle" not in m.depth:
            raise MetricError("paired needs measurements that contain kappa.phase/1; found none.")
    a, b = clean.depth["angle"], arm.depth["angle"]
    if a.shape != b.shape or clean.first != arm.first:
        raise MetricError(
            f"paired needs the same depths, rows and tokens on both sides, found {a.shape} and {b.shape}."
        )
    if not np.array_equal(clean.keep, arm.keep):
        raise MetricError(
            "paired: the two measurements have different masks or sinks; measure both with the same ones."
        )
    steps = slice(clean.first + 1, None)
    a, b = a[steps].astype(np.float64), b[steps].astype(np.float64)
    ok = ~(np.isnan(a) | np.isnan(b))
    keep = np.broadcast_to(clean.keep, a.shape)
    metric_id = "kappa.phase.paired/1"
    if inject is not None:
        if not 0 <= inject < len(clean.depth["angle"]):
            raise MetricError(f"inject={inject} is not one of the depths 0 … {len(clean.depth['angle']) - 1}.")
        # an injection below the first depth in use leads into no measured step: all steps are downstream
        inject = max(inject - clean.first, 0)
    n_states = clean.keep.sum(-1) * (len(a) + 1)
    scores = phase_paired(a, b, ok, keep, n_states=n_states, inject=inject)
    return [scores.result(row, metric_id, clean.extractor_id, arm.dtype) for row in range(a.shape[1])]


def _compute_paired(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, inject: int | None = None
) -> Result:
    a, b = as_pair(inputs, mask, metric_id)
    wa, wb = walk(a.states, a.keep, a.keep, eps=a.eps), walk(b.states, b.keep, b.keep, eps=b.eps)
    ok = wa.step_ok & wb.step_ok
    scores = phase_paired(wa.angle, wb.angle, ok, wa.step_keep, n_states=wa.keep.sum((0, 2)), inject=inject)
    return scores.result(0, metric_id, dtype=b.dtype)


def _compute_diverge(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    a, b = as_pair(inputs, mask, metric_id)
    keep = a.keep
    grid = np.full(keep.shape, np.nan)
    for depth, (p, q) in enumerate(zip(a.states, b.states, strict=True)):
        grid[depth] = _diverge_depth(p, q, keep[depth])
    terms = Terms(~np.isnan(grid), keep, keep.sum((0, 2)))
    scores = mean_of_profile(terms.mean(grid), terms, per_unit=terms.mean_steps(grid))
    scores.extras = {"grid": np.moveaxis(grid, 1, 0)}
    return scores.result(0, metric_id, dtype=b.dtype)


_PAIRED = frozenset({"paired"})
register(
    MetricSpec(
        id="kappa.phase.paired/1",
        sentence="Change of κ_phase between a clean run and another arm on the same tokens.",
        formula=(
            "Δκ_l = (1/π)·mean_n(θ'_{l,n} − θ_{l,n}) over units valid in both runs; Δκ = mean_l Δκ_l; injection at m: "
            "Δκ_inj = Δκ_{m−1} (m = 0: NaN depth<2), Δκ_down = mean_{l ≥ m} Δκ_l"
        ),
        latex=(
            r"\begin{aligned} \Delta\kappa_l &= "
            r"\frac{1}{\pi}\operatorname*{mean}_{n}\bigl(\theta'_{l,n}-\theta_{l,n}\bigr), \qquad "
            r"\Delta\kappa = \operatorname*{mean}_{l}\Delta\kappa_l \\"
            r"\Delta\kappa_{\mathrm{inj}} &= \Delta\kappa_{m-1}, \qquad \Delta\kappa_{\mathrm{down}} = "
            r"\operatorname*{mean}_{l\ge m}\Delta\kappa_l \end{aligned}"
        ),
        input="trajectory[depth,unit,dim]×2, clean first",
        value_range="[−1, 1]",
        unit="half-turns",
        invariances=frozenset({"R", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe",
        column="kappa_phase_d",
        levels={"sample": "arm − clean"},
        vectors=("two states 45° apart, kick α ⟂ both at the second: cos θ' = cos θ/√(1 + α²)",),
        groups=_PAIRED,
    ),
    _compute_paired,
    arity=2,
)
register(
    MetricSpec(
        id="diverge.angle/1",
        sentence="Angle between the states of two runs at the same depth and unit.",
        formula="(1/π)·angle(x_{l,n}, x'_{l,n}); profile = mean over units valid in both; value = mean over depths",
        latex=(
            r"\frac{1}{\pi}\operatorname*{mean}_{l}\ \operatorname*{mean}_{n}\ "
            r"\operatorname{angle}(x_{l,n},\,x'_{l,n})"
        ),
        input="trajectory[depth,unit,dim]×2, clean first",
        value_range="[0, 1]",
        unit="half-turns",
        invariances=frozenset({"R", "R_l", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe",
        column="diverge_angle",
        levels={"depth": "per unit", "profile": "mean over units", "sample": "mean over depths"},
        vectors=("equal runs → 0", "relnorm kick α ⟂ h → arctan(α)/π"),
        groups=_PAIRED,
    ),
    _compute_diverge,
    arity=2,
)
register_column("delta_inj", "kappa.phase.paired/1", "half-turns", {"sample": "step into the injection depth"})
register_column("delta_down", "kappa.phase.paired/1", "half-turns", {"sample": "mean over steps after the injection"})
