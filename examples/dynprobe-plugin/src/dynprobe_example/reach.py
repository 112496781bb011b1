"""A metric: how far a trajectory gets from where it began, measured against the way that it went."""

from __future__ import annotations

import numpy as np

from dynprobe.metrics import MetricSpec, trajectory_metric

__all__ = ["REACH"]


def reach(x: np.ndarray, ok: np.ndarray) -> float | tuple[float, str]:
    """Return ‖x_D − x_0‖ over the length of the way, mean over units.

    Args:
        x: States, float64 [depth, unit, dim].
        ok: States that are finite, not zero and not masked, bool [depth, unit].
    """
    whole = ok.all(axis=0)  # a way with a hole in it has no length
    if len(x) < 2:
        return np.nan, "depth<2"
    if not whole.any():
        return np.nan, "coverage"
    steps = np.linalg.norm(np.diff(x[:, whole], axis=0), axis=-1).sum(axis=0)
    direct = np.linalg.norm(x[-1, whole] - x[0, whole], axis=-1)
    moved = steps > 0
    if not moved.any():
        return np.nan, "zero-denominator"
    return float((direct[moved] / steps[moved]).mean())


REACH = trajectory_metric(
    MetricSpec(
        id="example.reach/1",
        sentence="Distance from the first depth to the last over the length of the way between them.",
        formula="r_n = ‖x_{D,n} − x_{0,n}‖/Σ_l ‖x_{l+1,n} − x_{l,n}‖; mean over units with every depth valid and Σ > 0",
        latex=r"r = \langle \lVert x_D - x_0 \rVert / \sum_l \lVert x_{l+1} - x_l \rVert \rangle_n",
        input="trajectory[depth,unit,dim]",
        value_range="[0, 1]",
        unit="1",
        invariances=frozenset({"R", "S", "P", "T", "shift"}),
        source="dynprobe-example",
        column="example_reach",
        levels={"sample": "mean over units"},
        vectors=(
            "a straight line → 1",
            "there and back → 0",
            "right angle of equal steps → 1/√2",
            "D = 1 → NaN depth<2",
        ),
    ),
    reach,
)
