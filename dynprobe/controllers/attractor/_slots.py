"""State of an attractor layer, and the small steps that both ways of passing tokens share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynprobe.controllers._controller import Memory
from dynprobe.controllers.attractor._settings import Settings

__all__ = ["CLOCKS", "burnt_in", "centre_of", "delta_of", "empty_state", "read_slots", "strengths", "unit_of"]

#: Half-lives of the three traces, in tokens.
CLOCKS = (10.0, 100.0, 1000.0)
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


def unit_of(x: Tensor) -> Tensor:
    """Vectors of length 1; 0 where there is no direction."""
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size > _ZERO, x / size, 0.0)


def delta_of(gain: Tensor, field: Tensor, size: Tensor, settings: Settings) -> Tensor:
    """δ = g·ε·‖y‖·f, or g·ε·f."""
    scale = gain.float() * settings.strength
    return (scale * size if settings.inject == "relative" else scale)[..., None] * field


def centre_of(state: Memory, x: Tensor, ok: Tensor, settings: Settings, mean: Tensor | None) -> Tensor:
    """What is subtracted from each token, ``[1 or rows, 1 or columns, dim]``; a running mean is of earlier tokens."""
    if settings.centring != "running":
        return x.new_zeros(1, 1, 1) if mean is None else mean.to(x)[None, None]
    n0, there = state["n"][:, None].double(), x.double().nan_to_num(0.0) * ok[..., None]
    start = state["mean"].double() * n0
    seen = n0 + ok.cumsum(1) - ok.long()
    running = (start[:, None] + there.cumsum(1) - there) / seen.clamp_min(1.0)[..., None]
    state["mean"] = ((start + there.sum(1)) / (n0 + ok.sum(1, keepdim=True)).clamp_min(1.0)).float()
    return running.float()


def read_slots(state: Memory, c: Tensor, live: Tensor, cos: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return f ``[rows, C, dim]`` and Σ w ``[rows, C]``, given strengths and cosines ``[rows, C, M]``."""
    if settings.read == "field":
        w = c
    elif settings.read == "match":
        w = c * (cos.double() - settings.theta_read).clamp_min(0.0)
    else:
        score = torch.where(live, settings.beta * cos.double() + c.clamp_min(1e-300).log(), -torch.inf)
        w = torch.where(live.any(-1, keepdim=True), torch.softmax(score, -1), 0.0).nan_to_num(0.0)
    if settings.clocks:
        w = w * (state["z"] / (state["z"] + settings.z_ref)).amin(-1)[:, None]
    return unit_of(w.float() @ state["A"]), w.sum(-1)


def burnt_in(count: Tensor, total: Tensor, settings: Settings) -> Tensor:
    """1.0 where burn-in is over, by tokens or by total strength."""
    return ((count if settings.burn == "tokens" else total) >= settings.burn_in).double()
