"""Continue a forward from a depth, and read a state through the model's own tail.

Both run the model's own forward in evaluation mode, with the blocks below stubbed, so masks, position embeddings and
caches are the model's business. Whether a model allows it (some blocks look back past the one below) is tried, see
:mod:`dynprobe.probes._road`, and not assumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynprobe.errors import ModelError, SiteError, UsageError
from dynprobe.probes._backend import need_hooks
from dynprobe.probes._dispatch import attach_to
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import Batch
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._outputs import logits_of, ordinary
from dynprobe.probes._roles import Site
from dynprobe.probes._stub import stubbed
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import Tape

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["logits_of", "readout", "resume", "select_last"]


def select_last(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the logits at each row's last real token, ``[batch, vocab]``."""
    columns = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), columns.to(logits.device)]


def resume(
    tape: Tape, at: int, states: Float[Tensor, "batch pos *slot dim"] | None = None, *, logits: str | None = "all"
) -> Tape:
    """Run the model from depth ``at`` on, starting from given states; blocks below do not run.

    ``dp.resume(tape, at=d, states=tape.states[d])`` is the identity: it gives the tape's own logits and later states.
    Where a model's upper blocks look back past the state they are given, which is tried once for each model, the slow
    road is taken: all blocks run, and the state that enters block ``at`` is replaced on its way.

    Args:
        tape: A tape of one whole forward (not of generation), with its token ids.
        at: Depth to start from, 0 … L; the states enter block ``at``.
        states: ``[k · batch, pos, dim]``: k versions of each of the tape's rows, version-major; None takes the tape's
            own states.
        logits: ``"all"``, ``"last"`` or None.

    Returns:
        A tape of depths ``at … L``.

    Raises:
        SiteError: If the depth does not exist, or is not on the tape and no states were given.
        UsageError: If the number of rows is no multiple of the tape's, or the width is not the model's.

    Example:
        >>> from dynprobe.probes import capture
        >>> from dynprobe.testing import tiny_llama
        >>> tape = capture(tiny_llama(), torch.tensor([[5, 6, 7, 8]]), logits="all")
        >>> again = resume(tape, at=2, states=tape.states[2])
        >>> again.depths[0], torch.allclose(again.logits, tape.logits, atol=1e-5)
        (2, True)
    """
    subject = tape.subject
    if subject is None or tape.token_ids is None:
        raise ModelError("resume needs a tape made by dp.capture or dp.record, with token ids")
    need_hooks(subject, "resuming a forward from a depth")
    if not 0 <= at <= subject.n_layers:
        raise SiteError(f"depth {at} was asked for; {subject.name} has depths 0…{subject.n_layers}")
    if logits not in ("last", "all", None):
        raise UsageError(f"logits={logits!r}; it is 'last', 'all' or None")
    width = tape.states[at].shape[-1] if states is None or at in tape.depths else subject.dim
    start = _fitting(subject, tape.states[at] if states is None else states, width)
    rows, times = len(tape.token_ids), len(start) // len(tape.token_ids)
    if times < 1 or times * rows != len(start) or start.shape[1] != tape.token_ids.shape[1]:
        raise UsageError(
            f"states are {tuple(start.shape)}; a tape of {rows} rows × {tape.token_ids.shape[1]} columns needs "
            f"[k·{rows}, {tape.token_ids.shape[1]}, dim]"
        )
    batch = Batch(
        tape.token_ids.repeat(times, 1).to(subject.device),
        tape.mask.repeat(times, 1).to(subject.device),
        tape.row_keys * times,
        tuple(int(n) for n in tape.n_prompt) * times,
    )

    read: list[Site] = [("resid_post", layer) for layer in range(max(at - 1, 0), subject.n_layers)]
    if at == 0:
        read.insert(0, ("resid_pre", 0))
    instrument = Instrument(subject, read, **batch.rows)
    attachment = None
    below = at if at and subject.resumable else 0
    if below == 0:
        attachment = attach_to(subject.door(at), write=lambda _: start)
    try:
        with (
            evaluating(subject.model),
            torch.no_grad(),
            stubbed(subject, below, lambda index: start if index == at - 1 else None),
            instrument,
        ):
            output = subject.model(**batch.model_inputs(subject))
    finally:
        if attachment is not None:
            attachment.remove()
    found = None if logits is None else logits_of(output)
    if found is not None and logits == "last":
        found = select_last(found, batch.mask)
    return instrument.tape(found)


def _fitting(subject: Subject, states: Tensor, width: int | None) -> Tensor:
    """The states on the device and in the dtype of the model's own; a copy where the model would overwrite them."""
    if width is not None and states.shape[-1] != width:
        raise UsageError(f"states of width {states.shape[-1]} were given; {subject.name} has width {width} there")
    return states.to(device=subject.device, dtype=subject.state_dtype, copy=subject.mutates)


def readout(subject: Subject, h: Float[Tensor, "*place dim"]) -> Float[Tensor, "*read vocab"]:
    """Send last-depth states through the model's own final norm and head.

    Args:
        subject: The subject.
        h: ``[…, dim]``, e.g. ``[batch, pos, dim]``: a state of depth L (or of any depth: the logit lens).

    Returns:
        Logits with the same leading axes, ``[…, vocab]``.

    Raises:
        UsageError: If the width is not the model's.

    Example:
        >>> from dynprobe.probes import capture
        >>> from dynprobe.testing import tiny_llama
        >>> subject = tiny_llama()
        >>> tape = capture(subject, torch.tensor([[5, 6, 7, 8]]), logits="all")
        >>> torch.allclose(readout(subject, tape.states[subject.n_layers]), tape.logits, atol=1e-5)
        True
    """
    h = _fitting(subject, h, subject.dim)
    # Without a batch axis each state is a row of one token: no context length can be too short for it.
    unit = h.shape[-1:] if subject.n_slots is None else h.shape[-2:]
    outer = h.shape[: -len(unit)]
    states = h.reshape(-1, outer[-1] if len(outer) >= 2 else 1, *unit)
    ids = torch.zeros(states.shape[:2], dtype=torch.long, device=subject.device)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), ("readout",) * len(ids), (ids.shape[1],) * len(ids))
    last = subject.n_layers - 1
    stubs = stubbed(subject, subject.n_layers, lambda index: states if index == last else None)
    with evaluating(subject.model), torch.no_grad(), stubs:
        logits = ordinary(logits_of(subject.model(**batch.model_inputs(subject))))
    return logits.reshape(*outer, logits.shape[-1])
