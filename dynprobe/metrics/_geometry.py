"""Norms, angles and validity: the only place where hidden states are touched.

Every metric of states is made from a few numbers per (depth, unit): the norm, the length of the update, the angle of
the step, the turning angle. :func:`walk` computes them for a whole batch in one pass over the states, a cache-sized
block of depths at a time, and hands back small float64 arrays; everything after it is arithmetic on those.

**Angles** use the chord form ``2·atan2(‖â − b̂‖, ‖â + b̂‖)``. With ``c = b − (‖b‖/‖a‖)·a`` the chord is ``‖c‖/‖b‖``, which
needs one multiply-add instead of two normalised copies. Where the chord is below ``√3.6`` (143°) the antichord follows
from it without loss, ``‖â + b̂‖² = 4 − ‖â − b̂‖²``; above, both are computed from the two states themselves in float64.
So the angle is accurate near 0 and near π, in float32 too. ``arccos`` of a dot product is never used.

**Validity.** A state that is not finite, is zero, or whose norm is below 1e-12 of its depth's median is invalid there.
It is excluded pairwise and counted; it is never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynprobe.metrics._result import Array, Bools

__all__ = ["Walk", "norms", "pair_angle", "validity", "walk"]

CHUNK_BYTES = 3 << 19  # 1.5 MB: three such blocks stay in a 4 MB second-level cache
CHUNK_BYTES_DEVICE = 1 << 28
FAR = 3.6  # squared chord above which the antichord is recomputed
NEAR_ZERO = 16.0  # times eps times the natural scale
TINY_NORM = 1e-12
_SAFE = {torch.float32: (1e-15, 1e15), torch.float64: (1e-140, 1e140)}


def _numpy(x: torch.Tensor) -> Array:
    return x.cpu().numpy().astype(np.float64, copy=False)


def norms(x: torch.Tensor) -> Array:
    """Euclidean norm over the last axis in float64; NaN where any component is not finite.

    Rows whose squares leave the range of the arithmetic are redone in float64 with their largest entry factored out.
    """
    out = _numpy(torch.linalg.vector_norm(x, dim=-1))
    low, high = _SAFE[x.dtype]
    odd = ~((out > low) & (out < high))
    if odd.any():
        where = np.nonzero(odd)
        rows = x[tuple(torch.from_numpy(i).to(x.device) for i in where)].double().cpu()
        top = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[0])
        scaled = top * torch.linalg.vector_norm(rows / torch.where(top > 0, top, 1.0)[:, None], dim=-1)
        out[where] = torch.where(torch.isfinite(top), scaled, torch.nan).numpy()
    return out


def validity(norm: Array, real: Bools, keep: Bools) -> Bools:
    """Which units can enter a quotient: finite, non-zero, not below 1e-12 of the median norm of their depth.

    Args:
        norm: [D, B, T], NaN where not finite.
        real: Units that exist, broadcastable to ``norm``.
        keep: Units the median is taken over.
    """
    with np.errstate(invalid="ignore"):
        valid = real & (norm > 0)
        reference = np.where(keep & np.isfinite(norm), norm, -np.inf)
        top = reference.max(-1, initial=-np.inf)
        if (valid & (norm < TINY_NORM * top[..., None])).any():
            median = np.full(top.shape, -np.inf)
            for where in zip(*np.nonzero(top > -np.inf), strict=True):
                row = reference[where]
                median[where] = np.median(row[row > -np.inf])
            valid &= ~(norm < TINY_NORM * median[..., None])
    return valid


def pair_angle(
    a: torch.Tensor, b: torch.Tensor, norm_a: Array, norm_b: Array, scratch: torch.Tensor | None = None
) -> Array:
    """Angle between the vectors of two tensors along the last axis, in radians; meaningless where a norm is 0 or NaN.

    Args:
        a: First vectors [..., dim].
        b: Second vectors, same shape.
        norm_a: Their norms, float64.
        norm_b: Their norms, float64.
        scratch: Buffer of the same shape, overwritten.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = norm_b / norm_a
        usable = np.isfinite(ratio) & (norm_b > 0)
        ratio = np.where(usable, ratio, 0.0)
        factor = torch.from_numpy(ratio).to(a.device, a.dtype)
        # addcmul is one pass; the buffer keeps it inside the cache
        c = torch.addcmul(b, a, factor[..., None], value=-1.0, out=scratch)
        chord = _numpy(torch.linalg.vector_norm(c, dim=-1)) / norm_b
        low, high = _SAFE[a.dtype]
        extreme = (np.minimum(norm_a, norm_b) < low) | (np.maximum(norm_a, norm_b) > high)
        redo = usable & ((chord * chord > FAR) | extreme | ~np.isfinite(chord))
        theta: Array = 2.0 * np.arcsin(np.minimum(0.5 * chord, 1.0))
    if redo.any():
        where = np.nonzero(redo)
        index = tuple(torch.from_numpy(i).to(a.device) for i in where)
        unit_a = a[index].double().cpu() / torch.from_numpy(norm_a[where])[:, None]
        unit_b = b[index].double().cpu() / torch.from_numpy(norm_b[where])[:, None]
        theta[where] = 2.0 * np.arctan2(
            torch.linalg.vector_norm(unit_a - unit_b, dim=-1).numpy(),
            torch.linalg.vector_norm(unit_a + unit_b, dim=-1).numpy(),
        )
    return theta


@dataclass
class Walk:
    """What one pass over the states leaves behind; D depths, B rows, T units, S = D − 1 steps, all float64.

    ``norm`` is NaN where a state is not finite. ``real`` marks units that exist, ``keep`` those that enter aggregates.
    Angles are undefined (any value) where ``valid`` is False at one of their states.
    """

    real: Bools
    keep: Bools
    valid: Bools
    norm: Array
    eps: float
    dim: int
    diff: Array
    angle: Array
    turn: Array | None = None
    sync: Array | None = None
    sync_count: Array | None = None
    hop: Array | None = None
    hop_turn: Array | None = None
    hop_diff: Array | None = None

    @property
    def step_ok(self) -> Bools:
        """Steps whose two states are valid, [S, B, T]."""
        return self.valid[1:] & self.valid[:-1]

    @property
    def step_keep(self) -> Bools:
        """Steps whose two states enter aggregates, [S, B, T]."""
        return self.keep[1:] & self.keep[:-1]

    @property
    def moved(self) -> Bools:
        """Steps whose update is not zero up to rounding, [S, B, T]."""
        return _moved(self.diff, self.norm[:-1], self.norm[1:], self.eps)

    @property
    def n_nonfinite(self) -> Any:
        """Per row, states of aggregate units that are not finite."""
        return (self.keep & np.isnan(self.norm)).sum((0, 2))

    @property
    def n_invalid(self) -> Any:
        """Per row, states of aggregate units that are invalid for any reason."""
        return (self.keep & ~self.valid).sum((0, 2))


def _moved(diff: Array, a: Array, b: Array, eps: float) -> Bools:
    with np.errstate(invalid="ignore"):
        moved: Bools = diff > NEAR_ZERO * eps * np.maximum(a, b)
    return moved


def walk(
    states: Sequence[torch.Tensor],
    real: Bools,
    keep: Bools,
    *,
    eps: float,
    dtype: torch.dtype = torch.float64,
    steps: bool = True,
    turn: bool = False,
    sync: bool = False,
    hop: bool = False,
    hop_turn: bool = False,
) -> Walk:
    """Pass once over the states and collect norms, update lengths and angles.

    Args:
        states: D tensors [B, T, dim].
        real: Units that exist, bool [D, B, T].
        keep: Units that enter aggregates and medians, a subset of ``real``.
        eps: Rounding unit of near-zero tests.
        dtype: Arithmetic, float32 or float64.
        steps: Also the depth steps.
        turn: Also turning angles between successive updates.
        sync: Also the sum of unit updates over depth.
        hop: Also angles between neighbouring units (tokens t−1, t) at each depth.
        hop_turn: Also turning angles along the units at each depth.
    """
    n_depths = len(states)
    batch, n_units, dim = (int(s) for s in states[0].shape) if n_depths else (real.shape[1], real.shape[2], 0)
    n_steps = max(n_depths - 1, 0) if steps else 0
    shape = (n_depths, batch, n_units)
    out = Walk(
        real=real, keep=keep, valid=np.zeros(shape, bool), norm=np.full(shape, np.nan), eps=eps, dim=dim,
        diff=np.full((n_steps, batch, n_units), np.nan), angle=np.full((n_steps, batch, n_units), np.nan),
    )  # fmt: skip
    turn, sync = turn and n_steps > 1, sync and n_steps > 0
    hop, hop_turn = hop and n_units > 1, hop_turn and n_units > 2
    if turn:
        out.turn = np.full((n_steps - 1, batch, n_units), np.nan)
    if sync:
        out.sync, out.sync_count = np.zeros((batch, n_units)), np.zeros((batch, n_units))
    if hop:
        out.hop = np.full((n_depths, batch, n_units - 1), np.nan)
    if hop_turn:
        out.hop_turn = np.full((n_depths, batch, n_units - 2), np.nan)
        out.hop_diff = np.full((n_depths, batch, n_units - 1), np.nan)
    if not n_depths or not batch or not n_units:
        return out
    budget = CHUNK_BYTES if states[0].device.type == "cpu" else CHUNK_BYTES_DEVICE
    row_bytes = n_units * max(dim, 1) * (8 if dtype == torch.float64 else 4)
    rows = min(batch, max(1, budget // row_bytes))
    depths = max(1, budget // (rows * row_bytes))
    with torch.no_grad():
        for start in range(0, batch, rows):
            _Pass(states, out, slice(start, min(start + rows, batch)), dtype, depths, steps and n_steps > 0).run()
    return out


class _Pass:
    """The pass over one block of rows."""

    def __init__(
        self, states: Sequence[torch.Tensor], out: Walk, rows: slice, dtype: torch.dtype, depths: int, steps: bool
    ) -> None:
        self.states, self.out, self.rows, self.dtype, self.depths, self.steps = states, out, rows, dtype, depths, steps
        self.all_rows = rows.stop - rows.start == states[0].shape[0]
        self.update: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.buffers: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def run(self) -> None:
        last = self._cast(self.states[0])
        self._settle(0, last[None])
        n_depths = len(self.states)
        for low in range(1, n_depths, self.depths):
            high = min(low + self.depths, n_depths)
            if high - low == 1:
                before, now = last[None], self._cast(self.states[low])[None]
            else:
                block = torch.stack([last, *(self._cast(s) for s in self.states[low:high])])
                before, now = block[:-1], block[1:]
            self._settle(low, now)
            if self.steps:
                self._step(low, before, now)
            last = now[-1]
        if self.out.sync is not None and self.total is not None:
            self.out.sync[self.rows] = norms(self.total) ** 2

    def _cast(self, state: torch.Tensor) -> torch.Tensor:
        state = state.detach()
        return (state if self.all_rows else state[self.rows]).to(self.dtype)

    def _buffer(self, like: torch.Tensor, which: int) -> torch.Tensor:
        pair = self.buffers.setdefault(tuple(like.shape), [])
        while len(pair) <= which:
            pair.append(torch.empty(like.shape, dtype=like.dtype, device=like.device))
        return pair[which]

    def _settle(self, low: int, now: torch.Tensor) -> None:
        """Norms and validity of the depths that just came in, and relations between their units."""
        out, rows, span = self.out, self.rows, slice(low, low + now.shape[0])
        norm = norms(now)
        out.norm[span, rows] = norm
        out.valid[span, rows] = validity(norm, out.real[span, rows], out.keep[span, rows])
        if out.hop is not None:
            out.hop[span, rows] = pair_angle(now[:, :, :-1], now[:, :, 1:], norm[..., :-1], norm[..., 1:])
        if out.hop_turn is not None and out.hop_diff is not None:
            hops = now[:, :, 1:] - now[:, :, :-1]
            length = norms(hops)
            out.hop_diff[span, rows] = length
            out.hop_turn[span, rows] = pair_angle(hops[:, :, :-1], hops[:, :, 1:], length[..., :-1], length[..., 1:])

    def _step(self, low: int, before: torch.Tensor, now: torch.Tensor) -> None:
        """Everything that relates depth l to depth l + 1."""
        out, rows = self.out, self.rows
        count = now.shape[0]
        span = slice(low - 1, low - 1 + count)
        norm_a, norm_b = out.norm[low - 1 : low - 1 + count, rows], out.norm[low : low + count, rows]
        spare = self._buffer(now, 0)
        out.angle[span, rows] = pair_angle(before, now, norm_a, norm_b, spare)
        update = torch.sub(now, before, out=spare)
        length = norms(update)
        out.diff[span, rows] = length
        if out.turn is not None:
            self._turn(span, update, length)
        if out.sync is not None and out.sync_count is not None:
            usable = out.valid[low - 1 : low - 1 + count, rows] & out.valid[low : low + count, rows]
            usable &= out.keep[low - 1 : low - 1 + count, rows] & out.keep[low : low + count, rows]
            usable &= _moved(length, norm_a, norm_b, out.eps)
            with np.errstate(divide="ignore", invalid="ignore"):
                weight = np.where(usable, 1.0 / length, 0.0)
            broken = ~np.isfinite(length)
            if broken.any():
                update[tuple(torch.from_numpy(i).to(update.device) for i in np.nonzero(broken))] = 0.0
            units = update.mul_(torch.from_numpy(weight).to(update.device, update.dtype)[..., None]).sum(0)
            self.total = units if self.total is None else self.total.add_(units)
            out.sync_count[rows] += usable.sum(0)

    def _turn(self, span: slice, update: torch.Tensor, length: Array) -> None:
        """Angles between successive updates, across block borders too."""
        out, rows = self.out, self.rows
        assert out.turn is not None
        if self.update is not None:
            first = pair_angle(self.update, update[0], out.diff[span.start - 1, rows], length[0])
            out.turn[span.start - 1, rows] = first
        if update.shape[0] > 1:
            angles = pair_angle(update[:-1], update[1:], length[:-1], length[1:])
            out.turn[span.start : span.stop - 1, rows] = angles
        self.update = update[-1].clone()
