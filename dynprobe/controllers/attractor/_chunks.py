"""The attractor rule with writes after every ``commit_every`` tokens: a chunk at a time, all its tokens at once.

A forward costs as many steps as it touches chunks, and each step as much as the tokens that it has there: a prefill
with large chunks is a few matrix products, and a decoded token does not pay for the size of its chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynprobe.controllers._controller import Memory
from dynprobe.controllers.attractor._settings import Settings
from dynprobe.controllers.attractor._slots import (
    CLOCKS,
    burnt_in,
    centre_of,
    delta_of,
    read_slots,
    strengths,
    unit_of,
)

__all__ = ["pass_chunks"]


def pass_chunks(
    state: Memory, x: Tensor, size: Tensor, length: Tensor, settings: Settings, mean: Tensor | None, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return field, gain and Σ w of tokens ``x``, the first ``length`` of each row, chunk by chunk."""
    (rows, columns, dim), C = x.shape, settings.commit_every
    n0, row = state["n"], torch.arange(rows, device=x.device)[:, None]
    centre = centre_of(state, x, torch.arange(columns, device=x.device) < length[:, None], settings, mean)
    unit = unit_of(x - centre)
    field = x.new_zeros(rows, columns + 1, dim)  # the last column takes what is none
    gain, weight = (torch.zeros(rows, columns + 1, dtype=torch.float64, device=x.device) for _ in range(2))
    last = int(((n0 + length - 1).clamp_min(0) // C).max())
    for chunk in range(int((n0 // C).min()), last + 1):
        low = (chunk * C - n0).clamp_min(0)  # places of the chunk's tokens among those of this forward
        high = torch.minimum((chunk + 1) * C - n0, length)
        width = int((high - low).max())
        if width <= 0:
            continue
        at = low[:, None] + torch.arange(width, device=x.device)
        inside = at < high[:, None]
        at = at.clamp_max(columns - 1)
        u = unit[row, at]
        f, w, total = _read(state, u, n0[:, None] + at, settings)
        g = settings.gate * torch.tanh(w / settings.s_ref) * burnt_in(n0[:, None] + at, total, settings)
        g = g.where(inside, 0.0)
        put = at.masked_fill(~inside, columns)
        field[row, put], gain[row, put], weight[row, put] = f, g, w
        if settings.observe == "post":
            pushed = x[row, at] + delta_of(g, f, size[row, at], settings)
            u = unit_of(pushed - (centre if centre.shape[1] == 1 else centre[row, at]))
        if width == C and bool(inside.all()):
            _commit(state, u, inside, (chunk + 1) * C, settings, theta)
            continue
        _keep(state, row, n0[:, None] + at - chunk * C, inside, u)
        end = (chunk + 1) * C  # of rows that were beyond it already, what is kept belongs to a later chunk
        full = (n0 < end) & (n0 + length >= end)
        if bool(full.any()):
            ready = state["pending_ok"] & full[:, None]
            _commit(state, state["pending"], ready, end, settings, theta)
            state["pending_ok"] = state["pending_ok"] & ~full[:, None]
    state["n"] = n0 + length
    return field[:, :-1], gain[:, :-1], weight[:, :-1]


def _keep(state: Memory, row: Tensor, place: Tensor, inside: Tensor, u: Tensor) -> None:
    """Keep tokens of a chunk that has not ended; in place, since the buffer may be far larger than they are."""
    held = state["pending"]
    if held.is_inference() and not torch.is_inference_mode_enabled():
        held = held.clone()
    row = row.expand_as(place)
    held[row[inside], place[inside]] = u[inside]
    ok = state["pending_ok"].clone()
    ok[row[inside], place[inside]] = True
    state["pending"], state["pending_ok"] = held, ok


def _read(state: Memory, u: Tensor, count: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return f ``[rows, C, dim]``, Σ w and Σ c ``[rows, C]`` of tokens with ``count`` tokens before them."""
    c = strengths(state, count, settings.half_life)
    live = c >= settings.s_min
    c = c * live
    f, w = read_slots(state, c, live, u @ state["A"].transpose(1, 2), settings)
    return f, w, c.sum(-1)


def _commit(state: Memory, u: Tensor, ok: Tensor, end: int, settings: Settings, theta: float) -> None:
    """Apply the writes ``u`` of a chunk that ended at token count ``end``, in the rows where they are ``ok``."""
    C = settings.commit_every
    index = torch.arange(end - C, end, device=u.device).expand(len(u), -1)
    c = strengths(state, index, settings.half_life)
    cos = (u @ state["A"].transpose(1, 2)).masked_fill(c < settings.s_min, -torch.inf)
    best, slot = cos.max(-1)
    hit = ok & (best >= theta)
    slots = torch.arange(settings.slots, device=u.device)
    hits = (slot[..., None] == slots) & hit[..., None]
    _reinforce(state, u, index, hits, settings)
    open_ = ok & ~hit
    for _ in range(settings.slots):
        any_open = open_.any(1)
        if not bool(any_open.any()):
            break
        first = open_.to(torch.uint8).argmax(1)
        leader = u[torch.arange(len(u), device=u.device), first][:, None]
        when = index.gather(1, first[:, None])
        chosen, found = _vacancy(state, when, settings)
        new = any_open & found
        mark = (chosen[:, None] == slots) & new[:, None]
        state["A"] = torch.where(mark[..., None], leader, state["A"])
        state["s"] = torch.where(mark, settings.s_new, state["s"])
        state["stamp"] = torch.where(mark, when + 1, state["stamp"])
        state["born"] = torch.where(mark, when, state["born"])
        state["hits"] = torch.where(mark, 0, state["hits"])
        state["z"] = torch.where(mark[..., None], 0.0, state["z"])
        open_ = open_ & (torch.arange(C, device=u.device) != first[:, None]) & any_open[:, None]
        near = open_ & new[:, None] & ((u @ leader.transpose(1, 2))[..., 0] >= theta)
        follow = near[..., None] & mark[:, None]
        _reinforce(state, u, index, follow, settings)
        hits = (hits & ~mark[:, None]) | follow
        open_ = open_ & ~near
    if settings.clocks:
        _tick(state, hits, ok)


def _vacancy(state: Memory, when: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The slot that a new direction gets in each row, and whether there is one."""
    c = strengths(state, when[:, 0], settings.half_life)
    dead = c < settings.s_min
    if settings.evict == "none":
        return dead.to(torch.uint8).argmax(1), dead.any(1)
    rank = c if settings.evict == "weakest" else state["born"].double()
    rank = torch.where(dead, -torch.inf, rank)
    return rank.argmin(1), torch.ones_like(dead.any(1))


def _reinforce(state: Memory, u: Tensor, index: Tensor, hit: Tensor, settings: Settings) -> None:
    """Add hits ``[rows, C, M]`` to their slots, in the order of the tokens."""
    times = hit.sum(1)
    any_hit = times > 0
    if not bool(any_hit.any()):
        return
    order = hit.cumsum(1)  # 1 for the first hit of a slot
    last = torch.where(hit, index[..., None], -1).amax(1)
    # A token that hits a slot does not decay it: of the tokens between two hits only those without one do.
    quiet = (last[:, None] - index[..., None]) - (times[:, None] - order)
    added = torch.where(hit, torch.exp2(-quiet.double() / settings.half_life), 0.0).sum(1)
    rest = (last - state["stamp"]) - (times - 1)
    kept = state["s"] * torch.exp2(-rest.double() / settings.half_life)
    state["s"] = torch.where(any_hit, (kept + added).clamp_max(settings.s_max), state["s"])
    state["stamp"] = torch.where(any_hit, last + 1, state["stamp"])
    state["hits"] = state["hits"] + times
    share = settings.rate * (1 - settings.rate) ** (times[:, None] - order).double()
    moved = torch.where(hit, share, 0.0).float().transpose(1, 2) @ u
    moved = moved + ((1 - settings.rate) ** times.double()).float()[..., None] * state["A"]
    state["A"] = torch.where(any_hit[..., None], unit_of(moved), state["A"])


def _tick(state: Memory, hits: Tensor, ok: Tensor) -> None:
    """Advance the three traces by the tokens of a chunk."""
    half = torch.tensor(CLOCKS, dtype=torch.float64, device=hits.device)
    keep = torch.exp2(-1.0 / half)
    later = ok.sum(1, keepdim=True) - ok.cumsum(1)  # tokens of the chunk that come after each
    weight = (1 - keep) * keep ** later[..., None].double()
    new = torch.einsum("btm,btc->bmc", (hits & ok[..., None]).double(), weight)
    state["z"] = state["z"] * (keep ** ok.sum(1)[:, None].double())[:, None] + new
