"""What a metric returns: a number that knows where it came from, or NaN that knows why it is NaN.

Two shapes. :class:`Result` is one value for one trajectory, handed to the user. :class:`Scores` is the same thing for a
whole batch, column by column, used inside this room so that one implementation serves the exact single call and the
batched road; ``scores.result(b, …)`` cuts row ``b`` out of it. Neither ever turns a missing number into zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Bools", "Result", "Scores", "first_reason"]

Array: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

_HALF = ("bfloat16", "float16")
#: Reason of a value that left the range of the arithmetic.
OUT_OF_RANGE = "range"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """One metric value with everything needed to judge it.

    Args:
        value: The number, or a label for metrics that classify; NaN when undefined.
        reason: Why the value is NaN (``"coverage"``, ``"depth<2"``, …; ``"range"`` where it left the range of the
            arithmetic), or a remark that stands beside a value.
        coverage: Valid elementary terms divided by unmasked ones, in [0, 1].
        n_units: Units (tokens, slots) that took part.
        n_steps: Steps or series values that took part.
        metric_id: Canonical id, parameters that differ from the default included.
        extractor_id: How the states were cut out; ``"given"`` when the caller cut them.
        dtype: The dtype handed in; half types are computed in float32 or better but stay marked here.
        profile: One value per step or depth, NaN where undefined.
        per_unit: One value per unit.
        series: The values of a series-valued metric.
        extras: Companion numbers (``kappa_path``, ``n_invalid``, ``n_stall``, ``n_nonfinite``, …).

    Example:
        >>> float(Result(0.25, None, 1.0, 1, 1, "kappa.phase/1"))
        0.25
    """

    value: float | str
    reason: str | None
    coverage: float
    n_units: int
    n_steps: int
    metric_id: str
    extractor_id: str = "given"
    dtype: str = "float64"
    profile: Array | None = None
    per_unit: Array | None = None
    series: Array | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # the last line: an overflow is no number, and no NaN goes without a reason
        if not isinstance(self.value, str) and not math.isfinite(self.value):
            object.__setattr__(self, "value", math.nan)
            if self.reason is None:
                object.__setattr__(self, "reason", OUT_OF_RANGE)

    def __float__(self) -> float:
        return float(self.value)

    @property
    def low_precision(self) -> bool:
        """True when the states were handed in as bfloat16 or float16: too coarse for small paired angles."""
        return self.dtype in _HALF

    def __repr__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:.10g}"
        why = f" ({self.reason})" if self.reason else ""
        flag = ", low precision" if self.low_precision else ""
        return (
            f"<{self.metric_id} = {value}{why}; coverage {self.coverage:.3g}, "
            f"{self.n_units} units, {self.n_steps} steps, {self.dtype}{flag}>"
        )


def first_reason(batch: int, *cases: tuple[Bools | bool, str]) -> list[str | None]:
    """Return per row the text of the first case that holds, or None.

    The order of the cases is the order of precedence: empty, too short, too few units, coverage, zero denominator.
    """
    out: list[str | None] = [None] * batch
    for holds, text in reversed(cases):
        if isinstance(holds, (bool, np.bool_)):
            if holds:
                out = [text] * batch
        elif holds.any():
            for row in np.flatnonzero(holds):
                out[row] = text
    return out


def _plain(x: Any) -> Any:
    return x.item() if isinstance(x, np.generic) else x


@dataclass(slots=True)
class Scores:
    """One metric for a batch of rows; every array has the batch as its last (profiles) or first (others) axis."""

    value: Any
    reason: Sequence[str | None]
    coverage: Array
    n_units: NDArray[np.int64]
    n_steps: NDArray[np.int64]
    profile: Array | None = None
    profile_coverage: Array | None = None
    profile_reason: NDArray[np.object_] | None = None
    per_unit: Array | None = None
    series: Array | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def result(self, row: int, metric_id: str, extractor_id: str = "given", dtype: str = "float64") -> Result:
        """Cut out one row."""
        value = self.value[row]
        return Result(
            value if isinstance(value, str) else float(value),
            self.reason[row],
            float(self.coverage[row]),
            int(self.n_units[row]),
            int(self.n_steps[row]),
            metric_id,
            extractor_id,
            dtype,
            None if self.profile is None else self.profile[:, row],
            None if self.per_unit is None else self.per_unit[row],
            None if self.series is None else self.series[row],
            {k: _plain(v[row]) for k, v in self.extras.items()},
        )

    def take(self, rows: NDArray[np.int64]) -> Scores:
        """Return the scores of some rows."""

        def last(grid: Any) -> Any:
            return None if grid is None else grid[:, rows]

        def first(values: Any) -> Any:
            if values is None or isinstance(values, np.ndarray):
                return None if values is None else values[rows]
            return [values[i] for i in rows]

        return Scores(
            first(self.value), first(self.reason), self.coverage[rows], self.n_units[rows], self.n_steps[rows],
            last(self.profile), last(self.profile_coverage), last(self.profile_reason), first(self.per_unit),
            first(self.series), {name: first(v) for name, v in self.extras.items()},
        )  # fmt: skip
