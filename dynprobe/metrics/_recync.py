"""Recync's detector: a crisis is three tokens in a row whose state turned unusually far from the one before.

The reference is the run itself, over the last twenty steps that were not unusual, so the detector needs no calibration.
It also means that a run which is noisy all along fires at a base rate, which is measured on clean runs before anything
is read into a crisis.

One run of low values is one crisis: the detector fires at the third and is quiet until a value is not low again. What a
controller does about it is its own affair; to try again from an earlier token it tells the detector by
:meth:`RecyncDetector.rewind`, and what was discarded is forgotten.

A step that is not a finite number belongs to no window and breaks the run of low values: it is not known to be low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._either import Floats, lengths, opened
from dynprobe.metrics._inputs import as_series
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result

__all__ = ["Crises", "RecyncDetector", "recync_detect", "token_cosine"]

_FARTHEST = 1e100
_MARGIN = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Crises:
    """What the detector saw.

    Args:
        fired: Steps at which it fired [step].
        low: Steps below the threshold [step].
        threshold: Threshold each step was compared with [step]; NaN before the window is full.
        at: Indices of the steps at which it fired.
        restart: For each, the step to begin again from, ``count`` (three) before.
        n_tested: Steps that were compared with a threshold.
        n_nonfinite: Steps that were not a finite number.
    """

    fired: Bools
    low: Bools
    threshold: Array
    at: tuple[int, ...]
    restart: tuple[int, ...]
    n_tested: int
    n_nonfinite: int


class RecyncDetector:
    """The detector as a stream: one cosine in, one decision out.

    c_t is low when c_t < mean − depth·SD (ddof 0) − 1e-12 over the last ``window`` values that were not low when they
    came; nothing is tested before there are that many. It fires at the ``count``-th low value in a row.

    Args:
        window: Values of the reference.
        depth: How many standard deviations below its mean is low.
        count: Low values in a row that make a crisis.

    Raises:
        MetricError: A setting without meaning.

    Source:
        Sato, Recync_framework.

    Example:
        >>> d = RecyncDetector()
        >>> [d.update(c) for c in [0.9, 1.0] * 10 + [0.91, 0.91, 0.91]][-3:]
        [False, False, True]
    """

    def __init__(self, window: int = 20, depth: float = 0.6, count: int = 3) -> None:
        if window < 1 or count < 1 or not depth >= 0:
            raise MetricError(
                f"Recync's detector needs window ≥ 1, count ≥ 1 and depth ≥ 0; found {window}, {count}, {depth}."
            )
        self.window, self.depth, self.count = window, depth, count
        self.values: list[float] = []
        self.low: list[bool] = []
        self.reference: list[float] = []
        self.run = 0

    @property
    def threshold(self) -> float:
        """Value below which the next step is low; NaN before the window is full."""
        if len(self.reference) < self.window:
            return float("nan")
        recent = self.reference[-self.window :]
        mean = math.fsum(recent) / self.window
        return mean - self.depth * math.sqrt(math.fsum((c - mean) ** 2 for c in recent) / self.window)

    def update(self, cosine: float) -> bool:
        """Take the next cosine; True when this step makes a crisis."""
        c = float(cosine)
        low = math.isfinite(c) and c < self.threshold - _MARGIN
        self.values.append(c)
        self.low.append(low)
        if not low and math.isfinite(c):
            self.reference.append(c)
        self.run = self.run + 1 if low else 0
        return self.run == self.count

    def rewind(self, n_steps: int) -> None:
        """Forget every step from number ``n_steps`` on, as if they had not come."""
        if not 0 <= n_steps <= len(self.values):
            raise MetricError(f"rewind goes to a step between 0 and {len(self.values)}, found {n_steps}.")
        kept = zip(self.values[:n_steps], self.low[:n_steps], strict=True)
        self.reference = [c for c, low in kept if not low and math.isfinite(c)]
        del self.values[n_steps:], self.low[n_steps:]
        self.run = 0
        for low in reversed(self.low):
            if not low:
                break
            self.run += 1


def recync_detect(cosines: Floats, *, window: int = 20, depth: float = 0.6, count: int = 3) -> Crises:
    """Find the crises of a whole run.

    Args:
        cosines: Cosine between the states of consecutive tokens at the last depth [step], as :func:`token_cosine`
            gives.
        window: Values of the reference.
        depth: Standard deviations below its mean.
        count: Low values in a row.

    Returns:
        Where it fired, where to begin again, and the threshold at each step.

    Raises:
        MetricError: The input is no series, or a setting has no meaning.

    Source:
        ``recync.detect/1``; Sato, Recync_framework.

    Example:
        >>> found = recync_detect([0.9, 1.0] * 10 + [0.91, 0.91, 0.91])
        >>> found.at, found.restart
        ((22,), (19,))
    """
    c = opened(cosines, "recync.detect/1")[0].double().cpu().numpy()
    if c.ndim != 1:
        raise MetricError(f"recync.detect/1 takes a series [step], found shape {list(c.shape)}.")
    if (np.abs(c[np.isfinite(c)]) > _FARTHEST).any():
        raise MetricError("recync.detect/1 takes cosines, found values whose squares leave the range of the numbers.")
    detector = RecyncDetector(window, depth, count)
    fired, threshold = np.zeros(len(c), bool), np.full(len(c), np.nan)
    for t, value in enumerate(c):
        threshold[t] = detector.threshold
        fired[t] = detector.update(value)
    at = tuple(int(t) for t in np.flatnonzero(fired))
    tested = int((np.isfinite(threshold) & np.isfinite(c)).sum())
    return Crises(
        fired, np.asarray(detector.low, dtype=bool), threshold, at, tuple(t - count for t in at), tested,
        int((~np.isfinite(c)).sum()),
    )  # fmt: skip


def token_cosine(states: Floats) -> Any:
    """Cosine between the states of consecutive units, cos(h_t, h_{t−1}).

    Args:
        states: [..., pos, dim].

    Returns:
        [..., pos − 1]; entry t belongs to positions t and t + 1. NaN where a state is zero or not finite.

    Example:
        >>> token_cosine([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]).round(6).tolist()
        [0.707107, 0.707107]
    """
    x, back = opened(states, "token_cosine")
    if x.ndim < 2:
        raise MetricError(f"token_cosine takes states [..., pos, dim], found shape {list(x.shape)}.")
    unit = x * (1.0 / lengths(x)).to(x.dtype)[..., None]
    return back((unit[..., 1:, :] * unit[..., :-1, :]).sum(-1).clamp(-1.0, 1.0))


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    s = as_series(inputs[0], mask, metric_id)
    c = s.values[0][s.keep[0]]
    found = recync_detect(c, window=params["window"], depth=params["depth"], count=params["count"])
    n_ok = len(c) - found.n_nonfinite
    reason = None
    if not len(c):
        reason = "empty"
    elif len(c) <= params["window"]:
        reason = f"steps<{params['window'] + 1}"
    elif 2 * n_ok < len(c) or not found.n_tested:
        reason = "coverage"
    extras = {
        "at": found.at, "restart": found.restart, "n_low": int(found.low.sum()), "n_tested": found.n_tested,
        "n_nonfinite": found.n_nonfinite,
    }  # fmt: skip
    value = float("nan") if reason else float(len(found.at))
    coverage = n_ok / len(c) if len(c) else float("nan")
    series = found.fired.astype(np.float64)
    return Result(value, reason, coverage, 1, found.n_tested, metric_id, dtype=s.dtype, series=series, extras=extras)


register(
    MetricSpec(
        id="recync.detect/1",
        sentence="Number of crises: three tokens in a row whose state turned unusually far from the one before.",
        formula=(
            "c_t = cos(h_t, h_{t−1}); low iff c_t < mean − 0.6·SD − 1e-12, mean and SD (ddof 0) of the last 20 values "
            "that were not low when they came, no test before there are 20; crisis at the third low value in a row, "
            "restart = that step − 3; a run of low values is one crisis; not finite: in no window, ends a run"
        ),
        latex=(
            r"c_t = \cos(h_t,\,h_{t-1}), \qquad \text{low} \iff c_t < \bar c_{20}-0.6\,\mathrm{SD}_{20}-10^{-12}, "
            r"\qquad "
            r"\text{crisis: the third low value in a row}"
        ),
        input="series",
        value_range="0, 1, 2, …",
        unit="crises",
        invariances=frozenset({"S", "shift"}),
        source="Sato, Recync_framework (response-level checkpoint restart)",
        params={"window": 20, "depth": 0.6, "count": 3},
        column="recync_crises",
        levels={"sample": "over the span"},
        vectors=(
            "10 × (0.9, 1.0), then 0.91 three times → 1, at step 22, restart 19",
            "10 × (0.9, 1.0), then 0.9195 three times → 1",
            "constant → 0",
            "20 values → NaN steps<21",
        ),
        groups=frozenset({"optional", "recovery"}),
    ),
    _compute,
)
