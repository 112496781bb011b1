"""One batch of a run: write the clean text, run every arm over it, and turn all of it into tables."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe import metrics
from dynprobe.errors import SelfTestError
from dynprobe.probes import (
    Calibration,
    PerturbWriter,
    Sampling,
    Site,
    Subject,
    generate,
    identical,
    make_batch,
    readout,
)
from dynprobe.prompts import Prompt
from dynprobe.protocols._arms import Passage, Text, forced, free
from dynprobe.protocols._conditions import Push, written_depths
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._readout import read_response
from dynprobe.protocols._tables import Labels, passage_tables, row_status

__all__ = ["BatchRunner", "Produced"]


@dataclass(eq=False)
class Produced:
    """Tables of one batch, the states to write with them, and what the batch says about itself."""

    tables: dict[str, pd.DataFrame]
    states: list[tuple[pd.DataFrame, torch.Tensor]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class BatchRunner:
    """Everything that stays the same over the batches of a run.

    Attributes:
        subject: The subject.
        config: The run's settings.
        prompts: All prompts of the run.
        rows: Their token ids.
        push: The perturbation, or None.
        calibration: Yardsticks.
        exact: Whether only rows of one length may share a forward.
        span: Tokens of token-axis metrics.
        saved: Sites whose states are written.
        early: Called once, with the samples of the first forced arms, before the first free arm is written.
    """

    subject: Subject
    config: RunConfig
    prompts: Sequence[Prompt]
    rows: Sequence[Sequence[int]]
    push: Push | None
    calibration: Calibration | None
    exact: bool
    span: str
    saved: Sequence[Site] = ()
    early: Callable[[pd.DataFrame], None] | None = None

    @property
    def theta(self) -> float | None:
        """Level of the debts: the clean 90 % quantile of ct."""
        known = self.calibration is not None and "limen_ct" in self.calibration.signals
        return self.calibration.quantile("limen_ct", 0.9) if known and self.calibration is not None else None

    @property
    def _extra(self) -> list[Site]:
        return [site for site in self.saved if site[0] in ("attn_out", "mlp_out")]

    def run(self, batch: Sequence[int]) -> Produced:
        """Run all arms of one planned batch."""
        collected: list[Produced] = []
        for replicate in range(self.config.num_samples):
            for group in self._groups([len(self.rows[i]) for i in batch]):
                collected += self._group([batch[i] for i in group], replicate)
        names = dict.fromkeys(name for p in collected for name in p.tables)
        tables = {
            name: pd.concat([p.tables[name] for p in collected if name in p.tables], ignore_index=True)
            for name in names
        }
        return Produced(tables, [s for p in collected for s in p.states])

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows that may share a forward."""
        if not self.exact:
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        return [list(g) for _, g in itertools.groupby(order, key=lambda i: lengths[i])]

    def _sampling(self, replicate: int) -> Sampling:
        c = self.config
        return Sampling(c.max_new_tokens, c.temperature, c.top_p, c.seed, replicate, c.stop_at_eos)

    def _group(self, chosen: Sequence[int], replicate: int) -> list[Produced]:
        blank = [Text(self.prompts[i].prompt_id, tuple(self.rows[i])) for i in chosen]
        texts = blank
        if self.config.max_new_tokens > 0:
            batch = make_batch(
                self.subject, [t.prompt for t in blank], side="left", row_keys=[t.row_key for t in blank]
            )
            new = generate(self.subject, batch, self._sampling(replicate))
            texts = [Text(t.row_key, t.prompt, tuple(n)) for t, n in zip(blank, new, strict=True)]
        out: list[Produced] = []
        solved = np.full(len(chosen), np.nan)
        for group in self._groups([len(t.fed) for t in texts]):  # texts of one batch may end early
            made, magnitude = self._forced_arms([texts[i] for i in group], [chosen[i] for i in group], replicate)
            out.append(made)
            if magnitude is not None:
                solved[group] = magnitude
        if self.early is not None:
            self.early(pd.concat([p.tables["samples"] for p in out], ignore_index=True))
            self.early = None
        if self.push is not None and self.config.max_new_tokens > 0:
            # The free arm is pushed with the strength that was solved for on the clean text.
            push = self.push.prepare(blank, self._partners(chosen), magnitude=solved)
            written = free(
                self.subject, blank, self._sampling(replicate), push.writers(),
                span=self.span, theta=self.theta, extra_sites=self._extra, which=self.config.measured_metrics,
            )  # fmt: skip
            out.append(self._tabulate(written, "perturbed.free", chosen, replicate, push=push))
        return out

    @property
    def _side(self) -> str:
        return "left" if self.config.padding == "left" else "right"

    def _forced(self, texts: Sequence[Text], writers: Sequence[Any] = ()) -> Passage:
        return forced(
            self.subject, texts, writers, side=self._side, span=self.span, theta=self.theta, extra_sites=self._extra,
            which=self.config.measured_metrics,
        )  # fmt: skip

    def _partners(self, chosen: Sequence[int]) -> list[list[int]]:
        """Each row's donor is the next prompt of the run, whatever batch either is in."""
        return [list(self.rows[(i + 1) % len(self.rows)]) for i in chosen]

    def _forced_arms(
        self, texts: list[Text], chosen: Sequence[int], replicate: int
    ) -> tuple[Produced, np.ndarray | None]:
        clean = self._forced(texts)
        parts = [self._tabulate(clean, "clean", chosen, replicate)]
        magnitude = None
        if self.push is not None:
            push = self.push.prepare(texts, self._partners(chosen), clean=clean, side=self._side)
            magnitude = push.magnitude
            sham = self._forced(texts, push.writers(sham=True))
            parts.append(self._sham(clean, sham, chosen, replicate))
            del sham
            writers = push.writers()
            arm = self._forced(texts, writers)
            parts.append(
                self._tabulate(arm, "perturbed.forced", chosen, replicate, clean=clean, push=push, writers=writers)
            )
        names = dict.fromkeys(name for p in parts for name in p.tables)
        tables = {n: pd.concat([p.tables[n] for p in parts if n in p.tables], ignore_index=True) for n in names}
        return Produced(tables, [s for p in parts for s in p.states]), magnitude

    def _labels(self, passage: Passage, condition: str, chosen: Sequence[int], replicate: int) -> Labels:
        tokenizer = self.subject.tokenizer
        decoded = [
            tokenizer.decode(list(t.new), skip_special_tokens=False) if tokenizer is not None and t.new else None
            for t in passage.texts
        ]
        prompts = [self.prompts[i] for i in chosen]
        return Labels(condition, [p.prompt_id for p in prompts], [p.category for p in prompts], replicate, decoded)

    def _sham(self, clean: Passage, sham: Passage, chosen: Sequence[int], replicate: int) -> Produced:
        """The sham arm must equal the clean one bit for bit; then it is stored as a digest of it."""
        mask = clean.mask
        assert clean.logits is not None
        assert sham.logits is not None
        pairs = zip([*clean.tape.states, clean.logits], [*sham.tape.states, sham.logits], strict=True)
        if not all(identical(a[mask.to(a.device)], b[mask.to(b.device)]) for a, b in pairs):
            raise SelfTestError(
                "the sham arm (alpha=0) differs from the clean arm in the same batch shape; no number of this batch "
                "could be trusted. Is the model in training mode, or its arithmetic not deterministic?"
            )
        labels = self._labels(sham, "sham", chosen, replicate)
        last = sham.tape.states[self.subject.n_layers]
        digests = [
            hashlib.blake2b(last[i][mask[i].to(last.device)].float().cpu().numpy().tobytes(), digest_size=8).hexdigest()
            for i in range(len(mask))
        ]
        table = pd.DataFrame(
            {
                "sample_id": labels.ids, "prompt_id": list(labels.prompt_ids), "condition_id": "sham",
                "replicate": replicate, "category": list(labels.categories),
                "n_prompt": [len(t.prompt) for t in sham.texts], "n_new": [len(t.new) for t in sham.texts],
                "n_fed": mask.sum(1).numpy(), "n_nonfinite": clean.measured.n_nonfinite,
                "status": row_status(clean.measured.n_nonfinite), "equal_to": "clean", "digest": digests,
            }
        )  # fmt: skip
        return Produced({"samples": table})

    def _tabulate(
        self,
        passage: Passage,
        condition: str,
        chosen: Sequence[int],
        replicate: int,
        *,
        clean: Passage | None = None,
        push: Push | None = None,
        writers: Sequence[PerturbWriter] = (),
    ) -> Produced:
        labels = self._labels(passage, condition, chosen, replicate)
        pairing: dict[str, Any] = {}
        if clean is not None and push is not None:
            assert clean.logits is not None
            assert passage.logits is not None
            pairing = {
                "clean": clean,
                "paired": metrics.paired(clean.measured, passage.measured, inject=self._inject(push)),
                "paired_outputs": metrics.paired_output(clean.logits, passage.logits),
                "divergence": metrics.diverge(list(clean.tape.states), list(passage.tape.states), passage.mask),
                "readout": read_response(clean, passage, writers, self._inject(push)),
                "affected_from": np.maximum(push.first_position(passage.texts, passage.mask.shape[1]), 1),
            }
        lens = self._lens(passage) if self.config.lens else None
        tables = passage_tables(
            passage, labels, span=self.span, lens=lens, perturbed=push is not None, calibration=self.calibration,
            **pairing,
        )  # fmt: skip
        if push is not None:
            samples = tables["samples"]
            asked, alone = samples["n_asked"].to_numpy(), samples["n_left_alone"].to_numpy()
            unreached = np.isnan(push.magnitude) if push.magnitude is not None else np.zeros(len(samples), bool)
            fine = samples["status"] == "ok"
            samples.loc[fine & unreached, "status"] = "isokl-unreached"
            samples.loc[fine & ~unreached & (alone == asked), "status"] = "not-written"
            samples.loc[fine & (alone > 0) & (alone < asked), "status"] = "partly-written"
        return Produced(tables, self._states(passage, labels))

    def _inject(self, push: Push) -> int:
        """Depth of the first state that is changed."""
        return min(depth for p in push.perturbs for depth in written_depths(self.subject, p))

    def _lens(self, passage: Passage) -> dict[str, np.ndarray]:
        """Logit lens: every depth through the model's own tail, compared with the model's output."""
        final = passage.logits
        states = list(passage.tape.states)
        if final is None:  # free arms keep no logits; their own tail gives them again
            final = readout(self.subject, states[-1])
        found: list[dict[str, np.ndarray]] = []
        for state in states:
            found.append(metrics.lens_output(readout(self.subject, state), final))
        grids = {name: np.stack([f[name] for f in found]) for name in found[0]}
        grids["prediction_depth"] = metrics.prediction_depth(grids.pop("lens_flip"))
        return grids

    def _states(self, passage: Passage, labels: Labels) -> list[tuple[pd.DataFrame, torch.Tensor]]:
        if not self.config.states:
            return []
        rows, columns = np.nonzero(passage.mask.numpy())
        ids = np.array(labels.ids, dtype=object)[rows]
        out = []
        for component, layer in self.saved:
            if component == "resid_post":
                depth, state = layer + 1, passage.tape.states[layer + 1]
            elif component == "resid_pre":
                depth, state = layer, passage.tape.states[layer]
            else:
                depth, state = layer + 1, passage.tape.updates[component, layer]
            where: dict[str, Any] = {
                "track": self.subject.track if component.startswith("resid") else component, "depth": np.int32(depth),
                "layer": np.int32(layer if component != "resid_pre" else depth - 1), "component": component,
            }  # fmt: skip
            if self.subject.turns:  # a site's number there is a turn's
                turn = self.subject.turns[depth - 1] if depth else None
                where |= {
                    "layer": np.int32(-1 if turn is None else turn.layer),
                    "component": "resid_pre" if turn is None else turn.component,
                    "stage": "embed" if turn is None else turn.stage,
                    "iteration": np.int32(0 if turn is None else turn.iteration),
                }
            keys = pd.DataFrame({"sample_id": ids, "pos": passage.positions[rows, columns].astype(np.int32), **where})
            out.append((keys, state.detach()[rows, columns].cpu()))
        return out
