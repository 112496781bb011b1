"""When to act: hysteresis on a streaming signal, or one of the timings it is judged against.

The deadband switches on when the signal was above q_hi for m tokens in a row and off when it was below q_lo for m′, or
when its budget of active tokens is spent. Its gain rises from 0 at q_lo to g_max at q_hi. Both levels are quantiles of
the same signal on clean text of the same model, so they must come from that model's own calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.controllers._controller import Memory, Seen
from dynprobe.controllers.recovery._signals import Signal
from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import Calibration, Perturb, Subject

__all__ = ["Always", "Deadband", "Never", "Oracle"]


@dataclass
class Deadband:
    """Hysteresis on a signal.

    ACTIVE when q_t > q_hi for ``m`` consecutive tokens; no longer when q_t < q_lo for ``m_off`` tokens, or when
    ``budget`` · ``horizon`` tokens were active. Gain g_t = g_max · clip((q_t − q_lo)/(q_hi − q_lo), 0, 1). An undefined
    signal counts as neither high nor low.

    Args:
        signal: Name of the signal.
        m: Tokens above before it switches on.
        m_off: Tokens below before it switches off.
        lo: Quantile of the lower level.
        hi: Quantile of the upper level.
        g_max: Largest gain.
        budget: Share of the new tokens that may be active.
        horizon: Number of new tokens the share is of.
    """

    signal: str = "kappa_phase_zmax"
    m: int = 3
    m_off: int = 5
    lo: float = 0.75
    hi: float = 0.99
    g_max: float = 0.5
    budget: float = 0.25
    horizon: int = 32

    def __post_init__(self) -> None:
        self._signal = Signal(self.signal)
        if self.m < 1 or self.m_off < 1:
            raise UsageError(f"m={self.m}, m_off={self.m_off}; both are at least 1")
        if not 0 <= self.g_max <= 1:
            raise UsageError(f"g_max={self.g_max}; a gain lies in [0, 1]")
        if not 0 < self.budget <= 1:
            raise UsageError(f"budget={self.budget}; it is a share of the tokens in (0, 1]")
        if self.n_active < 1:
            raise UsageError(
                f"budget={self.budget} of horizon={self.horizon} new tokens is not one whole token, so nothing would "
                "ever be done; generate more tokens or raise the budget"
            )
        if not 0 <= self.lo < self.hi <= 1:
            raise UsageError(f"lo={self.lo}, hi={self.hi}; both are quantiles with 0 ≤ lo < hi ≤ 1")
        self.q_lo = self.q_hi = float("nan")

    @property
    def reads(self) -> str | None:
        """What must be observed."""
        return self._signal.reads

    @property
    def n_active(self) -> int:
        """Tokens that may be active: the budget, rounded down."""
        return math.floor(self.budget * self.horizon + 1e-9)  # 0.29 · 100 is a little less than 29

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Take the levels from the calibration of this model.

        Raises:
            CalibrationError: If there is none, it lacks the signal, or its band is empty (``degenerate-band``).
        """
        self._signal.bind(subject, calibration)
        assert calibration is not None
        self.q_lo, self.q_hi = (calibration.quantile(self.signal, q) for q in (self.lo, self.hi))
        if not self.q_hi > self.q_lo:
            raise CalibrationError(
                f"degenerate-band: the clean {self.signal} has q{100 * self.lo:g} = {self.q_lo:g} and "
                f"q{100 * self.hi:g} = {self.q_hi:g}; calibrate on more text or take another signal"
            )

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows: inactive, counters at zero."""
        zeros = np.zeros(n_rows, dtype=np.int64)
        return {
            "active": np.zeros(n_rows, bool), "gain": np.zeros(n_rows), "signal": np.full(n_rows, np.nan),
            "above": zeros, "below": zeros.copy(), "spent": zeros.copy(), "depth": np.full(n_rows, -1),
            **self._signal.start(n_rows),
        }  # fmt: skip

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Measure this token's signal and decide what is in force at the next.

        Of the prompt the last ``m`` tokens count, so that a row may be active from its first new token on.
        """
        if seen.decoding:
            memory["spent"] = memory["spent"] + memory["active"]
        q, depth = self._signal.measure(seen, memory, 1 if seen.decoding else self.m)
        for column in range(q.shape[1]):
            self._follow(q[:, column], None if depth is None else depth[:, column], memory)

    def _follow(self, q: np.ndarray, depth: np.ndarray | None, memory: Memory) -> None:
        memory["signal"] = q
        with np.errstate(invalid="ignore"):
            high, low = q > self.q_hi, q < self.q_lo
            gain = self.g_max * np.clip((q - self.q_lo) / (self.q_hi - self.q_lo), 0.0, 1.0)
        was = memory["active"]
        memory["above"] = np.where(high, memory["above"] + 1, 0)
        memory["below"] = np.where(low, memory["below"] + 1, 0)
        left = memory["spent"] < self.n_active
        on = np.where(was, memory["below"] < self.m_off, memory["above"] >= self.m) & left
        if depth is not None:
            memory["depth"] = np.where(on & ~was, depth, memory["depth"])
        memory["active"] = on
        memory["gain"] = np.where(on, np.nan_to_num(gain), 0.0)


class _Timed:
    """A timing that looks at nothing."""

    reads: str | None = None

    def __init__(self, g_max: float = 0.5) -> None:
        self.g_max = g_max

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Nothing is needed."""

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows: inactive during the prompt."""
        return {
            "active": np.zeros(n_rows, bool), "gain": np.zeros(n_rows), "signal": np.full(n_rows, np.nan),
            "depth": np.full(n_rows, -1),
        }  # fmt: skip

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Set what is in force at the next token."""
        on = self.next_is_active(seen)
        memory["active"], memory["gain"] = on, np.where(on, self.g_max, 0.0)

    def next_is_active(self, seen: Seen) -> np.ndarray:
        """Whether the next token of each row is one to act at."""
        raise NotImplementedError


class Never(_Timed):
    """Never active."""

    def next_is_active(self, seen: Seen) -> np.ndarray:
        """False."""
        return np.zeros(len(seen.step.positions), bool)


class Always(_Timed):
    """Active at every new token with the largest gain: what perfect recall would do, at any cost."""

    def next_is_active(self, seen: Seen) -> np.ndarray:
        """True."""
        return np.ones(len(seen.step.positions), bool)


class Oracle(_Timed):
    """Active exactly at the new tokens where a perturbation writes: what a perfect detector would do.

    Args:
        perturbs: The perturbations of the study.
        g_max: The gain.
    """

    def __init__(self, perturbs: tuple[Perturb, ...], g_max: float = 0.5) -> None:
        super().__init__(g_max)
        self.perturbs = tuple(p.defaults_filled() for p in perturbs)

    def next_is_active(self, seen: Seen) -> np.ndarray:
        """Whether any perturbation writes at the next position."""
        following = seen.step.positions.max(axis=1, keepdims=True) + 1
        hits: Any = [p.where.mask(following, seen.step.n_prompt, positions="1:")[:, 0] for p in self.perturbs]
        return np.any(hits, axis=0) if hits else np.zeros(len(following), bool)
