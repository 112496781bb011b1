"""NumPy in, NumPy out; tensor in, tensor out on its own device.

Signals that a loop watches are computed on the device where the states are, one token at a time; the same functions
read whole stored tables afterwards. They compute in the dtype handed in, but never below float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError

__all__ = ["Floats", "lengths", "opened", "stacked"]

_LOW, _HIGH = 1e-15, 1e15

#: What these functions take: a NumPy array, a torch tensor, or nested lists of numbers.
Floats = Any


def _back_to_numpy(x: torch.Tensor) -> Any:
    return x.numpy()


def _same(x: torch.Tensor) -> Any:
    return x


def opened(x: Floats, name: str) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Return a floating tensor (float32 or better) and the function that gives a result back in the caller's kind."""
    if isinstance(x, torch.Tensor):
        out, back = x.detach(), _same
    else:
        try:
            array = np.asarray(x)
            out = torch.from_numpy(np.array(array, dtype=np.float64) if array.dtype.kind in "iub" else array.copy())
        except (TypeError, ValueError) as error:
            raise MetricError(f"{name} takes real numbers; the input could not be read: {error}.") from None
        back = _back_to_numpy
    if out.is_complex():
        raise MetricError(f"{name} takes real numbers, found {out.dtype}.")
    if not out.is_floating_point():
        out = out.double()
    return (out.float() if out.dtype in (torch.float16, torch.bfloat16) else out), back


def lengths(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norms over the last axis in float64; NaN for a state that is zero, subnormal, or not finite.

    Squares of float32 leave their range long before the states do: where a norm is suspiciously large or small, and on
    devices where looking would mean waiting, the sum is made in float64.
    """
    norm = torch.linalg.vector_norm(x, dim=-1)
    if x.dtype == torch.float32 and (x.device.type != "cpu" or not _within(norm)):
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    norm, least = norm.double(), float(torch.finfo(x.dtype).tiny)
    # beyond these the callers' 1/norm is not a number of this type, and an angle of zeros or infinities would be one
    return torch.where((norm >= least) & (norm <= 1.0 / least), norm, torch.nan)


def _within(norm: torch.Tensor) -> bool:
    if not norm.numel():
        return True
    low, high = torch.aminmax(norm)  # NaN where there is one, which is not within
    return float(low) > _LOW and float(high) < _HIGH


def stacked(states: Any, name: str) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Read states [depth, …, dim], or one tensor [..., dim] per depth."""
    if isinstance(states, Sequence) and len(states) and all(isinstance(s, torch.Tensor) for s in states):
        states = torch.stack([s.detach().to(states[0].device) for s in states])
    out, back = opened(states, name)
    if out.ndim < 2:
        raise MetricError(f"{name} takes states [depth, …, dim], found shape {list(out.shape)}.")
    return out, back
