"""``cka.linear``: linear centred kernel alignment, between neighbouring depths or between two runs.

1 where the units keep their relations up to a rotation and one scale, 0 where they share nothing. ``kappa.geom`` is one
minus this quantity with unit vectors as rows; here rows are taken as they are (``rows=raw``), so units with massive
norms weigh more, or made unit vectors (``rows=cosine``).

The default estimator is the debiased one (U-centred Gram matrices), whose null value is 0. The biased one of the
original paper tends to 1 when the width exceeds the number of units, whatever the data, and is exactly 1 for two units;
it is offered under ``est=biased`` for comparison with published numbers and never as a default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms_and_validity
from dynprobe.metrics._gram import (
    MIN_UNITS,
    Windows,
    adjacent,
    check_window,
    close,
    double_centre,
    lay_windows,
    u_centre,
)
from dynprobe.metrics._inputs import Trajectory, as_trajectory
from dynprobe.metrics._reduce import Terms, mean_of_profile, share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores

__all__ = ["checked_pair", "cka", "cka_paired"]

_ESTIMATORS = {"unbiased": (u_centre, MIN_UNITS), "biased": (double_centre, 2)}


def _one_scale(norm: Array, ok: Bools) -> Array:
    """Root mean square norm of each depth and row over its valid units, in the shape of ``norm``.

    One factor for all rows of a matrix: alignment ignores it, and products stay in the range of the arithmetic.
    """
    top = np.where(ok, norm, 0.0).max(-1, initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = np.where(ok, norm / top[..., None], 0.0) ** 2
    rms = top * np.sqrt(share(squares.sum(-1), ok.sum(-1)))
    return np.broadcast_to(rms[..., None], norm.shape)


def _rows(norm: Array, ok: Bools, rows: str, metric: str) -> Array:
    if rows not in ("raw", "cosine"):
        raise MetricError(f"{metric}: rows is 'raw' or 'cosine', found {rows!r}.")
    return norm if rows == "cosine" else _one_scale(norm, ok)


def _estimator(est: str, W: int, metric: str) -> Any:
    if est not in _ESTIMATORS:
        raise MetricError(f"{metric}: est is 'unbiased' or 'biased', found {est!r}.")
    centre, least = _ESTIMATORS[est]
    check_window(W, least, metric)
    return centre, least


def cka(
    states: Sequence[torch.Tensor], norm: Array, valid: Bools, keep: Bools, *, eps: float, W: int, est: str, rows: str
) -> Scores:
    """Alignment of neighbouring depths, for every row; arguments as in :func:`~dynprobe.metrics._gram.adjacent`."""
    metric = "cka.linear/1"
    centre, least = _estimator(est, W, metric)
    scale = _rows(norm, valid & keep, rows, metric)
    scores = adjacent(
        states, norm, valid, keep, eps=eps, scale=scale, W=W, centre=centre, least=least, asked=metric
    )  # fmt: skip
    return replace(scores, value=1.0 - scores.value, profile=None if scores.profile is None else 1.0 - scores.profile)


def cka_paired(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], norm: tuple[Array, Array], valid: tuple[Bools, Bools],
    keep: Bools, *, eps: float, W: int, est: str, rows: str,
) -> Scores:  # fmt: skip
    """Alignment of two runs depth by depth, for every row, over the units valid in both.

    Args:
        a: D tensors [B, T, dim] of one run.
        b: The same depths and units of the other; widths may differ.
        norm: Norms [D, B, T] of both.
        valid: Valid units [D, B, T] of both.
        keep: Unmasked units [D, B, T].
        eps: Rounding unit of the degenerate-Gram test.
        W: Units per window.
        est: ``unbiased`` or ``biased``.
        rows: ``raw`` or ``cosine``.
    """
    metric = "cka.linear.paired/1"
    centre, least = _estimator(est, W, metric)
    ok = valid[0] & valid[1] & keep
    terms = Terms(ok, keep, keep.sum((0, 2)))
    profile, degenerate = np.full(keep.shape[:2], np.nan), np.zeros(keep.shape[1], np.int64)
    if terms.n_ok.max(initial=0) >= least:
        windows = Windows(lay_windows(keep, W), torch.float64)
        usable = windows.take(ok) & windows.there.reshape(windows.groups, windows.size)
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = [np.where(usable, 1.0 / windows.take(_rows(n, ok, rows, metric)), 0.0) for n in norm]
        for depth, pair in enumerate(zip(a, b, strict=True)):
            here, units = slice(depth, depth + 1), torch.from_numpy(usable[depth])
            x, y = (
                centre(windows.grams([state], scale[here], usable[here]), units)
                for state, scale in zip(pair, scales, strict=True)
            )
            xx, yy, xy = ((p * q).sum((-1, -2)).numpy() for p, q in ((x, x), (y, y), (x, y)))
            close(profile[here], degenerate, xx, yy, xy, units.sum(-1).numpy()[None], eps, least)
    few = terms.n_ok < least
    scores = mean_of_profile(
        1.0 - np.where(few, np.nan, profile), terms,
        few=few.all(0) if len(few) else False, few_text=f"units<{least}", few_profile=few,
    )  # fmt: skip
    scores.extras = {"n_degenerate": degenerate, "n_invalid": (keep & ~ok).sum((0, 2))}
    return scores


def checked_pair(inputs: tuple[Any, ...], mask: Any, metric_id: str) -> tuple[Trajectory, Trajectory]:
    """Read two trajectories with the same depths and units; widths may differ."""
    a, b = (as_trajectory(x, mask, metric_id, ragged=True) for x in inputs)
    if a.keep.shape != b.keep.shape:
        raise MetricError(
            f"{metric_id} needs the same depths and units on both sides, found {a.keep.shape[0]} × {a.keep.shape[2]} "
            f"and {b.keep.shape[0]} × {b.keep.shape[2]}."
        )
    return a, b


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id, ragged=True)
    norm, valid = norms_and_validity(t.states, t.keep)
    return cka(t.states, norm, valid, t.keep, eps=t.eps, **params).result(0, metric_id, dtype=t.dtype)


def _compute_paired(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    a, b = checked_pair(inputs, mask, metric_id)
    (norm_a, valid_a), (norm_b, valid_b) = norms_and_validity(a.states, a.keep), norms_and_validity(b.states, b.keep)
    scores = cka_paired(
        a.states, b.states, (norm_a, norm_b), (valid_a, valid_b), a.keep, eps=max(a.eps, b.eps), **params
    )
    return scores.result(0, metric_id, dtype=b.dtype)


_PARAMS = {"W": 64, "est": "unbiased", "rows": "raw"}
_FORMULA = (
    "K = XXᵀ, M = YYᵀ; CKA = ⟨K̃, M̃⟩/√(⟨K̃, K̃⟩·⟨M̃, M̃⟩); est=unbiased: K̃ the U-centred matrix of kappa.geom/1, N ≥ 4; "
    "est=biased: K̃ = HKH, which is ‖YᵀX‖_F²/(‖XᵀX‖_F·‖YᵀY‖_F) with columns centred, N ≥ 2; rows=cosine: unit vectors; "
    "mean over non-overlapping windows of W units first; degenerate when the rms of K̃ ≤ 16·eps of the mean squared norm"
)
_INVARIANCES = frozenset({"R", "R_l", "S", "S_l", "P", "T", "shift"})
_RANGE = "[−1, 1]; est=biased [0, 1]"

_LATEX = (
    r"\mathrm{CKA}_l &= \frac{\langle\tilde K,\tilde M\rangle}"
    r"{\sqrt{\langle\tilde K,\tilde K\rangle\,\langle\tilde M,\tilde M\rangle}} \\"
    r"\tilde K &= \begin{cases} \text{U-centred } K & \text{est=unbiased} \\"
    r"HKH,\ H = I-\frac{1}{N}\mathbf 1\mathbf 1^{\mathsf T} & \text{est=biased} \end{cases} \\"
    r"\mathrm{value} &= \operatorname*{mean}_{l}\ \operatorname*{mean}_{\text{windows of }W}\ \mathrm{CKA}_l "
    r"\end{aligned}"
)
register(
    MetricSpec(
        id="cka.linear/1",
        span=True,
        sentence="Linear CKA of the units' geometry at neighbouring depths, debiased.",
        formula=f"{_FORMULA}; X, Y = states at depths l, l+1; value = mean over l",
        latex=r"\begin{aligned} K &= X_l X_l^{\mathsf T}, \qquad M = X_{l+1}X_{l+1}^{\mathsf T} \\" + _LATEX,
        input="trajectory[depth,unit,dim], dim may differ by depth",
        value_range=_RANGE,
        unit="1",
        invariances=_INVARIANCES,
        source="Kornblith et al. 2019 (arXiv 1905.00414); unbiased HSIC of Song et al. 2012",
        params=_PARAMS,
        column="cka",
        levels={"profile": "mean over windows", "sample": "mean over steps"},
        vectors=(
            "units e₁,e₁,e₂,e₂ then e₁,e₂,e₁,e₂ → −1/2; est=biased → 0",
            "y = s·xQ + c → 1",
            "est=biased, N = 2 → 1 for any data",
            "N = 3 → NaN units<4",
        ),
        groups=frozenset({"optional"}),
    ),
    _compute,
    score=lambda c, p: cka(*c.of_span, eps=c.w.eps, **p),
)
register(
    MetricSpec(
        id="cka.linear.paired/1",
        span=True,
        sentence="Linear CKA between the units' geometry in two runs at the same depth, debiased.",
        formula=f"{_FORMULA}; X, Y = states of the two runs at depth l, units valid in both; value = mean over l",
        latex=r"\begin{aligned} K &= X_l X_l^{\mathsf T}, \qquad M = X'_l {X'_l}^{\mathsf T} \\" + _LATEX,
        input="trajectory[depth,unit,dim]×2, clean first, dim may differ",
        value_range=_RANGE,
        unit="1",
        invariances=_INVARIANCES,
        source="Kornblith et al. 2019 (arXiv 1905.00414); unbiased HSIC of Song et al. 2012",
        params=_PARAMS,
        column="cka_linear_paired",
        vectors=("equal runs → 1", "units e₁,e₁,e₂,e₂ against e₁,e₂,e₁,e₂ → −1/2"),
        groups=frozenset({"paired"}),
    ),
    _compute_paired,
    arity=2,
)
