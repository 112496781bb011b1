"""Write texts under controllers, whether or not they take tokens back.

Without a controller that restarts, rows are decoded together as everywhere else. With one, rows differ in what is taken
back and when, so each is decoded alone: its text, its actions and its restarts cannot depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from dynprobe.controllers._controller import Controller
from dynprobe.controllers._steering import Steering
from dynprobe.errors import UsageError
from dynprobe.probes import Batch, Instrument, Sampling, Subject, generate, make_batch
from dynprobe.probes._restarts import Restart, Restarted, write_row

__all__ = ["Written", "generate_with", "why_not"]


@dataclass(frozen=True)
class Written:
    """Texts written under controllers.

    Attributes:
        new: New tokens of each row, end token included.
        restarts: Restarts of each row; empty lists where nothing can restart.
        actions: One table per steering, of all rows; see :meth:`Steering.actions`.
    """

    new: list[list[int]]
    restarts: list[list[Restarted]]
    actions: list[pd.DataFrame]

    def restart_table(self) -> pd.DataFrame:
        """Return the restarts as a table: ``row attempt at kept dropped seed temperature why``."""
        names = ["row", "attempt", "at", "kept", "dropped", "seed", "temperature", "why"]
        rows = [
            (row, r.attempt, r.at, r.kept, len(r.dropped), r.seed, r.temperature, r.why)
            for row, made in enumerate(self.restarts)
            for r in made
        ]
        return pd.DataFrame(rows, columns=names)


def why_not(controllers: Sequence[Controller], sampling: Sampling) -> str | None:
    """Return why controllers can do nothing under this way of choosing tokens, or None where they can.

    Example:
        >>> from dynprobe.controllers.recovery import Recync
        >>> why_not([Recync()], Sampling(max_new_tokens=32))
        'recovery.recync/1 has no effect under greedy decoding (temperature 0); give a temperature, such as 1.0'
    """
    for controller in controllers:
        name = controller.id or type(controller).__name__
        if controller.needs_sampling and sampling.temperature == 0:
            return f"{name} has no effect under greedy decoding (temperature 0); give a temperature, such as 1.0"
        if sampling.max_new_tokens < controller.min_new_tokens:
            return (
                f"{name} needs at least {controller.min_new_tokens} new tokens to be able to act; "
                f"max_new_tokens is {sampling.max_new_tokens}"
            )
    return None


def generate_with(
    subject: Subject,
    batch: Batch,
    sampling: Sampling,
    instrument: Instrument | Callable[[int], Instrument] | None,
    steerings: Sequence[Steering],
) -> Written:
    """Generate under controllers; rows are decoded one at a time where a controller may take tokens back.

    Args:
        subject: A language model.
        batch: Prompts, padded on the left or all of one length.
        sampling: How tokens are chosen.
        instrument: What is on the model meanwhile, the steerings among its writers. Where rows are decoded one at a
            time and there are several, a function that makes the instrument of row i: an instrument holds the notes of
            one sequence, and a writer may have a strength of its own for every row. None: the steerings alone.
        steerings: The controllers at work, in the order in which they act and are asked for restarts.

    Returns:
        Texts, restarts and what was done.

    Raises:
        UsageError: If a controller can do nothing so (:func:`why_not`), a steering is not on the instrument, or one
            instrument is given for several rows that are decoded one at a time.
        ModelError: If the model cannot generate, or its cache cannot give tokens back.
    """
    reason = why_not([s.controller for s in steerings], sampling)
    if reason is not None:
        raise UsageError(reason)
    if not any(s.controller.restarts for s in steerings):
        if callable(instrument):
            raise UsageError("a function that makes instruments is for controllers that restart; none of these does")
        made = instrument or Instrument(subject, (), steerings, **batch.rows)
        _check(made, steerings)
        new = generate(subject, batch, sampling, made)
        fed = batch.lengths.cpu().numpy() + [len(text) - 1 for text in new]
        return Written(new, [[] for _ in new], [s.actions(fed) for s in steerings])
    if isinstance(instrument, Instrument) and len(batch.mask) > 1:
        raise UsageError(
            f"{_names(steerings)} takes tokens back, so the {len(batch.mask)} rows are decoded one at a time; give a "
            "function that makes the instrument of a row in place of one instrument"
        )
    return _one_by_one(subject, batch, sampling, instrument, steerings)


def _one_by_one(
    subject: Subject,
    batch: Batch,
    sampling: Sampling,
    instrument: Instrument | Callable[[int], Instrument] | None,
    steerings: Sequence[Steering],
) -> Written:
    def wish(new: list[int], nll: list[float]) -> Restart | None:
        for steering in steerings:
            if steering.controller.restarts:
                wanted = steering.controller.restart(new, nll, steering.memory)
                if wanted is not None:
                    return wanted if wanted.why else replace(wanted, why=steering.name)
        return None

    written, actions = [], []
    for steering in steerings:
        steering.remember = True
    for row in range(len(batch.mask)):
        ids = batch.input_ids[row][batch.mask[row]].tolist()
        one = make_batch(subject, [ids], row_keys=[batch.row_keys[row]])
        if isinstance(instrument, Instrument):
            made = instrument
        else:
            made = instrument(row) if instrument is not None else Instrument(subject, (), steerings, **one.rows)
        _check(made, steerings)
        written.append(write_row(subject, one, sampling, wish, made))
        actions.append([s.actions().assign(row=row) for s in steerings])
    tables = [pd.concat([of_row[i] for of_row in actions], ignore_index=True) for i in range(len(steerings))]
    return Written([w.new for w in written], [w.restarts for w in written], tables)


def _check(instrument: Instrument, steerings: Sequence[Steering]) -> None:
    absent = [s.name for s in steerings if not any(s is writer for writer in instrument.writers)]
    if absent:
        raise UsageError(f"{absent[0]} is not among the instrument's writers, so it would never act; add its steering")


def _names(steerings: Sequence[Steering]) -> str:
    return ", ".join(dict.fromkeys(s.name for s in steerings if s.controller.restarts))
