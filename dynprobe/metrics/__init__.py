"""Metrics of hidden-state dynamics: definitions, one exact call, and one fast road for batches.

- Look up: :func:`ids`, :func:`spec`, :func:`columns`, :func:`parse_id`, :func:`format_id`, lists :data:`CORE` and
  :data:`DEFAULT`.
- One trajectory, exactly as handed in: :func:`compute` → :class:`Result`.
- A batch of captured states: :func:`measure` → :class:`Measurement`, :func:`frame`.
- The output distribution: :func:`output_metrics`, :func:`paired_output`, :func:`lens_output`.
- Two runs on the same tokens: :func:`paired`, :func:`diverge`.

A number that cannot be computed is NaN with a reason. Every definition has a versioned id and a digest.
"""

from __future__ import annotations

from dynprobe.metrics import _catalogue as _catalogue
from dynprobe.metrics._compute import compute
from dynprobe.metrics._frame import frame
from dynprobe.metrics._lists import CORE, DEFAULT
from dynprobe.metrics._measure import Measurement, measure
from dynprobe.metrics._output import lens_output, output_metrics, paired_output
from dynprobe.metrics._paired import diverge, paired
from dynprobe.metrics._phase_z import phase_z
from dynprobe.metrics._registry import (
    Column,
    MetricSpec,
    ParsedId,
    column_name,
    columns,
    format_id,
    ids,
    parse_id,
    spec,
)
from dynprobe.metrics._result import Result

__all__ = [
    "CORE",
    "DEFAULT",
    "Column",
    "Measurement",
    "MetricSpec",
    "ParsedId",
    "Result",
    "column_name",
    "columns",
    "compute",
    "diverge",
    "format_id",
    "frame",
    "ids",
    "lens_output",
    "measure",
    "output_metrics",
    "paired",
    "paired_output",
    "parse_id",
    "phase_z",
    "spec",
]
