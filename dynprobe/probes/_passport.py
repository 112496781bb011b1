"""The α passport: how large a write was, in every unit at once.

A strength is given in one unit and read in all: relative norm, calibration deviations, robust deviations, the model's
own units, and the cosine that is kept. Sizes are kept as sums and counts per row, so that sites, steps and batches
combine exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.probes._mad import GAUSS_MAD, mad
from dynprobe.probes._site_stats import SiteStats

__all__ = ["Passport", "passport", "spread"]

Float64: TypeAlias = NDArray[np.float64]

UNITS: Final = ("alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs", "alpha_cos")


@dataclass(frozen=True)
class Passport:
    """Realised sizes of writes in every unit, as sums and counts per row, so that sites and steps combine exactly.

    ``alpha_relnorm`` = mean ‖u‖/‖h‖ · ``alpha_coordstd`` = mean RMS_i(u_i/s_i) over coordinates with s_i > 0 ·
    ``alpha_mad`` = mean (‖u‖/√d)/(1.4826·MAD(h)) · ``alpha_abs`` = mean ‖u‖/√d · ``alpha_cos`` = mean cos(h, h + u);
    means over written states at which the quotient is defined.

    Args:
        sums: Per unit, float64 [batch].
        counts: Per unit, int64 [batch]: states in the sum.
        n_states: int64 [batch]: states asked to be written.
        n_nonfinite: int64 [batch]: of those, states with NaN or Inf, which enter no mean.
    """

    sums: dict[str, Float64]
    counts: dict[str, NDArray[np.int64]]
    n_states: NDArray[np.int64]
    n_nonfinite: NDArray[np.int64]

    @classmethod
    def zeros(cls, n_rows: int) -> Passport:
        """Return the passport of nothing, the neutral element of ``add``."""
        none = np.zeros(n_rows, dtype=np.int64)
        return cls({u: np.zeros(n_rows) for u in UNITS}, dict.fromkeys(UNITS, none), none, none)

    def add(self, other: Passport) -> Passport:
        """Return the passport of both sets of writes; rows must correspond."""
        return Passport(
            {u: self.sums[u] + other.sums[u] for u in UNITS},
            {u: self.counts[u] + other.counts[u] for u in UNITS},
            self.n_states + other.n_states,
            self.n_nonfinite + other.n_nonfinite,
        )

    def spread(self, rows: NDArray[np.int64], n_rows: int) -> Passport:
        """Return a passport of some rows as one of all; the others hold nothing."""
        return Passport(
            {u: spread(self.sums[u], rows, n_rows) for u in UNITS},
            {u: spread(self.counts[u], rows, n_rows) for u in UNITS},
            spread(self.n_states, rows, n_rows),
            spread(self.n_nonfinite, rows, n_rows),
        )

    def rows(self) -> dict[str, Float64]:
        """Return the mean of each unit per row, NaN where it is undefined."""
        with np.errstate(invalid="ignore"):
            return {u: self.sums[u] / self.counts[u] for u in UNITS}

    def reasons(self) -> dict[str, list[str | None]]:
        """Return why a value of ``rows`` is NaN: ``"empty"``, ``"nonfinite"``, or ``"zero-denominator"``.

        ``alpha_coordstd`` is also without value for want of a calibration: ``"no-calibration"``.
        """
        out: dict[str, list[str | None]] = {}
        for u in UNITS:
            rows = zip(self.counts[u], self.n_states, self.n_nonfinite, self.counts["alpha_abs"], strict=True)
            out[u] = [_reason(u, *(int(x) for x in row)) for row in rows]
        return out


def spread(values: NDArray[Any], rows: NDArray[np.int64], n_rows: int) -> NDArray[Any]:
    """Lay values of some rows out over all rows, zero elsewhere.

    Example:
        >>> spread(np.array([5, 7]), np.array([0, 2]), 4).tolist()
        [5, 0, 7, 0]
    """
    out = np.zeros(n_rows, dtype=values.dtype)
    out[rows] = values
    return out


def _reason(unit: str, count: int, n_states: int, n_nonfinite: int, n_finite: int) -> str | None:
    if count:
        return None
    if not n_states:
        return "empty"
    if not n_finite and n_nonfinite:
        return "nonfinite"
    return "no-calibration" if unit == "alpha_coordstd" else "zero-denominator"


def passport(h: Tensor, u: Tensor, mask: Tensor, site_stats: SiteStats | None = None) -> Passport:
    """Measure an update in every unit over the written states.

    In a half-precision model what is stored differs from h + u; hand in ``_kinds.realised(h, h_new)`` as ``u`` for the
    size that the model really received.

    Args:
        h: States before the write, [batch, pos, dim] (or [batch, pos, slot, dim]), any float dtype.
        u: Update of the same shape.
        mask: Written entries, bool [batch, pos] or [batch, pos, slot].
        site_stats: Calibration of the site; without it ``alpha_coordstd`` is NaN.

    Returns:
        Sums and counts per row.

    Example:
        >>> h, u = torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
        >>> rows = passport(h, u, torch.tensor([[True]])).rows()
        >>> float(rows["alpha_relnorm"][0]), round(float(rows["alpha_cos"][0]), 12)
        (0.75, 0.8)
    """
    h, u = h.detach(), u.detach()
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    mask = (mask if mask.ndim == h.ndim - 1 else mask[..., None].expand(h.shape[:-1])).to(h.device)
    x, v = (h, u) if bool(mask.all()) else (h[mask], u[mask])
    x, v = x.reshape(-1, h.shape[-1]).to(dtype), v.reshape(-1, h.shape[-1]).to(dtype)
    # The device reduces each state to five numbers; the rest is arithmetic on a few float64 on the host.
    table = torch.stack(
        [
            torch.linalg.vector_norm(x, dim=-1),
            torch.linalg.vector_norm(v, dim=-1),
            (x * v).sum(-1),
            mad(x),
            _in_deviations(v, h, mask, site_stats),
        ]
    )
    norm, size, dot, spread, deviations = table.cpu().numpy().astype(np.float64)
    root = h.shape[-1] ** 0.5
    with np.errstate(all="ignore"):
        cosine = _cosine(x, v, norm, size, dot)
        values = np.stack([size / norm, deviations, size / root / (GAUSS_MAD * spread), size / root, cosine])
    finite = np.isfinite(norm + size)
    valid = np.isfinite(values) & finite
    host = mask.cpu().numpy()
    sums = _per_row(np.where(valid, values, 0.0), host)
    counts = _per_row(valid.astype(np.int64), host)
    asked = host.reshape(len(host), -1).sum(1)
    n_nonfinite = asked - _per_row(finite[None].astype(np.int64), host)[0]
    return Passport(dict(zip(UNITS, sums, strict=True)), dict(zip(UNITS, counts, strict=True)), asked, n_nonfinite)


def _in_deviations(v: Tensor, h: Tensor, mask: Tensor, stats: SiteStats | None) -> Tensor:
    """Return RMS_i(u_i/s_i) over the coordinates with s_i > 0, NaN where there is none or no calibration."""
    if stats is None or stats.std is None:
        return torch.full((v.shape[0],), torch.nan, dtype=v.dtype, device=v.device)
    weights = stats.weights(v)
    if weights.ndim > 1:
        weights = weights.expand(h.shape)[mask]
    return torch.linalg.vector_norm(v * weights, dim=-1)


def _cosine(x: Tensor, v: Tensor, norm: Float64, size: Float64, dot: Float64) -> Float64:
    # With r = ‖u‖/‖h‖ and c = h·u/‖h‖² the cosine is (1 + c)/√(1 + 2c + r²): its error is r²·eps, where that of a dot
    # product of h and h + u would be eps and hide small kicks. Near h + u = 0 the root cancels; there h + u is formed.
    r, c = size / norm, dot / norm**2
    square = 1 + 2 * c + r**2
    cosine = (1 + c) / np.sqrt(square)
    ill = np.flatnonzero(~(square > 1e-2 * (1 + r**2)))
    if ill.size:
        a = x[torch.from_numpy(ill).to(x.device)].cpu().double().numpy()
        b = a + v[torch.from_numpy(ill).to(v.device)].cpu().double().numpy()
        length = np.linalg.norm(b, axis=-1)
        zero = length <= 16 * torch.finfo(x.dtype).eps * np.maximum(norm[ill], size[ill])
        cosine[ill] = np.where(zero, np.nan, (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * length))
    return np.clip(cosine, -1, 1)


def _per_row(values: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Sum [k, n] values of the selected states into [k, batch]."""
    table = np.zeros((len(values), *mask.shape), dtype=values.dtype)
    table[:, mask] = values
    return table.reshape(*table.shape[:2], -1).sum(-1)
