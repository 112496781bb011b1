"""Does a model write under dynprobe what it writes by itself, and are the states on the way those of the text?

Greedy, each of three rows alone and all in a batch padded on the left. Three things are compared: the tokens with those
of the model's own ``generate``; the states captured while it wrote with those that plain hooks see in the own
``generate``; and both with one whole forward over the finished text. The last may fail for a reason of the model's own,
whose decoding with a cache is then not its forward without one; this is told apart and said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprobe.errors import DynprobeError
from dynprobe.probes import (
    Batch,
    Check,
    Instrument,
    Sampling,
    Subject,
    Tape,
    Where,
    capture,
    generate,
    make_batch,
    sites_to_read,
)
from dynprobe.testing._own_model import OwnModel
from dynprobe.testing._resume_trial import ROWS, short_text

__all__ = ["Answer", "try_writing"]

_NEW = 6
#: Largest deviation of a state, relative to the largest norm at its depth, that counts as rounding.
_CLOSE = 1e-4
#: The same for two ways to compute one number: step by step with a cache, and at once. The self-test's own.
_SAME = 1e-3


@dataclass(frozen=True)
class Answer:
    """The answer to one question about one model type.

    Attributes:
        verdict: ``right``, ``fallback``, ``refused``, ``left out`` or ``wrong``.
        reason: Why it is not ``right``, or what is to be known where it is.
        value: The deviation it rests on; NaN where there is none.
    """

    verdict: str
    reason: str = ""
    value: float = math.nan


def _written(subject: Subject, batch: Batch) -> tuple[list[list[int]], Tape]:
    """The new tokens and the tape of dynprobe's own greedy decoding."""
    instrument = Instrument(subject, sites_to_read(subject, Where.parse("layers=all")), **batch.rows)
    sampling = Sampling(_NEW, stop_at_eos=False)
    new = generate(subject, batch, sampling, instrument)
    instrument.check_fired()
    return new, instrument.tape()


def _off(a: Tensor, b: Tensor) -> float:
    """Largest deviation of states ``[pos, dim]``, relative to the largest norm."""
    if a.shape != b.shape:
        return math.inf
    difference = (a.double() - b.double()).abs()
    size = max(float(b.double().flatten(1).norm(dim=-1).max()), 1e-12)
    return float(difference.max()) / size if bool(torch.isfinite(difference).all()) else math.inf


def _states_off(tape: Tape, row: int, others: list[Tensor], *, narrowed: bool = False) -> float:
    """Largest deviation of one row of a tape from states ``[pos, dim]`` by depth; ``narrowed``: of their last ones."""
    here = tape.mask[row]
    found = 0.0
    for ours, theirs in zip(tape.states, others, strict=True):
        mine = ours[row][here]
        found = max(found, _off(mine[-len(theirs) :] if narrowed else mine, theirs))
    return found


def try_writing(subject: Subject, own: OwnModel, said: Check | str) -> Answer:
    """Let a model write, alone and in a padded batch.

    Args:
        subject: The subject.
        own: The same model without dynprobe.
        said: What the self-test ``alone`` says, by which runs decide whether rows of several lengths share a batch;
            in words where runs refuse the model.
    """
    rows = [list(row) for row in ROWS]
    on_the_way = 0.0
    texts: list[list[int]] = []
    whole: list[list[Tensor]] = []
    for row in rows:
        batch = make_batch(subject, [row], side="left")
        try:
            theirs, states = own.text(batch.input_ids, batch.mask, _NEW)
        except Exception as error:  # whatever the library's own loop says on this type
            return _cannot(subject, batch, f"{type(error).__name__}: {short_text(error)}")
        ours, tape = _written(subject, batch)
        if ours != theirs:
            return Answer("wrong", f"alone it writes {ours[0]}, its own generate {theirs[0]}")
        seen = _states_off(tape, 0, [state[0] for state in states], narrowed=True)
        if seen > _CLOSE:
            return Answer("wrong", f"states captured while writing are {seen:.1g} from what plain hooks see", seen)
        forward = capture(subject, [row + ours[0][:-1]], logits=None)
        whole.append([state[0] for state in forward.states])
        on_the_way = max(on_the_way, _states_off(tape, 0, whole[-1]))
        texts.append(ours[0])
    apart = on_the_way > _SAME
    note = f"its own decoding with a cache deviates from one whole forward by {on_the_way:.1g}" if apart else ""
    if apart and isinstance(said, Check) and not said.detail["decode"] > said.limit:
        return Answer("wrong", f"{note}, and no self-test says so", on_the_way)
    together = _difference(subject, own, rows, texts, None if apart else whole)
    if not together:
        return Answer("fallback" if apart else "right", f"{note}; runs say so" if apart else "", on_the_way)
    if isinstance(said, str):
        return Answer("refused", f"in a padded batch {together}; {said}", on_the_way)
    if said.passed:
        return Answer("wrong", f"in a padded batch {together}, and no self-test says so", on_the_way)
    equal = [row[:3] for row in rows]
    alone = [_written(subject, make_batch(subject, [row], side="left"))[0][0] for row in equal]
    try:
        equals = _difference(subject, own, equal, alone, None)
    except DynprobeError as error:
        return Answer("fallback", f"one row at a time: {short_text(error)}", on_the_way)
    if equals:
        return Answer("wrong", f"in a batch of one length {equals}", on_the_way)
    return Answer("fallback", f"in a padded batch {together}; rows of one length write together", on_the_way)


def _difference(
    subject: Subject, own: OwnModel, rows: list[list[int]], texts: list[list[int]], whole: list[list[Tensor]] | None
) -> str:
    """In words, how rows that write together differ from rows that write alone; empty where they do not.

    Args:
        subject: The subject.
        own: The same model without dynprobe.
        rows: The prompts.
        texts: What each writes alone.
        whole: States of one whole forward over each row's text, by depth; None where they are not comparable.
    """
    batch = make_batch(subject, rows, side="left")
    try:
        ours, tape = _written(subject, batch)
    except DynprobeError as error:
        if "one row at a time" in str(error) and len({len(row) for row in rows}) == 1:
            raise
        return f"it refuses: {short_text(error)}"
    if ours != texts:
        theirs, _ = own.text(batch.input_ids, batch.mask, _NEW)
        return "it writes other texts" + (" (as does its own generate)" if ours == theirs else "")
    off = max(_states_off(tape, i, states) for i, states in enumerate(whole)) if whole is not None else 0.0
    return f"states are {off:.1g} off" if off > _SAME else ""


def _cannot(subject: Subject, batch: Batch, reason: str) -> Answer:
    """The model cannot write by itself: then it must not seem to under dynprobe."""
    try:
        _written(subject, batch)
    except DynprobeError as error:
        return Answer("refused", short_text(error))
    except Exception as error:
        same = f"{type(error).__name__}: {short_text(error)}" == reason
        return Answer("refused" if same else "wrong", f"its own generate fails: {reason}")
    return Answer("wrong", f"it writes although its own generate fails: {reason}")
