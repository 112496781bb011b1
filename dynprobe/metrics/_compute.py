"""``compute``: one metric of one trajectory, exactly as handed in."""

from __future__ import annotations

import inspect
from typing import Any

from dynprobe.errors import MetricError
from dynprobe.metrics._id_values import near_key
from dynprobe.metrics._range import scaled_inputs
from dynprobe.metrics._registry import MetricSpec, entry, format_id, parse_id
from dynprobe.metrics._result import Result

__all__ = ["compute"]

_OWN = {"inputs", "mask", "params", "metric_id"}


def _ignores_scale(spec: MetricSpec) -> bool:
    """Whether one factor for all inputs changes nothing: declared, and the inputs are states or a series of any unit.

    The detector of cosines compares with 1e-12, so it is not among them.
    """
    return (
        "S" in spec.invariances
        and spec.input.startswith(("trajectory", "tokens", "series"))
        and (spec.family != "recync")
    )


def compute(metric_id: str, X: Any, *more: Any, mask: Any = None, **params: Any) -> Result:
    """Compute one metric of one trajectory, series or pair, in float64.

    It takes exactly what it is given and drops nothing: no embedding, no sink position, no final norm. Near-zero tests
    use the epsilon of the dtype handed in (float32's for half types).

    Args:
        metric_id: Such as ``"kappa.phase/1"`` or ``"kappa.geom/1{W=16}"``. Extraction options written in the id are
            kept as ``extractor_id``; they change nothing here.
        X: The declared input: ``trajectory[depth, unit, dim]``, ``tokens[pos, dim]``, ``series``,
            ``logits[pos, vocab]``. NumPy array, torch tensor or nested list.
        *more: Further inputs of metrics that take several (the other run, targets).
        mask: True = valid; [depth, unit] or [unit] for trajectories, [pos] otherwise.
        **params: Estimator parameters (they join the id) and side inputs such as ``theta``, ``mu``, ``inject``.

    Returns:
        The value with reason, coverage and companions.

    Raises:
        MetricError: Unknown id or parameter, or an input of the wrong shape.

    Example:
        >>> import numpy as np
        >>> turns = np.arange(5) * np.pi / 6
        >>> r = compute("kappa.phase/1", np.stack([np.cos(turns), np.sin(turns)], -1)[:, None, :])
        >>> round(float(r), 10), round(r.extras["kappa_path"], 10)
        (0.1666666667, 2.0943951024)
        >>> compute("kappa.phase/1", np.ones((1, 3, 4)))
        <kappa.phase/1 = nan (depth<2); coverage nan, 0 units, 0 steps, float64>
    """
    parsed = parse_id(metric_id)
    found = entry(parsed.id)
    inputs = (X, *more)
    if len(inputs) != found.arity:
        raise MetricError(f"{parsed.id} takes {found.arity} input(s), {found.spec.input}; found {len(inputs)}.")
    side = [name for name in inspect.signature(found.compute).parameters if name not in _OWN]
    values, extra = dict(parsed.params), {}
    for key, value in params.items():
        if key in values:
            default = found.spec.params[key]
            values[key] = type(default)(value) if isinstance(default, (int, float)) else value
        elif key in side:
            extra[key] = value
        else:
            known = [*values, *side]
            raise MetricError(
                f"{parsed.id} has no parameter {key!r}.{near_key(key, known)} Known: {', '.join(known) or 'none'}."
            )
    full = format_id(parsed.id, values)
    if not extra and _ignores_scale(found.spec):
        inputs = scaled_inputs(inputs)
    result: Result = found.compute(inputs, mask, values, full, **extra)
    if not parsed.extraction:
        return result
    extractor = ",".join(f"{k}={parsed.extraction[k]}" for k in sorted(parsed.extraction))
    return Result(**{f: getattr(result, f) for f in Result.__slots__} | {"extractor_id": extractor})
