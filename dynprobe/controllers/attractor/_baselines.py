"""What an attractor layer is compared with: the same dose at the same tokens, in other directions.

Every baseline runs the layer's own rule beside itself for one thing only, its gain g: so the size of what is injected,
g·ε·‖y‖ (or g·ε), is decided in the same way, and what differs is the direction.

=================  ==================================================================================================
``constant``       one direction for all tokens and rows, drawn once (or given): a steering vector
``random``         the layer's slots under one orthogonal map that was drawn: a memory of nothing
``frozen``         the layer, whose slots stop changing when burn-in is over
``leaky``          an exponential mean of the same states, half-life H (a sliding latent, as in State Stream)
``hopfield``       the layer with the Hopfield read
``fast_weights``   F ← λF + ŷŷᵀ, read as F·ŷ (Ba et al. 2016), λ = 2^{−1/H}
``cache``          a continuous cache on the output (Grave et al. 2017); no state is written
``none``           the layer's rule, nothing injected
=================  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Seen
from dynprobe.controllers.attractor._layer import AttractorSite
from dynprobe.controllers.attractor._rule import pass_tokens
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.probes import Site, Subject
from dynprobe.probes._noise import gaussian

__all__ = ["BASELINES", "Constant", "ContinuousCache", "FastWeights", "Frozen", "Leaky", "RandomSlots", "make_baseline"]


class _Dosed(AttractorSite):
    """The layer's gain with a direction of its own."""

    def act(self, state: Tensor, site: Site, seen: Seen, memory: Memory) -> Tensor:
        """Inject a direction with the layer's dose."""
        if "A" not in memory:
            memory.update(self._fresh(state))
            memory.update({name: value for name, value in self.extra(state).items() if name not in memory})
        y = state.float()
        real = torch.from_numpy(seen.step.positions >= 0).to(state.device)
        real = real & y.isfinite().all(-1) & (y.norm(dim=-1) >= 1e-6)
        with torch.autocast(device_type=state.device.type, enabled=False):
            self.passed = pass_tokens(memory, state, real, self.settings, self.mean, self.theta)
            gain = self.passed.gain
            field = self.field(torch.where(real[..., None], y, 0.0), real, memory)
        size = gain.float() * self.settings.strength
        if self.settings.inject == "relative":
            size = size * y.norm(dim=-1)
        live = real & (gain > 0) & (field.norm(dim=-1) > 0) & (self.settings.strength > 0)
        if not bool(live.any()):
            return state
        return torch.where(live[..., None], (y + size[..., None] * field).to(state.dtype), state)

    def extra(self, state: Tensor) -> Memory:
        """Return what is remembered beside the slots."""
        return {}

    def field(self, y: Tensor, real: Tensor, memory: Memory) -> Tensor:
        """Return a unit direction for every token ``[rows, columns, dim]``, from earlier tokens only; 0 where none."""
        raise NotImplementedError


def _unit(x: Tensor) -> Tensor:
    size = x.norm(dim=-1, keepdim=True)
    return torch.where(size > 1e-12, x / size, 0.0)


class Constant(_Dosed):
    """One direction everywhere."""

    id = "attractor.constant/1"
    direction: Tensor | None = None
    seed = 0

    def field(self, y: Tensor, real: Tensor, memory: Memory) -> Tensor:
        """The direction, drawn from the noise function where none was given."""
        v = self.direction
        if v is None:
            v = torch.from_numpy(gaussian(self.seed, "constant", f"{self.site[0]}.{self.site[1]}", 0, y.shape[-1]))
        return _unit(v.to(y)).expand_as(y)


class RandomSlots(_Dosed):
    """The layer's slots turned by one orthogonal map that was drawn: same weights and mutual angles, no meaning."""

    id = "attractor.random/1"
    seed = 0

    def field(self, y: Tensor, real: Tensor, memory: Memory) -> Tensor:
        """Q·f for a signed permutation Q of the coordinates, since Σ w_m·QA_m = Q·Σ w_m·A_m."""
        assert self.passed is not None
        name, dim = f"{self.site[0]}.{self.site[1]}", y.shape[-1]
        order = np.argsort(gaussian(self.seed, "order", name, 0, dim), kind="stable")
        signs = np.where(gaussian(self.seed, "signs", name, 0, dim) < 0, -1.0, 1.0)
        return self.passed.field[..., torch.from_numpy(order).to(y.device)] * torch.from_numpy(signs).to(y)


class Frozen(AttractorSite):
    """The layer, whose slots stop changing when burn-in is over."""

    id = "attractor.frozen/1"

    def act(self, state: Tensor, site: Site, seen: Seen, memory: Memory) -> Tensor:
        """Pass the tokens; put the slots back as they were at the end of burn-in."""
        if "A" not in memory:
            memory.update(self._fresh(state))
        burn = int(self.settings.burn_in)
        real = torch.from_numpy(seen.step.positions >= 0).to(state.device)
        parts: list[Tensor] = []
        for column in range(state.shape[1]):  # rows reach the end of burn-in at columns of their own
            before = {k: v.clone() for k, v in memory.items()}
            passed = pass_tokens(
                memory,
                state[:, column : column + 1],
                real[:, column : column + 1],
                self.settings,
                self.mean,
                self.theta,
            )
            self.passed = passed
            over = before["n"] >= burn
            for name in ("A", "s", "hits", "born", "z", "mean", "pending", "pending_ok"):
                shape = (-1,) + (1,) * (memory[name].dim() - 1)
                memory[name] = torch.where(over.reshape(shape), before[name], memory[name])
            # Frozen strengths do not decay either: their stamps go along with the tokens.
            moved = memory["n"] - before["n"]
            memory["stamp"] = torch.where(over[:, None], before["stamp"] + moved[:, None], memory["stamp"])
            parts.append(passed.out)
        return torch.cat(parts, 1)


class Leaky(_Dosed):
    """An exponential mean of earlier states."""

    id = "attractor.leaky/1"

    def extra(self, state: Tensor) -> Memory:
        """The mean so far."""
        return {"ema": torch.zeros(len(state), state.shape[-1], device=state.device)}

    def field(self, y: Tensor, real: Tensor, memory: Memory) -> Tensor:
        """unit(e), e ← λe + (1 − λ)y."""
        keep = 2.0 ** (-1.0 / self.settings.half_life)
        ema, out = memory["ema"], torch.zeros_like(y)
        for t in range(y.shape[1]):
            out[:, t] = _unit(ema)
            ema = torch.where(real[:, t, None], keep * ema + (1 - keep) * y[:, t], ema)
        memory["ema"] = ema
        return out


class FastWeights(_Dosed):
    """A matrix of decaying outer products, read by the state itself."""

    id = "attractor.fast_weights/1"

    def extra(self, state: Tensor) -> Memory:
        """The matrix."""
        return {"F": torch.zeros(len(state), state.shape[-1], state.shape[-1], device=state.device)}

    def field(self, y: Tensor, real: Tensor, memory: Memory) -> Tensor:
        """unit(F·ŷ), then F ← λF + ŷŷᵀ; ŷ is centred as in the layer."""
        keep = 2.0 ** (-1.0 / self.settings.half_life)
        F, out = memory["F"], torch.zeros_like(y)
        u = _unit(y if self.mean is None else y - self.mean.to(y))
        for t in range(y.shape[1]):
            now = u[:, t]
            out[:, t] = _unit((F @ now[..., None])[..., 0])
            F = torch.where(real[:, t, None, None], keep * F + now[:, :, None] * now[:, None], F)
        memory["F"] = F
        return out


class ContinuousCache(Controller):
    """p ← (1 − λ)·p + λ·p_cache with p_cache(w) ∝ Σ_i exp(θ·ĥ·ĥ_i)·[x_{i+1} = w] over the tokens so far.

    Args:
        size: Tokens that are remembered.
        theta: Inverse temperature θ; states are taken as unit vectors so that it means the same in every model.
        share: λ.
        burn_in: Tokens before the mixture begins.

    Source:
        Grave, Joulin, Usunier 2017, arXiv:1612.04426.
    """

    id = "attractor.cache/1"
    reads = "layers=last"

    def __init__(self, size: int = 1000, theta: float = 20.0, share: float = 0.2, burn_in: int = 32) -> None:
        if not 0 <= share < 1 or size < 1:
            raise UsageError(f"share={share}, size={size}; a share lies in [0, 1) and the size is at least 1")
        self.size, self.sharpness, self.share, self.burn_in = size, theta, share, burn_in
        self._last: Site = ("resid_post", 0)

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """The last state is looked at; none is written."""
        self._last = ("resid_post", subject.n_layers - 1)
        return [] if writing else [self._last]

    def start(self, n_rows: int) -> Memory:
        """Nothing seen yet."""
        return {
            "keys": torch.zeros(n_rows, 0, 1), "words": torch.zeros(n_rows, 0, dtype=torch.long),
            "there": torch.zeros(n_rows, 0, dtype=torch.bool),
        }  # fmt: skip

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Remember the states; the word that follows a state is known when it is fed."""
        h = _unit(seen.states[self._last].float().flatten(2))
        ids = seen.step.token_ids
        if ids is None:
            raise UsageError("the continuous cache needs token ids, and embeddings were fed")
        keys, words = memory["keys"].to(h.device), memory["words"].to(h.device)
        if keys.shape[-1] != h.shape[-1]:
            keys = h.new_zeros(len(h), 0, h.shape[-1])
        real = torch.from_numpy(seen.step.positions >= 0).to(h.device)
        if words.shape[1]:
            words = torch.cat([words[:, :-1], ids[:, :1].to(h.device)], 1)  # what followed the last state
        following = torch.cat([ids[:, 1:].to(h.device), torch.full((len(h), 1), -1, device=h.device)], 1)
        memory["keys"] = torch.cat([keys, h], 1)[:, -self.size :]
        memory["words"] = torch.cat([words, following], 1)[:, -self.size :]
        memory["there"] = torch.cat([memory["there"].to(h.device), real], 1)[:, -self.size :]

    def choose(self, logits: Tensor, seen: Seen, memory: Memory) -> Tensor:
        """Mix the cache into the distribution of the next token."""
        keys, words = memory["keys"], memory["words"]
        known = memory["there"] & (words >= 0)
        enough = (known.sum(1) >= self.burn_in) & known.any(1)
        if self.share == 0 or not bool(enough.any()):
            return logits
        score = (self.sharpness * (keys @ keys[:, -1:].transpose(1, 2))[..., 0]).masked_fill(~known, -torch.inf)
        weight = torch.softmax(score.where(enough[:, None], 0.0), -1)
        p = torch.softmax(logits[:, -1].float(), -1)
        cache = torch.zeros_like(p).scatter_add(1, words.clamp_min(0), weight.to(p) * known)
        mixed = ((1 - self.share) * p + self.share * cache).clamp_min(1e-38).log()
        out = logits.clone()
        out[:, -1] = torch.where(enough[:, None], mixed.to(logits.dtype), logits[:, -1])
        return out


class _Silent(_Dosed):
    """The layer's rule with nothing injected."""

    id = "attractor.none/1"

    def field(self, y: Tensor, real: Tensor, memory: Memory) -> Tensor:
        """No direction."""
        return torch.zeros_like(y)


#: Name → class that takes what :class:`AttractorSite` takes.
BASELINES: dict[str, Callable[..., AttractorSite]] = {
    "none": _Silent, "constant": Constant, "random": RandomSlots, "frozen": Frozen, "leaky": Leaky,
    "fast_weights": FastWeights,
}  # fmt: skip


def make_baseline(name: str, **arguments: Any) -> Controller:
    """Return a baseline by name; ``hopfield`` and ``layer`` are the layer itself.

    Raises:
        UsageError: If there is no such baseline.
    """
    if name == "cache":
        return ContinuousCache(burn_in=int(arguments["settings"].burn_in))
    if name in ("layer", "hopfield"):
        settings = arguments.pop("settings")
        return AttractorSite(settings.replace(read="hopfield") if name == "hopfield" else settings, **arguments)
    if name not in BASELINES:
        known = ("layer", "hopfield", "cache", *BASELINES)
        raise UsageError(f"unknown baseline {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    return BASELINES[name](**arguments)
