"""A decoding loop whose batch shrinks: a row that has ended leaves, and its cache with it.

The library's ``generate`` keeps every row until the last one ends. A sweep decodes rows of many strengths together, and
strong ones end early or late, so here the finished rows are taken out of the batch and out of the cache. The forward,
its masks and its cache are the model's own; only the loop is ours. Whether it gives the library's texts is tried once
per subject on a small batch; where it does not, the library's loop is used.

A row leaves one step after its last token was chosen, so that whoever listens has seen that token fed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes._inputs import Batch
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._last import last_only
from dynprobe.probes._outputs import logits_of
from dynprobe.probes._subject import Subject

__all__ = ["can_shrink", "decode"]

#: Turns scores ``[alive, vocab]`` of the rows that are named into scores to take the arg-max of.
Adjust = Callable[[Tensor, np.ndarray], Tensor]

#: Share of the batch that must have ended before the cache is cut; cutting copies it.
_WORTH_CUTTING = 0.125


def can_shrink(subject: Subject) -> bool:
    """Whether the model's forward takes what the loop hands it."""
    return all(subject.accepts(name) for name in ("past_key_values", "attention_mask", "use_cache"))


def decode(
    subject: Subject,
    batch: Batch,
    n_new: int,
    ends: Sequence[int],
    adjust: Adjust | None = None,
    instrument: Instrument | None = None,
    pad: int = 0,
    forced: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, end token included.

    Args:
        subject: A language model.
        batch: Prompts, padded on the left or all of one length.
        n_new: Most tokens per row.
        ends: Tokens that end a row.
        adjust: Changes the scores before the largest is taken.
        instrument: Told which rows go on.
        pad: Token fed to a row that has ended and not yet left.
        forced: The text of each row, fed token by token instead of what the model would choose; a row ends with it.

    Raises:
        TypeError: If the model returns no cache that rows can be taken out of.
        UsageError: If a text that is given is empty.
    """
    if forced is not None and not all(len(text) for text in forced):
        raise UsageError("a text that is fed token by token has at least one token after its prompt")
    alive = np.arange(len(batch.mask))
    new: list[list[int]] = [[] for _ in alive]
    ended = np.zeros(len(alive), dtype=bool)
    inputs = batch.model_inputs(subject, cache=True)
    mask = inputs["attention_mask"]
    wish, named, placed = last_only(subject), subject.token_argument, subject.accepts("position_ids")
    for step in range(n_new):
        output = subject.model(**inputs, **wish)
        scores = logits_of(output)[:, -1].to(torch.float32, copy=True)
        tokens = (adjust(scores, alive) if adjust is not None else scores).argmax(-1)
        before = ended[alive]
        if forced is not None:
            given = [forced[row][step] if step < len(forced[row]) else pad for row in alive.tolist()]
            tokens = torch.tensor(given, device=scores.device)
        for place, token in enumerate(tokens.tolist()):
            row = int(alive[place])
            if not before[place]:
                new[row].append(token)
                ended[row] = step == len(forced[row]) - 1 if forced is not None else token in ends
        if ended.all() or step == n_new - 1:
            break
        cache: Any = getattr(output, "past_key_values", None)
        if not hasattr(cache, "layers") and not hasattr(cache, "reorder_cache"):
            raise TypeError("the model returns no cache made of layers")
        tokens = torch.where(torch.from_numpy(before).to(tokens.device), pad, tokens)
        kept = np.flatnonzero(~before)
        if len(kept) <= (1 - _WORTH_CUTTING) * len(before):
            index = torch.from_numpy(kept).to(tokens.device)
            if hasattr(cache, "layers"):
                for layer in cache.layers:
                    layer.reorder_cache(index)
            else:
                type(cache).reorder_cache(cache, index)  # the class's: an instance's own tells of beams
            tokens, mask, alive = tokens.index_select(0, index), mask.index_select(0, index), alive[kept]
            if instrument is not None:
                instrument.select(kept)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        inputs = {named: tokens[:, None], "attention_mask": mask, "past_key_values": cache}
        inputs["use_cache"] = True
        if placed:
            inputs["position_ids"] = (mask.sum(1, keepdim=True) - 1).clamp_min(0)
    return new
