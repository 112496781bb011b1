"""The text as windows of ids, and what a model makes of them: losses on held-out text, accuracy on held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _text import kjv_parts
from torch.nn import functional

from dynprobe.models import byte_tokenizer
from dynprobe.prompts import synthetic_item

__all__ = [
    "Corpus",
    "cross_entropy",
    "encode",
    "evaluate",
    "evaluate_depths",
    "load_corpus",
    "snippet_nll",
    "task_accuracy",
]

#: Windows of the reported numbers, evenly spaced over the held-out text.
TEST_WINDOWS, VALID_WINDOWS = 512, 64


@dataclass(frozen=True)
class Corpus:
    """The text as bytes, and the ids of the tokenizer for them."""

    parts: dict[str, bytes]
    ids: dict[str, torch.Tensor]
    windows: dict[str, np.ndarray]


def load_corpus(scratch: Path, database: Path | None = None, length: int = 128) -> Corpus:
    """Read the text, turn it into ids, and lay the windows on which models are judged."""
    parts = kjv_parts(scratch, database)
    ids = {name: encode(text) for name, text in parts.items()}
    windows = {
        name: np.linspace(4, len(parts[name]) - length - 2, count).astype(np.int64)
        for name, count in (("valid", VALID_WINDOWS), ("test", TEST_WINDOWS))
    }
    return Corpus(parts, ids, windows)


def encode(text: bytes) -> torch.Tensor:
    """Return the tokenizer's ids of ASCII bytes."""
    return _id_of_ascii()[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]


@cache
def _id_of_ascii() -> torch.Tensor:
    tokenizer = byte_tokenizer()
    return torch.tensor([tokenizer(chr(code)).input_ids[0] for code in range(128)])


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of predicting ``ids[:, 1:]``, in nats per byte."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, corpus: Corpus, part: str, length: int = 128, **call: Any) -> float:
    """Return the mean negative log likelihood in nats per byte over the windows of a part of the text.

    A window is ``length`` bytes predicted from the bytes before them in the window and one byte in front.
    """
    model.eval()
    losses = []
    for starts in np.array_split(corpus.windows[part], max(1, len(corpus.windows[part]) // 16)):
        ids = torch.stack([corpus.ids[part][at - 1 : at + length] for at in starts.tolist()])
        losses.append((cross_entropy(model(input_ids=ids[:, :-1], use_cache=False, **call).logits, ids), len(ids)))
    model.train()
    return float(sum(float(loss) * n for loss, n in losses) / sum(n for _, n in losses))


@torch.no_grad()
def evaluate_depths(model: Any, corpus: Corpus, part: str, depths: Sequence[int], length: int) -> dict[int, float]:
    """Return the loss of a CSM-style model at several depths from one pass: a run is a prefix of every longer one."""
    losses = dict.fromkeys(depths, 0.0)
    for starts in np.array_split(corpus.windows[part], max(1, len(corpus.windows[part]) // 4)):
        ids = torch.stack([corpus.ids[part][at - 1 : at + length] for at in starts.tolist()])

        def score(k: int, state: torch.Tensor, ids: torch.Tensor = ids, **_: Any) -> None:
            if k in losses:
                losses[k] += float(cross_entropy(model.readout(state), ids)) * len(ids)

        model.model(input_ids=ids[:, :-1], use_cache=False, num_iterations=max(depths), on_iteration=score)
    return {depth: total / len(corpus.windows[part]) for depth, total in losses.items()}


@torch.no_grad()
def snippet_nll(model: Any, text: bytes, length: int = 160) -> float:
    """Return the loss on a text cut into windows of ``length`` + 1 bytes, the first of each given."""
    ids = encode(text).view(-1, length + 1)
    return float(cross_entropy(model(input_ids=ids[:, :-1], use_cache=False).logits, ids))


@torch.no_grad()
def task_accuracy(model: Any, task: str, steps: int, count: int = 100, **call: Any) -> float:
    """Return the share of held-out items of one difficulty whose next byte is the right one, among the choices."""
    model.eval()
    items = [synthetic_item(task, steps, index=i, split="test") for i in range(count)]
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer([item.prompt for item in items]).input_ids)
    logits = model(input_ids=ids, use_cache=False, **call).logits[:, -1]
    right = 0
    for row, item in zip(logits, items, strict=True):
        options = torch.tensor([tokenizer(c).input_ids[0] for c in item.choices])
        right += item.choices[int(row[options].argmax())] == item.answer
    model.train()
    return right / count
