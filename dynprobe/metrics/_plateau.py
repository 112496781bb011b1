"""Plateaus: between two states, does the output change evenly or in one jump?

A state is led from A to B along t ∈ [0, 1] and the output F is compared with both ends::

    d(t) = ‖F(x(t)) − F_A‖ / (‖F(x(t)) − F_A‖ + ‖F(x(t)) − F_B‖)

A linear F gives d = t. A model with stable regions stays near 0, jumps, and stays near 1. ``t10``, ``t50`` and ``t90``
are the first upward crossings of d = 0.1, 0.5 and 0.9, linear between grid points, so a jump has the width of at most
one grid step: the grid is part of every statement about sharpness. Where F_A = F_B, d is 0/0 and NaN. A level that is
never crossed is NaN, ``no-crossing``; a crossing that would lie in a hole of the series is not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array, as_series, eps_of
from dynprobe.metrics._range import in_range
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["READOUTS", "crossing", "distance_share", "readouts"]

READOUTS = ("t10", "t50", "t90", "width", "slope", "share")
_LOW, _HIGH = 0.1, 0.9


def distance_share(outputs: Array, a: Array, b: Array, eps: float = 2.0**-52) -> Array:
    """Return d for each output.

    Args:
        outputs: F(x(t)), ``[t, dim]``.
        a: F_A ``[dim]``.
        b: F_B ``[dim]``.
        eps: Rounding unit of the outputs; ends that differ by no more than 16 of them are equal.

    Returns:
        ``[t]`` in [0, 1]; NaN where one is not finite, and everywhere if F_A = F_B.

    Example:
        >>> distance_share(np.array([[0.0], [1.0], [4.0]]), np.array([0.0]), np.array([4.0]))
        array([0.  , 0.25, 1.  ])
    """
    x, y, z = (np.asarray(v, dtype=np.float64) for v in (outputs, a, b))
    to_a, to_b = np.linalg.norm(x - y, axis=-1), np.linalg.norm(x - z, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        d: Array = to_a / (to_a + to_b)
    if _same(y, z, eps):
        # d would be 0/0 at the ends and near 1/2 elsewhere, which says nothing about a boundary.
        d = np.full_like(d, np.nan)
    return d


def _same(a: Array, b: Array, eps: float) -> bool:
    return bool(np.linalg.norm(a - b) <= 16 * eps * max(np.linalg.norm(a), np.linalg.norm(b)))


def crossing(t: Array, d: Array, level: float) -> tuple[float, str | None]:
    """Return the first t at which d comes from below up to ``level``, and why there is none.

    Args:
        t: Ascending grid.
        d: Values on it; NaN = unknown.
        level: The level.

    Example:
        >>> crossing(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.25, 1.0]), 0.5)[0].__round__(6)
        0.666667
        >>> crossing(np.array([0.0, 1.0]), np.array([0.0, 0.3]), 0.5)
        (nan, 'no-crossing')
    """
    known = np.flatnonzero(np.isfinite(d))
    if not len(known):
        return math.nan, "coverage" if len(d) else "empty"
    if known[0] == 0 and d[0] == level:
        return float(t[0]), None
    for i, j in pairwise(known):
        if d[i] < level <= d[j]:
            if j != i + 1:
                return math.nan, "coverage"
            return float(t[i] + (level - d[i]) / (d[j] - d[i]) * (t[j] - t[i])), None
    return math.nan, "no-crossing"


def _inside(t: Array, d: Array) -> float:
    """Length of t over which the polygon through (t, d) lies in (0.1, 0.9)."""
    total = 0.0
    for t0, t1, d0, d1 in zip(t[:-1], t[1:], d[:-1], d[1:], strict=True):
        if d0 == d1:
            total += (t1 - t0) * (_LOW < d0 < _HIGH)
        else:
            part = min(max(d0, d1), _HIGH) - max(min(d0, d1), _LOW)
            total += (t1 - t0) * max(part, 0.0) / abs(d1 - d0)
    return total


def readouts(t: Array, d: Array) -> dict[str, tuple[float, str | None]]:
    """Return every read-out of one curve with its reason for NaN.

    Args:
        t: Ascending grid ``[n]``.
        d: Values on it.

    Returns:
        ``t10``, ``t50``, ``t90``, ``width`` (t90 − t10), ``slope`` (largest dd/dt between neighbours), ``share`` (part
        of the range of t on which d is not inside (0.1, 0.9)).
    """
    out = {f"t{round(100 * level)}": crossing(t, d, level) for level in (_LOW, 0.5, _HIGH)}
    (first, why), (last, other) = out["t10"], out["t90"]
    out["width"] = (last - first, why or other)
    if len(t) == 0:
        return out | {"slope": (math.nan, "empty"), "share": (math.nan, "empty")}
    if len(t) < 2:
        return out | {"slope": (math.nan, "steps<1"), "share": (math.nan, "steps<1")}
    whole = np.isfinite(d)
    pairs = whole[:-1] & whole[1:]
    if 2 * pairs.sum() < len(pairs):
        return out | {"slope": (math.nan, "coverage"), "share": (math.nan, "coverage")}
    out["slope"] = (float((np.diff(d)[pairs] / np.diff(t)[pairs]).max()), None)
    covered = float(np.diff(t)[pairs].sum())
    inside = sum(_inside(t[i : i + 2], d[i : i + 2]) for i in np.flatnonzero(pairs))
    out["share"] = (1 - inside / covered, None)
    return out


def _computer(name: str) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        t, d = (as_series(x, mask, metric_id) for x in inputs)
        grid, values = t.values[0], np.where(d.ok, d.values, np.nan)[0]
        if len(grid) != len(values) or not np.isfinite(grid).all() or (np.diff(grid) <= 0).any():
            raise MetricError(
                f"{metric_id} takes an ascending grid t[n] and d[n], found {len(grid)} and {len(values)}."
            )
        grid, values = grid[d.keep[0]], values[d.keep[0]]
        value, reason = readouts(grid, values)[name]
        n = int(np.isfinite(values).sum())
        return Result(value, reason, n / len(grid) if len(grid) else math.nan, 1, n, metric_id, dtype=d.dtype)

    return compute


def _compute_d(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (f, dtype), (a, _), (b, _) = (as_array(x, metric_id) for x in inputs)
    if f.ndim != 2 or a.shape != f.shape[1:] or b.shape != f.shape[1:] or mask is not None:
        raise MetricError(
            f"{metric_id} takes outputs[t, dim], F_A[dim], F_B[dim] without mask, found {list(f.shape)}, "
            f"{list(a.shape)}, {list(b.shape)}."
        )
    eps = eps_of(dtype)
    f, a, b = in_range(f, a, b)
    d = distance_share(f, a, b, eps)
    ok = np.isfinite(d)
    n = int(ok.sum())
    reason = "empty" if not len(d) else "zero-denominator" if _same(a, b, eps) else None
    if reason is None and 2 * n < len(d):
        reason = "coverage"
    value = float(d[ok].mean()) if reason is None else math.nan
    name = str(dtype).removeprefix("torch.")
    coverage = n / len(d) if len(d) else math.nan
    return Result(value, reason, coverage, 1, n, metric_id, dtype=name, series=d)


_SOURCE = "activation plateaus: arXiv 2409.17113; code MShinkle/activation_plateau_mechanisms"
register(
    MetricSpec(
        id="plateau.d/1",
        sentence="Share of the way from one end's output to the other's, along an interpolation; series = the curve.",
        formula="d(t) = ‖F(x(t)) − F_A‖/(‖F(x(t)) − F_A‖ + ‖F(x(t)) − F_B‖); value = mean over t; F_A = F_B → NaN",
        latex=(
            r"d(t) = \frac{\lVert F(x(t))-F_A\rVert}{\lVert F(x(t))-F_A\rVert+\lVert F(x(t))-F_B\rVert}, \qquad "
            r"\operatorname*{mean}_{t} d(t)"
        ),
        input="outputs[t,dim], F_A[dim], F_B[dim]",
        value_range="[0, 1]",
        unit="1",
        invariances=frozenset({"R", "S", "shift"}),
        source=_SOURCE,
        vectors=("F linear, t = 0.25 → d = 0.25", "F_A = F_B → NaN"),
        groups=frozenset({"optional"}),
    ),
    _compute_d,
    arity=3,
)

_CROSS = "first upward crossing of d = {}: first i with d_i < {} ≤ d_{{i+1}}, linear between grid points"
_DEFINITIONS = {
    "t10": ("Where the output begins to leave the first end.", _CROSS.format(0.1, 0.1), "[0, 1]", "t", "linear → 0.1"),
    "t50": ("Where the output is as far from one end as from the other.", _CROSS.format(0.5, 0.5), "[0, 1]", "t",
            "linear → 0.5"),
    "t90": ("Where the output has nearly reached the second end.", _CROSS.format(0.9, 0.9), "[0, 1]", "t",
            "linear → 0.9"),
    "width": ("Width of the boundary between two plateaus.", "t90 − t10 of first upward crossings", "(−∞, ∞)", "t",
              "linear → 0.8; a step → 0.8 grid steps"),
    "slope": ("Steepest rise of the output's share of the way.", "max_i (d_{i+1} − d_i)/(t_{i+1} − t_i)", "(−∞, ∞)",
              "1/t", "linear → 1; a step → 1/grid step"),
    "share": ("Plateau fraction: part of the way on which the output stays near one end.",
              "1 − (length of t with 0.1 < d < 0.9)/(length of t), d linear between grid points", "[0, 1]", "1",
              "linear → 0.2; a step → 1 − 0.8 grid steps"),
}  # fmt: skip
_CROSSING = r"t_{{{}}}: \text{{ first upward crossing of }} d(t) = {}"
_LATEX = {
    "t10": _CROSSING.format(10, 0.1),
    "t50": _CROSSING.format(50, 0.5),
    "t90": _CROSSING.format(90, 0.9),
    "width": r"t_{90}-t_{10}",
    "slope": r"\max_i\frac{d_{i+1}-d_i}{t_{i+1}-t_i}",
    "share": r"1-\frac{\bigl|\{t : 0.1<d(t)<0.9\}\bigr|}{t_{\mathrm{end}}-t_{\mathrm{start}}}",
}
for _name, (_sentence, _formula, _range, _unit, _vector) in _DEFINITIONS.items():
    register(
        MetricSpec(
            id=f"plateau.{_name}/1",
            sentence=_sentence,
            formula=_formula,
            latex=_LATEX[_name],
            input="t series, d series",
            value_range=_range,
            unit=_unit,
            invariances=frozenset(),
            source=_SOURCE + "; read-outs by dynprobe",
            vectors=(_vector,),
            groups=frozenset({"optional"}),
        ),
        _computer(_name),
        arity=2,
    )
