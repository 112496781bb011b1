"""One pass over the states of a batch.

Every metric of states is made from a few numbers per (depth, unit): the norm, the length of the update, the angle of
the step, the turning angle. :func:`walk` computes them for a whole batch in one pass over the states, a cache-sized
block of depths at a time, and hands back small float64 arrays; everything after it is arithmetic on those. The exact
call on one trajectory takes the same road with a batch of one, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from dynprobe.metrics import _geometry
from dynprobe.metrics._geometry import CHUNK_BYTES_DEVICE, NEAR_ZERO, norms, pair_angle, validity, workspace
from dynprobe.metrics._reduce import Terms
from dynprobe.metrics._reduction import way_of
from dynprobe.metrics._result import Array, Bools

__all__ = ["Walk", "walk"]


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

    @cached_property
    def step_ok(self) -> Bools:
        """Steps whose two states are valid, [S, B, T]."""
        return self.valid[1:] & self.valid[:-1]

    @cached_property
    def step_keep(self) -> Bools:
        """Steps whose two states enter aggregates, [S, B, T]."""
        return self.keep[1:] & self.keep[:-1]

    @cached_property
    def step_terms(self) -> Terms:
        """Steps as terms of an aggregate."""
        return Terms(self.step_ok, self.step_keep, self.n_states)

    @cached_property
    def state_terms(self) -> Terms:
        """States as terms of an aggregate."""
        return Terms(self.valid, self.keep, self.n_states)

    @cached_property
    def moved(self) -> Bools:
        """Steps whose update is not zero up to rounding, [S, B, T]."""
        return _moved(self.diff, self.norm[:-1], self.norm[1:], self.eps)

    @cached_property
    def n_states(self) -> Any:
        """Per row, states that enter aggregates."""
        return self.keep.sum((0, 2))

    @cached_property
    def n_nonfinite(self) -> Any:
        """Per row, states of aggregate units that are not finite."""
        return (self.keep & np.isnan(self.norm)).sum((0, 2))

    @cached_property
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
    again = partial(
        walk, states, real, keep, eps=eps, dtype=dtype, steps=steps, turn=turn, sync=sync, hop=hop, hop_turn=hop_turn
    )
    way = way_of(states[0].device, (dtype, dim, n_depths), again)
    budget = _geometry.CHUNK_BYTES if way == "cache" else CHUNK_BYTES_DEVICE
    row_bytes = n_units * max(dim, 1) * (8 if dtype == torch.float64 else 4)
    rows = min(batch, max(1, budget // row_bytes))
    depths = 1 if way == "layer" else min(n_depths, max(1, budget // (rows * row_bytes)))
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
        self.parity = 0
        self.update: torch.Tensor | None = None
        self.total: torch.Tensor | None = None

    def run(self) -> None:
        n_depths, low = len(self.states), 0
        last: torch.Tensor | None = None
        while low < n_depths:
            high = self._end_of_block(low)
            new = [self._cast(s) for s in self.states[low:high]]
            if last is not None and last.device != new[0].device:
                last = self._follow(last, new[0].device)
            if last is None and len(new) > 1:
                block = self._stack(new)
                before, now, all_new = block[:-1], block[1:], block
            elif last is None:
                before, now, all_new = new[0][None, :0], new[0][None, :0], new[0][None]
            elif len(new) == 1:
                before, now, all_new = last[None], new[0][None], new[0][None]
            else:
                block = self._stack([last, *new])
                before, now, all_new = block[:-1], block[1:], block[1:]
            self._settle(low, all_new)
            if self.steps and now.shape[1]:
                self._step(high - now.shape[0], before, now)
            last = new[-1]
            low = high
        if self.out.sync is not None and self.total is not None:
            self.out.sync[self.rows] = norms(self.total) ** 2

    def _end_of_block(self, low: int) -> int:
        """End of the block that begins at a depth; the states of a block are on one device."""
        high, device = low + 1, self.states[low].device
        while high < min(low + self.depths, len(self.states)) and self.states[high].device == device:
            high += 1
        return high

    def _follow(self, last: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Go on where the next layer is: the one state, update and sum that reach across the border move there."""
        self.update = None if self.update is None else self.update.to(device)
        self.total = None if self.total is None else self.total.to(device)
        return last.to(device)

    def _cast(self, state: torch.Tensor) -> torch.Tensor:
        state = state if self.all_rows else state[self.rows]
        return state if state.dtype == self.dtype else state.to(self.dtype)

    @staticmethod
    def _stack(pieces: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(pieces, out=workspace("block", pieces[0], (len(pieces), *pieces[0].shape)))

    def _settle(self, low: int, now: torch.Tensor) -> None:
        """Norms and validity of the depths that just came in, and relations between their units."""
        out, rows, span = self.out, self.rows, slice(low, low + now.shape[0])
        norm = norms(now)
        out.norm[span, rows] = norm
        out.valid[span, rows] = validity(norm, out.real[span, rows], out.keep[span, rows])
        if out.hop is not None:
            a, b = now[:, :, :-1], now[:, :, 1:]
            out.hop[span, rows] = pair_angle(a, b, norm[..., :-1], norm[..., 1:], workspace("chord", a))
        if out.hop_turn is not None and out.hop_diff is not None:
            hops = torch.sub(now[:, :, 1:], now[:, :, :-1], out=workspace("hops", now[:, :, 1:]))
            length = norms(hops)
            out.hop_diff[span, rows] = length
            a, b = hops[:, :, :-1], hops[:, :, 1:]
            out.hop_turn[span, rows] = pair_angle(a, b, length[..., :-1], length[..., 1:], workspace("chord", a))

    def _step(self, low: int, before: torch.Tensor, now: torch.Tensor) -> None:
        """Everything that relates depth l to depth l + 1; ``low`` is the depth of ``now[0]``."""
        out, rows = self.out, self.rows
        count = now.shape[0]
        span = slice(low - 1, low - 1 + count)
        norm_a, norm_b = out.norm[low - 1 : low - 1 + count, rows], out.norm[low : low + count, rows]
        out.angle[span, rows] = pair_angle(before, now, norm_a, norm_b, workspace("chord", now))
        # the previous block's last update stays readable while this one is written into the other buffer
        self.parity = 1 - self.parity
        update = torch.sub(now, before, out=workspace(f"update{self.parity}", now))
        length = norms(update)
        out.diff[span, rows] = length
        if out.turn is not None:
            self._turn(span, update, length)
        if out.sync is not None:
            self._sync(low, update, length, norm_a, norm_b)

    def _turn(self, span: slice, update: torch.Tensor, length: Array) -> None:
        """Angles between successive updates, across block borders too."""
        out, rows = self.out, self.rows
        assert out.turn is not None
        if self.update is not None:
            a, b = self.update, update[0]
            out.turn[span.start - 1, rows] = pair_angle(
                a, b, out.diff[span.start - 1, rows], length[0], workspace("chord", b)
            )
        if update.shape[0] > 1:
            a, b = update[:-1], update[1:]
            out.turn[span.start : span.stop - 1, rows] = pair_angle(
                a, b, length[:-1], length[1:], workspace("chord", a)
            )
        self.update = update[-1]

    def _sync(self, low: int, update: torch.Tensor, length: Array, norm_a: Array, norm_b: Array) -> None:
        """Add the unit updates of this block to the sum over depth."""
        out, rows, count = self.out, self.rows, update.shape[0]
        assert out.sync_count is not None
        usable = out.valid[low - 1 : low - 1 + count, rows] & out.valid[low : low + count, rows]
        usable &= out.keep[low - 1 : low - 1 + count, rows] & out.keep[low : low + count, rows]
        usable &= _moved(length, norm_a, norm_b, out.eps)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.where(usable, 1.0 / length, 0.0)
        factor = torch.from_numpy(weight).to(update.device, update.dtype)[..., None]
        units = torch.mul(update, factor, out=workspace("chord", update))
        broken = ~np.isfinite(length)
        if broken.any():
            units[tuple(torch.from_numpy(i).to(update.device) for i in np.nonzero(broken))] = 0.0
        added = units[0] if count == 1 else units.sum(0)
        self.total = added.clone() if self.total is None else self.total.add_(added)
        out.sync_count[rows] += usable.sum(0)
