"""The two named lists of metrics.

``CORE`` is cheap enough to be always on; ``DEFAULT`` is what a run stores unless told otherwise. The logit lens and the
paired read-outs are asked for by name: one runs the model's tail at every depth, the other needs a second run.
"""

from __future__ import annotations

__all__ = ["CORE", "DEFAULT"]

CORE: tuple[str, ...] = (
    "kappa.phase/1",
    "delta.rel_prev/1",
    "delta.rel_next/1",
    "delta.rms/1",
    "delta.angle/1",
    "resid.norm/1",
    "limen.ct/1",
    "limen.ratio/1",
)

DEFAULT: tuple[str, ...] = (
    *CORE,
    "kappa.geom/1",
    "kappa.sync/1",
    "kappa.xcorr/1",
    "curv.depth/1",
    "curv.token/1",
    "limen.ct2/1",
    "limen.qratio/1",
    "limen.gini/1",
    "limen.regime/1",
    "limen.ratio/1{norm=winsor_mad}",
    "debt.cusum/1",
    "debt.excess/1",
    "collapse.late_ct/1",
    "output.entropy/1",
    "output.margin/1",
    "output.nll/1",
)
