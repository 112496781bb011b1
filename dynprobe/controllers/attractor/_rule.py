"""The update rule of the attractor layer: read before write, token by token, or chunk by chunk.

State of each row: unit directions A [M, D], strengths s [M] as they were at the token count ``stamp`` [M], and the
number n of valid tokens seen. Strength is decayed lazily, c = s·2^{−(n − stamp)/H}, so half-lives are exact whatever
the batching. Of a token y with n tokens before it,

    read     w_m = c_m·relu(cos(y, A_m) − θ_r)  (match);  c_m  (field);  softmax_m(β·cos(y, A_m) + log c_m)  (hopfield)
             f = unit(Σ w_m A_m)
    gate     g = gate · tanh(Σ w / s_ref) · [burn-in is over]
    inject   δ = g·ε·‖y‖·f  or  g·ε·f;      y′ = y + δ where g > 0, the very y elsewhere
    write    m* = argmax over live slots of cos(y, A_m);
             hit (cos ≥ θ):  A ← unit((1 − α)A + αŷ),  s ← min(s_max, c + 1),  stamp ← n + 1
             miss:           a dead slot, or the one that gives way:  A ← ŷ,  s ← s₀,  stamp ← n + 1

so that nothing at a token depends on that token or on later ones. With ``commit_every = C`` the reads of C tokens see
the slots as they were at the last multiple of C, and their writes are applied together at its end. Boundaries are token
counts, so prefill and decode agree for every C. Applied together means: each token is matched with the slots as they
were; hits on one slot are added in order, renormalised and capped at s_max once, after the last; a miss that no slot
takes opens one, later misses of the chunk within θ of it reinforce it, and a chunk opens at most M (where nothing may
give way, a miss that finds no dead slot counts as one of them). For C = 1 this is the rule above.

A token that is padding, not finite, or shorter than 1e-6 does not exist: it neither reads nor writes nor counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynprobe.controllers._controller import Memory
from dynprobe.controllers.attractor._chunks import pass_chunks
from dynprobe.controllers.attractor._settings import Settings
from dynprobe.controllers.attractor._singly import pass_singly
from dynprobe.controllers.attractor._slots import delta_of, empty_state, strengths

__all__ = ["Passed", "empty_state", "pass_tokens", "strengths"]

_SHORT = 1e-6


@dataclass(frozen=True)
class Passed:
    """What the tokens of one forward went through, ``[rows, columns]`` each.

    Attributes:
        out: States to use, ``[rows, columns, dim]``; the very tensor that came in where nothing was injected.
        gain: g of each token.
        field: f, ``[rows, columns, dim]``.
        weight: Σ w.
    """

    out: Tensor
    gain: Tensor
    field: Tensor
    weight: Tensor


def pass_tokens(
    state: Memory, y: Tensor, real: Tensor, settings: Settings, mean: Tensor | None, theta: float
) -> Passed:
    """Let tokens pass the layer; ``state`` is changed.

    Args:
        state: From :func:`empty_state`.
        y: ``[rows, columns, dim]``.
        real: Columns that are no padding ``[rows, columns]``.
        settings: The layer's.
        mean: What is subtracted before directions are compared ``[dim]``; None for ``running`` and ``none``.
        theta: Cosine of a hit.
    """
    x = y.float()
    size = x.norm(dim=-1)
    ok = real & size.isfinite() & (size >= _SHORT)
    if settings.slots == 0:
        state["n"] = state["n"] + ok.sum(1)
        none = torch.zeros_like(size, dtype=torch.float64)
        return Passed(y, none, torch.zeros_like(x), none)
    if settings.commit_every == 1:
        field, gain, weight = pass_singly(state, x, size, ok, settings, mean, theta)
        return _pushed(y, x, size, field, gain, weight, settings)
    if bool(ok.all()):
        field, gain, weight = pass_chunks(state, x, size, ok.sum(1), settings, mean, theta)
        return _pushed(y, x, size, field, gain, weight, settings)
    row = torch.arange(len(y), device=y.device)[:, None]
    order = torch.argsort((~ok).to(torch.uint8), dim=1, stable=True)  # the tokens that exist first, in their order
    first = x[row, order].nan_to_num(0.0)
    read = pass_chunks(state, first, size[row, order], ok.sum(1), settings, mean, theta)
    back = torch.argsort(order, dim=1)
    field, gain, weight = (part[row, back] for part in read)
    return _pushed(y, x, size, field, gain, weight, settings)


def _pushed(
    y: Tensor, x: Tensor, size: Tensor, field: Tensor, gain: Tensor, weight: Tensor, settings: Settings
) -> Passed:
    """Inject what was read."""
    if settings.idle or not bool((gain > 0).any()):
        return Passed(y, gain, field, weight)
    pushed = (x + delta_of(gain, field, size, settings)).to(y.dtype)
    return Passed(torch.where((gain > 0)[..., None], pushed, y), gain, field, weight)
