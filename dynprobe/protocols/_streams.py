"""Teacher-forced, token by token: the road on which something that acts between tokens can act.

A controller looks at one token and acts at the next, so a whole text in one forward would never let it. Here the prompt
is one forward and every token of the continuation is one more, with the cache, as in writing; but the tokens are given,
so that all arms read the same text and can be paired token by token.

Some models' caches do not do what one forward over the whole text does (padding that moves positions, a state that is
not taken up), and none of them says so. Every subject is therefore tried once, on a padded pair of rows one of which
leaves, against whole forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.errors import ModelError
from dynprobe.probes import Instrument, Subject, Where, make_batch, sites_to_read
from dynprobe.probes._chunks import out_of_memory
from dynprobe.probes._decode import can_shrink, decode
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import pad_token
from dynprobe.probes._outputs import logits_of
from dynprobe.probes._trial_calls import trial_ids
from dynprobe.protocols._arms import Passage, Text, aligned, measured

__all__ = ["check_streams", "streamed"]


#: Name of the fact that holds why a subject cannot be fed token by token.
_FACT = "streams_not"
#: Largest difference of logits from a whole forward, in their SDs, by the bytes of a number.
_SAME_LOGITS = {2: 0.5, 4: 0.02, 8: 0.02}


def check_streams(subject: Subject) -> None:
    """Refuse a model that cannot be fed token by token.

    Raises:
        ModelError: If its forward takes no cache, or with the cache it is another model than without.
    """
    if not can_shrink(subject):
        raise ModelError(
            f"{subject.name} ({type(subject.model).__name__}) takes no cache (past_key_values, attention_mask, "
            "use_cache), so nothing can act between its tokens; recovery and controllers need a decoder with a cache"
        )
    if _FACT not in subject.facts:
        try:
            with torch.no_grad(), evaluating(subject.model):
                subject.facts[_FACT] = _trial(subject)
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as error:
            if out_of_memory(error):
                raise
            subject.facts[_FACT] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if subject.facts[_FACT]:
        raise ModelError(
            f"{subject.name} ({type(subject.model).__name__}) cannot be fed token by token in a padded batch: "
            f"{subject.facts[_FACT]}. Recovery and controllers are measured that way; take another model"
        )


def _trial(subject: Subject) -> str:
    """Why a text is not the same token by token as in one forward; empty where it is."""
    ids = 2 * trial_ids(subject.model)[0].tolist()
    texts = [Text("long", tuple(ids[:5]), tuple(ids[5:9])), Text("short", tuple(ids[2:5]), tuple(ids[5:7]))]
    kept: list[tuple[Any, Tensor]] = []
    batch = make_batch(subject, [t.prompt for t in texts], side="left")
    listener = lambda step, output: kept.append((step, logits_of(output)[:, -1]))  # noqa: E731
    with Instrument(subject, listeners=(listener,), **batch.rows) as instrument:
        decode(subject, batch, 4, (), instrument=instrument, pad=pad_token(subject), forced=[t.new for t in texts])
    for row, text in enumerate(texts):
        whole = logits_of(subject.model(**make_batch(subject, [text.fed]).model_inputs(subject)))[0].float()
        for step, logits in kept:
            places = np.arange(len(texts)) if step.rows is None else step.rows
            for place in np.flatnonzero(places == row):
                pos = int(step.positions[place].max())
                if pos >= len(text.fed):  # it has ended and not yet left
                    continue
                gap = float((logits[place].float() - whole[pos]).abs().nan_to_num(0.0).max())
                if gap > _SAME_LOGITS[logits.dtype.itemsize] * float(whole[pos][whole[pos].isfinite()].std()):
                    return f"its logits differ by {gap:.3g} from those of one forward over the whole text"
    return ""


def streamed(
    subject: Subject,
    texts: Sequence[Text],
    writers: Sequence[Any] = (),
    *,
    span: str = "auto",
    theta: float | None = None,
    which: Sequence[str] = metrics.DEFAULT,
) -> Passage:
    """Feed each text's continuation token by token after its prompt, and measure what the model went through.

    Args:
        subject: The subject.
        texts: Rows with their continuation, of at least one token.
        writers: Perturbations first, then controllers' steerings.
        span: Tokens of token-axis metrics.
        theta: Level of the debts.
        which: Metrics to compute.

    Raises:
        ModelError: If the model cannot be fed token by token.
    """
    check_streams(subject)
    batch = make_batch(subject, [t.prompt for t in texts], side="left", row_keys=[t.row_key for t in texts])
    kept: list[tuple[Any, Tensor]] = []

    def keep(step: Any, output: Any) -> None:
        if step.index == 0:
            kept.clear()
        kept.append((step, logits_of(output)))

    read = sites_to_read(subject, Where.parse("layers=all"))
    instrument = Instrument(subject, read, writers, energies=True, listeners=(keep,), all_logits=True, **batch.rows)
    with torch.no_grad(), evaluating(subject.model), instrument:
        decode(
            subject, batch, max(len(t.new) for t in texts), (), instrument=instrument, pad=pad_token(subject),
            forced=[t.new for t in texts],
        )  # fmt: skip
    instrument.check_fired()
    tape = instrument.tape()
    positions = tape.positions.numpy().copy()
    fed = torch.tensor([len(t.fed) for t in texts])[:, None]
    mask = tape.mask & (torch.from_numpy(positions) < fed)
    positions[~mask.numpy()] = -1
    tape.passport = instrument.passport(fed[:, 0].numpy())
    logits = _laid_out(kept, len(texts))
    targets = aligned([t.targets for t in texts], mask)
    outputs = metrics.output_metrics(logits, targets.to(logits.device))
    return Passage(
        list(texts), tape, mask, positions, measured(tape, mask, positions, texts, span, theta, which), outputs, logits
    )


def _laid_out(kept: Sequence[tuple[Any, Tensor]], n_rows: int) -> Tensor:
    """Logits of all forwards side by side; zeros stand for rows that had left, which no mask lets count."""
    parts: list[Tensor] = []
    for step, logits in kept:
        if step.rows is None:
            parts.append(logits)
            continue
        whole = logits.new_zeros(n_rows, *logits.shape[1:])
        whole[torch.from_numpy(step.rows).to(logits.device)] = logits
        parts.append(whole)
    return torch.cat(parts, 1)
