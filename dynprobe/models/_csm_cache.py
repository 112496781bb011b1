"""The decoding state of the CSM-style model: of constant size, whatever the length of the text.

There is no key–value cache, because no position ever looks back at another one. What a next token needs of all tokens
before it are the N leaky memories, and the last few embeddings that the causal convolution still sees. (With
``carry="refined"`` also the last refined state.) The object has the methods that ``generate`` of transformers asks of a
cache. A text cannot be taken back: memories forget, so ``crop`` is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynprobe.errors import ModelError

__all__ = ["CsmCache"]


class CsmCache:
    """Decoding state of a batch.

    Attributes:
        memory: Leaky memories after the last real token ``[batch, slot, dim]``, or None before the first call.
        window: Normalised embeddings of the last real tokens ``[batch, conv_width − 1, hidden]``, zeros before them.
        refined: Refined state of the last real token ``[batch, slot, dim]``; only with ``carry="refined"``.
        seen: Number of real tokens so far ``[batch]``.
        length: Number of columns so far, padding included.

    Example:
        >>> CsmCache().get_seq_length()
        0
    """

    is_compileable = False

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.window: Tensor | None = None
        self.refined: Tensor | None = None
        self.seen: Tensor | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns that were put in, padding included."""
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes of the state; does not grow with the text."""
        held = (self.memory, self.window, self.refined, self.seen)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("memory", "window", "refined", "seen"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of a beam search in a new order."""
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forget everything."""
        self.memory = self.window = self.refined = self.seen = None
        self.length = 0

    def crop(self, max_length: int) -> None:
        """Refused: what a leaky memory has taken up cannot be taken back.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "the decoding state of a CSM-style model cannot be cut back to an earlier token (assisted generation asks "
            "for that). Generate without an assistant, or copy the state with copy.deepcopy before going on."
        )

    def advance(self, columns: int, real: Tensor) -> None:
        """Count the columns of a finished call; ``real`` ``[batch, columns]`` marks those that are no padding."""
        counted = real.sum(1)
        self.seen = counted if self.seen is None else self.seen + counted
        self.length += columns

    def seen_before(self, batch: int, device: torch.device) -> Tensor:
        """Return the number of real tokens of each row so far ``[batch]``."""
        return torch.zeros(batch, dtype=torch.long, device=device) if self.seen is None else self.seen
