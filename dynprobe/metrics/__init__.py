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
- While a model generates, one token at a time: :func:`phase_lag`, :func:`norm_step`, :func:`step_zmax`,
  :func:`step_z`, :func:`readiness`, :func:`readiness_gmean`, :func:`str_kernel` with :func:`str_sigma`,
  :func:`token_cosine` with :class:`RecyncDetector` and :func:`recync_detect` → :class:`Crises`.
- Kinds of steps: :func:`bad_labels` with :func:`bad_limits`, :func:`hmm_states` with :func:`state_features`; what they
  spell: :func:`symbols`, :func:`motifs`, :func:`path_edit_distance`.
- One scalar series by delay embedding: :func:`delay_embed`, :func:`delay_pca` with :func:`axis_similarity`,
  :func:`reference_axes` and :func:`mirror_symmetry`, :func:`false_neighbours`, :func:`lag_autocorrelation`,
  :func:`choose_lag`, :func:`choose_theiler`; what to hold against it: :func:`surrogates`, :func:`end_mismatch`,
  :func:`spectrum_error`. :func:`dynprobe.delay_diagnostics` puts them together.
- Certainty and rivalry: :func:`cycles_margin`, :func:`cycles_ct`, :func:`reopening`. Linear read-out:
  :func:`functional_capacity`.
- Thresholds, recovery, detectors and their intervals: :mod:`dynprobe.metrics.statistics`.

- A metric of your own: :class:`Metric`, :class:`MetricSpec`, :func:`trajectory_metric`; see ``docs/extending.md``.

A number that cannot be computed is NaN with a reason. Every definition has a versioned id and a digest.
"""

from __future__ import annotations

from dynprobe.metrics import _catalogue as _catalogue
from dynprobe.metrics import statistics as statistics
from dynprobe.metrics._bad_states import StateLimits, bad_labels, bad_limits
from dynprobe.metrics._compute import compute
from dynprobe.metrics._convergence_call import TOLERANCES, convergence, convergence_ids
from dynprobe.metrics._cycles import Cycles, LabelledRun, cycles_ct, cycles_margin
from dynprobe.metrics._delay import (
    DelayPca,
    axis_similarity,
    delay_embed,
    delay_pca,
    lag_autocorrelation,
    mirror_symmetry,
    reference_axes,
)
from dynprobe.metrics._delay_choice import autocorrelation, choose_lag, choose_theiler, mutual_information
from dynprobe.metrics._false_neighbours import FalseNeighbours, false_neighbours
from dynprobe.metrics._frame import frame
from dynprobe.metrics._functional_capacity import FunctionalCapacity, above_chance, functional_capacity
from dynprobe.metrics._hmm_states import HmmStates, hmm_states, state_features
from dynprobe.metrics._lens import Translators, prediction_depth, read_translators
from dynprobe.metrics._lists import CORE, DEFAULT
from dynprobe.metrics._lockin import Lockin, lockin
from dynprobe.metrics._measure import Measurement, measure
from dynprobe.metrics._motifs import Motif, motifs
from dynprobe.metrics._one_function import trajectory_metric
from dynprobe.metrics._output import lens_output, output_metrics, paired_arms, paired_output
from dynprobe.metrics._paired import diverge, paired
from dynprobe.metrics._phase_z import phase_z
from dynprobe.metrics._readiness import readiness, readiness_gmean
from dynprobe.metrics._recync import Crises, RecyncDetector, recync_detect, token_cosine
from dynprobe.metrics._reduction import reducing
from dynprobe.metrics._registry import (
    Column,
    Metric,
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
from dynprobe.metrics._reopening import Reopening, reopening
from dynprobe.metrics._request import requested
from dynprobe.metrics._response import response
from dynprobe.metrics._result import Result
from dynprobe.metrics._signals import norm_step, phase_lag, step_z, step_zmax
from dynprobe.metrics._slots import measure_slots
from dynprobe.metrics._str_kernel import str_kernel, str_sigma
from dynprobe.metrics._surrogates import SURROGATES, end_mismatch, spectrum_error, surrogates
from dynprobe.metrics._symbols import Symbols, path_edit_distance, symbols

__all__ = [
    "CORE",
    "DEFAULT",
    "SURROGATES",
    "TOLERANCES",
    "Column",
    "Crises",
    "Cycles",
    "DelayPca",
    "FalseNeighbours",
    "FunctionalCapacity",
    "HmmStates",
    "LabelledRun",
    "Lockin",
    "Measurement",
    "Metric",
    "MetricSpec",
    "Motif",
    "ParsedId",
    "RecyncDetector",
    "Reopening",
    "Result",
    "StateLimits",
    "Symbols",
    "Translators",
    "above_chance",
    "autocorrelation",
    "axis_similarity",
    "bad_labels",
    "bad_limits",
    "choose_lag",
    "choose_theiler",
    "column_name",
    "columns",
    "compute",
    "convergence",
    "convergence_ids",
    "cycles_ct",
    "cycles_margin",
    "delay_embed",
    "delay_pca",
    "diverge",
    "end_mismatch",
    "false_neighbours",
    "format_id",
    "frame",
    "functional_capacity",
    "hmm_states",
    "ids",
    "lag_autocorrelation",
    "lens_output",
    "lockin",
    "measure",
    "measure_slots",
    "mirror_symmetry",
    "motifs",
    "mutual_information",
    "norm_step",
    "output_metrics",
    "paired",
    "paired_arms",
    "paired_output",
    "parse_id",
    "path_edit_distance",
    "phase_lag",
    "phase_z",
    "prediction_depth",
    "read_translators",
    "readiness",
    "readiness_gmean",
    "recync_detect",
    "reducing",
    "reference_axes",
    "relaxation",
    "reopening",
    "requested",
    "response",
    "spec",
    "spectrum_error",
    "state_features",
    "step_z",
    "step_zmax",
    "str_kernel",
    "str_sigma",
    "surrogates",
    "symbols",
    "token_cosine",
    "trajectory_metric",
]
