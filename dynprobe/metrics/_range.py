"""Numbers whose squares leave the range of float64, brought back by an exact power of two.

A norm of 1e200 is a number, its square is not: a quotient of two such norms would be NaN, a clipped one 1, a sum of
squares of 1e-200 plainly 0. Multiplying by a power of two rounds nothing, so what does not depend on a common factor is
computed on the scaled numbers, and what does is scaled back. Numbers that are in range are left as they are, bit for
bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynprobe.metrics._result import Array, Bools

__all__ = ["HIGH", "LOW", "in_range", "levelled", "scaled_inputs"]

#: Largest entries between these are squared and summed without a thought.
LOW, HIGH = 1e-100, 1e100


def _exponent(*arrays: Array) -> int:
    """Binary exponent of the largest finite entry, 0 where it is in range or there is none."""
    top = 0.0
    for x in arrays:
        size = np.abs(x)
        top = max(top, float(np.max(size, initial=0.0, where=np.isfinite(size))))
    return 0 if top == 0 or LOW < top < HIGH else int(np.frexp(top)[1])


def in_range(*arrays: Array) -> tuple[Array, ...]:
    """The arrays divided by one power of two, such that the largest finite entry is in [½, 1), where it is extreme.

    Example:
        >>> import numpy as np
        >>> in_range(np.array([2.0**700, 2.0**699]))[0].tolist(), in_range(np.array([3.0]))[0].tolist()
        ([0.5, 0.25], [3.0])
    """
    exponent = _exponent(*arrays)
    return arrays if not exponent else tuple(np.ldexp(x, -exponent) for x in arrays)


def levelled(x: Array, ok: Bools) -> tuple[Array, Any]:
    """Rows of non-negative numbers that can be squared and summed, and the powers of two they were divided by.

    Args:
        x: […, n].
        ok: The entries that count, same shape.

    Returns:
        ``x`` itself and 0 where everything that counts is in range; else ``x / 2^e`` and the e […] of each row.

    Example:
        >>> import numpy as np
        >>> x, e = levelled(np.array([[3e200, 4e200, 9.0]]), np.array([[True, True, False]]))
        >>> bool(np.isclose(np.ldexp(np.sqrt((x[:, :2] ** 2).sum(-1)), e)[0], 5e200, rtol=1e-12))
        True
    """
    size = np.where(ok, np.abs(x), 0.0)
    seen = size[(size > 0) & np.isfinite(size)]
    if not seen.size or (seen.min() > LOW and seen.max() < HIGH):
        return x, 0
    top = np.max(size, axis=-1, initial=0.0, where=np.isfinite(size))
    exponent = np.where(top > 0, np.frexp(top)[1], 0)
    return np.ldexp(x, -exponent[..., None]), exponent


def scaled_inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs of a metric that ignores a common factor: as they are, or all divided by one power of two.

    Only float64 can hold what float64 cannot square, so everything else passes untouched.
    """
    pieces = [list(x) if isinstance(x, (list, tuple)) else [x] for x in inputs]
    arrays = [a for group in pieces for a in group]
    if not all(isinstance(a, (np.ndarray, torch.Tensor)) for a in arrays):
        return inputs
    if not any(a.dtype in (np.float64, torch.float64) for a in arrays):
        return inputs
    plain = [a.detach().cpu().double().numpy() if isinstance(a, torch.Tensor) else a for a in arrays]
    if any(a.dtype.kind != "f" for a in plain):
        return inputs
    exponent = _exponent(*plain)
    if not exponent:
        return inputs
    scaled = iter(np.ldexp(a.astype(np.float64), -exponent) for a in plain)
    return tuple([next(scaled) for _ in x] if isinstance(x, (list, tuple)) else next(scaled) for x in inputs)
