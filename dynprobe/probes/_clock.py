"""Know, in every forward, which absolute position each column of each row is.

Hooks see ``[batch, columns, dim]`` and nothing else; in decoding the columns shrink to one. The clock listens to the
calls of the root module and keeps, for the current sequence, how many real tokens each row has had. So a write at
``positions=5`` means the same token in a padded batch, alone, in prefill and in decode.

A forward continues the current sequence when it brings back the cache the previous one used, or a mask wider than its
input; anything else starts a new sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.probes._noise import row_key_from_tokens

__all__ = ["Clock", "Step"]

_CACHES = ("past_key_values", "cache_params", "state")


@dataclass(frozen=True)
class Step:
    """One forward of the root module.

    Attributes:
        index: Number of forwards since the sequence began (0 = prefill).
        positions: Absolute 0-based position among real tokens, ``[batch, columns]``; −1 marks padding.
        n_prompt: Real tokens of each row's prompt, ``[batch]``.
        row_keys: The name each row's noise is drawn under.
        token_ids: ``[batch, columns]`` on the CPU, or None when embeddings were fed.
    """

    index: int
    positions: np.ndarray
    n_prompt: np.ndarray
    row_keys: tuple[str, ...]
    token_ids: Tensor | None


class Clock:
    """Follow the calls of one root module and name positions.

    Args:
        model: The root module.
        row_keys: Names of the rows; None hashes each row's first real tokens.
        n_prompt: Length of each row's prompt where a forward carries more than the prompt (teacher forcing).
    """

    def __init__(
        self, model: nn.Module, row_keys: Sequence[str] | None = None, n_prompt: Sequence[int] | None = None
    ) -> None:
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._given_keys = tuple(row_keys) if row_keys is not None else None
        self._given_prompt = np.asarray(n_prompt, dtype=np.int64) if n_prompt is not None else None
        self._cache: Any = None
        self._seen = np.zeros(0, dtype=np.int64)
        self._width = 0
        self._prompt = np.zeros(0, dtype=np.int64)
        self._keys: tuple[str, ...] = ()
        self._index = -1

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """Read one call of the root module and return its :class:`Step`."""
        call = dict(zip(self._names, args, strict=False)) | kwargs
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        source = ids if ids is not None else call.get("inputs_embeds")
        if source is None:  # a model of another convention: its first tensor argument carries batch and positions
            source = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() >= 2), None)
        if source is None:
            raise TypeError("the model was called without a tensor of at least two axes; positions cannot be named")
        batch, columns = int(source.shape[0]), int(source.shape[1])
        token_ids = source.detach().cpu() if source.dim() == 2 and not source.is_floating_point() else None
        cache = next((call[name] for name in _CACHES if call.get(name) is not None), None)
        flat = mask.detach().cpu().numpy().astype(bool) if isinstance(mask, Tensor) and mask.dim() == 2 else None

        known = self._index >= 0 and len(self._seen) == batch
        same_cache = known and cache is not None and (cache is self._cache or self._cache is None) and self._grown(cache)
        wider = flat is not None and flat.shape[1] > columns
        if known and (same_cache or (wider and flat is not None and flat.shape[1] == self._width + columns)):
            real = flat[:, -columns:] if flat is not None and flat.shape[1] >= columns else np.ones((batch, columns), bool)
            start = self._seen
            self._index += 1
        else:
            self._index = 0
            real = flat[:, -columns:] if flat is not None else np.ones((batch, columns), bool)
            start = self._start(flat if wider else None, cache, batch, columns)
            total = start + real.sum(1)
            self._prompt = self._given_prompt if self._given_prompt is not None and len(self._given_prompt) == batch else total
            self._keys = self._name_rows(batch, token_ids, real)
            self._width = int(flat.shape[1] - columns) if flat is not None else 0
        positions = np.where(real, start[:, None] + np.cumsum(real, 1) - 1, -1)
        self._seen = start + real.sum(1)
        self._width += columns
        self._cache = cache
        return Step(self._index, positions, self._prompt, self._keys, token_ids)

    def _start(self, mask: np.ndarray | None, cache: Any, batch: int, columns: int) -> np.ndarray:
        """Real tokens that came before a sequence whose beginning was not seen (a warm cache)."""
        if mask is not None:
            return mask[:, :-columns].sum(1)
        held = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        return np.full(batch, held, np.int64)

    def _grown(self, cache: Any) -> bool:
        """Whether the cache already holds something: an empty one belongs to a new sequence."""
        length = getattr(cache, "get_seq_length", None)
        if length is None:
            return True
        held = int(length())
        return held > 0 or bool(getattr(cache, "has_previous_state", lambda *_: False)())

    def _name_rows(self, batch: int, token_ids: Tensor | None, real: np.ndarray) -> tuple[str, ...]:
        if self._given_keys is not None:
            if len(self._given_keys) == batch:
                return self._given_keys
            if batch % len(self._given_keys) == 0:  # beams or samples of one prompt share its noise
                times = batch // len(self._given_keys)
                return tuple(key for key in self._given_keys for _ in range(times))
            raise ValueError(f"{len(self._given_keys)} row keys were given and the model was called with {batch} rows")
        if token_ids is None:
            return tuple(f"row-{i}" for i in range(batch))
        return tuple(row_key_from_tokens(token_ids[i][torch.from_numpy(real[i])].tolist()) for i in range(batch))
