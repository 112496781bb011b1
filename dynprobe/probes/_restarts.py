"""Write one row with a cache whose last tokens can be taken back.

After every token that is chosen somebody is asked whether to go back. If so, the cache is cut, the instrument is told
(clock, tape, books and the memory of controllers go back with it), and writing goes on from the logits that stood at
that place, with another seed, and with another temperature where one is wished for. Nothing is computed twice, and
nothing is left of the tokens that were taken back but a record.

Tokens are chosen as in :func:`~dynprobe.probes.generate`: by noise that depends on seed, name of the row and
position alone. So what follows a restart is the text that a fresh generation from the shorter text would have with the
same seed, and a row's text does not depend on what was tried before.

Refused, before anything runs: models whose cache cannot give tokens back (none at all, a recurrent state, a sliding
window, whose oldest entries are gone by then); it is tried on a few tokens, once per subject.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import UsageError
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._generate import Sampling, adjusting, check_writes, choosers, end_tokens
from dynprobe.probes._inputs import Batch, make_batch
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._last import last_only
from dynprobe.probes._outputs import logits_of
from dynprobe.probes._roles import Rewinds
from dynprobe.probes._subject import Subject
from dynprobe.probes._take_back import check_takes_back, next_inputs

__all__ = ["Restart", "Restarted", "Wish", "WrittenRow", "write_row"]

#: Restarts of one row after which the wish is taken to be endless.
_MOST_RESTARTS = 1000


@dataclass(frozen=True)
class Restart:
    """A wish to go back: keep the first ``keep`` new tokens and write on from there.

    Attributes:
        keep: New tokens that stay.
        temperature: Of the new attempt; None takes the run's own.
        seed_shift: Added to the run's seed.
        hold: Tokens that are written so; after them the run's own temperature and seed hold again. None: all the rest.
        why: In words, for the record.
    """

    keep: int
    temperature: float | None = None
    seed_shift: int = 0
    hold: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Restarted:
    """A restart that was made.

    Attributes:
        attempt: Its number in the row, from 1.
        at: New tokens there were when it was wished for.
        kept: New tokens that stayed.
        dropped: The tokens that were taken back.
        seed: Seed from then on.
        temperature: Temperature from then on.
        why: The reason given.
    """

    attempt: int
    at: int
    kept: int
    dropped: tuple[int, ...]
    seed: int
    temperature: float
    why: str


#: Asked after every chosen token with the new tokens so far and their NLL under the model as it runs, at temperature 1.
Wish = Callable[[list[int], list[float]], Restart | None]


@dataclass(frozen=True)
class WrittenRow:
    """What was written.

    Attributes:
        new: The new tokens, end token included.
        nll: Negative log-likelihood of each under the model as it ran, before a controller changed its logits and at
            temperature 1, nats.
        restarts: The restarts, in order.
    """

    new: list[int]
    nll: list[float]
    restarts: list[Restarted] = field(default_factory=list)


@dataclass(frozen=True)
class _Regime:
    """How tokens from ``start`` on are chosen, up to but not including ``stop``."""

    start: int
    stop: float
    sampling: Sampling


def write_row(
    subject: Subject,
    batch: Batch,
    sampling: Sampling,
    wish: Wish | None = None,
    instrument: Instrument | None = None,
) -> WrittenRow:
    """Write the continuation of one row, and take tokens back where that is wished for.

    Args:
        subject: A language model.
        batch: One prompt; padding is cut off.
        sampling: How tokens are chosen.
        wish: Asked after every chosen token, the end token and the last one included.
        instrument: Readers and writers to keep on the model meanwhile; entered here. What it keeps at the end is what
            it would have kept had the tokens that were taken back never been.

    Returns:
        Tokens, their NLL and the restarts.

    Raises:
        ModelError: If the model cannot write, or its cache cannot give tokens back.
        UsageError: If there is more than one row, a wish keeps more tokens than there are, or wishes do not end.

    Example:
        Take back the first four tokens once, and write them with another seed:

        >>> from dynprobe.probes import make_batch
        >>> from dynprobe.testing import tiny_llama
        >>> model, once = tiny_llama(), [Restart(keep=0, seed_shift=10_000)]
        >>> row = write_row(
        ...     model, make_batch(model, [[5, 6, 7]]), Sampling(6, temperature=1.0, stop_at_eos=False),
        ...     lambda new, nll: once.pop() if once and len(new) == 4 else None,
        ... )
        >>> len(row.new), [(r.at, r.kept, r.seed) for r in row.restarts]
        (6, [(4, 0, 10000)])
    """
    if len(batch.mask) != 1:
        raise UsageError(f"tokens can be taken back in one row at a time; the batch has {len(batch.mask)} rows")
    check_writes(subject, batch)
    if wish is not None:
        check_takes_back(subject)
    if instrument is not None:
        deaf = [party for party in instrument._listeners if not isinstance(party, Rewinds)]
        if deaf and wish is not None:
            raise UsageError(
                f"the listener {deaf[0]!r} cannot forget tokens that are taken back; give it a method rewind(columns)"
            )
    one = _unpadded(subject, batch)
    raw: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        raw.append(logits_of(output)[:, -1].clone())

    # On the model before the instrument is: it sees the logits before a controller changes them.
    handle = subject.model.register_forward_hook(note)
    try:
        with torch.no_grad(), evaluating(subject.model), instrument or nullcontext():
            return _Row(subject, one, sampling, wish, instrument, raw).write()
    finally:
        handle.remove()


class _Row:
    """The loop over the tokens of one row."""

    def __init__(
        self, subject: Subject, batch: Batch, sampling: Sampling, wish: Wish | None, instrument: Instrument | None,
        raw: list[Tensor],
    ) -> None:  # fmt: skip
        self.subject, self.batch, self.sampling = subject, batch, sampling
        self.wish, self.instrument = wish, instrument
        self.ends = set(end_tokens(subject)) if sampling.stop_at_eos else set()
        self.raw = raw  # of every forward: before any controller changed it
        self.logits: list[Tensor] = []  # and after; entry i is what new token i is chosen from
        self.row = WrittenRow([], [])
        self.regimes = [_Regime(0, float("inf"), sampling)]
        self.cache: Any = None

    def write(self) -> WrittenRow:
        """Write to the end."""
        new = self.row.new
        inputs = self.batch.model_inputs(self.subject, cache=True)
        self.mask = inputs["attention_mask"]
        self._forward(inputs)
        while True:
            self._choose()
            wanted = self.wish(list(new), list(self.row.nll)) if self.wish is not None else None
            if wanted is not None:
                self._take_back(wanted)
                continue
            if new[-1] in self.ends or len(new) == self.sampling.max_new_tokens:
                return self.row
            self._feed(new[-1])

    def _forward(self, inputs: dict[str, Any]) -> None:
        output = self.subject.model(**inputs, **last_only(self.subject))
        self.cache = getattr(output, "past_key_values", None)
        chosen = logits_of(output)[:, -1]
        self.logits.append(self.raw[-1] if torch.equal(chosen, self.raw[-1]) else chosen.clone())

    def _feed(self, token: int) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(1, 1)], 1)
        ids = self.batch.input_ids.new_tensor([[token]])
        self._forward(next_inputs(self.subject, ids, self.mask, self.cache))

    def _choose(self) -> None:
        index = len(self.row.new)
        sampling = next(r.sampling for r in reversed(self.regimes) if r.start <= index < r.stop)
        scores = self.logits[index].to(torch.float32, copy=True)
        adjust = adjusting(choosers(sampling, self.batch.row_keys, [int(self.batch.lengths[0]) + index]))
        token = int(adjust(scores, np.zeros(1, dtype=np.int64)).argmax(-1))
        self.row.new.append(token)
        self.row.nll.append(-float(torch.log_softmax(self.raw[index].double(), -1)[0, token]))

    def _take_back(self, wanted: Restart) -> None:
        new, done = self.row.new, self.row.restarts
        if not 0 <= wanted.keep < len(new):
            raise UsageError(f"a restart is to keep {wanted.keep} of {len(new)} new tokens; it keeps 0…{len(new) - 1}")
        if wanted.hold is not None and wanted.hold < 1:
            raise UsageError(f"a restart is to hold for {wanted.hold} tokens; it holds for at least 1, or None")
        if len(done) == _MOST_RESTARTS:
            raise UsageError(f"{_MOST_RESTARTS} restarts in one row ({wanted.why}): the wish does not end; bound it")
        columns = len(new) - 1 - wanted.keep  # the newest token was not fed yet
        if columns:
            self.cache.crop(-columns)
            self.mask = self.mask[:, :-columns]
            if self.instrument is not None:
                self.instrument.rewind(columns)
        temperature = self.sampling.temperature if wanted.temperature is None else wanted.temperature
        sampling = replace(self.sampling, temperature=temperature, seed=self.sampling.seed + wanted.seed_shift)
        done.append(
            Restarted(
                len(done) + 1, len(new), wanted.keep, tuple(new[wanted.keep :]), sampling.seed, temperature, wanted.why
            )
        )
        stop = float("inf") if wanted.hold is None else wanted.keep + wanted.hold
        self.regimes = [r for r in self.regimes if r.start <= wanted.keep]
        self.regimes.append(_Regime(wanted.keep, stop, sampling))
        for held in (new, self.row.nll):
            del held[wanted.keep :]
        for kept in (self.raw, self.logits):
            del kept[wanted.keep + 1 :]


def _unpadded(subject: Subject, batch: Batch) -> Batch:
    """The row without its padding."""
    ids = batch.input_ids[0][batch.mask[0]].tolist()
    return make_batch(subject, [ids], row_keys=batch.row_keys, n_prompt=batch.n_prompt)
