"""A metric made of one function: what its author writes is the mathematics, everything around it is done here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import norms_and_validity
from dynprobe.metrics._inputs import Trajectory, as_trajectory
from dynprobe.metrics._range import HIGH, LOW
from dynprobe.metrics._registry import Metric, MetricSpec, format_id
from dynprobe.metrics._result import Array, Bools, Result, Scores, first_reason

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = ["trajectory_metric"]

#: ``f(x, ok, **params) → value``, or ``(nan, reason)`` where there is none.
Formula: TypeAlias = Callable[..., "float | tuple[float, str]"]


def trajectory_metric(spec: MetricSpec, formula: Formula) -> Metric:
    """Make a metric of one trajectory out of one function.

    The function gets ``x``, float64 ``[depth, unit, dim]``, and ``ok``, bool ``[depth, unit]``: states that are finite,
    not zero, and not masked. It returns a number, or NaN with a reason. Around it the states are read in any dtype and
    form, coverage is counted, and a trajectory without states (``empty``) or with fewer than half of them usable
    (``coverage``) never reaches it; a number that is not finite becomes NaN with a reason. A run calls it once per text
    and stores one value.

    Args:
        spec: The definition. Its input begins with ``trajectory``; its only level is ``sample``; its ``params`` are the
            keyword arguments of the function.
        formula: The function.

    Raises:
        MetricError: The definition and the function do not fit each other.

    Example:
        >>> import numpy as np
        >>> definition = MetricSpec(
        ...     id="acme.reach/1", sentence="Distance from the first depth to the last, mean over units.",
        ...     formula="mean_n ‖x_{D,n} − x_{0,n}‖", input="trajectory[depth,unit,dim]", value_range="[0, ∞)",
        ...     unit="model units", invariances=frozenset({"R", "P", "T", "shift"}), source="Acme 2026",
        ...     column="acme_reach", levels={"sample": "mean over units"}, vectors=("0, 3e₁ → 3",),
        ... )
        >>> reach = trajectory_metric(
        ...     definition, lambda x, ok: np.linalg.norm(x[-1] - x[0], axis=-1)[ok[0] & ok[-1]].mean()
        ... )
        >>> reach.compute((np.array([[[1.0, 0.0]], [[4.0, 0.0]]]),), None, {}, "acme.reach/1").value
        3.0
    """
    if not spec.input.startswith("trajectory") or set(spec.levels) != {"sample"}:
        raise MetricError(
            f"{spec.id}: one function gives one number per trajectory, so input='trajectory[depth,unit,dim]' and "
            f"levels={{'sample': …}}; found {spec.input!r}, {sorted(spec.levels)}. Other levels need Metric(score=…)."
        )
    taken = list(inspect.signature(formula).parameters)[2:]
    if set(taken) != set(spec.params):
        raise MetricError(
            f"{spec.id}: the function takes (x, ok{''.join(f', {name}' for name in taken)}) and the definition has the "
            f"parameters {', '.join(spec.params) or 'none'}; they must be the same."
        )

    def result(t: Trajectory, params: dict[str, Any], metric_id: str) -> Result:
        keep = t.keep[:, 0]
        x = torch.stack([s[0] for s in t.states]).numpy() if t.states else np.zeros((*keep.shape, 0))
        valid = norms_and_validity(t.states, t.keep)[1][:, 0] if t.states else keep
        n_ok, n_keep = int((valid & keep).sum()), int(keep.sum())
        coverage = n_ok / n_keep if n_keep else np.nan
        (reason,) = first_reason(1, (n_keep == 0, "empty"), (2 * n_ok < n_keep, "coverage"))
        value: Any = np.nan
        if reason is None:
            ok = valid & keep
            with np.errstate(all="ignore"):
                found = formula(_levelled(x, ok) if "S" in spec.invariances else x, ok, **params)
            value, reason = found if isinstance(found, tuple) else (found, None)
        return Result(
            float(value), reason, coverage, int(keep.any(0).sum()), max(len(keep) - 1, 0), metric_id, dtype=t.dtype,
            extras={"n_invalid": int((keep & ~valid).sum())},
        )  # fmt: skip

    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        return result(as_trajectory(inputs[0], mask, metric_id), params, metric_id)

    def score(c: Context, params: dict[str, Any]) -> Scores:
        keep = (c.deep_span if spec.span else c.w.keep) & c.w.real
        full, rows = format_id(spec.id, params), []
        for b in range(keep.shape[1]):
            real = np.flatnonzero(c.w.real[:, b].any(0)) if len(keep) else np.zeros(0, np.int64)
            picked = [s[b : b + 1, torch.from_numpy(real).to(s.device)].detach().cpu().double() for s in c.states]
            rows.append(result(Trajectory(picked, keep[:, b : b + 1][:, :, real], c.w.eps, ""), params, full))
        return _gathered(rows)

    return Metric(spec, compute, score=score)


def _levelled(x: Array, ok: Bools) -> Array:
    """States whose squares stay in range: a power of two changes nothing that has no scale."""
    largest = np.abs(x[ok]).max(initial=0.0)
    return x if LOW < largest < HIGH else np.ldexp(x, -int(np.frexp(largest)[1]))


def _gathered(rows: Sequence[Result]) -> Scores:
    return Scores(
        np.array([row.value for row in rows]), [row.reason for row in rows], np.array([row.coverage for row in rows]),
        np.array([row.n_units for row in rows]), np.array([row.n_steps for row in rows]),
        extras={"n_invalid": np.array([row.extras["n_invalid"] for row in rows])},
    )  # fmt: skip
