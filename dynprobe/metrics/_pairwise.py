"""Distances between the units of one depth, from differences and in float64.

``‖x‖² + ‖y‖² − 2x·y`` loses all digits of a small distance between long vectors; so distances are taken from the
differences themselves. States are divided by the largest norm first, so that squares stay in range; the factor is
handed back.
"""

from __future__ import annotations

import numpy as np
import torch

from dynprobe.metrics._result import Array, Bools

__all__ = ["pairwise"]

CHUNK_ENTRIES = 1 << 24


def pairwise(x: torch.Tensor, norm: Array, ok: Bools, *, cosine: bool = False) -> tuple[Array, Array]:
    """Distances between all units of each group.

    Args:
        x: States [G, N, dim].
        norm: Their norms [G, N].
        ok: Valid units [G, N].
        cosine: Divide each state by its own norm, so that the distance is the chord between directions.

    Returns:
        Distances [G, N, N], NaN where a unit is not valid, and the factor [G] they were divided by (1 with ``cosine``).
    """
    groups, n = ok.shape
    top = np.where(ok, norm, 0.0).max(-1, initial=0.0)
    top = np.where(top > 0, top, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(ok, 1.0 / (norm if cosine else top[:, None]), 0.0)
    out = np.empty((groups, n, n))
    at_once = max(1, CHUNK_ENTRIES // max(n * n, 1))
    with torch.no_grad():
        for low in range(0, groups, at_once):
            part = slice(low, low + at_once)
            flags = torch.from_numpy(ok[part, :, None])
            rows = torch.where(flags, x[part].detach().cpu().double(), 0.0) * torch.from_numpy(scale[part, :, None])
            out[part] = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    out[~(ok[:, :, None] & ok[:, None, :])] = np.nan
    return out, (np.ones(groups) if cosine else top)
