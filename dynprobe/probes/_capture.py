"""Read and push a model: one call that captures, and two contexts around the user's own call.

``capture`` runs the forward itself, so it does so in evaluation mode and puts every module back into its own mode
afterwards. ``record`` and ``perturb`` watch a forward that is the user's: its mode, its gradients and its devices are
left alone, and a model in training mode is recorded with its dropout on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, SiteError, UsageError
from dynprobe.probes._backend import on_backend
from dynprobe.probes._calibration import Calibration
from dynprobe.probes._clock import Step
from dynprobe.probes._discover import blocks_by_pattern, discover
from dynprobe.probes._dispatch import attach_to, calls_of
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import Prompts, make_batch, tokenize
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._last import last_only
from dynprobe.probes._noise import row_key_from_tokens
from dynprobe.probes._reading import sites_to_read
from dynprobe.probes._resume import logits_of, select_last
from dynprobe.probes._roles import Site, Writer
from dynprobe.probes._same_model import check_same_model
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import Tape
from dynprobe.probes._where import Where
from dynprobe.probes._writers import Perturbs, make_writers

__all__ = ["Recording", "as_subject", "capture", "perturb", "record"]


class _Halt(Exception):  # noqa: N818 - control flow, not an error
    """The last wanted state was read; the rest of the forward is not needed."""


#: What was found in modules that were handed over bare; without the module itself, which would never be freed.
_FOUND: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def as_subject(model: nn.Module | Subject) -> Subject:
    """Return the subject of a module; the module is searched once, and left in the mode it was in.

    Raises:
        ModelError: If no chain of blocks is found.
    """
    if isinstance(model, Subject):
        return model
    found = _FOUND.get(model)
    if found is None or not _still_there(model, found):
        with evaluating(model):
            subject = discover(model, name=type(model).__name__)
        found = {f.name: getattr(subject, f.name) for f in fields(subject) if f.name != "model"}
        _FOUND[model] = found
    return Subject(model=model, **found)


def _still_there(model: nn.Module, found: dict[str, Any]) -> bool:
    """Whether the blocks are the ones that were found (layers may have been cut or replaced since).

    A loop is looked at anew: how often it runs is a setting that shows nowhere else.
    """
    if found["turns"]:
        return False
    try:
        return blocks_by_pattern(model, found["block_path"]) == found["blocks"]
    except SiteError:
        return False


def _halt_after(subject: Subject, read: Sequence[Site]) -> Any:
    """Stop the forward behind the last wanted state; returns the handle of the hook that does so."""

    def halt(*_: Any) -> None:
        raise _Halt

    layer = max((layer - (component == "resid_pre") for component, layer in read), default=subject.n_layers - 1)
    if layer < 0:
        if subject.turns:
            return attach_to(subject.door(0), read=halt)  # the last of the readers there
        return subject.blocks[0].register_forward_pre_hook(halt)

    def halt_at_turn(module: nn.Module, *_: Any) -> None:
        if calls_of(module) == subject.turns[layer].call + 1:
            raise _Halt

    # Behind all other hooks, so that whatever reads the last state (its energy) has read it.
    return subject.blocks[layer].register_forward_hook(halt_at_turn if subject.turns else halt)


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
    calibration: Calibration | None = None,
    backend: str | None = None,
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
        calibration: From :func:`dynprobe.calibrate`; needed by the scales ``coordstd`` and ``cov``.
        backend: What reads and writes: ``"hooks"`` or ``"nnsight"``; None takes the subject's own.

    Returns:
        The tape.

    Raises:
        SiteError: If a layer or component does not exist.
        PromptError: If there is nothing to feed.
        CalibrationError: If the scale needs a calibration that is not there, or it is another model's.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> tape = capture(tiny_llama(), [[5, 6, 7], [8, 9]], where="layers=all")
        >>> tape.states[2].shape, tape.logits.shape
        (torch.Size([2, 3, 32]), torch.Size([2, 96]))
    """
    if logits not in ("last", "all", None):
        raise UsageError(f"logits={logits!r}; it is 'last', 'all' or None")
    subject = on_backend(as_subject(subject), backend)
    rows = tokenize(subject, prompts, chat_template=chat_template)
    if row_keys is None and chat_template == "auto":
        # Every templated prompt begins with the same turn markers; its own first tokens are what names it.
        row_keys = [row_key_from_tokens(row) for row in tokenize(subject, prompts)]
    batch = make_batch(subject, rows, side=padding, row_keys=row_keys)
    read = sites_to_read(subject, Where.parse(where))
    writers = _writers(subject, perturb, calibration)
    instrument = Instrument(subject, read, writers, grad=grad, energies=True, **batch.rows)
    inputs = batch.model_inputs(subject)
    if logits == "last" and bool(batch.mask[:, -1].all()):
        inputs |= last_only(subject)
    found: Tensor | None = None
    with evaluating(subject.model), instrument, nullcontext() if grad else torch.no_grad():
        if logits is None and instrument.halt():
            subject.model(**inputs)
        elif logits is None:
            handle = _halt_after(subject, read)
            try:
                subject.model(**inputs)
            except _Halt:
                instrument.end_step()
            finally:
                handle.remove()
        else:
            found = logits_of(subject.model(**inputs))
            if logits == "last":
                found = found[:, -1] if found.shape[1] == 1 else select_last(found, batch.mask)
    instrument.check_fired()
    return instrument.tape(found)


def _writers(subject: Subject, perturb: Perturbs, calibration: Calibration | None) -> list[Writer]:
    """Writers of a caller's perturbation, with a calibration that is this model's or says of no model."""
    if calibration is not None and calibration.header.get("weights") is not None:
        check_same_model(subject, calibration)
    return make_writers(subject, perturb, calibration=calibration)


class Recording:
    """A tape that fills while the user's own call runs; everything of :class:`Tape` is reachable on it."""

    def __init__(self, instrument: Instrument) -> None:
        self._instrument = instrument
        self._tape: Tape | None = None
        self._last: Step | None = None

    @property
    def tape(self) -> Tape:
        """The tape of the latest sequence the model was called on."""
        last = self._instrument.steps[-1] if self._instrument.steps else None
        if self._tape is None or last is not self._last:
            self._tape, self._last = self._instrument.tape(), last
        return self._tape

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tape, name)

    def __getitem__(self, key: tuple[str, int] | str) -> Tensor:
        return self.tape[key]

    def __repr__(self) -> str:
        return repr(self.tape) if self._instrument.steps else "Recording(nothing yet)"


@contextmanager
def record(model: nn.Module | Subject, where: str | Where = "layers=all", *, grad: bool = False) -> Iterator[Recording]:
    """Record the states of whatever the user calls inside the block: ``model(...)`` or ``model.generate(...)``.

    Rows are recorded as they run. Under beam search the rows of a tape are beams, and a beam may go on with another's
    text; sample or decode greedily where a row should be one text.

    Args:
        model: The model itself, or a subject.
        where: What to keep.
        grad: Keep the graph.

    Yields:
        A recording; ``.states``, ``.mask`` and all else of a tape. A new sequence replaces the one before.

    Raises:
        SelfTestError: If a block did not run exactly once per forward, so that the tape would have a hole.

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
    with Instrument(subject, sites_to_read(subject, Where.parse(where)), grad=grad) as instrument:
        yield Recording(instrument)
        if instrument.step is None:
            instrument.check_fired()


@contextmanager
def perturb(
    model: nn.Module | Subject,
    perturb: Perturbs,
    *,
    row_keys: Sequence[str] | None = None,
    calibration: Calibration | None = None,
) -> Iterator[Instrument]:
    """Perturb whatever the user calls inside the block.

    Args:
        model: The model itself, or a subject.
        perturb: What to write.
        row_keys: Names of the rows for the noise; default a hash of each row's first real tokens.
        calibration: Needed by the scales ``coordstd`` and ``cov``.

    Yields:
        The instrument; ``.passport()`` is the size of what was written to the latest sequence, in every unit.

    Raises:
        CalibrationError: If the scale needs a calibration that is not there, or it is another model's.
        ModelError: If the model was not called inside the block.
        SelfTestError: If a block did not run exactly once per forward.

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
    writers = _writers(subject, perturb, calibration)
    if not writers:
        raise UsageError("dp.perturb needs a perturbation, e.g. dp.perturb(model, 'alpha=0.1')")
    with Instrument(subject, (), writers, row_keys=row_keys) as instrument:
        yield instrument
        if not instrument.steps:
            raise ModelError("the model was not called inside dp.perturb, so nothing was perturbed")
        if instrument.step is None:
            instrument.check_fired()
