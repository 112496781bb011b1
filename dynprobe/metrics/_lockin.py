"""Lock-in read-out: the response to a periodic drive, at the drive's frequency and nowhere else.

A drive u_pos along the tokens makes every later state swing at the same frequency. The paired difference δ_pos = h′ − h
is demodulated over a window of N tokens that holds an integer number of periods::

    C = (2/N) Σ_pos δ_pos e^{−iω pos} ∈ C^dim,     ω = 2π/period

and so is the drive that was really written, C_u. Their quotient H = ⟨C_u, C⟩/‖C_u‖² is the transfer coefficient along
the drive: its modulus is the **gain**, its argument the **phase** (a response that lags m tokens has −2πm/period), and
‖C‖/‖C_u‖ is the **total** gain over all directions. Averaging over N tokens suppresses whatever does not swing with the
drive by √(N/2), so a response is seen that lies far below the scatter of single tokens.

How far it stands out is told by the neighbours: the window's other frequency bins, without the mean, the harmonics of
the drive (a non-linear system answers there) and the Nyquist bin. The nearest eight of them, projected on the drive's
direction, give the noise power: **snr** = |⟨ê, C⟩|²/mean_b|⟨ê, C_b⟩|². If the noise is Gaussian and flat over those
bins, snr over m bins follows F(2, 2m), hence p = (1 + snr/m)^{−m} exactly. In a noise-free pair the "noise" is real all
the same: tokens answer differently, and the gain is modulated by the text.

What it refuses. Two periods are the least; a window that does not fit the row is NaN (``"tokens<16"``). No entry of the
window may be missing (``"coverage"``), because then the mean would leak into the line. No drive, no gain: 0/0 is NaN
(``"zero-denominator"``); a response that is exactly 0 has gain 0 and no phase. The window begins where the drive does,
so its first tokens carry the transient; ``settle`` leaves some out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import NEAR_ZERO
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._response import difference
from dynprobe.metrics._result import Array, Bools

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["BINS", "COLUMNS", "Lockin", "Window", "lockin", "window"]

BINS = 8
COLUMNS = ("lockin_gain", "lockin_phase", "lockin_total", "lockin_snr", "lockin_p", "lockin_snr_total")
_LARGEST_CYCLE = 1000


@dataclass(frozen=True)
class Window:
    """A stretch of tokens that holds an integer number of periods.

    Attributes:
        start: First token, counted from where the row begins.
        length: Number of tokens N; 0 where the row is too short.
        periods: Number of periods K in it, the drive's bin.
        needed: Tokens that the shortest window takes.
    """

    start: int
    length: int
    periods: int
    needed: int

    @property
    def reason(self) -> str | None:
        """Why there is no window, or None."""
        return None if self.length else f"tokens<{self.needed}"

    def noise_bins(self, n: int = BINS) -> NDArray[np.int64]:
        """Return the ``n`` bins nearest to the drive's, without mean, Nyquist and harmonics of the drive."""
        bins = np.arange(1, (self.length + 1) // 2)
        bins = bins[bins % self.periods != 0]
        return bins[np.argsort(np.abs(bins - self.periods), kind="stable")][:n]


def window(start: int, stop: int, period: float) -> Window:
    """Return the longest window that begins at ``start`` and ends before ``stop`` or there.

    Args:
        start: First driven token.
        stop: One behind the last driven token.
        period: Tokens per cycle, more than 2; where it is no integer, the window holds whole multiples of the shortest
            stretch that repeats (5 tokens for 2.5).

    Raises:
        MetricError: The period is not above 2.

    Example:
        >>> w = window(1, 30, 8)
        >>> w.start, w.length, w.periods, window(1, 10, 8).reason
        (1, 24, 3, 'tokens<16')
    """
    if not (math.isfinite(period) and period > 2):
        raise MetricError(f"a lock-in takes a period of more than 2 tokens, not {period}.")
    exact = Fraction(period)
    near = exact.limit_denominator(_LARGEST_CYCLE)
    cycle = near if near > 2 and abs(near - exact) <= exact / 10**9 else exact
    step = cycle.numerator
    needed = step * max(1, math.ceil(2 * cycle / step))
    room = max(stop - start, 0)
    length = room // step * step
    if length < needed:
        return Window(start, 0, 0, needed)
    return Window(start, length, int(length / cycle), needed)


@dataclass(frozen=True)
class Lockin:
    """The lock-in of a batch.

    Attributes:
        profile: Column → [depths, B].
        reason: Column → [depths, B], why a value is NaN; None beside a number.
        n_tokens: Length of each row's window [B].
        n_periods: Periods in it [B].
    """

    profile: dict[str, Array]
    reason: dict[str, NDArray[np.object_]]
    n_tokens: NDArray[np.int64]
    n_periods: NDArray[np.int64]


def lockin(
    states_clean: Sequence[Float[torch.Tensor, "batch pos dim"]],
    states_arm: Sequence[Float[torch.Tensor, "batch pos dim"]],
    drive: Float[torch.Tensor, "batch pos dim"],
    driven: Any,
    *,
    period: float,
    bins: int = BINS,
    settle: int = 0,
) -> Lockin:
    """Demodulate the paired difference of a batch at every depth.

    Args:
        states_clean: Depths, tensors [B, T, dim].
        states_arm: The same depths of the driven run.
        drive: What was written [B, T, dim], the reference of gain and phase.
        driven: Bool [B, T], the tokens at which the drive acts; the window runs from the first to the last of them.
        period: Tokens per cycle, more than 2.
        bins: Most neighbouring bins of the noise estimate.
        settle: First driven tokens that are left out.

    Returns:
        Gain, phase (rad, in (−π, π]), total gain, SNR (power ratio), its p-value, and the SNR over all directions.

    Raises:
        MetricError: Shapes do not fit, or a parameter is out of range.
    """
    if bins < 1 or settle < 0:
        raise MetricError(f"lockin: bins is at least 1 and settle at least 0, found {bins} and {settle}.")
    on: Bools = np.asarray(driven.detach().cpu() if isinstance(driven, torch.Tensor) else driven, dtype=bool)
    if len(states_clean) != len(states_arm):
        raise MetricError(f"lockin: {len(states_clean)} depths against {len(states_arm)}; capture the same ones.")
    if on.ndim != 2 or tuple(drive.shape[:2]) != on.shape:
        raise MetricError(f"lockin: the drive {list(drive.shape)} does not fit driven {list(on.shape)}.")
    n_depths, batch = len(states_clean), len(on)
    ends = [(int(i[0]), int(i[-1]) + 1) if len(i := np.flatnonzero(row)) else (0, 0) for row in on]
    windows = [window(first + settle, last, period) for first, last in ends]
    profile = {name: np.full((n_depths, batch), np.nan) for name in COLUMNS}
    reason = {name: np.full((n_depths, batch), None, dtype=object) for name in COLUMNS}
    eps = eps_of(drive.dtype if drive.is_floating_point() else torch.float64)
    references = [_demodulated(drive[b], w, bins) if w.length else None for b, w in enumerate(windows)]
    for depth in range(n_depths):
        moved = difference(states_clean[depth], states_arm[depth], "lockin").cpu()
        for b, w in enumerate(windows):
            reference = references[b]
            if reference is None:
                for name in COLUMNS:
                    reason[name][depth, b] = w.reason
                continue
            values, why = _transfer(_demodulated(moved[b], w, bins), reference, eps)
            for name in COLUMNS:
                profile[name][depth, b] = values.get(name, np.nan)
                reason[name][depth, b] = why.get(name)
    counts = np.array([(w.length, w.periods) for w in windows], dtype=np.int64).reshape(batch, 2)
    return Lockin(profile, reason, counts[:, 0], counts[:, 1])


@dataclass(frozen=True)
class _Lines:
    """Complex amplitudes at the drive's bin and at its neighbours, and the size of the signal they came from."""

    line: NDArray[np.complex128]
    noise: NDArray[np.complex128]
    rms: float


def _demodulated(x: torch.Tensor, w: Window, bins: int) -> _Lines:
    """(2/N) Σ x_j e^{−2πikj/N} at the bins k that are read; NaN where an entry of the window is not finite."""
    y = x[w.start : w.start + w.length].detach().cpu().double().numpy()
    bin_of = np.concatenate([[w.periods], w.noise_bins(bins)])
    turns = np.mod(np.outer(bin_of, np.arange(w.length)), w.length) / w.length  # whole turns are taken off exactly
    with np.errstate(invalid="ignore", over="ignore"):
        c = 2 / w.length * (np.cos(2 * np.pi * turns) @ y - 1j * (np.sin(2 * np.pi * turns) @ y))
        rms = float(np.sqrt(2 * (y**2).sum() / w.length))
    return _Lines(c[0], c[1:], rms)


def _transfer(moved: _Lines, drive: _Lines, eps: float) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers of one depth of one row, and the reasons of those that are missing."""
    if not (np.isfinite(moved.rms) and np.isfinite(drive.rms)):
        return {}, dict.fromkeys(COLUMNS, "coverage")
    near, nothing = NEAR_ZERO * eps, "zero-denominator"
    size = float(np.linalg.norm(drive.line))
    if size <= near * drive.rms:
        return {}, dict.fromkeys(COLUMNS, nothing)
    unit, whole = drive.line / size, float(np.linalg.norm(moved.line))
    along = complex(np.vdot(unit, moved.line))
    values = {"lockin_gain": abs(along) / size, "lockin_total": whole / size}
    why: dict[str, str] = {}
    if abs(along) > near * whole:
        phase = math.atan2(along.imag, along.real)
        values["lockin_phase"] = math.pi if phase == -math.pi else phase
    else:
        why["lockin_phase"] = nothing
    power = np.abs(moved.noise @ unit.conj()) ** 2
    floor, signal, m = float(power.mean()), abs(along) ** 2, len(power)
    if floor + signal > 0:
        # (1 + snr/m)^−m without the quotient, which need not exist
        values["lockin_p"] = (floor * m / (floor * m + signal)) ** m
    else:
        why["lockin_p"] = nothing
    floor_total = float((np.abs(moved.noise) ** 2).sum(1).mean())
    for name, above, below in (("lockin_snr", signal, floor), ("lockin_snr_total", whole**2, floor_total)):
        if below > near**2 * above:
            values[name] = above / below
        else:
            why[name] = nothing
    return values, why
