"""Rows that write together: does each give, while it writes, what it gives alone, and what a whole forward gives?

Reading a padded batch may be right and writing from it wrong: a model may choose its keys among those of the padding,
or count positions in its cache from the first column. And a cache may be another model: decoding with it is then not
the forward without it, and arms that write are not to be set against arms that are read. Both are tried on two rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dynprobe.errors import DynprobeError
from dynprobe.probes._capture import capture
from dynprobe.probes._chunks import out_of_memory
from dynprobe.probes._generate import Sampling, generate
from dynprobe.probes._inputs import make_batch
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._reading import sites_to_read
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import Tape
from dynprobe.probes._where import Where

__all__ = ["WhileWriting", "while_writing"]

#: Tokens that each row writes; all but the last are fed.
_NEW = 4


@dataclass(frozen=True)
class WhileWriting:
    """Largest deviations of a state while a row writes, relative to the largest norm at its depth.

    Attributes:
        together: Of a row in a padded batch, from the row alone; NaN where the model cannot write.
        whole: Of a row alone, from one whole forward over its text; NaN likewise.
        reason: What the model said where one of them could not be measured.
    """

    together: float = math.nan
    whole: float = math.nan
    reason: str = ""


def while_writing(subject: Subject, rows: Sequence[Sequence[int]]) -> WhileWriting:
    """Let the longest and the shortest of some rows write a few tokens, together and alone.

    Args:
        subject: The subject.
        rows: Token ids, of more than one length.
    """
    if not hasattr(subject.model, "generate"):
        return WhileWriting(reason="the model has no generate()")
    ordered = sorted(([*row] for row in rows), key=len)
    pair = [ordered[-1], ordered[0]]
    whole = 0.0
    alone: list[tuple[list[int], Tape]] = []
    try:
        for row in pair:
            ((new,), tape) = _written(subject, [row])
            alone.append((new, tape))
            once = capture(subject, [[*row, *new[:-1]]], logits=None)
            whole = max(whole, _off(tape, 0, once, len(row) + len(new) - 1))
    except Exception as error:  # whatever a model says that cannot write: then nobody reads what it wrote
        if out_of_memory(error):
            raise
        return WhileWriting(reason=_said(error))
    try:
        texts, tape = _written(subject, pair)
    except DynprobeError as error:  # it says itself that its rows cannot write together
        return WhileWriting(math.inf, whole, _said(error))
    together = 0.0
    for i, (row, (new, single)) in enumerate(zip(pair, alone, strict=True)):
        # Where two tokens are as good as equal, rounding may choose; what was fed until then has to agree.
        same = next((n for n, (a, b) in enumerate(zip(texts[i], new, strict=True)) if a != b), len(new) - 1)
        together = max(together, _off(tape, i, single, len(row) + same))
    return WhileWriting(together, whole)


def _written(subject: Subject, rows: list[list[int]]) -> tuple[list[list[int]], Tape]:
    batch = make_batch(subject, rows, side="left")
    instrument = Instrument(subject, sites_to_read(subject, Where.parse("layers=all")), **batch.rows)
    new = generate(subject, batch, Sampling(_NEW, stop_at_eos=False), instrument)
    return new, instrument.tape()


def _off(tape: Tape, row: int, other: Tape, n_tokens: int) -> float:
    """Largest deviation of a row's first tokens from those of the only row of another tape."""
    pairs = zip(tape.states, other.states, strict=True)
    kept, theirs = tape.mask[row], other.mask[0]
    return max(_relative(a[row][kept.to(a.device)], b[0][theirs.to(b.device)], n_tokens) for a, b in pairs)


def _relative(a: Tensor, b: Tensor, n_tokens: int) -> float:
    if min(len(a), len(b)) < n_tokens:
        return math.inf
    x, y = a[:n_tokens].double(), b[:n_tokens].double().to(a.device)
    found = float((x - y).abs().max()) / max(float(y.norm(dim=-1).max()), 1e-12)
    return found if math.isfinite(found) else math.inf


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
