"""``convergence``: every residual, the contraction estimate and the iterations to tolerance of one trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dynprobe.errors import MetricError, did_you_mean
from dynprobe.metrics._compute import compute
from dynprobe.metrics._registry import column_name, format_id
from dynprobe.metrics._result import Result

__all__ = ["TOLERANCES", "convergence", "convergence_ids"]

_STATES = (
    "delta.rel_prev/1",
    "delta.rel_prev/1{agg=fro}",
    "delta.rel_next/1",
    "delta.rel_next/1{agg=fro}",
    "delta.rms/1",
    "delta.angle/1",
    "deq.residual/1",
    "deq.residual/1{eps=1e-05}",
    "influence.block/1",
    "converge.accel/1",
)
_LOGITS = ("huginn.entropy_diff/1", "huginn.kl/1", "huginn.minp_kl/1")

#: Tolerances that public code stops at, by residual. ``delta_rms``, ``delta_angle`` and ``converge_accel`` have none;
#: theirs is this package's.
TOLERANCES: Mapping[str, float] = MappingProxyType(
    {
        "delta_rel_prev_fro": 1e-3,
        "delta_rel_next": 0.03,
        "deq_residual": 1e-3,
        "influence_block": 1e-3,
        "delta_rms": 1e-3,
        "delta_angle": 1e-3,
        "converge_accel": 1e-3,
        "huginn_entropy_diff": 1e-3,
        "huginn_kl": 1e-3,
        "huginn_minp_kl": 1e-5,
    }
)


def _limits(tol: Mapping[str, float] | None) -> dict[str, float]:
    limits = dict(TOLERANCES)
    for name, value in (tol or {}).items():
        if name not in limits:
            raise MetricError(
                f"no residual {name!r}.{did_you_mean(name, limits)} Tolerances are known for {', '.join(limits)}."
            )
        limits[name] = value
    return limits


def _rules(limits: Mapping[str, float], patience: int) -> list[dict[str, Any]]:
    """Parameters of ``converge.iterations`` by every residual of the states."""
    of_output = {column_name(metric) for metric in _LOGITS}
    hits = {name: max(patience, 2) if name == "converge_accel" else patience for name in limits}
    return [{"of": name, "tol": limits[name], "patience": hits[name]} for name in limits if name not in of_output]


def convergence_ids(tol: Mapping[str, float] | None = None, patience: int = 1) -> tuple[str, ...]:
    """Return the ids of everything :func:`convergence` computes of states, for :func:`measure` and its like.

    Args:
        tol: Tolerances by residual that take the place of :data:`TOLERANCES`.
        patience: How many residuals in a row must be below; the acceleration always waits for two, as published.

    Raises:
        MetricError: A tolerance is for no known residual.

    Example:
        >>> [i for i in convergence_ids() if "delta_rel_next" in i]
        ['converge.iterations/1{of=delta_rel_next,tol=0.03}']
    """
    rules = (format_id("converge.iterations/1", rule) for rule in _rules(_limits(tol), patience))
    return (*_STATES, "converge.rho/1", *rules)


def convergence(
    X: Any, logits: Any = None, *, mask: Any = None, tol: Mapping[str, float] | None = None, patience: int = 1
) -> dict[str, Result]:
    """Measure the convergence of one iterated state in every normalisation at once.

    Args:
        X: States ``trajectory[iteration, unit, dim]``, iteration 0 = before the first update.
        logits: Beside them ``logits[iteration, pos, vocab]``, for the exits that look at the output.
        mask: True = valid; [iteration, unit] or [unit], for the states.
        tol: Tolerances by residual that take the place of :data:`TOLERANCES`.
        patience: How many residuals in a row must be below; the acceleration always waits for two, as published.

    Returns:
        Metric id → result: the residuals (``profile`` has one value per update), ``converge.rho/1``, and the iterations
        to tolerance by every residual that has one. Those of the output are ``converge.exit/1`` of the profile, under
        the residual's id followed by ``→ converge.exit/1{…}``.

    Raises:
        MetricError: An input has the wrong shape, or a tolerance is for no known residual.

    Example:
        >>> import numpy as np
        >>> found = convergence(1 + 2.0 ** -np.arange(12.0)[:, None, None])
        >>> float(found["converge.rho/1"]), float(found["converge.iterations/1{of=delta_rel_next,tol=0.03}"])
        (0.5, 6.0)
        >>> found["converge.iterations/1"].reason, found["converge.iterations/1"].extras["time"]
        (None, 10.0)
    """
    limits, of_output = _limits(tol), {column_name(metric): metric for metric in _LOGITS}
    out = {metric: compute(metric, X, mask=mask) for metric in (*_STATES, "converge.rho/1")}
    for rule in _rules(limits, patience):
        found = compute("converge.iterations/1", X, mask=mask, **rule)
        out[found.metric_id] = found
    if logits is None:
        return out
    for name, metric in of_output.items():
        out[metric] = compute(metric, logits)
        leave = format_id("converge.exit/1", {"tol": limits[name], "patience": patience})
        profile = out[metric].profile
        out[f"{metric} → {leave}"] = compute(leave, [] if profile is None else profile)
    out["huginn.argmax_stable/1"] = compute("huginn.argmax_stable/1", logits)
    return out
