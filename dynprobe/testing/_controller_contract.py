"""Is a controller one? The contract as a suite that its author runs, in one line, before anybody else uses it.

What a controller computes is its own affair. What is tried here is what everything around it relies on: that it decides
from a row alone, keeps what it remembers in its memory and nowhere else, and leaves nothing behind. All texts are given
token by token, so that two runs differ in nothing but what is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dynprobe.controllers import Controller, Steering
from dynprobe.errors import CalibrationError, ModelError
from dynprobe.probes import (
    Calibration,
    Instrument,
    Subject,
    Where,
    identical,
    live_hooks,
    load,
    make_batch,
    sites_to_read,
)
from dynprobe.probes._decode import can_shrink
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._outputs import logits_of
from dynprobe.testing._suite import Suite

__all__ = ["CONTROLLER_CHECKS", "check_controller"]

#: What is tried, in this order.
CONTROLLER_CHECKS = ("detached", "repeatable", "idle", "quiet", "alone", "leaving", "reordered", "rewound")

_PROMPTS = ([40, 41, 42, 43, 44, 45, 46], [50, 51, 52], [60, 61, 62, 63, 64])
_N_NEW, _REORDERED_AT, _REWOUND_AT = 9, 4, 6
_EVERY = Where.parse("layers=all")
_BOOKS = ("row", "pos", "active", "site")
#: Largest difference of a state in a batch and alone, in its SDs, by the bytes of a number; larger is no rounding.
_ROUNDING = {2: 0.2, 4: 1e-3, 8: 1e-6}


_ON_SELF = "what is remembered of a row belongs in the memory that start() returns, not on self"


@dataclass(eq=False)
class _Trace:
    """What a run left behind, by row and position: states of all depths, logits to choose from, what was done."""

    states: dict[tuple[int, int], Tensor]
    chosen: dict[tuple[int, int], Tensor]
    actions: pd.DataFrame


def check_controller(
    make: Callable[[], Controller],
    subject: Subject | None = None,
    calibration: Calibration | None = None,
    *,
    only: str | None = None,
) -> tuple[str, ...]:
    """Try whether a controller keeps the contract.

    ``detached`` nothing stays on the model, also after an error; ``repeatable`` a second sequence and a second
    controller give the same bits as the first, and the prompt of the next sequence finds nothing of the last;
    ``idle`` a controller that is asked to act where it calls itself idle does nothing there; ``quiet`` a run in which
    nothing was written has the bits of a run without controller; ``alone`` a row in a padded
    batch is treated as by itself; ``leaving`` so is one whose neighbours end and leave; ``reordered`` so is one that
    changes places, as beams do; ``rewound`` taking tokens back and giving them again is as if it had not happened.

    Args:
        make: Returns a new controller.
        subject: A language model with a cache; default the zoo's ``tiny-llama``.
        calibration: Of that model; made here if the controller asks for one.
        only: One check, by name.

    Returns:
        The checks that were made; ``quiet`` is left out where the controller wrote, ``rewound`` where the model's cache
        cannot be cut.

    Raises:
        SelfTestError: If one fails; the message says which and where.
        ModelError: If the model takes no cache.

    Example:
        >>> from dynprobe.controllers import Controller
        >>> class Halve(Controller):
        ...     writes = "layers=1"
        ...     def act(self, state, site, seen, memory):
        ...         return 0.5 * state if seen.decoding else state
        >>> check_controller(Halve)
        ('detached', 'repeatable', 'idle', 'alone', 'leaving', 'reordered', 'rewound')
    """
    subject = subject if subject is not None else load("tiny-llama")
    if not can_shrink(subject):
        raise ModelError(f"{subject.name} takes no cache, so nothing can act between its tokens; take another model")
    with torch.no_grad(), evaluating(subject.model):
        return _Suite(make, subject, _calibration(make, subject, calibration)).run(only)


def _calibration(make: Callable[[], Controller], subject: Subject, given: Calibration | None) -> Calibration | None:
    if given is not None:
        return given
    try:
        Steering(make(), subject)
    except CalibrationError:
        from dynprobe.protocols import calibrate

        return calibrate(subject)
    return None


class _Suite(Suite):
    kind, checks = "controllers", CONTROLLER_CHECKS

    def __init__(self, make: Callable[[], Controller], subject: Subject, calibration: Calibration | None) -> None:
        self.make, self.subject, self.calibration = make, subject, calibration
        vocab = subject.vocab_size or 100
        draws = np.random.default_rng(0).integers(3, vocab, (len(_PROMPTS), _N_NEW))
        self.prompts = [[token % vocab for token in prompt] for prompt in _PROMPTS]
        self.new = draws.tolist()
        self.rounding = _ROUNDING[subject.dtype.itemsize]
        self.name = make().id or type(make()).__name__

    @cached_property
    def together(self) -> _Trace:
        """All rows in one padded batch."""
        return self.fed(self.prompts, self.new)

    @cached_property
    def by_themselves(self) -> list[_Trace]:
        """Each row alone."""
        return [self.fed([prompt], [new]) for prompt, new in zip(self.prompts, self.new, strict=True)]

    def detached(self) -> None:
        subject = self.subject
        ids = torch.tensor([self.prompts[0]], device=subject.device)
        before = logits_of(subject.model(ids))
        hooks = live_hooks(subject.model)
        for error in (False, True):
            try:
                with Instrument(subject, (), [self.steering()]):
                    subject.model(ids)
                    if error:
                        raise InterruptedError
            except InterruptedError:
                pass
        if live_hooks(subject.model) != hooks or not identical(before, logits_of(subject.model(ids))):
            self.fail("detached", "the model does not give the same bits as before, once the controller is gone")

    def repeatable(self) -> None:
        first = self.together
        again = self.fed(self.prompts, self.new)
        self.compare("repeatable", first, again, None, "two new controllers on the same text", exact=True)
        one = self.steering()
        self.fed(self.prompts[::-1], self.new, one)
        second = self.fed(self.prompts, self.new, one)
        self.compare(
            "repeatable", first, second, None, f"a controller's first and its second sequence ({_ON_SELF})", exact=True
        )

    def idle(self) -> None:
        asked = self.fed(self.prompts, self.new, _Asked(self.make(), self.subject, self.calibration))
        self.compare("idle", self.together, asked, None, "a run and one where it was asked though idle", exact=True)

    def quiet(self) -> bool:
        if (self.together.actions["energy"] > 0).any():
            return False
        none = self.fed(self.prompts, self.new, Steering(Controller(), self.subject))
        for at, state in none.states.items():
            if not identical(state, self.together.states[at]):
                self.fail("quiet", f"nothing was written, yet row {at[0]} position {at[1]} has other bits")
        return True

    def alone(self) -> None:
        for row, trace in enumerate(self.by_themselves):
            self.compare("alone", trace, self.together, row, "a row by itself and the same row in a padded batch")

    def leaving(self) -> None:
        lengths = (3, _N_NEW, 6)
        short = self.fed(self.prompts, [new[:n] for new, n in zip(self.new, lengths, strict=True)])
        for row, trace in enumerate(self.by_themselves):
            self.compare("leaving", trace, short, row, "a row by itself and one whose neighbours left the batch")

    def reordered(self) -> None:
        swapped = self.fed(self.prompts, self.new, order=np.array([2, 0, 1]))
        for row, trace in enumerate(self.by_themselves):
            self.compare("reordered", trace, swapped, row, "a row by itself and one that changed places in the batch")

    def rewound(self) -> bool:
        try:
            back = self.fed(self.prompts, self.new, self.steering(remember=True), rewind=3)
        except _CannotCut:
            return False
        self.compare(
            "rewound", self.together, back, None, f"a run and one with tokens taken back and given again ({_ON_SELF})"
        )
        return True

    def steering(self, *, remember: bool = False) -> Steering:
        return Steering(self.make(), self.subject, self.calibration, remember=remember)

    def fed(
        self,
        prompts: Sequence[Sequence[int]],
        new: Sequence[Sequence[int]],
        steering: Steering | None = None,
        *,
        order: np.ndarray | None = None,
        rewind: int = 0,
    ) -> _Trace:
        """Feed prompts and then their continuations token by token; rows leave when theirs is over.

        Args:
            prompts: Token ids.
            new: The tokens that follow each.
            steering: What steers; a new one of the controller otherwise.
            order: Put the rows into this order on the way.
            rewind: Take so many tokens back on the way, and give them again.
        """
        subject = self.subject
        steering = steering if steering is not None else self.steering()
        batch = make_batch(subject, [list(p) for p in prompts], side="left")
        chosen: dict[tuple[int, int], Tensor] = {}
        rows, t = list(range(len(prompts))), 0
        with Instrument(subject, sites_to_read(subject, _EVERY), [steering], **batch.rows) as instrument:
            inputs = batch.model_inputs(subject, cache=True)
            mask = inputs["attention_mask"]
            while True:
                output = subject.model(**inputs)
                cache, last = output.past_key_values, instrument.steps[-1].positions.max(axis=1)
                chosen |= {(row, int(last[i])): logits_of(output)[i, -1] for i, row in enumerate(rows)}
                if rewind and t == _REWOUND_AT:
                    _cut(cache, rewind)
                    instrument.rewind(rewind)
                    mask, t, rewind = mask[:, :-rewind], t - rewind, 0
                going = np.flatnonzero([t < len(new[row]) for row in rows])
                if order is not None and t == _REORDERED_AT:
                    going, order = order, None
                if not len(going):
                    break
                if list(going) != list(range(len(rows))):
                    index = torch.from_numpy(going).to(mask.device)
                    type(cache).reorder_cache(cache, index)  # the class's: an instance's own may tell the controller
                    instrument.select(going)
                    rows, mask = [rows[i] for i in going], mask[index]
                tokens = torch.tensor([[new[row][t]] for row in rows], device=mask.device)
                mask, t = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), t + 1
                inputs = {subject.token_argument: tokens, "attention_mask": mask, "past_key_values": cache}
                inputs["use_cache"] = True
                if subject.accepts("position_ids"):
                    inputs["position_ids"] = mask.sum(1, keepdim=True) - 1
            tape = instrument.tape()
        states: dict[tuple[int, int], Tensor] = {}
        for row, column in np.argwhere(tape.mask.numpy()).tolist():
            at = row, int(tape.positions[row, column])
            states[at] = torch.stack([tape.states[d][row, column].float().flatten() for d in tape.depths])
        return _Trace(states, chosen, steering.actions())

    def compare(
        self, check: str, one: _Trace, other: _Trace, row: int | None, what: str, *, exact: bool = False
    ) -> None:
        """Refuse two runs that should be the same; ``row`` of the other is the only row of the one."""
        for name, mine, theirs in (("states", one.states, other.states), ("logits", one.chosen, other.chosen)):
            for (r, pos), a in mine.items():
                b = theirs.get((r if row is None else row, pos))
                if b is None:  # the row had left
                    continue
                if not (identical(a, b) if exact else self.close(a, b)):
                    self.fail(check, f"{what} differ in the {name} of position {pos} (row {r if row is None else row})")
        books, also = one.actions, other.actions
        if row is not None:
            also = also[also["row"] == row].assign(row=0).reset_index(drop=True)
            books = books.iloc[: len(also)]
        if len(books) != len(also) or any((books[c].to_numpy() != also[c].to_numpy()).any() for c in _BOOKS):
            self.fail(check, f"{what} differ in what was active and where it was written")
        for name in ("signal", "gain", "energy"):
            x, y = (frame[name].to_numpy(np.float64) for frame in (books, also))
            if not np.allclose(x, y, rtol=0 if exact else 0.01, atol=0 if exact else 1e-4, equal_nan=True):
                self.fail(check, f"{what} differ in their {name}")

    def close(self, a: Tensor, b: Tensor) -> bool:
        a, b = a.float(), b.float()
        known = a.isfinite()
        if not torch.equal(known, b.isfinite()):
            return False
        some = a[known]
        if not len(some):
            return True
        spread = float(some.std(correction=0)) or float(some.abs().max())
        return float((some - b[known]).abs().max()) <= self.rounding * max(spread, 1e-12)


class _Asked(Steering):
    """Lets the controller act in every forward, also where it said that it would do nothing."""

    def begin(self, step: Any) -> None:
        super().begin(step)
        self._idle = False


class _CannotCut(Exception):  # noqa: N818 - control flow, not an error
    """The cache cannot be cut."""


def _cut(cache: Any, columns: int) -> None:
    try:
        cache.crop(-columns)  # negative: so many of the latest
    except (AttributeError, NotImplementedError, ModelError) as error:
        raise _CannotCut from error
