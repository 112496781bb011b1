r"""Depth on two axes: normalised, and as a path.

Models differ in how many updates they make. Two axes make their profiles comparable, and neither is right alone: of a
smooth flow that is sampled at D depths, a step is ∝ 1/D while the path keeps its length. Every statement about κ
therefore has both.

**Normalised depth** s runs from 0 at the first measured state d₀ to 1 at the last, s(d) = (d − d₀)/(d₁ − d₀). A value
stands in the middle of the states that it reads: the norm of state d at s(d), a step d−1 → d at s(d − ½), a curvature
over d−2 … d at s(d − 1). Between them a profile is linear, and constant beyond the outermost, so that the **area** of a
profile of steps is exactly its mean over steps; area(κ) = ``kappa.phase``.

**Path**: the sum of the steps up to s, linear inside a step; for angles π·κ in rad, ending at κ_path. With a step
missing the sum is not known from there on, and is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["DepthProfile", "along_depth", "first_state", "radial_steps"]

#: Columns that describe a step, and so tell where the first state is.
_STEPS = ("kappa_phase", "delta_angle", "angle", "delta_rel_prev", "delta_rel_next", "delta_rms")
_HALF_TURNS = "half-turns"


@dataclass(frozen=True)
class DepthProfile:
    """One metric along depth, for every prompt.

    Attributes:
        nodes: Normalised depth of the values [node].
        values: Values [prompt, node].
        area: Area under the profile over s in 0 … 1 [prompt].
        profile: The profile on the common grid [prompt, grid].
        path: Sum of all steps [prompt]; NaN for values that are no steps.
        cumulative: Sum of the steps up to each point of the grid [prompt, grid]; None for values that are no steps.
        path_unit: Unit of the path.
        reach: How many earlier states a value reads: 0, 1 or 2.
    """

    nodes: np.ndarray
    values: np.ndarray
    area: np.ndarray
    profile: np.ndarray
    path: np.ndarray
    cumulative: np.ndarray | None
    path_unit: str
    reach: int


def first_state(depths: np.ndarray, values: Mapping[str, np.ndarray]) -> int | None:
    """Return the first depth whose state is measured: the one before the first step, else the first value.

    Example:
        >>> first_state(np.arange(4), {"kappa_phase": np.array([[np.nan, np.nan, 0.1, 0.2]])})
        1
    """
    for name in _STEPS:
        first = _first(values[name]) if name in values else None
        if first:  # a step on the very first row would have no state before it
            return int(depths[first - 1])
    found = [f for f in (_first(v) for v in values.values()) if f is not None]
    return int(depths[min(found)]) if found else None


def along_depth(depths: np.ndarray, values: np.ndarray, start: int, unit: str, grid: np.ndarray) -> DepthProfile | None:
    """Put profiles on normalised depth and sum their steps.

    Args:
        depths: Depths [depth].
        values: Values [prompt, depth].
        start: First measured state, d₀.
        unit: Unit of the values.
        grid: Points of normalised depth [grid].

    Returns:
        The profiles, or None where the track has one state only or nothing is measured.

    Example:
        >>> steps = np.array([[np.nan, 0.1, 0.3, 0.2]])
        >>> found = along_depth(np.arange(4), steps, 0, "half-turns", np.array([0, 0.5, 1]))
        >>> found.area.round(6).tolist(), (found.path / np.pi).round(6).tolist(), found.profile.round(6).tolist()
        ([0.2], [0.6], [[0.1, 0.3, 0.2]])
    """
    end = int(depths.max()) if len(depths) else start
    used = depths >= start
    depths, values = depths[used], values[:, used]
    first = _first(values)
    if end <= start or first is None:
        return None
    reach = int(depths[first]) - start
    reach = reach if reach in (1, 2) else 0
    at = depths >= start + reach
    nodes = (depths[at] - reach / 2 - start) / (end - start)
    kept = values[:, at]
    profile, area = _interpolated(nodes, kept, grid)
    path, cumulative, path_unit = np.full(len(kept), math.nan), None, ""
    if reach == 1:
        scale, path_unit = (math.pi, "rad") if unit == _HALF_TURNS else (1.0, unit)
        whole = len(nodes) == end - start
        sums = np.concatenate([np.zeros((len(kept), 1)), np.cumsum(scale * kept, axis=1)], axis=1)
        if not whole:  # depths that were not stored leave steps out
            sums = np.full((len(kept), 2), math.nan)
        path = sums[:, -1]
        ends = np.linspace(0, 1, sums.shape[1])
        cumulative = _interpolated(ends, sums, grid, gaps=True)[0]
    return DepthProfile(nodes, kept, area, profile, path, cumulative, path_unit, reach)


def radial_steps(norm: np.ndarray) -> np.ndarray:
    """Return |ln(n_d / n_{d−1})| of mean norms [prompt, depth]; NaN on the first row.

    Example:
        >>> radial_steps(np.array([[1.0, np.e, 1.0]])).tolist()
        [[nan, 1.0, 1.0]]
    """
    out = np.full(norm.shape, math.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.abs(np.log(norm[:, 1:] / norm[:, :-1]))
    out[:, 1:] = np.where(np.isfinite(steps), steps, math.nan)
    return out


def _first(values: np.ndarray) -> int | None:
    some = np.isfinite(values).any(0)
    return int(np.argmax(some)) if some.any() else None


def _interpolated(
    nodes: np.ndarray, values: np.ndarray, grid: np.ndarray, gaps: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return profiles on the grid and their exact area; prompts with the same gaps are done together.

    A prompt with fewer than half of the values has neither. With ``gaps`` nothing is drawn across a missing value.
    """
    out, area = np.full((len(values), len(grid)), math.nan), np.full(len(values), math.nan)
    known = np.isfinite(values)
    if known.all():
        patterns, which = known[:1], np.zeros(len(known), dtype=np.int64)
    else:
        patterns, which = np.unique(known, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = which.reshape(-1) == number
        if not pattern.any() or 2 * pattern.sum() < len(pattern):
            continue
        x = nodes[pattern]
        matrix = np.array([np.interp(grid, x, unit) for unit in np.eye(len(x))])
        out[rows] = values[np.ix_(rows, pattern)] @ matrix
        if gaps and not pattern.all():
            out[np.ix_(rows, grid > nodes[max(int(np.argmin(pattern)) - 1, 0)])] = math.nan
        edges = np.concatenate([[0.0], (x[1:] + x[:-1]) / 2, [1.0]])
        area[rows] = values[np.ix_(rows, pattern)] @ np.diff(edges)
    return out, area
