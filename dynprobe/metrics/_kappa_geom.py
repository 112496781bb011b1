"""``kappa.geom``: geometric desynchronisation, one minus unbiased CKA between neighbouring depths.

It compares *relations among units*, so it ignores any rotation and rescaling of a depth, and depths may differ in
width. Units are taken in non-overlapping windows of W in their order (a whole 8k-token Gram costs as much as the
forward); a last window shorter than four units is left out, unless it is the only one. Windows are laid over the
unmasked units, the same at all depths; inside a window the units of a pair of depths are those valid at both.

Two numerical choices. HSIC_u is the inner product of U-centred matrices, because the trace form cancels. And a window's
mean unit vector is subtracted before the Gram matrix is made: it changes cosines by a_i + a_j off the diagonal, which
U-centring annihilates, so the value is the same, but the digits survive when all units share one large direction.
The Gram form is used for any W: a feature-space form would have to go through the trace form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import NEAR_ZERO, norms, validity
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import mean_of_profile, share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores

__all__ = ["kappa_geom"]

MIN_UNITS = 4


def _windows(keep: Bools, size: int) -> Any:
    """Positions of the unmasked units by window: int [B, windows, size], −1 where a window has no unit."""
    any_keep = np.logical_or.reduce(keep, axis=0)
    counts = any_keep.sum(-1)
    longest = int(counts.max(initial=0))
    size = max(1, min(size, longest))
    n_windows = max(1, -(-longest // size))
    index = np.full((len(counts), n_windows * size), -1)
    rank = np.cumsum(any_keep, axis=-1) - 1
    rows, cols = np.nonzero(any_keep)
    index[rows, rank[rows, cols]] = cols
    return index.reshape(len(counts), n_windows, size)


def _u_centre(gram: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """U-centred matrix on the given units; zero on the diagonal and outside. ``gram`` [G, W, W], ``units`` [G, W]."""
    pair = units[:, :, None] & units[:, None, :]
    pair.diagonal(dim1=1, dim2=2).zero_()
    k = torch.where(pair, gram, 0.0)
    n = units.sum(-1).to(gram.dtype).clamp(min=3.0)[:, None, None]
    row = k.sum(-1, keepdim=True)
    total = row.sum(-2, keepdim=True)
    return torch.where(pair, k - (row + row.transpose(1, 2)) / (n - 2.0) + total / ((n - 1.0) * (n - 2.0)), 0.0)


class _Windows:
    """Gathers unit vectors window by window and makes their cosine Gram matrices."""

    def __init__(self, index: Any, dtype: torch.dtype) -> None:
        self.index, self.dtype = index, dtype
        self.shape = index.shape
        self.there = index >= 0
        self.rows = np.arange(index.shape[0])[:, None, None]
        whole = index.shape[1] == 1 and bool((index == np.arange(index.shape[2])).all())
        self.whole = index.shape[2] if whole else None

    def take(self, array: Any) -> Any:
        """[B, T] → [B, windows, size]."""
        return array[self.rows, np.maximum(self.index, 0)]

    def gram(self, state: torch.Tensor, norm: Array, valid: Bools) -> tuple[torch.Tensor, torch.Tensor]:
        """Shifted cosines [G, W, W] in float64 and usable units [G, W]."""
        usable = self.take(valid) & self.there
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(usable, 1.0 / self.take(norm), 0.0)
        groups, size = self.shape[0] * self.shape[1], self.shape[2]
        state = state.detach()
        if self.whole is not None:
            x = state[:, : self.whole].to(self.dtype)
        else:
            rows = torch.from_numpy(np.broadcast_to(self.rows, self.shape).reshape(-1).copy()).to(state.device)
            cols = torch.from_numpy(np.maximum(self.index, 0).reshape(-1)).to(state.device)
            x = state[rows, cols].to(self.dtype)
        x = x.reshape(groups, size, -1)
        flags = torch.from_numpy(usable.reshape(groups, size))
        unit = x * torch.from_numpy(scale.reshape(groups, size, 1)).to(x.device, x.dtype)
        if not usable.all():
            unit = torch.where(flags.to(x.device)[..., None], unit, 0.0)
        count = flags.sum(-1).clamp(min=1).to(unit.device, unit.dtype)[:, None, None]
        unit = unit - unit.sum(1, keepdim=True) / count
        return torch.bmm(unit, unit.transpose(1, 2)).double().cpu(), flags


def kappa_geom(
    states: Sequence[torch.Tensor],
    norm: Array,
    valid: Bools,
    keep: Bools,
    *,
    eps: float,
    W: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Scores:
    """Score every row.

    Args:
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        eps: Rounding unit of the degenerate-Gram test.
        W: Units per window.
        dtype: Arithmetic of the Gram product; centring is always float64.
    """
    if W < MIN_UNITS:
        raise MetricError(f"kappa.geom/1 needs windows of at least {MIN_UNITS} units, found W={W}.")
    n_depths, batch = len(states), keep.shape[1]
    profile = np.full((max(n_depths - 1, 0), batch), np.nan)
    extras = {"n_degenerate": np.zeros(batch, np.int64)}
    step_keep = keep[1:] & keep[:-1]
    step_ok = valid[1:] & valid[:-1] & step_keep
    n_pair = step_ok.sum(-1)
    if n_depths > 1 and n_pair.max(initial=0) >= MIN_UNITS:
        windows = _Windows(_windows(keep, W), dtype)
        with torch.no_grad():
            _fill(profile, extras["n_degenerate"], windows, states, norm, valid & keep, eps)
    few = n_pair < MIN_UNITS
    scores = mean_of_profile(
        np.where(few, np.nan, profile),
        step_ok,
        step_keep,
        n_states=keep.sum((0, 2)),
        short=n_depths < 2,
        few=few.all(0) if n_depths > 1 else False,
        few_profile=few,
    )
    scores.extras = {
        **extras,
        "n_invalid": (keep & ~valid).sum((0, 2)),
        "n_nonfinite": (keep & np.isnan(norm)).sum((0, 2)),
    }
    return scores


def _fill(
    profile: Array,
    degenerate: Any,
    windows: _Windows,
    states: Sequence[torch.Tensor],
    norm: Array,
    ok: Bools,
    eps: float,
) -> None:
    batch, n_windows = windows.shape[:2]
    before = windows.gram(states[0], norm[0], ok[0])
    centred: torch.Tensor | None = None
    for step in range(len(states) - 1):
        now = windows.gram(states[step + 1], norm[step + 1], ok[step + 1])
        if torch.equal(before[1], now[1]):
            units = now[1]
            a = _u_centre(*before) if centred is None else centred
            b = centred = _u_centre(*now)
        else:
            units = before[1] & now[1]
            a, b, centred = _u_centre(before[0], units), _u_centre(now[0], units), None
        n = units.sum(-1).numpy()
        aa, bb, ab = ((p * q).sum((1, 2)).numpy() for p, q in ((a, a), (b, b), (a, b)))
        pairs = np.maximum(n * (n - 1), 1)
        floor = (NEAR_ZERO * eps) ** 2
        enough = n >= MIN_UNITS
        flat = enough & ((aa / pairs <= floor) | (bb / pairs <= floor))
        with np.errstate(divide="ignore", invalid="ignore"):
            value = 1.0 - ab / np.sqrt(aa * bb)
        good = (enough & ~flat).reshape(batch, n_windows)
        total = np.where(good, value.reshape(batch, n_windows), 0.0).sum(-1)
        profile[step] = share(total, good.sum(-1))
        degenerate += flat.reshape(batch, n_windows).sum(-1)
        before = now


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id, ragged=True)
    norm = np.stack([norms(s) for s in t.states]) if t.states else np.zeros(t.keep.shape)
    valid = validity(norm, t.keep, t.keep)
    scores = kappa_geom(t.states, norm, valid, t.keep, eps=t.eps, W=int(params["W"]))
    return scores.result(0, metric_id, dtype=t.dtype)


register(
    MetricSpec(
        id="kappa.geom/1",
        sentence="One minus unbiased CKA of the cosine geometry of units at neighbouring depths.",
        formula=(
            "G_l = X̂_l X̂_lᵀ; Ã_ij = K_ij − Σ_k K_ik/(N−2) − Σ_k K_kj/(N−2) + ΣK/((N−1)(N−2)) for i ≠ j, K zero on the "
            "diagonal; HSIC_u = Σ_{i≠j} Ã_ij B̃_ij/(N(N−3)); CKA_u = HSIC_u(G_l,G_{l+1})/√(HSIC_u(G_l,G_l)·"
            "HSIC_u(G_{l+1},G_{l+1})); κ_geom = 1 − mean_l CKA_u, mean over non-overlapping windows of W units first; "
            "degenerate when the rms of Ã ≤ 16·eps"
        ),
        input="trajectory[depth,unit,dim], dim may differ by depth",
        value_range="[0, 2]",
        unit="1",
        invariances=frozenset({"R", "R_l", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe; unbiased HSIC of Song et al. 2012, CKA of Kornblith et al. 2019",
        params={"W": 64},
        column="kappa_geom",
        levels={"profile": "mean over windows", "sample": "mean over steps"},
        vectors=(
            "kgeom-1: units e₁,e₁,e₂,e₂ then e₁,e₂,e₁,e₂ → 1.5",
            "kgeom-2: A, A, B → 0.75",
            "N = 3 → NaN units<4",
            "off-diagonal cosines a_i + a_j → NaN zero-denominator",
        ),
        groups=frozenset({"default"}),
    ),
    _compute,
)
