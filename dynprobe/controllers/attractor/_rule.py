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
were; hits on one slot are added in order, without renormalising in between; a miss that no slot takes opens one, later
misses of the chunk within θ of it reinforce it, and a chunk opens at most M. For C = 1 this is the rule above.

A token that is padding, not finite, or shorter than 1e-6 does not exist: it neither reads nor writes nor counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynprobe.controllers._controller import Memory
from dynprobe.controllers.attractor._settings import Settings

__all__ = ["CLOCKS", "Passed", "empty_state", "pass_tokens", "strengths"]

#: Half-lives of the three traces, in tokens.
CLOCKS = (10.0, 100.0, 1000.0)
_SHORT = 1e-6
_ZERO = 1e-12


def empty_state(rows: int, dim: int, settings: Settings, device: torch.device | str = "cpu") -> Memory:
    """Return the state of rows that have seen nothing."""
    M, C = settings.slots, settings.commit_every
    f32: dict[str, Any] = {"device": device, "dtype": torch.float32}
    f64: dict[str, Any] = {"device": device, "dtype": torch.float64}
    whole: dict[str, Any] = {"device": device, "dtype": torch.long}
    return {
        "A": torch.zeros(rows, M, dim, **f32), "s": torch.zeros(rows, M, **f64),
        "stamp": torch.zeros(rows, M, **whole), "hits": torch.zeros(rows, M, **whole),
        "born": torch.full((rows, M), -1, **whole), "n": torch.zeros(rows, **whole),
        "z": torch.zeros(rows, M, len(CLOCKS), **f64), "mean": torch.zeros(rows, dim, **f32),
        "pending": torch.zeros(rows, C, dim, **f32),
        "pending_ok": torch.zeros(rows, C, device=device, dtype=torch.bool),
    }  # fmt: skip


def strengths(state: Memory, n: Tensor, half_life: float) -> Tensor:
    """Return c_m = s_m·2^{−(n − stamp_m)/H} at token counts n ``[rows, …]``, ``[rows, …, M]`` in float64."""
    s, stamp = state["s"], state["stamp"]
    while s.dim() <= n.dim():
        s, stamp = s.unsqueeze(1), stamp.unsqueeze(1)
    return s * torch.exp2(-(n[..., None] - stamp).double() / half_life)


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
    rows, columns, dim = y.shape
    C = settings.commit_every
    x = y.float()
    size = x.norm(dim=-1)
    ok = real & x.isfinite().all(-1) & (size >= _SHORT)
    order = torch.argsort((~ok).to(torch.uint8), dim=1, stable=True)  # the tokens that exist first, in their order
    length, n0 = ok.sum(1), state["n"]
    x = x.gather(1, order[..., None].expand(-1, -1, dim)).nan_to_num(0.0)
    size = size.gather(1, order)
    centre = _centre(state, x, length, settings, mean)
    unit = _unit(x - centre)
    field, gain = torch.zeros_like(x), size.new_zeros(rows, columns, dtype=torch.float64)
    weight = torch.zeros_like(gain)
    place = torch.arange(C, device=y.device)
    chunks = range(int((n0 // C).min()), int(((n0 + length - 1).clamp_min(0) // C).max()) + 1)
    for chunk in chunks if settings.slots else ():
        at = chunk * C - n0[:, None] + place  # place of each of the chunk's tokens among those of this forward
        inside = (at >= 0) & (at < length[:, None])
        at = at.clamp(0, columns - 1)
        u = unit.gather(1, at[..., None].expand(-1, -1, dim))
        count = (n0[:, None] + at).where(inside, n0[:, None])
        f, w, total = _read(state, u, count, settings)
        g = settings.gate * torch.tanh(w / settings.s_ref) * _burnt_in(count, total, settings)
        g = g.where(inside, 0.0)
        put = at.masked_fill(~inside, columns)  # one column more takes what is none
        gain = _put(gain, put, g)
        weight = _put(weight, put, w)
        field = _put(field, put, f)
        if settings.observe == "post":
            here = x.gather(1, at[..., None].expand(-1, -1, dim))
            length_of = size.gather(1, at)
            pushed = here + _delta(g, f, length_of, settings)
            u = _unit(
                pushed - (centre if centre.shape[1] == 1 else centre.gather(1, at[..., None].expand(-1, -1, dim)))
            )
        state["pending"] = u.where(inside[..., None], state["pending"])
        state["pending_ok"] = state["pending_ok"] | inside
        _commit(state, (chunk + 1) * C, (n0 + length) >= (chunk + 1) * C, settings, theta)
    state["n"] = n0 + length
    return _pushed(y, order, field, gain, weight, size, settings)


def _pushed(
    y: Tensor, order: Tensor, field: Tensor, gain: Tensor, weight: Tensor, size: Tensor, settings: Settings
) -> Passed:
    """Put what was read back where the tokens stand, and inject it."""
    back = torch.argsort(order, dim=1)
    wide = back[..., None].expand_as(field)
    field, gain, weight, size = (
        field.gather(1, wide),
        gain.gather(1, back),
        weight.gather(1, back),
        size.gather(1, back),
    )
    if settings.idle or not bool((gain > 0).any()):
        return Passed(y, gain, field, weight)
    pushed = (y.float() + _delta(gain, field, size, settings)).to(y.dtype)
    return Passed(torch.where((gain > 0)[..., None], pushed, y), gain, field, weight)


def _delta(gain: Tensor, field: Tensor, size: Tensor, settings: Settings) -> Tensor:
    scale = gain.float() * settings.strength
    return (scale * size if settings.inject == "relative" else scale)[..., None] * field


def _put(into: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Scatter along the columns; places beyond the last are dropped."""
    wide = torch.cat([into, into[:, :1]], 1)
    index = place if values.dim() == 2 else place[..., None].expand_as(values)
    return wide.scatter(1, index, values.to(into.dtype))[:, :-1]


def _unit(x: Tensor) -> Tensor:
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size > _ZERO, x / size, 0.0)


def _centre(state: Memory, x: Tensor, length: Tensor, settings: Settings, mean: Tensor | None) -> Tensor:
    """What is subtracted from each token, ``[1 or rows, 1 or columns, dim]``; a running mean is of earlier tokens."""
    if settings.centring != "running":
        return x.new_zeros(1, 1, 1) if mean is None else mean.to(x)[None, None]
    n0 = state["n"][:, None].double()
    before = torch.arange(x.shape[1], device=x.device)[None]
    total = state["mean"].double()[:, None] * n0[..., None] + (x.double().cumsum(1) - x.double())
    seen = n0 + before
    running = (total / seen.clamp_min(1.0)[..., None]).float()
    there = (before < length[:, None])[..., None]
    state["mean"] = (
        (state["mean"].double() * n0 + (x.double() * there).sum(1)) / (n0 + length[:, None]).clamp_min(1.0)
    ).float()
    return running


def _read(state: Memory, u: Tensor, count: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return f ``[rows, C, dim]``, Σ w and Σ c ``[rows, C]`` of tokens with ``count`` tokens before them."""
    c = strengths(state, count, settings.half_life)
    live = c >= settings.s_min
    c = c * live
    cos = (u @ state["A"].transpose(1, 2)).double()
    if settings.read == "field":
        w = c
    elif settings.read == "match":
        w = c * (cos - settings.theta_read).clamp_min(0.0)
    else:
        score = torch.where(live, settings.beta * cos + c.clamp_min(1e-300).log(), -torch.inf)
        w = torch.where(live.any(-1, keepdim=True), torch.softmax(score, -1), 0.0).nan_to_num(0.0)
    if settings.clocks:
        w = w * (state["z"] / (state["z"] + settings.z_ref)).amin(-1)[:, None]
    return _unit(w.float() @ state["A"]), w.sum(-1), c.sum(-1)


def _burnt_in(count: Tensor, total: Tensor, settings: Settings) -> Tensor:
    return ((count if settings.burn == "tokens" else total) >= settings.burn_in).double()


def _commit(state: Memory, end: int, full: Tensor, settings: Settings, theta: float) -> None:
    """Apply the writes of a chunk that ended at token count ``end``, in the rows where it is ``full``."""
    ok = state["pending_ok"] & full[:, None]
    if not bool(ok.any()):
        return
    u, C = state["pending"], settings.commit_every
    index = torch.arange(end - C, end, device=u.device).expand(len(u), -1)
    c = strengths(state, index, settings.half_life)
    cos = (u @ state["A"].transpose(1, 2)).masked_fill(c < settings.s_min, -torch.inf)
    best, slot = cos.max(-1)
    hit = ok & (best >= theta)
    slots = torch.arange(settings.slots, device=u.device)
    _reinforce(state, u, index, (slot[..., None] == slots) & hit[..., None], settings)
    hits = (slot[..., None] == slots) & hit[..., None]
    open_ = ok & ~hit
    for _ in range(settings.slots):
        any_open = open_.any(1)
        if not bool(any_open.any()):
            break
        first = open_.to(torch.uint8).argmax(1)
        leader = u.gather(1, first[:, None, None].expand(-1, 1, u.shape[-1]))
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
        near = open_ & new[:, None] & ((u * leader).sum(-1) >= theta)
        follow = near[..., None] & mark[:, None]
        _reinforce(state, u, index, follow, settings)
        hits = (hits & ~mark[:, None]) | follow
        open_ = open_ & ~near
    if settings.clocks:
        _tick(state, hits, ok)
    state["pending_ok"] = state["pending_ok"] & ~full[:, None]


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
    state["A"] = torch.where(any_hit[..., None], _unit(moved), state["A"])


def _tick(state: Memory, hits: Tensor, ok: Tensor) -> None:
    """Advance the three traces by the tokens of a chunk."""
    half = torch.tensor(CLOCKS, dtype=torch.float64, device=hits.device)
    keep = torch.exp2(-1.0 / half)
    later = ok.sum(1, keepdim=True) - ok.cumsum(1)  # tokens of the chunk that come after each
    weight = (1 - keep) * keep ** later[..., None].double()
    new = torch.einsum("btm,btc->bmc", (hits & ok[..., None]).double(), weight)
    state["z"] = state["z"] * (keep ** ok.sum(1)[:, None].double())[:, None] + new
