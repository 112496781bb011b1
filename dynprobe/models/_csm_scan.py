"""The linear recurrence y_t = a_t·y_{t−1} + u_t over positions, and its derivatives.

This is the only place of the CSM-style model where information crosses positions. Two roads to the same numbers up to
rounding: a plain loop, cheapest on a CPU because each step touches its data once, and Hillis–Steele doubling in log₂ S
passes, for accelerators, where a loop is bound by its launches. Both compute position t from positions ≤ t alone, in an
order that does not depend on what follows, so causality holds bit for bit.

The derivative of a linear recurrence is the same recurrence run backwards (reverse mode) or again (forward mode).
Writing both down keeps the memory of training at one copy of y instead of one per pass, and lets tangents flow through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_scan"]

_LOOP_UP_TO = 128


def linear_scan(a: Tensor, u: Tensor) -> Tensor:
    """Run y_t = a_t·y_{t−1} + u_t from y_{−1} = 0.

    Args:
        a: Decay ``[batch, pos, slot, 1]``, in [0, 1].
        u: Input ``[batch, pos, slot, dim]``. A start y_{−1} ≠ 0 enters as ``a[:, 0] * y`` added to ``u[:, 0]``.

    Returns:
        y ``[batch, pos, slot, dim]``.

    Example:
        >>> import torch
        >>> linear_scan(torch.full((1, 3, 1, 1), 0.5), torch.ones(1, 3, 1, 1)).flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    y: Tensor = _LinearScan.apply(a, u)
    return y


def _loop(a: Tensor, u: Tensor) -> Tensor:
    out = torch.empty_like(u)
    if u.shape[1]:
        out[:, 0] = u[:, 0]
    for t in range(1, u.shape[1]):
        torch.addcmul(u[:, t], a[:, t], out[:, t - 1], out=out[:, t])
    return out


def _doubling(a: Tensor, u: Tensor) -> Tensor:
    shift = 1
    while shift < u.shape[1]:
        u = torch.cat([u[:, :shift], u[:, shift:] + a[:, shift:] * u[:, :-shift]], dim=1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], dim=1)
        shift *= 2
    return u


def _scan(a: Tensor, u: Tensor) -> Tensor:
    loop = u.device.type == "cpu" or u.shape[1] <= _LOOP_UP_TO
    return _loop(a, u) if loop else _doubling(a, u)


def _before(y: Tensor) -> Tensor:
    """y_{t−1}, zero at t = 0."""
    return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, u: Tensor) -> Tensor:
        return _scan(a, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        a, y = ctx.saved_tensors
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
        total = linear_scan(later.flip(1), grad.flip(1)).flip(1)
        to_a = (total * _before(y)).sum(-1, keepdim=True) if ctx.needs_input_grad[0] else None
        return to_a, total

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, du: Tensor | None) -> Tensor:
        a, y = ctx.saved_tensors
        source = torch.zeros_like(y) if du is None else du
        if da is not None:
            source = source + da * _before(y)
        return linear_scan(a, source)
