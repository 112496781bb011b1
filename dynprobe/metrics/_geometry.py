"""Norms, angles and validity of hidden states.

Here are the primitives; :mod:`~dynprobe.metrics._walk` applies them to a whole batch.

**Angles** use the chord form ``2·atan2(‖â − b̂‖, ‖â + b̂‖)``. With ``c = b − (‖b‖/‖a‖)·a`` the chord is ``‖c‖/‖b‖``: it
needs one multiply-add instead of two normalised copies. Where the chord is below ``√3.6`` (143°) the antichord follows
from it without loss, ``‖â + b̂‖² = 4 − ‖â − b̂‖²``; above, both are computed from the two states themselves in float64.
So the angle is accurate near 0 and near π, in float32 too. ``arccos`` of a dot product is never used.

**Validity.** A state that is not finite, is zero, or whose norm is below 1e-12 of its depth's median is invalid there.
It is excluded pairwise and counted; it is never replaced.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch

from dynprobe.metrics._reduction import chord_length
from dynprobe.metrics._result import Array, Bools

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_BYTES_DEVICE",
    "NEAR_ZERO",
    "norms",
    "norms_and_validity",
    "pair_angle",
    "validity",
    "workspace",
]

CHUNK_BYTES = 3 << 19  # 1.5 MB: three such blocks stay in a 4 MB second-level cache
CHUNK_BYTES_DEVICE = 1 << 28
FAR = 3.6  # squared chord above which the antichord is recomputed
NEAR_ZERO = 16.0  # times eps times the natural scale
TINY_NORM = 1e-12
TINIEST = float(np.finfo(np.float64).tiny)  # below it 1/norm is no number
_SAFE = {torch.float32: (1e-15, 1e15), torch.float64: (1e-140, 1e140)}


_local = threading.local()


def workspace(slot: str, like: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A reusable buffer of a few megabytes per thread: fresh ones would page-fault on every call.

    Buffers beyond the block size (one row larger than a block, or another device) are allocated as usual.
    """
    shape = like.shape if shape is None else shape
    size = math.prod(shape)
    if like.device.type != "cpu" or size * like.element_size() > 2 * CHUNK_BYTES:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    pool = _local.__dict__.setdefault("pool", {})
    key = (slot, like.dtype)
    if key not in pool:
        # made outside inference mode, so that later calls may write into it whatever mode they run in
        with torch.inference_mode(False):
            pool[key] = torch.empty(2 * CHUNK_BYTES // like.element_size(), dtype=like.dtype)
    flat: torch.Tensor = pool[key]
    return flat[:size].view(tuple(shape))


def _numpy(x: torch.Tensor) -> Array:
    return x.cpu().numpy().astype(np.float64, copy=False)


def norms(x: torch.Tensor) -> Array:
    """Euclidean norm over the last axis in float64; NaN where any component is not finite.

    Rows whose squares leave the range of the arithmetic are redone in float64 with their largest entry factored out.
    """
    out = _numpy(torch.linalg.vector_norm(x, dim=-1))
    low, high = _SAFE[x.dtype]
    odd = ~((out > low) & (out < high))
    if odd.any():
        where = np.nonzero(odd)
        rows = x[tuple(torch.from_numpy(i).to(x.device) for i in where)].double().cpu()
        top = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[0])
        scaled = top * torch.linalg.vector_norm(rows / torch.where(top > 0, top, 1.0)[:, None], dim=-1)
        out[where] = torch.where(torch.isfinite(top), scaled, torch.nan).numpy()
    return out


def validity(norm: Array, real: Bools, keep: Bools) -> Bools:
    """Which units can enter a quotient: finite, non-zero, not below 1e-12 of the median norm of their depth.

    Args:
        norm: [D, B, T], NaN where not finite.
        real: Units that exist, broadcastable to ``norm``.
        keep: Units the median is taken over.
    """
    with np.errstate(invalid="ignore"):
        valid = real & (norm >= TINIEST)
        reference = np.where(keep & np.isfinite(norm), norm, -np.inf)
        top = reference.max(-1, initial=-np.inf)
        if (valid & (norm < TINY_NORM * top[..., None])).any():
            median = np.full(top.shape, -np.inf)
            for where in zip(*np.nonzero(top > -np.inf), strict=True):
                row = reference[where]
                median[where] = np.median(row[row > -np.inf])
            valid &= ~(norm < TINY_NORM * median[..., None])
    return valid


def norms_and_validity(states: Sequence[torch.Tensor], keep: Bools) -> tuple[Array, Bools]:
    """Norms and valid units [D, B, T] of a list of depths; ``keep`` marks the unmasked ones."""
    norm = np.stack([norms(s) for s in states]) if len(states) else np.zeros(keep.shape)
    return norm, validity(norm, keep, keep)


def pair_angle(
    a: torch.Tensor, b: torch.Tensor, norm_a: Array, norm_b: Array, scratch: torch.Tensor | None = None
) -> Array:
    """Angle between the vectors of two tensors along the last axis, in radians; meaningless where a norm is 0 or NaN.

    Args:
        a: First vectors [..., dim].
        b: Second vectors, same shape.
        norm_a: Their norms, float64.
        norm_b: Their norms, float64.
        scratch: Buffer of the same shape, overwritten.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = norm_b / norm_a
        usable = np.isfinite(ratio) & (norm_b > 0)
        ratio = np.where(usable, ratio, 0.0)
        factor = torch.from_numpy(ratio).to(a.device, a.dtype)
        chord = _numpy(chord_length(a, b, factor, scratch)) / norm_b
        low, high = _SAFE[a.dtype]
        extreme = (np.minimum(norm_a, norm_b) < low) | (np.maximum(norm_a, norm_b) > high)
        redo = usable & ((chord * chord > FAR) | extreme | ~np.isfinite(chord))
        theta: Array = 2.0 * np.arcsin(np.minimum(0.5 * chord, 1.0))
    if redo.any():
        where = np.nonzero(redo)
        index = tuple(torch.from_numpy(i).to(a.device) for i in where)
        unit_a, unit_b = _unit64(a[index]), _unit64(b[index])
        theta[where] = 2.0 * np.arctan2(
            torch.linalg.vector_norm(unit_a - unit_b, dim=-1).numpy(),
            torch.linalg.vector_norm(unit_a + unit_b, dim=-1).numpy(),
        )
    return theta


def _unit64(x: torch.Tensor) -> torch.Tensor:
    x = x.double().cpu()
    x = x / x.abs().amax(-1, keepdim=True)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
