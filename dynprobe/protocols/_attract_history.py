"""The historical layer in a study: written and read one row at a time, with the library's own positions.

It mixes the rows of a batch and counts positions by the length of the cache, which with the leak is not the number of
tokens. So nothing of it may pass through a batch, nor through a loop that hands in positions: this one hands in tokens
and the cache, as the first reports did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynprobe.controllers.attractor import duality_phase2
from dynprobe.errors import ModelError
from dynprobe.probes import Subject, logits_of
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._generate import end_tokens
from dynprobe.protocols._arms import Text

__all__ = ["historical_answer", "historical_logits", "historical_session"]


@contextmanager
def historical_session(subject: Subject, *, leak: bool) -> Iterator[None]:
    """Keep one memory from item to item, as the first reports did without saying so."""
    with duality_phase2(subject, leak=leak):
        yield


def historical_answer(subject: Subject, ids: Sequence[int], n_new: int) -> list[int]:
    """Return what is written after a prompt, greedily, end token included; the layer must be on the model.

    Raises:
        ModelError: If the model takes no cache.
    """
    from transformers import DynamicCache

    if not subject.accepts("past_key_values"):
        raise ModelError(f"{subject.name} takes no cache, which the historical layer is about")
    model: Any = subject.model
    cache, ends, new = DynamicCache(config=model.config), set(end_tokens(subject)), []
    fed = torch.tensor([list(ids)], device=subject.device)
    with torch.no_grad(), evaluating(model):
        for _ in range(n_new):
            logits = logits_of(model(fed, past_key_values=cache, use_cache=True))
            new.append(int(logits[0, -1].argmax()))
            if new[-1] in ends:
                break
            fed = torch.tensor([[new[-1]]], device=subject.device)
    return new


def historical_logits(subject: Subject, texts: Sequence[Text], *, leak: bool) -> Tensor:
    """Return logits ``[text, pos, vocab]`` of texts that are read in one forward each, from an empty memory."""
    longest, rows = max(len(t.fed) for t in texts), []
    with torch.no_grad(), evaluating(subject.model):
        for text in texts:
            with duality_phase2(subject, leak=leak):
                fed = torch.tensor([text.fed], device=subject.device)
                logits = logits_of(subject.model(fed, use_cache=False))
            rows.append(torch.nn.functional.pad(logits, (0, 0, 0, longest - logits.shape[1])))
    return torch.cat(rows)
