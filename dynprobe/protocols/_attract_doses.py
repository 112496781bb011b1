"""From a dose to a strength: the ε at which the layer changes the next-token distribution by so many nats.

A raw ε has no meaning across models: at the defaults one layer moves a small model by 1e-4 nats per token, and ε = 1
by a hundredth or a twentieth. A study therefore asks for the mean KL(bare ‖ layer) per token past burn-in, and ε is
solved for it on texts that are read, not written, so that both sides see the same tokens. KL is not monotone in ε
everywhere, so the first crossing is looked for from below on a doubling grid and then narrowed in ln ε. All texts share
one forward per step (split where logits would be too large); every step is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.controllers import Controller, Seen, Steering
from dynprobe.controllers.attractor._baselines import ContinuousCache
from dynprobe.errors import UsageError
from dynprobe.probes import Batch, Instrument, Subject, logits_of, make_batch
from dynprobe.probes._clock import Step
from dynprobe.probes._evaluating import evaluating
from dynprobe.protocols._arms import Text
from dynprobe.protocols._attract_arms import Condition, Sites
from dynprobe.protocols._attract_config import HISTORICAL
from dynprobe.protocols._attract_history import historical_logits

__all__ = ["Dose", "DoseTexts", "arm_logits", "solve_doses"]

_START, _SMALLEST = 1 / 16, 1e-6
_TOLERANCE = 0.02
_MOST_STEPS = 24
_LOGIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Dose:
    """What a dose came to.

    Attributes:
        condition: The arm with its strength; strength 0 where the dose is not reached.
        kl: Mean KL(bare ‖ arm) per token past burn-in at that strength, nats; NaN where it was not reached.
        status: ``solved``, ``given`` (a raw strength, or one taken over from the layer), ``unreached``.
        largest: Largest ε that was tried for this arm.
        kl_largest: KL there.
        n_texts: Texts.
        n_tokens: Tokens past burn-in.
    """

    condition: Condition
    kl: float
    status: str
    largest: float
    kl_largest: float
    n_texts: int
    n_tokens: int


@dataclass(eq=False)
class DoseTexts:
    """Texts that are read, the bare model's logits on them, and what was tried.

    Attributes:
        subject: The model.
        sites: Makes the arms.
        texts: The texts.
        trials: One line per text and step.
    """

    subject: Subject
    sites: Sites
    texts: Sequence[Text]
    trials: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        longest = max(len(t.fed) for t in self.texts)
        rows = max(1, _LOGIT_BYTES // (4 * longest * (self.subject.vocab_size or 1)))
        self._parts = [self.texts[i : i + rows] for i in range(0, len(self.texts), rows)]
        self._bare = [self._forward(part, []) for part in self._parts]
        self._starts: dict[tuple[str, str], list[np.ndarray]] = {}

    def _forward(self, texts: Sequence[Text], controllers: Sequence[Controller]) -> tuple[Tensor, np.ndarray]:
        logits, positions, _ = arm_logits(self.subject, texts, controllers)
        return logits, positions

    def _first(self, condition: Condition) -> list[np.ndarray]:
        """First position that counts, of each text of each part."""
        cell, settings = condition.cell, condition.cell.settings
        key = (cell.name, cell.layers)
        if key not in self._starts:
            if settings.burn == "tokens":
                begin = max(math.ceil(settings.burn_in), 1)
                self._starts[key] = [np.full(len(part), begin) for part in self._parts]
            else:
                self._starts[key] = [self._burnt(condition, part) for part in self._parts]
            longest = max(len(t.fed) for t in self.texts)
            if min(int(first.min()) for first in self._starts[key]) >= longest:
                raise UsageError(
                    f"burn_in={settings.burn_in:g} ({settings.burn}) is not over within the {longest} tokens of the "
                    "longest text that doses are solved on; give longer prompts, more --dose-tokens or less burn-in"
                )
        return self._starts[key]

    def _burnt(self, condition: Condition, texts: Sequence[Text]) -> np.ndarray:
        """First position of each text at which the layer would inject."""
        controllers = self.sites.controllers(replace(condition, arm="layer", strength=0.0))
        _, positions = self._forward(texts, controllers)
        found = np.full(len(texts), positions.shape[1])
        for controller in controllers:
            gain = controller.passed.gain.cpu().numpy()  # type: ignore[attr-defined]
            for row in range(len(texts)):
                at = positions[row][(gain[row] > 0) & (positions[row] >= 0)]
                found[row] = min(found[row], int(at.min()) if len(at) else positions.shape[1])
        return np.maximum(found, 1)

    def kl(self, condition: Condition) -> tuple[float, int]:
        """Return mean KL(bare ‖ arm) per token past burn-in, and the number of those tokens."""
        total, count = 0.0, 0
        step = 1 + max((int(t["trial"]) for t in self.trials), default=-1)
        for part, (bare, positions), first in zip(self._parts, self._bare, self._first(condition), strict=True):
            if condition.arm in HISTORICAL:
                logits = historical_logits(self.subject, part, leak=condition.arm == "phase2_leak")
            else:
                logits, _ = self._forward(part, self.sites.controllers(condition))
            grid = metrics.paired_output(bare, logits)["kl_clean_pert"]
            keep = positions >= first[:, None]
            for row, text in enumerate(part):
                values = grid[row][keep[row]]
                self.trials.append({
                    "prompt_id": text.row_key, "alpha": condition.strength,
                    "condition_id": condition.arm + (f";{condition.cell.name}" if condition.cell.name else ""),
                    "trial": step, "kl_clean_pert": float(values.mean()) if len(values) else math.nan,
                    "n_tokens": len(values),
                })  # fmt: skip
                total, count = total + float(values.sum()), count + len(values)
        return (total / count if count else math.nan), count


def arm_logits(
    subject: Subject, texts: Sequence[Text], controllers: Sequence[Controller]
) -> tuple[Tensor, np.ndarray, Batch]:
    """Return an arm's logits ``[batch, pos, vocab]`` on texts that are read, their positions, and the batch."""
    batch = make_batch(subject, [t.fed for t in texts], row_keys=[t.row_key for t in texts],
                       n_prompt=[len(t.prompt) for t in texts])  # fmt: skip
    caches = [c for c in controllers if isinstance(c, ContinuousCache)]
    steerings = [Steering(c, subject) for c in controllers if not isinstance(c, ContinuousCache)]
    read = [("resid_post", subject.n_layers - 1)] if caches else []
    with torch.no_grad(), evaluating(subject.model):
        with Instrument(subject, read, steerings, **batch.rows) as instrument:
            logits = logits_of(subject.model(**batch.model_inputs(subject)))
        for cache in caches:
            logits = _mixed(cache, subject, batch, instrument.tape().states[-1], logits)
    positions = np.where(batch.mask.cpu().numpy(), batch.mask.long().cumsum(1).cpu().numpy() - 1, -1)
    return logits, positions, batch


def _mixed(cache: ContinuousCache, subject: Subject, batch: Batch, states: Tensor, logits: Tensor) -> Tensor:
    """The cache's distribution at every token of a text that is read: token by token, as in writing."""
    ids, mask = batch.input_ids, batch.mask
    site = ("resid_post", subject.n_layers - 1)
    cache.sites_of(subject, None, writing=False)
    memory = cache.start(len(ids))
    positions = np.where(mask.cpu().numpy(), mask.long().cumsum(1).cpu().numpy() - 1, -1)
    lengths, keys = mask.sum(1).cpu().numpy(), tuple(str(i) for i in range(len(ids)))
    out = []
    for t in range(ids.shape[1]):
        step = Step(t, positions[:, t : t + 1], lengths, keys, ids[:, t : t + 1].cpu())
        seen = Seen(step, {site: states[:, t : t + 1]})
        cache.decide(seen, memory)
        out.append(cache.choose(logits[:, t : t + 1], seen, memory))
    return torch.cat(out, 1)


def solve_doses(texts: DoseTexts, conditions: Sequence[Condition], *, match: str, largest: float) -> list[Dose]:
    """Return one dose for each condition, in order.

    Args:
        texts: What is read.
        conditions: All arms of the study; those of other settings of ``reset`` share the dose of ``item``.
        match: ``strength`` gives every arm the layer's ε, ``kl`` solves for each.
        largest: Largest ε that is tried.

    Raises:
        UsageError: If burn-in outlasts the texts.
    """
    ladders: dict[tuple[str, str, str], _Ladder] = {}
    done: dict[str, Dose] = {}
    found: list[Dose] = []
    for condition in conditions:
        plain = replace(condition, reset="item")
        if plain.condition_id in done:
            known = done[plain.condition_id]
            found.append(replace(known, condition=replace(known.condition, reset=condition.reset)))
            continue
        dose = _dose(texts, plain, ladders, match, largest)
        done[plain.condition_id] = dose
        found.append(replace(dose, condition=replace(dose.condition, reset=condition.reset)))
    return found


def _dose(
    texts: DoseTexts, condition: Condition, ladders: dict[tuple[str, str, str], _Ladder], match: str, largest: float
) -> Dose:
    n = len(texts.texts)
    if condition.arm == "none":
        kl, count = texts.kl(condition)
        return Dose(condition, kl, "given", 0.0, kl, n, count)
    if condition.dose is None:
        kl, count = texts.kl(condition)
        return Dose(condition, kl, "given", math.nan, kl, n, count)
    if condition.raw:
        chosen = replace(condition, strength=condition.dose)
        kl, count = texts.kl(chosen)
        return Dose(chosen, kl, "given", condition.dose, kl, n, count)
    arm = condition.arm if match == "kl" else "layer"
    key = (arm, condition.cell.name, condition.cell.layers)
    ladder = ladders.setdefault(key, _Ladder(texts, replace(condition, arm=arm), largest))
    strength = ladder.solve(condition.dose)
    top, kl_top = ladder.top
    if math.isnan(strength):
        return Dose(condition, math.nan, "unreached", top, kl_top, n, ladder.count)
    chosen = replace(condition, strength=strength)
    if arm == condition.arm:
        return Dose(chosen, ladder.tried[strength], "solved", top, kl_top, n, ladder.count)
    kl, count = texts.kl(chosen)
    return Dose(chosen, kl, "given", strength, kl, n, count)


class _Ladder:
    """What is known of KL against ε for one arm with one choice of settings."""

    def __init__(self, texts: DoseTexts, condition: Condition, largest: float) -> None:
        self.texts, self.condition, self.largest = texts, condition, largest
        self.tried: dict[float, float] = {}
        self.count = 0

    @property
    def top(self) -> tuple[float, float]:
        """The largest ε that was tried, and its KL."""
        best = max(self.tried)
        return best, self.tried[best]

    def _at(self, strength: float) -> float:
        if strength not in self.tried:
            self.tried[strength], self.count = self.texts.kl(replace(self.condition, strength=strength))
        return self.tried[strength]

    def solve(self, target: float) -> float:
        """Return the smallest ε found at which KL reaches ``target``; NaN where none up to the largest does."""
        low = min(_START, self.largest)
        while self._at(low) >= target and low > _SMALLEST:
            low /= 4
        if not self._at(low) < target:  # NaN as well
            return math.nan
        high = low
        while not self._at(high) >= target:
            if high >= self.largest or math.isnan(self._at(high)):
                return math.nan
            low, high = high, min(high * 2, self.largest)
        for _ in range(_MOST_STEPS):
            at_low, at_high = (math.log(max(self._at(x), 1e-300) / target) for x in (low, high))
            best = low if abs(at_low) < abs(at_high) else high
            if abs(math.log(max(self._at(best), 1e-300) / target)) <= _TOLERANCE:
                return best
            share = min(max(-at_low / (at_high - at_low), 0.1), 0.9) if at_high > at_low else 0.5
            middle = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
            if not low < middle < high:
                break
            if self._at(middle) >= target:
                high = middle
            else:
                low = middle
        return high  # a jump of KL: the first ε beyond it
