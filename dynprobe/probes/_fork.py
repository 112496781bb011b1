"""Branch many continuations off one clean forward.

A sweep asks the same question under many strengths, seeds and directions. Three parts of the answer never change and
are computed once: the clean states, the blocks below the write, and the tokens before it. So a branch starts from the
clean state that enters the first changed block, with the lower blocks stubbed (:mod:`dynprobe.probes._stub`), and where
the write begins at a later column, with the keys and values of the earlier columns taken from one prefill. All rows of
a branch go through the model's own forward in one batch.

Both shortcuts are proven and not assumed. Whether lower blocks may be left out is the ``resume`` self-test of the
subject; whether earlier columns may be taken from a cache is tried here, at the first branch that wants it, on the very
rows and columns it is wanted for. Where one of them does not hold the longer road is taken, and ``roads`` says so.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes._backend import need_hooks
from dynprobe.probes._chunks import out_of_memory
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import Batch
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._last import last_only
from dynprobe.probes._reading import sites_to_read
from dynprobe.probes._resume import logits_of, select_last
from dynprobe.probes._roles import Site, Writer
from dynprobe.probes._stub import stubbed
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import Tape
from dynprobe.probes._where import Where

__all__ = ["Fork", "Roads", "lowest_block"]

#: Largest deviation of a cached tail from the whole forward, in standard deviations of the logits.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_LENIENT = 0.2
#: Rows of the clean batch that a cached prefix is tried on.
_TRIED = 2
#: What a model or a cache says that cannot be used this way. Anything else is an error of ours and is not caught.
_CACHE_ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError, AssertionError)


@dataclass
class Roads:
    """Which roads the branches of a fork took, and why not the short ones.

    Attributes:
        resumed: Branches that left out the blocks below the write.
        whole: Branches that ran all blocks although the write lies higher (the subject does not resume).
        prefix: Branches that took earlier columns from the cache.
        refusals: Why a cache of earlier columns was not used, by first column.
        deviation: Largest deviation seen when the cache was tried, in standard deviations of the logits (of the last
            states, where the fork keeps no logits at every position).
    """

    resumed: int = 0
    whole: int = 0
    prefix: int = 0
    refusals: dict[int, str] = field(default_factory=dict)
    deviation: float = 0.0


def lowest_block(sites: Sequence[Site], n_layers: int) -> int:
    """Return how many blocks lie below the first written state, so that they need not run.

    Example:
        >>> lowest_block([("resid_post", 6), ("attn_out", 9)], 12)
        7
        >>> lowest_block([("attn_out", 6)], 12), lowest_block([("resid_pre", 0)], 12)
        (6, 0)
    """
    return min((layer + (component == "resid_post") for component, layer in sites), default=n_layers)


class Fork:
    """One clean forward, and any number of branches off it.

    Args:
        subject: The subject.
        batch: Rows of the clean forward. Pad on the left where a write begins at the last tokens: then these share
            their columns, and everything before them can be shared.
        logits: Keep the clean logits at ``"all"`` positions, at the ``"last"``, or None.
        read: Sites to keep besides the residual stream.

    Attributes:
        clean: Tape of the clean forward, with every depth.
        roads: Which roads the branches took.

    Example:
        >>> import numpy as np
        >>> from dynprobe.probes import PerturbWriter, Perturb, make_batch
        >>> from dynprobe.testing import tiny_llama
        >>> subject = tiny_llama()
        >>> fork = Fork(subject, make_batch(subject, [[5, 6, 7, 8]]))
        >>> alphas = np.array([0.0, 0.1, 0.2, 0.4])
        >>> writer = PerturbWriter(subject, Perturb(alpha=1, layers=1), magnitude=alphas)
        >>> branch = fork.branch([0, 0, 0, 0], [writer])
        >>> branch.logits.shape, bool(torch.allclose(branch.logits[0], fork.clean.logits[0], atol=1e-6))
        (torch.Size([4, 4, 96]), True)
    """

    def __init__(
        self, subject: Subject, batch: Batch, *, logits: str | None = "all", read: Sequence[Site] = ()
    ) -> None:
        if logits not in ("all", "last", None):
            raise UsageError(f"logits={logits!r}; it is 'last', 'all' or None")
        need_hooks(subject, "branching off a forward (sweeps and thresholds)")
        self.subject, self.batch, self.roads = subject, batch, Roads()
        reading = list(dict.fromkeys([*sites_to_read(subject, Where.parse("layers=all")), *read]))
        instrument = Instrument(subject, reading, **batch.rows)
        inputs = batch.model_inputs(subject)
        short = logits == "last" and self._ends_together
        if logits is None or short:
            inputs |= last_only(self.subject)
        with evaluating(subject.model), torch.no_grad(), instrument:
            output = subject.model(**inputs)
        instrument.check_fired()
        found = None if logits is None else logits_of(output)
        if found is not None and logits == "last":
            found = found[:, -1] if short else select_last(found, batch.mask)
        self.clean: Tape = instrument.tape(found)
        self._prefixes: dict[int, Any] = {}
        self._proven: dict[int, int] = {}  # first column → lowest block whose cache was compared

    @property
    def _ends_together(self) -> bool:
        """Whether the last column is real in every row."""
        return bool(self.batch.mask[:, -1].all())

    def branch(
        self,
        source: Sequence[int] | np.ndarray,
        writers: Sequence[Writer] = (),
        *,
        below: int | None = None,
        start: int = 0,
        logits: str | None = "all",
        read: Sequence[Site] = (),
    ) -> Tape:
        """Run one batch of rows from where their writes begin.

        Args:
            source: Row of the clean batch that each row of the branch continues, ``[rows]``.
            writers: What writes; a strength per row is a writer's ``magnitude``.
            below: Blocks that need not run; default all below the lowest written one.
            start: First column that is run; no row may be written or read before it. Where the shared columns cannot
                be used, or the last logits of a row lie before it, the branch begins earlier.
            logits: ``"all"`` columns from ``start`` on, the ``"last"`` token's, or None.
            read: Sites to read in the branch; states of stubbed blocks other than the last cannot be.

        Returns:
            The tape of the branch: columns ``start …``, depths as read.

        Raises:
            UsageError: If ``logits``, ``start`` or ``below`` cannot be.
        """
        subject = self.subject
        if logits not in ("all", "last", None):
            raise UsageError(f"logits={logits!r}; it is 'last', 'all' or None")
        width = self.batch.mask.shape[1]
        if not 0 <= start < width:
            raise UsageError(f"start={start}; the batch has columns 0…{width - 1}")
        wanted = self._wanted(below, [site for writer in writers for site in writer.sites])
        below = wanted if subject.resumable else 0
        rows = np.asarray(source, dtype=np.int64)
        if logits == "last":  # a row padded on the right may end before the columns that are run
            ends = width - 1 - self.batch.mask.flip(1).long().argmax(1)
            start = min(start, int(ends[torch.from_numpy(rows).to(ends.device)].min()))
        start = self._usable(start, below)
        self.roads.resumed += below > 0
        self.roads.whole += wanted > 0 and not subject.resumable
        if start:
            try:
                made = self._run(rows, writers, below, start, logits, read)
            except _CACHE_ERRORS as error:  # a cache that serves some depths and not this one
                if out_of_memory(error):
                    raise
                self._refuse(start, _said(error))
            else:
                self.roads.prefix += 1
                return made
        return self._run(rows, writers, below, 0, logits, read)

    def _wanted(self, below: int | None, sites: Sequence[Site]) -> int:
        """Blocks that need not run; a write in one that does not run would be lost."""
        n = self.subject.n_layers
        lowest = lowest_block(sites, n)
        if below is None:
            return lowest
        if not 0 <= below <= n:
            raise UsageError(f"below={below}; {self.subject.name} has blocks 0…{n - 1}, of which 0…{n} may be left out")
        if below > lowest:
            component, layer = min(sites, key=lambda site: lowest_block([site], n))
            raise UsageError(f"below={below} leaves out a block that a writer writes at {component}.{layer}")
        return below

    def _run(
        self, source: np.ndarray, writers: Sequence[Writer], below: int, start: int, logits: str | None,
        read: Sequence[Site],
    ) -> Tape:  # fmt: skip
        subject, clean = self.subject, self.clean
        index = torch.from_numpy(source).to(subject.device)
        rows = _select(self.batch, index)
        inputs = rows.model_inputs(subject, cache=start > 0)
        if start:
            inputs[subject.token_argument] = inputs[subject.token_argument][:, start:]
            if "position_ids" in inputs:
                inputs["position_ids"] = inputs["position_ids"][:, start:]
            inputs["past_key_values"] = self._prefix(start, index, below)
        short = logits == "last" and self._ends_together
        if logits is None or short:
            inputs |= last_only(self.subject)
        entry: Tensor | None = None
        if below:
            entry = clean.states[below].index_select(0, index)[:, start:].to(subject.state_dtype)
        known: dict[str, Any] = {"row_keys": rows.row_keys, "n_prompt": rows.n_prompt, "mask": rows.mask[:, start:]}
        instrument = Instrument(subject, read, writers, **known)
        stubs = stubbed(subject, below, lambda i: entry if i == below - 1 else None)
        with evaluating(subject.model), torch.no_grad(), stubs, instrument:
            output = subject.model(**inputs)
        instrument.check_fired()
        found = None if logits is None else logits_of(output)
        if found is not None and logits == "last":
            found = found[:, -1] if short else select_last(found, rows.mask[:, start:])
        return instrument.tape(found)

    def _usable(self, start: int, below: int) -> int:
        """``start`` where a cached prefix gives this model's own numbers, else 0.

        A branch takes the cache of no block below its first; so what was compared there is proven for it and for all
        above it, and a branch that starts lower is tried again.
        """
        if start == 0 or start in self.roads.refusals:
            return 0
        if below >= self._proven.get(start, self.subject.n_layers + 1):
            return start
        reason = self._try(start, below)
        if reason is None:
            self._proven[start] = below
            return start
        self._refuse(start, reason)
        return 0

    def _refuse(self, start: int, reason: str) -> None:
        self.roads.refusals[start] = reason
        self._prefixes.pop(start, None)
        self._proven.pop(start, None)

    def _try(self, start: int, below: int) -> str | None:
        """Compare a cached tail of the unwritten rows with the clean forward; the reason why it cannot be used."""
        subject, clean = self.subject, self.clean
        if not (subject.accepts("past_key_values") and subject.accepts("attention_mask")):
            return "the model's forward takes no past_key_values"
        tail_of = self.batch.mask[:, start:].sum(1)
        longest = torch.argsort(tail_of, descending=True, stable=True)[:_TRIED].sort().values
        tried = np.repeat(longest.cpu().numpy(), 2)  # repeated, since that is how it is used
        every = clean.logits is not None and clean.logits.dim() == 3
        n = subject.n_layers
        try:
            if start not in self._prefixes:
                cache = self._prefill(start)
                if not hasattr(cache, "layers"):
                    return "the model returns no cache made of layers"
                self._prefixes[start] = cache
            tail = self._run(tried, (), below, start, "all" if every else None, [("resid_post", n - 1)])
        except _CACHE_ERRORS as error:
            if out_of_memory(error):
                raise
            return _said(error)
        what, before, after = "last states", clean.states[n], tail.states[n]
        if every:  # states may have a few huge coordinates, beside which no other one counts
            assert clean.logits is not None
            assert tail.logits is not None
            what, before, after = "logits", clean.logits, tail.logits
        index = torch.from_numpy(tried)
        real = self.batch.mask[:, start:][index.to(self.batch.mask.device)].to(before.device)
        whole, cached = before[:, start:][index.to(before.device)][real].double(), after[real].double()
        if not len(whole):
            return "no token of the texts lies there"
        worst = float((whole - cached).abs().max()) / max(float(whole.std()), 1e-12)
        limit = _TOLERANCE.get(subject.dtype, _LENIENT)
        if not worst <= limit:
            return f"a cached prefix changes the {what} by {worst:.1e} of their spread, more than {limit:.0e}"
        self.roads.deviation = max(self.roads.deviation, worst)
        return None

    def _prefill(self, start: int) -> Any:
        """The cache of the columns before ``start``, clean, as the model returns it."""
        batch, subject = self.batch, self.subject
        prefix = Batch(batch.input_ids[:, :start], batch.mask[:, :start], batch.row_keys, batch.n_prompt)
        with evaluating(subject.model), torch.no_grad():
            output = subject.model(**prefix.model_inputs(subject, cache=True), **last_only(self.subject))
        return getattr(output, "past_key_values", None)

    def _prefix(self, start: int, index: Tensor, below: int) -> Any:
        """A cache of the columns before ``start`` for these rows; stubbed blocks keep theirs unexpanded."""
        held = self._prefixes[start]
        cache = copy.copy(held)
        aligned = len(held.layers) == self.subject.n_layers
        cache.layers = [
            layer if aligned and number < below else _expanded(layer, index) for number, layer in enumerate(held.layers)
        ]
        return cache


def _expanded(layer: Any, index: Tensor) -> Any:
    """One layer's cache with the chosen rows; the original is not touched."""
    grows = type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")  # these bind new tensors when written
    layer = copy.copy(layer) if grows else copy.deepcopy(layer)
    layer.reorder_cache(index)  # unlike batch_select_indices it also takes along the states of recurrent layers
    return layer


def _said(error: BaseException) -> str:
    """The first line of an error, for the record."""
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]


def _select(batch: Batch, index: Tensor) -> Batch:
    """The rows of a batch that an index names, repeated where it repeats them."""
    picked = index.tolist()
    return Batch(
        batch.input_ids.index_select(0, index.to(batch.input_ids.device)),
        batch.mask.index_select(0, index.to(batch.mask.device)),
        tuple(batch.row_keys[i] for i in picked),
        tuple(batch.n_prompt[i] for i in picked),
    )
