"""One batch under one condition: run it, read it, measure it.

Two roads lead to a trajectory. *Forced*: one forward over the clean text, so that arms can be paired token by token.
*Free*: the model writes its own text while the instruments are on. Both end in a :class:`Passage` with the same fields.
In both, the last token of a generated text is not fed back, so every row of a passage has a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.metrics import Measurement
from dynprobe.probes import (
    Batch,
    Instrument,
    Sampling,
    Subject,
    Tape,
    generate,
    logits_of,
    make_batch,
    sites_to_read,
)
from dynprobe.probes import Where as _Where
from dynprobe.probes._measured import measure_track

__all__ = ["Passage", "Text", "aligned", "emission_mask", "forced", "free", "measured", "span_mask"]


@dataclass(frozen=True)
class Text:
    """A prompt with what was generated after it.

    Attributes:
        row_key: Name of the row for the noise.
        prompt: Token ids of the prompt.
        new: Token ids of the continuation.
    """

    row_key: str
    prompt: tuple[int, ...]
    new: tuple[int, ...] = ()

    @property
    def fed(self) -> list[int]:
        """The tokens that go through the model: all but the last generated one, which nothing follows."""
        return [*self.prompt, *self.new[:-1]]

    @property
    def targets(self) -> list[int]:
        """The token that follows each fed one; −1 after a prompt without continuation."""
        whole = [*self.prompt, *self.new]
        return whole[1:] if self.new else [*whole[1:], -1]


@dataclass(eq=False)
class Passage:
    """A batch of rows under one condition, measured.

    Attributes:
        texts: The rows.
        tape: States ``[batch, pos, dim]`` at every depth.
        mask: ``[batch, pos]`` columns that count (real tokens that were fed and belong to the text).
        positions: ``[batch, pos]`` absolute positions, −1 where nothing counts.
        measured: Depth, token, profile and sample metrics.
        outputs: ``entropy``, ``margin``, ``nll`` ``[batch, pos]``.
        logits: ``[batch, pos, vocab]`` of forced passages while they are being paired.
    """

    texts: list[Text]
    tape: Tape
    mask: Tensor
    positions: np.ndarray
    measured: Measurement
    outputs: dict[str, np.ndarray]
    logits: Tensor | None = None


def span_mask(passage_mask: Tensor, positions: np.ndarray, texts: Sequence[Text], span: str) -> Tensor:
    """Columns that token-axis and set metrics run over."""
    if span == "auto":
        span = "new" if any(t.new for t in texts) else "prompt"
    if span == "all":
        return passage_mask.clone()
    prompt = torch.tensor([len(t.prompt) for t in texts])[:, None]
    pos = torch.from_numpy(positions)
    return passage_mask.cpu() & ((pos < prompt) if span == "prompt" else (pos >= prompt))


def emission_mask(passage_mask: Tensor, positions: np.ndarray, texts: Sequence[Text], span: str) -> Tensor:
    """Columns whose distribution is about the span: the last prompt token is the one that emits the first new token."""
    if span != "new":
        return span_mask(passage_mask, positions, texts, span)
    prompt = torch.tensor([len(t.prompt) for t in texts])[:, None]
    return passage_mask.cpu() & (torch.from_numpy(positions) >= prompt - 1)


def measured(
    tape: Tape,
    mask: Tensor,
    positions: np.ndarray,
    texts: Sequence[Text],
    span: str,
    theta: float | None,
    which: Sequence[str] = metrics.DEFAULT,
) -> Measurement:
    chosen = span_mask(mask, positions, texts, span)
    return measure_track(tape.subject, list(tape.states), mask, which, span=chosen, span_name="mask", theta=theta)


def forced(
    subject: Subject,
    texts: Sequence[Text],
    writers: Sequence[Any] = (),
    *,
    side: str = "right",
    span: str = "auto",
    theta: float | None = None,
    extra_sites: Sequence[tuple[str, int]] = (),
    which: Sequence[str] = metrics.DEFAULT,
) -> Passage:
    """Run texts through the model in one teacher-forced forward and measure them.

    Args:
        subject: The subject.
        texts: Rows with their continuation.
        writers: What perturbs.
        side: Padding side.
        span: Tokens of token-axis metrics.
        theta: Level of the debts.
        extra_sites: Attention or MLP outputs to keep as well.
        which: Metrics to compute.
    """
    batch = make_batch(
        subject, [t.fed for t in texts], side=side,
        row_keys=[t.row_key for t in texts], n_prompt=[len(t.prompt) for t in texts],
    )  # fmt: skip
    instrument = _instrument(subject, batch, writers, extra_sites)
    with torch.no_grad(), instrument:
        logits = logits_of(subject.model(**batch.model_inputs(subject)))
    instrument.check_fired()
    tape = instrument.tape()
    mask = batch.mask.cpu()
    targets = aligned([t.targets for t in texts], mask)
    outputs = metrics.output_metrics(logits, targets.to(logits.device))
    positions = tape.positions.numpy()
    return Passage(
        list(texts), tape, mask, positions, measured(tape, mask, positions, texts, span, theta, which), outputs, logits
    )


def _instrument(
    subject: Subject, batch: Batch, writers: Sequence[Any], extra: Sequence[tuple[str, int]], **options: Any
) -> Instrument:
    read = list(dict.fromkeys([*sites_to_read(subject, _Where.parse("layers=all")), *extra]))
    return Instrument(subject, read, writers, energies=True, **batch.rows, **options)


def aligned(rows: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """Lay one list per row over the true columns of ``mask``; −1 elsewhere."""
    out = torch.full(mask.shape, -1, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, mask[i]] = torch.as_tensor(list(row), dtype=torch.long)
    return out


class _OutputListener:
    """Reduce logits to entropy, margin and NLL while the model writes; at most one position waits for its target.

    Args:
        remember: Keep the logits of every forward, so that tokens can be taken back.
    """

    def __init__(self, *, remember: bool = False) -> None:
        self._parts: list[dict[str, np.ndarray]] = []
        self._waiting: Tensor | None = None
        self._rows = np.zeros(0, dtype=np.int64)
        self._n = 0
        self._remember = remember
        self._past: list[tuple[Tensor, np.ndarray, int]] = []

    def rewind(self, columns: int) -> None:
        """Be as before the last ``columns`` forwards."""
        if columns:
            self._waiting, self._rows, n_parts = self._past[-columns]
            del self._parts[n_parts:], self._past[-columns:]

    def __call__(self, step: Any, output: Any) -> None:
        if self._remember and self._waiting is not None:
            self._past.append((self._waiting, self._rows, len(self._parts)))
        logits = logits_of(output)
        ids = step.token_ids.to(logits.device)
        rows = np.arange(len(ids)) if step.rows is None else step.rows
        if self._waiting is not None:
            kept = np.searchsorted(self._rows, rows)  # rows that left have nothing more to be said of them
            self._note(self._waiting[torch.from_numpy(kept).to(logits.device)], ids[:, :1], rows)
        else:
            self._n = len(ids)
        if logits.shape[1] > 1:
            self._note(logits[:, :-1], ids[:, 1:], rows)
        self._waiting, self._rows = logits[:, -1:].clone(), rows

    def _note(self, logits: Tensor, ids: Tensor, rows: np.ndarray) -> None:
        found = metrics.output_metrics(logits, ids)
        whole = {name: np.full((self._n, grid.shape[1]), np.nan) for name, grid in found.items()}
        for name, grid in found.items():
            whole[name][rows] = grid
        self._parts.append(whole)

    def finish(self, last: Tensor) -> dict[str, np.ndarray]:
        """Close with the token chosen after the last forward, ``[batch]`` (−1 for none)."""
        assert self._waiting is not None
        chosen = last[torch.from_numpy(self._rows)]
        self._note(self._waiting, chosen[:, None].to(self._waiting.device), self._rows)
        return {name: np.concatenate([p[name] for p in self._parts], axis=1) for name in self._parts[0]}


def free(
    subject: Subject,
    prompts: Sequence[Text],
    sampling: Sampling,
    writers: Sequence[Any] = (),
    *,
    span: str = "auto",
    theta: float | None = None,
    extra_sites: Sequence[tuple[str, int]] = (),
    which: Sequence[str] = metrics.DEFAULT,
    write: Callable[[Subject, Batch, Sampling, Instrument], list[list[int]]] = generate,
    remember: bool = False,
) -> Passage:
    """Let the model write under the writers and measure what it went through.

    Args:
        subject: The subject.
        prompts: Rows; their continuation is ignored.
        sampling: How tokens are chosen.
        writers: What perturbs, in prefill and in every decode step.
        span: Tokens of token-axis metrics.
        theta: Level of the debts.
        extra_sites: Attention or MLP outputs to keep as well.
        which: Metrics to compute.
        write: What lets the model write; default :func:`dynprobe.probes.generate`.
        remember: Whether ``write`` may take tokens back.
    """
    batch = make_batch(subject, [t.prompt for t in prompts], side="left", row_keys=[t.row_key for t in prompts])
    listener = _OutputListener(remember=remember)
    instrument = _instrument(subject, batch, writers, extra_sites, listeners=(listener,), all_logits=True)
    new = write(subject, batch, sampling, instrument)
    instrument.check_fired()
    tape = instrument.tape()
    texts = [Text(t.row_key, t.prompt, tuple(n)) for t, n in zip(prompts, new, strict=True)]
    fed = torch.tensor([len(t.fed) for t in texts])[:, None]
    positions = tape.positions.numpy().copy()
    # Rows that ended early went on being fed padding while others wrote; those columns are not part of their text.
    mask = tape.mask & (torch.from_numpy(positions) < fed)
    positions[~mask.numpy()] = -1
    tape.passport = instrument.passport(fed[:, 0].numpy())
    last = torch.tensor([t.new[-1] if len(t.fed) == int(tape.mask[i].sum()) else -1 for i, t in enumerate(texts)])
    outputs = listener.finish(last)
    return Passage(texts, tape, mask, positions, measured(tape, mask, positions, texts, span, theta, which), outputs)
