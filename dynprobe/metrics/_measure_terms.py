"""``measure_terms``: the metrics of states that are not here, from the few numbers that were sent instead.

A trace that runs where the model lives (:mod:`dynprobe.metrics._sent`) hands back norms, step lengths, step angles and
the chords between tokens. They are what :func:`~dynprobe.metrics._walk.walk` collects, so everything after it, masks,
validity, coverage, reasons and means, is the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dynprobe.metrics._geometry import validity
from dynprobe.metrics._inputs import eps_of
from dynprobe.metrics._limen_ct import CtSeries
from dynprobe.metrics._lists import CORE
from dynprobe.metrics._measure import Measurement, _plan, _read_mask, closed, extractor_text
from dynprobe.metrics._sample import Context
from dynprobe.metrics._walk import Walk

__all__ = ["OF_TERMS", "measure_terms"]

#: Metrics that are arithmetic on norms, step lengths, step angles and the chords between tokens.
OF_TERMS = (
    *CORE, "limen.qratio/1", "limen.gini/1", "limen.regime/1", "limen.ratio/1{norm=winsor_mad}", "collapse.late_ct/1",
)  # fmt: skip


def measure_terms(
    terms: Mapping[str, Any], mask: Any, *, dtype: str, dim: int, sink: int = 1, span: Any = None
) -> Measurement:
    """Measure states that were reduced elsewhere and are not here: the metrics of ``OF_TERMS``.

    Args:
        terms: ``norm`` [depths, B, T]; ``diff`` and ``angle`` [depths − 1, B, T]; ``chord`` [B, T − 1] and ``bend``
            [B, T − 2] of the last depth; float64 tensors, as a trace sends them.
        mask: Bool [B, T], True = real token.
        dtype: Dtype of the states, e.g. ``"float32"``.
        dim: Width of the states.
        sink: As for :func:`measure`; depth 0 takes no part.
        span: As for :func:`measure`.

    Returns:
        What :func:`measure` returns of the states with ``dtype=float64``, up to rounding.
    """
    grids = {name: np.asarray(terms[name], dtype=np.float64) for name in ("norm", "diff", "angle", "chord", "bend")}
    norm, plan, eps = grids["norm"], _plan(OF_TERMS), eps_of(getattr(torch, dtype))
    shape = norm.shape[1:]
    real = _read_mask(mask, shape, "mask")
    keep = real & (np.cumsum(real, axis=1) > sink)
    in_span = keep if span is None else keep & _read_mask(span, shape, "span")
    deep = norm[1:].shape
    reals, keeps = np.broadcast_to(real, deep), np.broadcast_to(keep, deep)
    valid = validity(norm[1:], reals, keeps)
    w = Walk(reals, keeps, valid, norm[1:], eps, dim, grids["diff"][1:], grids["angle"][1:])
    context = Context(w, (), in_span, torch.float64, None, ct=plan.ct, ct2=plan.ct2)
    context.ct = CtSeries.of_chords(grids["chord"], grids["bend"], valid[-1], eps)
    return closed(plan, context, real, keep, norm[0], len(norm), dtype, extractor_text(0, sink, span))
