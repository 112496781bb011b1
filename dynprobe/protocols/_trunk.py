"""The clean texts of one group, and perturbed rows measured against them.

A sweep or a search asks for many writes on few texts. The trunk holds what they share: the clean forward with its
states, logits and metrics. Rows are asked for as :class:`Request`, in any number and order, and come back as measured
branches. What a row is worth depends on its request only; grouping, batch size and order are matters of speed, and rows
that do not fit into memory are tried again in smaller groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.errors import SelfTestError
from dynprobe.metrics import Measurement
from dynprobe.probes import (
    Calibration,
    Fork,
    Perturb,
    PerturbWriter,
    RowsWriter,
    Site,
    Subject,
    identical,
    lowest_block,
    make_batch,
    sites_to_read,
)
from dynprobe.probes import Where as _Where
from dynprobe.probes._chunks import halving
from dynprobe.probes._tape import States, Tape
from dynprobe.protocols._arms import Passage, Text, aligned, measured
from dynprobe.protocols._branch import Branch, Request, rows_of
from dynprobe.protocols._conditions import written_depths, yardstick
from dynprobe.protocols._strength import donor_states

__all__ = ["Branch", "Request", "Trunk", "roads_of"]

#: Logits and states of one group of rows stay below this many bytes.
_GROUP_BYTES = 768 * 2**20
#: Share of the columns that must lie before the first write for their keys and values to be taken from a cache.
_WORTH_SHARING = 0.25


@dataclass(eq=False)
class Trunk:
    """A group of texts with their clean forward.

    Attributes:
        subject: The subject.
        texts: Rows.
        calibration: Coordinate statistics, for scales that need them and for the passport.
        partners: Token ids of the prompt whose states each row moves towards under ``interp``.
        which: Metrics to measure branches with; empty measures the output only.
        span: Tokens of token-axis metrics.
        theta: Level of the debts.
        side: Padding side; ``"left"`` where writes begin at the last tokens, so that what is before can be shared.
        most_rows: Largest number of rows in one forward; None means what fits into memory.
        halved: Sizes of groups that did not fit into memory.
    """

    subject: Subject
    texts: Sequence[Text]
    calibration: Calibration | None = None
    partners: Sequence[Sequence[int]] = ()
    which: Sequence[str] = ()
    span: str = "auto"
    theta: float | None = None
    side: str = "right"
    most_rows: int | None = None
    halved: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        texts = list(self.texts)
        batch = make_batch(
            self.subject, [t.fed for t in texts], side=self.side,
            row_keys=[t.row_key for t in texts], n_prompt=[len(t.prompt) for t in texts],
        )  # fmt: skip
        self.fork = Fork(self.subject, batch)
        tape = self.fork.clean
        self.mask = batch.mask.cpu()
        self.positions = tape.positions.numpy()
        self._targets = aligned([t.targets for t in texts], self.mask)
        assert tape.logits is not None
        self.logits = tape.logits
        self.clean: Passage | None = None
        if self.which:
            outputs = metrics.output_metrics(self.logits, self._targets.to(self.logits.device))
            self.clean = Passage(
                texts, tape, self.mask, self.positions, self._measure(tape, self.mask, self.positions, texts), outputs
            )
        self._donors: dict[Site, list[Tensor]] = {}
        self._clean_updates: dict[Site, list[Tensor]] = {}

    def _measure(self, tape: Tape, mask: Tensor, positions: np.ndarray, texts: Sequence[Text]) -> Measurement:
        return measured(tape, mask, positions, texts, self.span, self.theta, self.which)

    def branches(self, requests: Sequence[Request]) -> Iterator[Branch]:
        """Run the requested rows, those that start at one block together, and yield them measured.

        Raises:
            SelfTestError: If a row with α = 0 differs from the clean state it started from.
        """
        groups: dict[tuple[int, int], list[Request]] = {}
        for request in requests:
            groups.setdefault(self._entry(request.perturb), []).append(request)
        for below, inject in sorted(groups):
            work = partial(self._branch, below=below, inject=inject)
            yield from halving(groups[below, inject], self._group_size(below), work, self.halved.append)

    def relative(self, text: int, perturb: Perturb, size: float) -> float:
        """Strength under ``relnorm`` that writes states of one text by ‖u‖/√d = ``size`` on average."""
        component, layer = PerturbWriter(self.subject, perturb).sites[0]
        real = self.mask[text].numpy()
        if component in ("resid_pre", "resid_post"):
            state = self.fork.clean.states[layer + (component == "resid_post")][text][self.mask[text]]
        else:
            state = self._updates((component, layer))[text]
        n_prompt = np.array([len(self.texts[text].prompt)])
        wanted = perturb.where.mask(self.positions[text : text + 1], n_prompt, positions="1:")[0][real]
        norm = torch.linalg.vector_norm(state.float()[torch.from_numpy(wanted).to(state.device)], dim=-1)
        return size * state.shape[-1] ** 0.5 / float(norm[norm > 0].mean())

    def _updates(self, site: Site) -> list[Tensor]:
        """Clean attention or MLP outputs of each text, ``[tokens, dim]``; they are no states, so the fork has none."""
        if site not in self._clean_updates:
            self._clean_updates |= donor_states(self.subject, [site], [t.fed for t in self.texts])
        return self._clean_updates[site]

    def _entry(self, perturb: Perturb) -> tuple[int, int]:
        """Blocks that need not run, and the depth of the first changed state."""
        bare = perturb.replace(alpha=0.0)
        below = lowest_block(PerturbWriter(self.subject, bare).sites, self.subject.n_layers)
        return below, min(written_depths(self.subject, bare))

    def _group_size(self, below: int) -> int:
        depths = self.subject.n_layers + 1 if self.which else 1
        per_row = 4 * self.mask.shape[1] * ((self.subject.vocab_size or 1) + depths * self.subject.width)
        fitting = max(1, _GROUP_BYTES // per_row)
        return fitting if self.most_rows is None else min(fitting, self.most_rows)

    def writer(self, requests: Sequence[Request], source: np.ndarray) -> RowsWriter:
        """One writer for all rows: what differs in strength only shares its noise and its arithmetic."""
        kinds: dict[tuple[str, str | None], list[int]] = {}
        for row, request in enumerate(requests):
            same = request.perturb.replace(alpha=0.0)
            kinds.setdefault((str(same), same.direction_digest), []).append(row)
        parts = []
        for rows in kinds.values():
            model = requests[rows[0]].perturb
            alphas = np.array([requests[row].perturb.alpha for row in rows])
            writes = model.replace(alpha=float(alphas[np.argmax(np.abs(alphas))]))
            donors = None
            if "donor" in model.noise_scale.needs:
                sites = PerturbWriter(self.subject, model.replace(alpha=0.0)).sites
                missing = [site for site in sites if site not in self._donors]
                if missing:
                    self._donors |= donor_states(self.subject, missing, self.partners)
                donors = {site: [self._donors[site][i] for i in source[rows]] for site in sites}
            known = yardstick(self.subject, model, self.calibration)
            writer = PerturbWriter(self.subject, writes, calibration=known, donors=donors, magnitude=alphas)
            parts.append((writer, np.array(rows)))
        return RowsWriter(parts, len(requests))

    def _branch(self, requests: Sequence[Request], below: int, inject: int) -> Branch:
        subject, fork = self.subject, self.fork
        source = np.array([r.text for r in requests], dtype=np.int64)
        writer = self.writer(requests, source)
        n_prompt = [len(self.texts[i].prompt) for i in source]
        width = self.mask.shape[1]
        written = writer.first_position(n_prompt, width)
        first = np.maximum(written, 1)  # a write at position 0 is run, and what it does there is no effect on a text
        mask, positions = self.mask.numpy()[source], self.positions[source]
        affected = mask & (positions >= first[:, None])
        touched = (mask & (positions >= written[:, None])).any(0)
        start = int(touched.argmax()) if touched.any() else 0
        if start < _WORTH_SHARING * width:
            start = 0
        resumed = below if subject.resumable else 0
        if self.which:
            read = [s for s in sites_to_read(subject, _Where.parse("layers=all")) if s[1] >= resumed - 1]
            read = [s for s in read if not (resumed and s[0] == "resid_pre")]
        else:
            read = [("resid_post", below - 1)] if below else [("resid_pre", 0)]
        tape = fork.branch(source, [writer], below=below, start=start, read=read)
        assert tape.logits is not None
        start = width - tape.logits.shape[1]
        self._check_sham(requests, source, tape, start)
        outputs = self._paired_outputs(source, tape.logits, start, mask)
        right = self.right(source, tape.logits, start)
        branch = Branch(requests, source, first, affected, outputs, dict(tape.passport), right)
        if self.which:
            self._measured(branch, tape, start, mask, positions, inject)
        return branch

    def _check_sham(self, requests: Sequence[Request], source: np.ndarray, tape: Tape, start: int) -> None:
        """Where nothing was to be written the state must be the clean one, bit for bit."""
        shams = [row for row, request in enumerate(requests) if request.perturb.alpha == 0]
        if not shams:
            return
        depth = min(tape.states.depths)
        real = self.mask[source[shams]][:, start:].to(tape.states[depth].device)
        index = torch.from_numpy(source[shams]).to(tape.states[depth].device)
        resumed = self.subject.resumable and depth > 0
        clean = self.fork.clean.states[depth].index_select(0, index)[:, start:]
        if resumed and not identical(tape.states[depth][shams][real], clean[real]):
            raise SelfTestError(
                "a row written with alpha=0 differs from the clean state it started from; no number of this batch "
                "could be trusted"
            )

    def _paired_outputs(
        self, source: np.ndarray, logits: Tensor, start: int, mask: np.ndarray
    ) -> dict[str, np.ndarray]:
        width = mask.shape[1]
        found = {name: np.zeros((len(source), width)) for name in ("kl_clean_pert", "flip")}
        for text in np.unique(source):
            rows = np.flatnonzero(source == text)
            columns = np.flatnonzero(mask[rows[0], start:])
            if not len(columns):
                continue
            span = slice(int(columns[0]), int(columns[-1]) + 1)
            whole = slice(span.start + start, span.stop + start)
            pair = metrics.paired_arms(self.logits[text, whole], [logits[row, span] for row in rows])
            for name, grid in pair.items():
                found[name][rows, whole] = grid
        return found

    def right(self, source: np.ndarray, logits: Tensor, start: int = 0) -> np.ndarray:
        """1 where all tokens of a row's continuation are top-1, else 0; NaN without one.

        ``logits`` are those of the columns from ``start`` on; the ones before are clean.
        """
        found = np.full(len(source), np.nan)
        for row, text in enumerate(source):
            if not self.texts[text].new:
                continue
            emits = self.positions[text] >= len(self.texts[text].prompt) - 1
            columns = torch.from_numpy(np.flatnonzero(emits & (self._targets[text].numpy() >= 0)))
            before, after = columns[columns < start], columns[columns >= start] - start
            best = torch.cat([
                self.logits[text].index_select(0, before.to(logits.device)).argmax(-1).cpu(),
                logits[row].index_select(0, after.to(logits.device)).argmax(-1).cpu(),
            ])  # fmt: skip
            found[row] = float(bool((best == self._targets[text][columns]).all()))
        return found

    def _measured(
        self, branch: Branch, tape: Tape, start: int, mask: np.ndarray, positions: np.ndarray, inject: int
    ) -> None:
        assert self.clean is not None
        assert tape.logits is not None
        source = branch.source
        clean = rows_of(self.clean, source)
        index = torch.from_numpy(source)
        states: dict[int, Tensor] = {}
        for depth in self.clean.tape.states.depths:
            whole = clean.tape.states[depth]
            if depth not in tape.states.depths:
                states[depth] = whole
            elif start:
                states[depth] = torch.cat([whole[:, :start], tape.states[depth]], 1)
            else:
                states[depth] = tape.states[depth]
        joined = replace(
            clean.tape, states=States(states, self.subject.n_layers), passport=tape.passport, logits=None, updates={}
        )
        targets = self._targets[index][:, start:]
        tail = metrics.output_metrics(tape.logits, targets.to(tape.logits.device))
        outputs = {name: np.concatenate([clean.outputs[name][:, :start], tail[name]], 1) for name in tail}
        measurement = self._measure(joined, torch.from_numpy(mask), positions, clean.texts)
        branch.clean = clean
        branch.passage = Passage(clean.texts, joined, torch.from_numpy(mask), positions, measurement, outputs)
        branch.paired = metrics.paired(clean.measured, measurement, inject=inject)
        branch.divergence = metrics.diverge(list(clean.tape.states), list(joined.states), branch.passage.mask)


def roads_of(trunk: Trunk) -> dict[str, Any]:
    """Which roads the branches of a trunk took, as plain data."""
    roads = trunk.fork.roads
    return {**vars(roads), "refusals": {str(column): why for column, why in roads.refusals.items()}}
