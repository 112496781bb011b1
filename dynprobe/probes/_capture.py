"""Read and push a model: one call that captures, and two contexts around the user's own call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, UsageError
from dynprobe.probes._inputs import Prompts, make_batch, tokenize
from dynprobe.probes._instrument import Instrument, Writer, sites_to_read
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._resume import logits_of, select_last
from dynprobe.probes._subject import Subject, discover
from dynprobe.probes._tape import Tape
from dynprobe.probes._where import Where
from dynprobe.probes._writers import Perturbs, make_writers

__all__ = ["Recording", "as_subject", "capture", "perturb", "record"]


class _Halt(Exception):  # noqa: N818 - control flow, not an error
    """The last wanted state was read; the rest of the forward is not needed."""


def as_subject(model: nn.Module | Subject) -> Subject:
    """Return the subject of a module, discovering it once per module."""
    if isinstance(model, Subject):
        return model
    known = model.__dict__.get("_dynprobe_subject")
    if not isinstance(known, Subject):
        training = model.training
        known = discover(model, name=type(model).__name__)
        model.train(training)
        object.__setattr__(model, "_dynprobe_subject", known)
    return known


def _last_needed(subject: Subject, instrument: Instrument) -> int:
    layers = [layer if c != "resid_pre" else layer - 1 for c, layer in instrument.read]
    return max(layers, default=subject.n_layers - 1)


def capture(
    subject: Subject | nn.Module,
    prompts: Prompts,
    where: str | Where = "layers=all",
    perturb: Perturbs = None,
    *,
    logits: str | None = "last",
    grad: bool = False,
    padding: str = "right",
    chat_template: str = "none",
    row_keys: Sequence[str] | None = None,
) -> Tape:
    """Run one forward over prompts and keep the states that ``where`` names.

    Rows keep the order of the prompts. Work that is not needed is not done: without logits the head does not run, and
    the forward stops after the last wanted layer.

    Args:
        subject: From :func:`dynprobe.load`, or a module.
        prompts: Texts, lists of token ids, or a LongTensor ``[batch, pos]``.
        where: What to keep, in the mini-language.
        perturb: What to write, in the mini-language, or :class:`dynprobe.Perturb`, or a callable
            ``fn(state, site) -> state``; several in a list.
        logits: ``"last"`` (``[batch, vocab]`` at each row's last token), ``"all"`` (``[batch, pos, vocab]``) or None.
        grad: Keep the graph, so that gradients flow back from the states.
        padding: Side of the padding, ``"right"`` or ``"left"``.
        chat_template: ``"auto"`` wraps texts as a user turn where the tokenizer has a template.
        row_keys: Names of the rows for the noise; default a hash of each row's first tokens.

    Returns:
        The tape.

    Raises:
        SiteError: If a layer or component does not exist.
        PromptError: If there is nothing to feed.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> tape = capture(tiny_llama(), [[5, 6, 7], [8, 9]], where="layers=all")
        >>> tape.states[2].shape, tape.logits.shape
        (torch.Size([2, 3, 32]), torch.Size([2, 96]))
    """
    if logits not in ("last", "all", None):
        raise UsageError(f"logits={logits!r}; it is 'last', 'all' or None")
    subject = as_subject(subject)
    rows = tokenize(subject, prompts, chat_template=chat_template)
    batch = make_batch(subject, rows, side=padding, row_keys=row_keys)
    read = sites_to_read(subject, Where.parse(where) if isinstance(where, str) else where)
    writers = make_writers(subject, perturb)
    instrument = Instrument(subject, read, writers, row_keys=batch.row_keys, n_prompt=batch.n_prompt, grad=grad)
    inputs = batch.model_inputs(subject)
    if logits == "last" and padding == "left" and subject.accepts("logits_to_keep"):
        inputs["logits_to_keep"] = 1
    found: Tensor | None = None
    with instrument, (nullcontext() if grad else torch.no_grad()):
        if logits is None:
            last = subject.blocks[_last_needed(subject, instrument)]

            def halt(*_: Any) -> None:
                raise _Halt

            handle = last.register_forward_hook(halt)
            try:
                with suppress(_Halt):
                    subject.model(**inputs)
            finally:
                handle.remove()
        else:
            found = logits_of(subject.model(**inputs))
    instrument.check_fired()
    if found is not None and logits == "last":
        found = found[:, -1] if found.shape[1] == 1 else select_last(found, batch.mask)
    return instrument.tape(found)


class Recording:
    """A tape that fills while the user's own call runs; everything of :class:`Tape` is reachable on it."""

    def __init__(self, instrument: Instrument) -> None:
        self._instrument = instrument
        self._tape: Tape | None = None

    @property
    def tape(self) -> Tape:
        """The tape of the latest sequence the model was called on."""
        if self._tape is None or not self._tape.mask.shape[1] == sum(s.positions.shape[1] for s in self._instrument.steps):
            self._tape = self._instrument.tape()
        return self._tape

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tape, name)

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        return self.tape[key]

    def __repr__(self) -> str:
        return repr(self.tape) if self._instrument.steps else "Recording(nothing yet)"


@contextmanager
def record(model: nn.Module | Subject, where: str | Where = "layers=all", *, grad: bool = False) -> Iterator[Recording]:
    """Record the states of whatever the user calls inside the block: ``model(...)`` or ``model.generate(...)``.

    Args:
        model: The model itself, or a subject.
        where: What to keep.
        grad: Keep the graph.

    Yields:
        A recording; ``.states``, ``.mask`` and all else of a tape. A new sequence replaces the one before.

    Example:
        >>> import torch
        >>> from dynprobe.testing import tiny_llama
        >>> subject = tiny_llama()
        >>> with record(subject.model) as tape:
        ...     _ = subject.model(torch.tensor([[1, 2, 3]]))
        >>> len(tape.states)
        4
    """
    subject = as_subject(model)
    instrument = Instrument(subject, sites_to_read(subject, Where.parse(where) if isinstance(where, str) else where), grad=grad)
    with instrument:
        yield Recording(instrument)


@contextmanager
def perturb(
    model: nn.Module | Subject,
    perturb: Perturbs,
    *,
    row_keys: Sequence[str] | None = None,
    calibration: Any = None,
) -> Iterator[Instrument]:
    """Perturb whatever the user calls inside the block.

    Args:
        model: The model itself, or a subject.
        perturb: What to write.
        row_keys: Names of the rows for the noise; default a hash of each row's first real tokens.
        calibration: Needed by the scales ``coordstd`` and ``cov``.

    Example:
        >>> import torch
        >>> from dynprobe.testing import tiny_llama
        >>> subject, ids = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> clean = subject.model(ids).logits
        >>> with perturb(subject, "alpha=0.5,layers=1"):
        ...     pushed = subject.model(ids).logits
        >>> torch.equal(clean[:, 0], pushed[:, 0]), torch.equal(clean[:, 1:], pushed[:, 1:])
        (True, False)
    """
    subject = as_subject(model)
    writers: list[Writer] = make_writers(subject, perturb, calibration=calibration)
    if not writers:
        raise UsageError("dp.perturb needs a perturbation, e.g. dp.perturb(model, 'alpha=0.1')")
    with Instrument(subject, (), writers, row_keys=row_keys) as instrument:
        yield instrument
        if not instrument.steps:
            raise ModelError("the model was not called inside dp.perturb, so nothing was perturbed")
