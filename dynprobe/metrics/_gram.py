"""Gram matrices of units, window by window, and the normalised inner product of two of them.

Centred kernel alignment asks how alike two depths see the relations among the same units. It is what ``kappa.geom`` and
``cka.linear`` share; they differ in how rows are scaled and how the matrices are centred. Units are taken in
non-overlapping windows of W in their order (a whole 8k-token Gram costs as much as the forward); a last window that is
too short is left out, unless it is the only one. Windows are laid over the unmasked units, the same at all depths;
inside a window the units of a pair of depths are those valid at both.

Two numerical choices. HSIC_u is the inner product of U-centred matrices, because the trace form cancels. And a window's
mean row is subtracted before the Gram matrix is made: it changes entries by a_i + a_j off the diagonal, which centring
annihilates, so the value is the same, but the digits survive when all units share one large direction. The Gram form is
used for any W: a feature-space form would have to go through the trace form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics import _geometry
from dynprobe.metrics._geometry import CHUNK_BYTES_DEVICE, NEAR_ZERO, workspace
from dynprobe.metrics._reduce import Terms, mean_of_profile, share
from dynprobe.metrics._result import Array, Bools, Scores

__all__ = ["MIN_UNITS", "Windows", "adjacent", "check_window", "close", "double_centre", "lay_windows", "u_centre"]

MIN_UNITS = 4
Centring: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lay_windows(keep: Bools, size: int) -> Any:
    """Positions of the unmasked units by window: int [B, windows, size], −1 where a window has no unit."""
    any_keep = np.logical_or.reduce(keep, axis=0)
    counts = any_keep.sum(-1)
    longest = int(counts.max(initial=0))
    if 0 < longest <= size:
        # one window per row: leave the units where they are, so that states are sliced and not gathered
        used = np.flatnonzero(any_keep.any(0))
        places = np.arange(used[0], used[-1] + 1)
        return np.where(any_keep[:, places], places, -1)[:, None, :]
    size = max(1, min(size, longest))
    n_windows = max(1, -(-longest // size))
    index = np.full((len(counts), n_windows * size), -1)
    rank = np.cumsum(any_keep, axis=-1) - 1
    rows, cols = np.nonzero(any_keep)
    index[rows, rank[rows, cols]] = cols
    return index.reshape(len(counts), n_windows, size)


def u_centre(k: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """U-centred matrices on the given units, in place; zero on the diagonal and outside.

    ``k`` is [..., G, W, W], ``units`` bool [G, W].
    """
    pair = None if bool(units.all()) else (units[:, :, None] & units[:, None, :]).to(k.dtype)
    n = units.sum(-1).to(k.dtype).clamp(min=3.0)[:, None, None]
    k.diagonal(dim1=-2, dim2=-1).zero_()
    if pair is not None:
        k *= pair
    row = k.sum(-1, keepdim=True)
    total = row.sum(-2, keepdim=True)
    row = row / (n - 2.0) - total / (2.0 * (n - 1.0) * (n - 2.0))
    k -= row
    k -= row.transpose(-1, -2)
    k.diagonal(dim1=-2, dim2=-1).zero_()
    if pair is not None:
        k *= pair
    return k


def double_centre(k: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``H K H`` on the given units, diagonal kept; zero outside. Shapes as in :func:`u_centre`."""
    pair = (units[:, :, None] & units[:, None, :]).to(k.dtype)
    n = units.sum(-1).to(k.dtype).clamp(min=1.0)[:, None, None]
    k = k * pair
    row = k.sum(-1, keepdim=True) / n
    return (k - row - row.transpose(-1, -2) + row.sum(-2, keepdim=True) / n) * pair


class Windows:
    """Gathers unit vectors window by window and makes their Gram matrices."""

    def __init__(self, index: Any, dtype: torch.dtype) -> None:
        self.index, self.dtype = index, dtype
        self.shape = index.shape
        self.there = index >= 0
        self.rows = np.arange(index.shape[0])[:, None, None]
        self.groups, self.size = index.shape[0] * index.shape[1], index.shape[2]
        start = int(index.max(initial=0)) - self.size + 1
        in_place = np.where(index >= 0, index - start, np.arange(self.size)) == np.arange(self.size)
        self.slice = slice(start, start + self.size) if index.shape[1] == 1 and bool(in_place.all()) else None

    def take(self, array: Any) -> Any:
        """[D, B, T] → [D, G, W]."""
        taken = array[:, self.rows, np.maximum(self.index, 0)]
        return taken.reshape(len(array), self.groups, self.size)

    def gather(self, state: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] → [G, W, dim]."""
        if self.slice is not None:
            x = state[:, self.slice]
        else:
            rows = torch.from_numpy(np.broadcast_to(self.rows, self.shape).reshape(-1).copy()).to(state.device)
            cols = torch.from_numpy(np.maximum(self.index, 0).reshape(-1)).to(state.device)
            x = state[rows, cols]
            x = x.unflatten(0, (self.groups, self.size))
        return x

    def grams(self, states: Sequence[torch.Tensor], scale: Array, usable: Bools) -> torch.Tensor:
        """Shifted cosines [k, G, W, W] in float64 of k depths of one width; ``scale`` is 1/norm, 0 where unusable."""
        pieces = [self.gather(s.detach()).to(self.dtype) for s in states]
        x = pieces[0][None] if len(pieces) == 1 else torch.stack([p.to(pieces[0].device) for p in pieces])
        factor = torch.from_numpy(scale[..., None]).to(x.device, x.dtype)
        unit = torch.mul(x, factor, out=workspace("chord", x))
        count = torch.from_numpy(np.maximum(usable.sum(-1), 1)).to(x.device, x.dtype)[..., None, None]
        if not usable.all():
            # a product with scale 0 would keep NaN, and the mean must not reach into unusable rows
            flags = torch.from_numpy(usable[..., None]).to(x.device)
            unit = torch.where(flags, unit, 0.0)
        unit -= unit.sum(-2, keepdim=True) / count
        flat = unit.flatten(0, 1)
        # .double() copies float32 products; a float64 product is fresh as well, so the caller may write into it
        gram = torch.bmm(flat, flat.transpose(1, 2)).double().cpu()
        return gram.view(len(states), self.groups, self.size, self.size)


def check_window(W: float, least: int, asked: str) -> None:
    """Refuse a window size that is no whole number or too small."""
    if least > W or int(W) != W:
        raise MetricError(f"{asked} needs windows of at least {least} units, a whole number; found W={W}.")


def adjacent(
    states: Sequence[torch.Tensor],
    norm: Array,
    valid: Bools,
    keep: Bools,
    *,
    eps: float,
    scale: Array | None = None,
    W: int = 64,
    dtype: torch.dtype = torch.float64,
    centre: Centring = u_centre,
    least: int = MIN_UNITS,
    asked: str = "kappa.geom/1",
) -> Scores:
    """One minus the alignment of neighbouring depths, for every row.

    Args:
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        valid: Valid units [D, B, T].
        keep: Unmasked units [D, B, T].
        eps: Rounding unit of the degenerate-Gram test.
        scale: What each state is divided by [D, B, T]; None = its norm, which makes cosines.
        W: Units per window.
        dtype: Arithmetic of the Gram product; centring is always float64.
        centre: How the Gram matrices are centred.
        least: Units a window needs.
        asked: Id for the refusal.
    """
    check_window(W, least, asked)
    n_depths, batch = len(states), keep.shape[1]
    profile = np.full((max(n_depths - 1, 0), batch), np.nan)
    degenerate = np.zeros(batch, np.int64)
    terms = Terms(valid[1:] & valid[:-1], keep[1:] & keep[:-1], keep.sum((0, 2)))
    if n_depths > 1 and terms.n_ok.max(initial=0) >= least:
        windows = Windows(lay_windows(keep, W), dtype)
        with torch.no_grad():
            fill_profile(
                profile, degenerate, windows, states, norm if scale is None else scale, valid & keep, eps, centre, least
            )
    few = terms.n_ok < least
    some_few = bool(few.any())
    scores = mean_of_profile(
        np.where(few, np.nan, profile),
        terms,
        short=n_depths < 2,
        few=few.all(0) if some_few and n_depths > 1 else False,
        few_text=f"units<{least}",
        few_profile=few if some_few else None,
    )
    scores.extras = {
        "n_degenerate": degenerate,
        "n_invalid": (keep & ~valid).sum((0, 2)),
        "n_nonfinite": (keep & np.isnan(norm)).sum((0, 2)),
    }
    return scores


def fill_profile(
    profile: Array,
    degenerate: Any,
    windows: Windows,
    states: Sequence[torch.Tensor],
    scale_by: Array,
    ok: Bools,
    eps: float,
    centre: Centring,
    least: int,
) -> None:
    """Fill the profile, a block of depths at a time while the usable units do not change, else step by step."""
    usable = windows.take(ok) & windows.there.reshape(windows.groups, windows.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(usable, 1.0 / windows.take(scale_by), 0.0)
    n_depths = len(states)
    steady = bool((usable == usable[:1]).all()) and len({s.shape[-1] for s in states}) == 1
    bytes_per_depth = windows.groups * windows.size * max(states[0].shape[-1] * 4, windows.size * 16)
    block = max(1, (_geometry.CHUNK_BYTES if states[0].device.type == "cpu" else CHUNK_BYTES_DEVICE) // bytes_per_depth)
    block = block if steady else 1
    before: torch.Tensor | None = None
    before_raw: torch.Tensor | None = None
    for low in range(0, n_depths, block):
        high = min(low + block, n_depths)
        raw = windows.grams(states[low:high], scale[low:high], usable[low:high])
        units = torch.from_numpy(usable[low])
        if steady:
            now = centre(raw, units)
            chain = now if before is None else torch.cat([before, now])
            if len(chain) < 2:
                before = chain
                continue
            own = torch.linalg.vecdot(chain.flatten(2), chain.flatten(2)).numpy()
            cross = torch.linalg.vecdot(chain[:-1].flatten(2), chain[1:].flatten(2)).numpy()
            start = low if before is None else low - 1
            counts = np.broadcast_to(usable[0].sum(-1), cross.shape)
            close(profile[start : high - 1], degenerate, own[:-1], own[1:], cross, counts, eps, least)
            before = now[-1:]
        else:
            if before_raw is not None:
                both = torch.from_numpy(usable[low - 1] & usable[low])
                a, b = centre(before_raw, both), centre(raw.clone(), both)
                aa, bb, ab = ((p * q).sum((-1, -2)).numpy() for p, q in ((a, a), (b, b), (a, b)))
                counts = both.sum(-1).numpy()[None]
                close(profile[low - 1 : low], degenerate, aa, bb, ab, counts, eps, least)
            before_raw = raw


def close(
    profile: Array, degenerate: Any, aa: Array, bb: Array, ab: Array, n: Any, eps: float, least: int = MIN_UNITS
) -> None:
    """Inner products [S, G] of centred matrices on n units to 1 − CKA, mean over the windows of a row."""
    steps, batch = profile.shape
    floor = (NEAR_ZERO * eps) ** 2 * np.maximum(n * (n - 1), 1)
    enough = n >= least
    flat = enough & ((aa <= floor) | (bb <= floor))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 1.0 - ab / np.sqrt(aa * bb)
    good = (enough & ~flat).reshape(steps, batch, -1)
    total = np.where(good, value.reshape(good.shape), 0.0).sum(-1)
    profile[:] = share(total, good.sum(-1))
    degenerate += flat.reshape(steps, batch, -1).sum((0, 2))
