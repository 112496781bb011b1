"""Metrics of hidden-state dynamics: definitions, one exact call, and one fast road for batches.

- Look up: :func:`ids`, :func:`spec`, :func:`columns`, :func:`parse_id`, :func:`format_id`, lists :data:`CORE` and
  :data:`DEFAULT`, :func:`requested` for what a run may store beside them.
- One trajectory, exactly as handed in: :func:`compute` → :class:`Result`.
- A batch of captured states: :func:`measure` → :class:`Measurement`, :func:`frame`; with several vectors per
  position, :func:`measure_slots`.
- The output distribution: :func:`output_metrics`, :func:`paired_output`, :func:`paired_arms`; through a lens
  :func:`lens_output`, :func:`prediction_depth`, :func:`read_translators` → :class:`Translators`.
- One iterated state, every residual, contraction and iterations to tolerance at once: :func:`convergence`,
  and their ids, :func:`convergence_ids`.
- Two runs on the same tokens: :func:`paired`, :func:`diverge`, :func:`response`, :func:`relaxation`, :func:`lockin`.
- Thresholds and their intervals: :mod:`dynprobe.metrics.statistics`.

A number that cannot be computed is NaN with a reason. Every definition has a versioned id and a digest.
"""

from __future__ import annotations

from dynprobe.metrics import _catalogue as _catalogue
from dynprobe.metrics import statistics as statistics
from dynprobe.metrics._compute import compute
from dynprobe.metrics._convergence_call import TOLERANCES, convergence, convergence_ids
from dynprobe.metrics._frame import frame
from dynprobe.metrics._lens import Translators, prediction_depth, read_translators
from dynprobe.metrics._lists import CORE, DEFAULT
from dynprobe.metrics._lockin import Lockin, lockin
from dynprobe.metrics._measure import Measurement, measure
from dynprobe.metrics._output import lens_output, output_metrics, paired_arms, paired_output
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
from dynprobe.metrics._relax import relaxation
from dynprobe.metrics._request import requested
from dynprobe.metrics._response import response
from dynprobe.metrics._result import Result
from dynprobe.metrics._slots import measure_slots

__all__ = [
    "CORE",
    "DEFAULT",
    "TOLERANCES",
    "Column",
    "Lockin",
    "Measurement",
    "MetricSpec",
    "ParsedId",
    "Result",
    "Translators",
    "column_name",
    "columns",
    "compute",
    "convergence",
    "convergence_ids",
    "diverge",
    "format_id",
    "frame",
    "ids",
    "lens_output",
    "lockin",
    "measure",
    "measure_slots",
    "output_metrics",
    "paired",
    "paired_arms",
    "paired_output",
    "parse_id",
    "phase_z",
    "prediction_depth",
    "read_translators",
    "relaxation",
    "requested",
    "response",
    "spec",
]
