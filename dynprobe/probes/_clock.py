"""Know, in every forward, which absolute position each column of each row is.

Hooks see ``[batch, columns, dim]`` and nothing else; in decoding the columns shrink to one. The clock listens to the
calls of the root module and keeps, for the current sequence, how many real tokens each row has had. So a write at
``positions=5`` means the same token in a padded batch, alone, in prefill and in decode.

A forward continues the current sequence when it brings back the very cache the previous one used or returned (or, from
models without one, a mask that has grown by its columns); anything else starts a new sequence. A sequence's prompt is
its first forward. A cache that was shortened in between (assisted decoding) is refused: its columns were taken back.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, UsageError
from dynprobe.probes._noise import row_key_from_tokens

__all__ = ["CACHES", "Clock", "Step"]

#: Names under which models take and return what they keep of earlier tokens.
CACHES = ("past_key_values", "cache_params", "state", "past_buckets_states")


@dataclass(frozen=True)
class Step:
    """One forward of the root module.

    Attributes:
        index: Number of forwards since the sequence began (0 = prefill).
        positions: Absolute 0-based position among real tokens, ``[batch, columns]``; −1 marks padding.
        n_prompt: Real tokens of each row's prompt, ``[batch]``.
        row_keys: The name each row's noise is drawn under.
        token_ids: ``[batch, columns]`` on the CPU, or None when embeddings were fed.
        rows: Which rows of the sequence's first forward this one carries, ``[batch]``; None where none has left.
    """

    index: int
    positions: np.ndarray
    n_prompt: np.ndarray
    row_keys: tuple[str, ...]
    token_ids: Tensor | None
    rows: np.ndarray | None = None

    def take(self, chosen: np.ndarray, rows: np.ndarray | None = None) -> Step:
        """Return the step as some of its rows see it; ``rows`` is what they are called then."""
        ids = None if self.token_ids is None else self.token_ids[torch.from_numpy(chosen)]
        keys = tuple(self.row_keys[i] for i in chosen)
        return Step(self.index, self.positions[chosen], self.n_prompt[chosen], keys, ids, rows)


class Clock:
    """Follow the calls of one root module and name positions.

    Args:
        model: The root module.
        row_keys: Names of the rows; None hashes each row's first real tokens.
        n_prompt: Length of each row's prompt where a forward carries more than the prompt (teacher forcing).
        mask: Real tokens of a first forward ``[batch, columns]``, for models that take no mask themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        row_keys: Sequence[str] | None = None,
        n_prompt: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._given_keys = tuple(row_keys) if row_keys is not None else None
        self._given_prompt = tuple(n_prompt) if n_prompt is not None else None
        self._given_mask = mask
        self._cache: Any = None
        self._seen = np.zeros(0, dtype=np.int64)
        self._width = 0
        self._prompt = np.zeros(0, dtype=np.int64)
        self._keys: tuple[str, ...] = ()
        self._index = -1
        self._rows: np.ndarray | None = None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """Read one call of the root module and return its :class:`Step`.

        Raises:
            ModelError: If positions cannot be named: no input with two axes, a mask of an unknown form, a cache that
                was cut since the last forward.
            UsageError: If the names of the rows do not fit their number.
        """
        call = dict(zip(self._names, args, strict=False)) | kwargs
        source = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        if source is None:  # a model of another convention: its first tensor argument carries batch and positions
            source = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() >= 2), None)
        if source is None:
            raise ModelError("the model was called without a tensor [batch, pos, …]; positions cannot be named")
        batch, columns = int(source.shape[0]), int(source.shape[1])
        token_ids = None
        if source.dim() == 2 and not source.is_floating_point():
            with torch.inference_mode(False):
                token_ids = source.detach().to("cpu", copy=True)
        cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
        held = _held(cache)
        mask = call.get("attention_mask")
        if mask is None and self._given_mask is not None and self._given_mask.shape == (batch, columns):
            mask = self._given_mask
        flat = mask.detach().cpu().numpy().astype(bool) if isinstance(mask, Tensor) and mask.dim() == 2 else None
        real = _real(flat if flat is not None else mask, batch, columns, held or 0)

        if self._continues(batch, columns, cache, held, flat):
            start = self._seen
            self._index += 1
        else:
            start = np.full(batch, held or 0, dtype=np.int64)
            if flat is not None and flat.shape[1] > columns:  # a warm cache, and the mask knows its real tokens
                start = flat[:, :-columns].sum(1)
            self._index = 0
            self._rows = None
            self._width = flat.shape[1] - columns if flat is not None else held or 0
            self._keys = self._name_rows(batch, token_ids, real)
            self._prompt = self._name_prompt(start + real.sum(1))
        positions = np.where(real, start[:, None] + np.cumsum(real, 1) - 1, -1)
        self._seen = start + real.sum(1)
        self._width += columns
        self._cache = cache
        return Step(self._index, positions, self._prompt, self._keys, token_ids, self._rows)

    def end(self, output: Any) -> None:
        """Note the cache that a forward returned; the next one may bring it back."""
        self._cache = next((c for name in CACHES if (c := getattr(output, name, None)) is not None), self._cache)

    def select(self, kept: np.ndarray) -> None:
        """Go on with some of the rows: the others have left the batch, and the cache with them."""
        rows = np.arange(len(self._seen)) if self._rows is None else self._rows
        self._rows = rows[kept]
        self._seen, self._prompt = self._seen[kept], self._prompt[kept]
        self._keys = tuple(self._keys[i] for i in kept)

    def rewind(self, columns: int) -> None:
        """Take back the last columns of every row: one real token each; the cache was cut by as many."""
        self._seen = self._seen - columns
        self._width -= columns
        self._index -= columns

    def release(self) -> None:
        """Let go of the cache; the next forward starts a new sequence."""
        self._cache, self._index = None, -1

    def _continues(self, batch: int, columns: int, cache: Any, held: int | None, flat: np.ndarray | None) -> bool:
        if self._index < 0 or len(self._seen) != batch:
            return False
        if cache is None:
            return flat is not None and columns < flat.shape[1] == self._width + columns
        if cache is not self._cache or held == 0:  # another sequence's, or one that was emptied
            return False
        if held is not None and held != self._width:
            raise ModelError(
                f"the cache holds {held} columns after forwards of {self._width}: it was cut in between, as assisted "
                "decoding does, and positions cannot be named; generate without an assistant"
            )
        return True

    def _name_rows(self, batch: int, token_ids: Tensor | None, real: np.ndarray) -> tuple[str, ...]:
        if self._given_keys is not None:
            times, rest = divmod(batch, len(self._given_keys))
            if rest:
                raise UsageError(
                    f"{len(self._given_keys)} row keys were given and the model was called on {batch} rows"
                )
            return tuple(key for key in self._given_keys for _ in range(times))  # beams and samples share their noise
        if token_ids is None:
            return tuple(f"row-{i}" for i in range(batch))
        return tuple(row_key_from_tokens(token_ids[i][torch.from_numpy(real[i])].tolist()) for i in range(batch))

    def _name_prompt(self, total: np.ndarray) -> np.ndarray:
        if self._given_prompt is None or len(total) % len(self._given_prompt):
            return total
        return np.repeat(np.asarray(self._given_prompt, dtype=np.int64), len(total) // len(self._given_prompt))


def _held(cache: Any) -> int | None:
    """Columns a cache holds; None where it cannot say (a recurrent state), 0 where it is empty."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, TypeError):  # state-space caches know only whether they were used
        try:
            return None if cache.has_previous_state() else 0
        except (AttributeError, ValueError):
            return None


def _real(mask: Any, batch: int, columns: int, held: int) -> np.ndarray:
    """Which of a forward's columns are real tokens, ``[batch, columns]``."""
    if mask is None:
        return np.ones((batch, columns), dtype=bool)
    if isinstance(mask, np.ndarray) and mask.shape[1] >= columns:
        return mask[:, -columns:]
    if isinstance(mask, Mapping):  # one mask per kind of attention, as static caches get it
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] == batch and mask.shape[3] >= columns:
        # A real token sees itself, whatever window the attention has; padding sees nothing of the sort. A cache as
        # long as the window has rolled, so that the newest columns are its last.
        start = min(held, mask.shape[3] - columns)
        seen = mask[:, 0, :, start : start + columns].diagonal(dim1=1, dim2=2).detach().cpu()
        return (seen if seen.dtype == torch.bool else seen > -1.0).numpy()
    shape = tuple(getattr(mask, "shape", ())) or type(mask).__name__
    raise ModelError(
        f"an attention mask {shape} does not say which of {batch} × {columns} columns are real tokens; "
        "pass attention_mask as [batch, pos] of ones and zeros"
    )
