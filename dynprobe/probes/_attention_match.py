"""Which row of which matrix made a number: matching what modules give out with what attention takes in.

A projection hands its outputs on in some order, split into heads, perhaps through a norm. Over sixteen different tokens
each output is a vector of sixteen numbers, and a copy of it is found by looking for it; a copy that could be two things
is none. Nothing here knows a layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "ROWS", "NoWeightsError", "Pass", "columns_of", "deviation", "matrix_of", "moves", "rows_of", "same", "tolerance",
]  # fmt: skip

#: Rows of the scouting forward: coordinates are told apart by so many numbers.
ROWS = 16


class NoWeightsError(Exception):
    """Carries the reason why the weights of a layer were not found."""


@dataclass(eq=False)
class Pass:
    """One call of a module with one tensor in and one out, as they were at that moment."""

    path: str
    module: nn.Module
    taken: Tensor
    given: Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative deviation up to which recomputed counts as equal: 1e-4, more for half precision."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def matrix_of(p: Pass) -> tuple[Tensor, Tensor | None] | None:
    """Return the matrix ``[out, in]`` and bias that map a module's input to its output, or None where none do."""
    weight, bias = getattr(p.module, "weight", None), getattr(p.module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    n_in, n_out = p.taken.shape[-1], p.given.shape[-1]
    for matrix in (weight.detach(), weight.detach().T):
        if matrix.shape != (n_out, n_in):
            continue
        made = nn.functional.linear(p.taken, matrix.to(p.taken.dtype), None if bias is None else bias.to(p.taken.dtype))
        if deviation(made, p.given) <= tolerance(p.given.dtype):
            return matrix, None if bias is None else bias.detach()
    return None


def deviation(a: Tensor, b: Tensor) -> float:
    """Return the largest |a − b| over the largest |b|."""
    top = float(b.abs().max())
    gap = float((a.to(b.dtype) - b).abs().max())
    return gap / top if top > 0 else (0.0 if gap == 0 else float("inf"))


def moves(p: Pass) -> bool:
    """Whether a module changes its input."""
    return not torch.equal(p.taken, p.given)


def rows_of(
    name: str, heads: Tensor, made: Tensor, rows: Tensor, norms: Sequence[Pass]
) -> tuple[Tensor, Tensor | None]:
    """Rows that give the coordinates of all heads at position 0; and, where they pass a norm, its result at 1."""
    wanted = heads[:, :, 0].flatten(1)
    index = _match(wanted, made[:, 0], rows)
    if index is not None:
        return index, None
    for norm in norms:
        for taken, given in zip(_by_position(norm.taken), _by_position(norm.given), strict=True):
            through = _match(wanted, given[:, 0])
            index = None if through is None else _match(taken[:, 0][:, through], made[:, 0], rows)
            if index is not None and through is not None:
                return index, given[:, 1][:, through]
    raise NoWeightsError(
        f"the {name} coordinates at position 0 are not the outputs of matrices that read the layer's input, nor of one "
        "norm on them"
    )


def _by_position(t: Tensor) -> list[Tensor]:
    """``[row, position, coordinate]`` of a tensor whose position axis may come before or after the heads."""
    out = []
    if t.dim() >= 3 and t.shape[1] == 2:
        out.append(t.flatten(2))
    if t.dim() == 4 and t.shape[2] == 2:
        out.append(t.transpose(1, 2).flatten(2))
    return out


def _match(wanted: Tensor, offered: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """For each column of ``wanted [row, n]`` the one column of ``offered [row, m]`` that it is a copy of, or None.

    Several candidates are one where the ``rows`` of weights behind them are equal, as they are under tied weights.
    """
    if wanted.shape[0] != offered.shape[0] or not offered.shape[1]:
        return None
    a, b = wanted.T.double(), offered.T.double()
    found = []
    for part in a.split(256):
        distance = torch.cdist(part, b, p=float("inf"))
        nearest, which = distance.min(1)
        # A copy is exact or nearly so.
        if bool((nearest > 8 * torch.finfo(wanted.dtype).eps * part.abs().amax(1)).any()):
            return None
        candidates = distance <= 4 * nearest[:, None]
        for i in (candidates.sum(1) > 1).nonzero()[:, 0].tolist():
            if rows is None or not bool((rows[candidates[i]] == rows[which[i]]).all()):
                return None
        found.append(which)
    return torch.cat(found)


def columns_of(given: Tensor, ender: Pass, matrix: Tensor) -> Tensor:
    """Columns of the last matrix that meet the coordinates of all heads, ``[head, dv, dim]``."""
    heads, width = given.shape[1], given.shape[3]
    if matrix.shape[1] != heads * width:
        raise NoWeightsError(f"the last matrix reads {matrix.shape[1]} numbers and the heads give {heads * width}")
    merged = given.transpose(1, 2).flatten(2).flatten(0, 1)
    index = _match(merged, ender.taken.reshape(2 * ROWS, -1))
    if index is None:
        raise NoWeightsError("the last matrix does not read what attention returns (a gate or norm stands between)")
    return matrix.T[index].unflatten(0, (heads, width))
