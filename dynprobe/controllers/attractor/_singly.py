"""The attractor rule with writes after every token: one lean step per token, all rows at once.

The same rule as that of chunks with ``commit_every = 1``, which tests hold it to, written so that a step is a few dozen
small operations: this is what runs at every token that a model writes, and it may not be felt beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynprobe.controllers._controller import Memory
from dynprobe.controllers.attractor._settings import Settings
from dynprobe.controllers.attractor._slots import CLOCKS, burnt_in, centre_of, delta_of, read_slots, unit_of

__all__ = ["pass_singly"]


def pass_singly(
    state: Memory, x: Tensor, size: Tensor, ok: Tensor, settings: Settings, mean: Tensor | None, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Let tokens pass one after the other; ``state`` is changed.

    Args:
        state: From :func:`empty_state`.
        x: ``[rows, columns, dim]``, float32.
        size: Their lengths ``[rows, columns]``.
        ok: Tokens that exist ``[rows, columns]``.
        settings: The layer's.
        mean: What is subtracted before directions are compared ``[dim]``.
        theta: Cosine of a hit.

    Returns:
        Field ``[rows, columns, dim]``, gain and Σ w ``[rows, columns]``.
    """
    centre = centre_of(state, x, ok, settings, mean)
    unit = unit_of(x - centre).nan_to_num(0.0)
    rows, columns, _ = x.shape
    row, slots = torch.arange(rows, device=x.device), torch.arange(settings.slots, device=x.device)
    fields, gains, weights = [], [], []
    for t in range(columns):
        u, there, n = unit[:, t], ok[:, t], state["n"]
        c = state["s"] * torch.exp2((state["stamp"] - n[:, None]).double() / settings.half_life)
        live = c >= settings.s_min
        c = c * live
        cos = (state["A"] @ u[..., None])[..., 0]
        f, w = read_slots(state, c[:, None], live[:, None], cos[:, None], settings)
        f, w = f[:, 0], w[:, 0]
        gain = settings.gate * torch.tanh(w / settings.s_ref) * burnt_in(n, c.sum(-1), settings) * there
        fields.append(f)
        gains.append(gain)
        weights.append(w)
        if settings.observe == "post":
            pushed = x[:, t] + delta_of(gain, f, size[:, t], settings)
            u = unit_of(pushed - (centre[:, 0] if centre.shape[1] == 1 else centre[:, t])).nan_to_num(0.0)
            cos = (state["A"] @ u[..., None])[..., 0]
        best, slot = cos.masked_fill(~live, -torch.inf).max(-1)
        _write(state, u, c, best >= theta, slot, there, row, slots, settings)
    return torch.stack(fields, 1), torch.stack(gains, 1), torch.stack(weights, 1)


def _write(
    state: Memory, u: Tensor, c: Tensor, hit: Tensor, slot: Tensor, there: Tensor, row: Tensor, slots: Tensor,
    settings: Settings,
) -> None:  # fmt: skip
    """Reinforce the slot that was hit, or open one, in the rows where the token is there."""
    n = state["n"]
    if settings.evict == "weakest":  # a dead slot has c = 0
        vacant, taken = c.argmin(1), there
    else:
        dead = c == 0
        rank = state["born"].masked_fill(dead, -2)
        vacant = rank.argmin(1)
        taken = there if settings.evict == "oldest" else there & (hit | dead.any(1))
    chosen = torch.where(hit, slot, vacant)
    mark = (slots == chosen[:, None]) & taken[:, None]
    struck = mark & hit[:, None]
    old = state["A"][row, chosen]
    moved = unit_of((1 - settings.rate) * old + settings.rate * u)
    state["A"] = torch.where(mark[..., None], torch.where(hit[:, None], moved, u)[:, None], state["A"])
    risen = (c + 1.0).clamp_max(settings.s_max)
    state["s"] = torch.where(mark, torch.where(hit[:, None], risen, settings.s_new), state["s"])
    state["stamp"] = torch.where(mark, n[:, None] + 1, state["stamp"])
    opened = mark & ~struck
    state["born"] = torch.where(opened, n[:, None], state["born"])
    state["hits"] = (state["hits"] + struck).masked_fill(opened, 0)
    if settings.clocks:
        keep = torch.exp2(-1.0 / torch.tensor(CLOCKS, dtype=torch.float64, device=u.device))
        z = state["z"].masked_fill(opened[..., None], 0.0)
        ticked = z * keep + (1 - keep) * struck[..., None]
        state["z"] = torch.where(there[:, None, None], ticked, z)
    state["n"] = n + there
