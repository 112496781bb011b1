"""The historical ``duality_phase2``: one synthetic key and value in every layer, with and without its cache defect.

This is the version whose generation was reported to collapse while its perplexity stayed flat. It keeps, per layer and
for all rows together, up to 32 unit directions of mean queries; the strongest is offered to every query as one more key
(μ*) and value (σ*·μ*). As published, the pair was joined to keys and values *before* they went into the cache, so that
one synthetic entry per layer was stored with every forward and never left: after n tokens the cache holds 2n entries,
positions that are counted by it advance by two, and a query sees all the synthetic pairs there ever were. A perplexity
run is one forward and has one. ``leak=False`` is the same memory whose pair is offered and not stored.

It lies outside the contract of controllers on purpose: it mixes the rows of a batch, sees padding, and lets a prompt's
tokens know its later ones. What is kept of it is what was read from the code; see ``docs/attractor.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dynprobe.errors import ModelError
from dynprobe.probes import Subject, as_subject

__all__ = ["Phase2", "Phase2Memory", "duality_phase2"]


@dataclass
class Phase2Memory:
    """The attractors of one layer.

    hit:   μ ← unit(m·μ + (1 − m)·p), σ ← min(1, σ + 0.1·(1 − σ)); a hit needs cos(p, μ) > ``threshold``.
    miss:  a new attractor with σ = 0.5, in place of the weakest where there are ``slots``.
    decay: every unused one, every forward: σ ← σ·exp(−decay·forwards since its last use); gone below 0.05. The factor
           itself grows, so after n unused forwards σ has fallen by exp(−decay·n(n + 1)/2): with 0.01 a new attractor
           (σ = 0.5) is gone after 21 and a full one after 24 forwards, not after the 300 that were documented.
    """

    slots: int = 32
    threshold: float = 0.3
    decay: float = 0.01
    momentum: float = 0.9
    directions: list[Tensor] = field(default_factory=list)
    sigma: list[float] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    now: int = 0

    def see(self, p: Tensor) -> float:
        """Take in the mean query direction of one forward; returns its cosine with the best match (−1 for none)."""
        self.now += 1
        cos = [float(p @ mu) for mu in self.directions]
        best = max(range(len(cos)), key=cos.__getitem__, default=None)
        if best is not None and cos[best] > self.threshold:
            self.directions[best] = functional.normalize(
                self.momentum * self.directions[best] + (1 - self.momentum) * p, dim=-1
            )
            self.sigma[best] = min(1.0, self.sigma[best] + 0.1 * (1 - self.sigma[best]))
            self.used[best] = self.now
        elif len(self.directions) < self.slots:
            self.directions.append(p)
            self.sigma.append(0.5)
            self.used.append(self.now)
        else:
            weakest = min(range(self.slots), key=self.sigma.__getitem__)
            self.directions[weakest], self.sigma[weakest], self.used[weakest] = p, 0.5, self.now
        for i, last in enumerate(self.used):
            if last != self.now:
                self.sigma[i] *= math.exp(-self.decay * (self.now - last))
        alive = [i for i, s in enumerate(self.sigma) if s >= 0.05]
        self.directions = [self.directions[i] for i in alive]
        self.sigma, self.used = [self.sigma[i] for i in alive], [self.used[i] for i in alive]
        return -1.0 if best is None else cos[best]

    def strongest(self) -> tuple[Tensor, float] | None:
        """Return μ* and σ*."""
        if not self.sigma:
            return None
        best = max(range(len(self.sigma)), key=self.sigma.__getitem__)
        return self.directions[best], self.sigma[best]


class Phase2(TorchFunctionMode):
    """While it is entered, every softmax attention of the model is offered one more key and value.

    Args:
        n_layers: Attention calls per forward.
        leak: Store the pair in the cache, as published.
        gated: Offer it only where the mean query's best cosine exceeds 0.85.
        settings: Of :class:`Phase2Memory`.

    Attributes:
        memories: One per layer.
        offered: Pairs that were offered so far.
    """

    def __init__(self, n_layers: int, *, leak: bool, gated: bool = False, **settings: Any) -> None:
        super().__init__()
        self.memories = [Phase2Memory(**settings) for _ in range(n_layers)]
        self.leak, self.gated, self.offered = leak, gated, 0
        self.cache: Any = None
        self._call = 0

    def begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        self._call, self.cache = 0, kwargs.get("past_key_values")
        if self.leak and kwargs.get("use_cache", True) and self.cache is None:
            raise ModelError(
                "duality_phase2 with its leak stores into the cache: hand in past_key_values=DynamicCache()"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every other call on."""
        kwargs = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        layer, self._call = self._call, self._call + 1
        if layer >= len(self.memories):
            raise ModelError(f"{layer + 1} attention calls in a forward of {len(self.memories)} layers")
        query = call["query"]
        p = functional.normalize(query.detach().float().mean(dim=(0, 1, 2)), dim=-1)
        memory = self.memories[layer]
        cos = memory.see(p)
        found = memory.strongest()
        if found is None or (self.gated and cos <= 0.85):
            return func(**call)
        mu, sigma = found
        key, value = call["key"], call["value"]
        if value.shape[-1] != mu.shape[-1]:
            raise ModelError("duality_phase2 needs values as wide as queries")
        pair = [(mu * factor).to(key.dtype).expand(*key.shape[:2], 1, -1) for factor in (1.0, sigma)]
        call["attn_mask"] = _opened(call.get("attn_mask"), query, key, bool(call.get("is_causal")))
        call["is_causal"] = False
        call["key"], call["value"] = torch.cat([key, pair[0]], 2), torch.cat([value, pair[1]], 2)
        self.offered += 1
        if self.leak and self.cache is not None:
            held = self.cache.layers[layer]
            rows, heads = held.keys.shape[:2]
            stored = [(mu * factor).to(held.keys.dtype).expand(rows, heads, 1, -1) for factor in (1.0, sigma)]
            held.keys, held.values = torch.cat([held.keys, stored[0]], 2), torch.cat([held.values, stored[1]], 2)
        return func(**call)


def _opened(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The mask with one more column that every query sees."""
    q, k = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or q == 1:
            return None
        mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)[None, None]
    if mask.shape[-1] < k:  # entries that leaked in since the mask was made are seen
        mask = functional.pad(mask, (0, k - mask.shape[-1]), value=mask.dtype == torch.bool)
    return functional.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else 0.0)


@contextmanager
def duality_phase2(model: nn.Module | Subject, *, leak: bool, gated: bool = False, **settings: Any) -> Iterator[Phase2]:
    """Run a model with the historical layer in every attention.

    Args:
        model: A decoder whose attention is ``scaled_dot_product_attention`` (Llama, NeoX, GPT-2 and most others).
        leak: Store the synthetic pairs in the cache, as published.
        gated: Its ``gated`` preset.
        settings: ``slots``, ``threshold``, ``decay``, ``momentum``.

    Yields:
        The mode; ``.memories`` holds each layer's attractors.

    Raises:
        ModelError: If an attention does not go that way.
    """
    subject = as_subject(model)
    implementation = getattr(getattr(subject.model, "config", None), "_attn_implementation", "sdpa")
    if implementation != "sdpa":
        raise ModelError(
            f"{subject.name} computes attention by {implementation!r}; load it with attn_implementation='sdpa'"
        )
    mode = Phase2(subject.n_layers, leak=leak, gated=gated, **settings)
    handle = subject.model.register_forward_pre_hook(mode.begin, with_kwargs=True)
    try:
        with mode:
            yield mode
    finally:
        handle.remove()
