"""Reading what the caller hands in: trajectories, token states, series, logits.

Everything becomes a float64 torch tensor on the CPU here, together with the two facts that the conversion would
otherwise lose: the dtype that was handed in, and the rounding unit that "near zero" is measured with (that dtype's
epsilon; float32's for half types, because a half capture is not more trustworthy for being coarse). Nothing is dropped,
cut or reordered. A wrong shape is refused with the declared one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._result import Array, Bools

__all__ = [
    "Series", "Trajectory", "as_array", "as_logits", "as_pair", "as_series", "as_tokens", "as_trajectory", "eps_of",
]  # fmt: skip

_HALF = (torch.float16, torch.bfloat16)


def eps_of(dtype: torch.dtype) -> float:
    """Rounding unit for near-zero tests: the dtype's epsilon, float32's for half types, float64's for integers."""
    if dtype in _HALF:
        dtype = torch.float32
    return float(torch.finfo(dtype).eps) if dtype.is_floating_point else float(torch.finfo(torch.float64).eps)


def _tensor(x: Any, metric_id: str) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        out = x.detach().cpu()
    else:
        try:
            array = np.asarray(x)
            if array.dtype.kind in "iub":
                array = array.astype(np.float64)
            out = torch.from_numpy(np.ascontiguousarray(array))
        except (TypeError, ValueError) as error:
            raise MetricError(f"{metric_id} takes real numbers; the input could not be read: {error}.") from None
    if out.is_complex():
        raise MetricError(f"{metric_id} takes real numbers, found {out.dtype}.")
    return out if out.is_floating_point() else out.double()


def as_array(x: Any, metric_id: str) -> tuple[Array, torch.dtype]:
    """Read an array of any shape as float64, beside the dtype that was handed in."""
    whole = _tensor(x, metric_id)
    return whole.double().numpy(), whole.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mask(mask: Any, shape: tuple[int, ...], metric_id: str, also: tuple[int, ...] | None = None) -> Bools:
    if mask is None:
        return np.ones(shape, dtype=bool)
    array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    array = array.astype(bool)
    if also is not None and array.shape == also:
        array = np.broadcast_to(array, shape)
    if array.shape != shape:
        wanted = f"{list(shape)}" + (f" or {list(also)}" if also is not None else "")
        raise MetricError(f"{metric_id}: the mask has shape {list(array.shape)}, expected {wanted} (True = valid).")
    return array


@dataclass
class Trajectory:
    """One trajectory as a batch of one: D tensors [1, unit, dim] and the mask [D, 1, unit]."""

    states: list[torch.Tensor]
    keep: Bools
    eps: float
    dtype: str


def as_trajectory(x: Any, mask: Any, metric_id: str, ragged: bool = False) -> Trajectory:
    """Read ``trajectory[depth, unit, dim]``; a list of [unit, dim_l] arrays too, with different dims if allowed.

    Args:
        x: Array of three axes, or a sequence with one array of two axes per depth.
        mask: None, or bool [depth, unit] or [unit]; True = valid.
        metric_id: For messages.
        ragged: Whether depths may differ in dim.
    """
    pieces: list[torch.Tensor]
    if isinstance(x, Sequence) and len(x) and all(isinstance(p, (np.ndarray, torch.Tensor)) and p.ndim == 2 for p in x):
        pieces = [_tensor(p, metric_id) for p in x]
    else:
        whole = _tensor(x, metric_id)
        if whole.ndim != 3:
            raise MetricError(
                f"{metric_id} takes trajectory[depth, unit, dim], found {whole.ndim} axes {list(whole.shape)}. "
                "For one unit write X[:, None, :]; for a batch call it per row or use dynprobe.metrics.measure."
            )
        pieces = list(whole)
        if not pieces:
            return Trajectory([], np.ones((0, 1, whole.shape[1]), bool), eps_of(whole.dtype), _name(whole.dtype))
    n = pieces[0].shape[0]
    if any(p.shape[0] != n for p in pieces):
        raise MetricError(f"{metric_id}: depths have different numbers of units, {[p.shape[0] for p in pieces]}.")
    if not ragged and any(p.shape[1] != pieces[0].shape[1] for p in pieces):
        raise MetricError(f"{metric_id} needs one dim at all depths, found {sorted({p.shape[1] for p in pieces})}.")
    keep = _mask(mask, (len(pieces), n), metric_id, also=(n,))
    coarse = max(pieces, key=lambda p: eps_of(p.dtype)).dtype
    return Trajectory([p.double()[None] for p in pieces], keep[:, None, :], eps_of(coarse), _name(coarse))


def as_pair(inputs: Sequence[Any], mask: Any, metric_id: str) -> tuple[Trajectory, Trajectory]:
    """Read two trajectories of one shape, the clean one first."""
    a, b = (as_trajectory(x, mask, metric_id) for x in inputs)
    if len(a.states) != len(b.states) or any(p.shape != q.shape for p, q in zip(a.states, b.states, strict=True)):
        raise MetricError(f"{metric_id} needs two trajectories of one shape, clean first.")
    return a, b


def as_tokens(x: Any, mask: Any, metric_id: str) -> Trajectory:
    """Read ``tokens[pos, dim]`` as a trajectory of one depth."""
    whole = _tensor(x, metric_id)
    if whole.ndim != 2:
        raise MetricError(f"{metric_id} takes tokens[pos, dim], found {whole.ndim} axes {list(whole.shape)}.")
    keep = _mask(mask, (whole.shape[0],), metric_id)
    return Trajectory([whole.double()[None]], keep[None, None, :], eps_of(whole.dtype), _name(whole.dtype))


@dataclass
class Series:
    """One series as a batch of one: values [1, T], validity and mask of the same shape."""

    values: Array
    ok: Bools
    keep: Bools
    dtype: str


def as_series(x: Any, mask: Any, metric_id: str) -> Series:
    """Read ``series[T]``; non-finite values count as invalid."""
    whole = _tensor(x, metric_id)
    if whole.ndim != 1:
        raise MetricError(
            f"{metric_id} takes a series[T], found {whole.ndim} axes {list(whole.shape)}. "
            "From states: compute('limen.ct/1', tokens).series is one."
        )
    keep = _mask(mask, (whole.shape[0],), metric_id)
    values = whole.double().numpy()[None]
    return Series(values, np.isfinite(values) & keep[None], keep[None], _name(whole.dtype))


def as_logits(x: Any, metric_id: str, axes: int = 2) -> torch.Tensor:
    """Read ``logits[pos, vocab]`` (or with a leading depth axis) as float64."""
    whole = _tensor(x, metric_id)
    if whole.ndim != axes:
        shape = "logits[pos, vocab]" if axes == 2 else "logits[depth, pos, vocab]"
        raise MetricError(f"{metric_id} takes {shape}, found {whole.ndim} axes {list(whole.shape)}.")
    if not whole.shape[-1]:
        raise MetricError(f"{metric_id} takes logits over a vocabulary, found none: {list(whole.shape)}.")
    return whole
