"""Singular values of the units-by-dimensions matrix of each depth, made once for all metrics that read them.

Always in float64 and from the matrix itself: a Gram matrix would square the condition number and turn the rounding of
empty directions into singular values of 1e-8. What is left of them is set to zero, because an entropy of low order
would count it. Units that are masked or invalid are zero rows, which add only zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import NEAR_ZERO
from dynprobe.metrics._result import Array, Bools

__all__ = ["Spectra", "spectra"]

_WIDE = 2  # above this aspect a QR first is faster and as accurate


class Spectra(NamedTuple):
    """Singular values per depth, up to one positive factor per depth and row.

    Args:
        values: One array [B, K] per depth, descending, in units of the largest norm; all zero where nothing is left.
        rows: Rows that are not zero [D, B].
        dims: Width of each depth.
    """

    values: list[Array]
    rows: np.ndarray
    dims: list[int]


def spectra(
    states: Sequence[torch.Tensor], norm: Array, ok: Bools, *, eps: float, centre: str = "none", unit: bool = False
) -> Spectra:
    """Singular values of the valid units of every depth and row.

    Args:
        states: D tensors [B, T, dim_l].
        norm: Norms [D, B, T].
        ok: Units that take part [D, B, T].
        eps: Rounding unit: what centring leaves below 16·eps of the largest norm is zero.
        centre: ``none`` or ``mean`` (subtract the mean over units).
        unit: Divide rows by their norm, after centring; rows without one are left out.
    """
    if centre not in ("none", "mean"):
        raise MetricError(f"erank, entropy.matrix: centre is 'none' or 'mean', found {centre!r}.")
    n_depths, batch = ok.shape[:2]
    rows, values = np.zeros((n_depths, batch), np.int64), []
    used = np.flatnonzero(ok.any((0, 1)))
    places = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
    for depth, state in enumerate(states):
        here = ok[depth][:, places]
        flags = torch.from_numpy(here[..., None])
        top = np.where(here, norm[depth][:, places], 0.0).max(-1, initial=0.0)
        factor = torch.from_numpy(np.where(top > 0, top, 1.0))[:, None, None]
        x = torch.where(flags, state[:, places].detach().cpu().double(), 0.0) / factor
        if centre == "mean":
            count = torch.from_numpy(np.maximum(here.sum(-1), 1))[:, None, None]
            x = torch.where(flags, x - x.sum(1, keepdim=True) / count, 0.0)
            x[torch.linalg.vector_norm(x, dim=-1) <= NEAR_ZERO * eps] = 0.0
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rows[depth] = (size[..., 0] > 0).sum(-1).numpy()
        if unit:
            x = torch.where(size > 0, x / size, 0.0)
        sigma = _singular(x).numpy()
        # the usual tolerance of a numerical rank: what rounding leaves in empty directions is zero
        tolerance = np.maximum(rows[depth], state.shape[-1]) * np.finfo(np.float64).eps
        values.append(np.where(sigma > tolerance[:, None] * sigma.max(-1, initial=0.0)[:, None], sigma, 0.0))
    return Spectra(values, rows, [int(s.shape[-1]) for s in states])


def _singular(x: torch.Tensor) -> torch.Tensor:
    n, d = x.shape[-2:]
    if not n or not d:
        return x.new_zeros((len(x), 0))
    if n >= _WIDE * d or d >= _WIDE * n:
        x = torch.linalg.qr(x if n > d else x.mT, mode="r")[1]
    return torch.linalg.svdvals(x)
