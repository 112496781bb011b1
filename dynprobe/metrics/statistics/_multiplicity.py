"""Many tests at once: adjusted p of a family."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from dynprobe.metrics.statistics._crossing import Array

__all__ = ["adjusted"]

NAN = float("nan")


def adjusted(p: Any, method: Literal["holm", "fdr_bh"]) -> Array:
    """Adjusted p of one family, Holm or Benjamini–Hochberg; a missing p is no test and stays missing.

    With p_(1) ≤ … ≤ p_(m): Holm max_{j ≤ i} (m − j + 1)·p_(j), BH min_{j ≥ i} m·p_(j)/j, both at most 1. The same as
    statsmodels' ``multipletests``, whose import alone takes longer than a comparison.

    Example:
        >>> adjusted([0.01, 0.02, 0.03, 0.04], "holm").round(6).tolist()
        [0.04, 0.06, 0.06, 0.06]
        >>> adjusted([0.01, 0.02, 0.03, 0.04], "fdr_bh").round(6).tolist()
        [0.04, 0.04, 0.04, 0.04]
    """
    values = np.asarray(p, dtype=np.float64)
    out = np.full(values.shape, NAN)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    m = len(order)
    if method == "holm":
        out[order] = np.maximum.accumulate(values[order] * (m - np.arange(m)))
    else:
        out[order] = np.minimum.accumulate((values[order] * m / (1 + np.arange(m)))[::-1])[::-1]
    return np.minimum(out, 1.0)
