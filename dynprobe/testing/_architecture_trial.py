"""Is everything that dynprobe says of this architecture true? Seven questions, each with an answer of its own.

- ``blocks``: are the blocks found, as many as the configuration says?
- ``states``: are the captured states and logits, bit for bit, what plain hooks and the model's own
  ``output_hidden_states`` hand out, in batches padded on either side and in a single row?
- ``null``: does a write of strength 0 at every block leave states and logits bit for bit as they are?
- ``alone``: does a row of a padded batch give what it gives alone?
- ``resume``: is a forward that begins at a depth right (:mod:`dynprobe.testing._resume_trial`)?
- ``generation``: are greedy texts those of the own ``generate``, alone and in a padded batch, and are the states
  captured on the way those of one whole forward over the text (:mod:`dynprobe.testing._writing_trial`)?
- ``push``: does a write of α = 0.1 at the default site change that state by a tenth of its norm, nothing before it, and
  the logits to what plain hooks make of the same states?

An answer is ``right``; ``fallback``, where dynprobe finds by itself that its ordinary road would be wrong and takes
another, which is tried too; ``refused``, where it says that it cannot; or ``wrong``. There must be no ``wrong``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynprobe.errors import DynprobeError
from dynprobe.probes import (
    Check,
    Perturb,
    Subject,
    Tape,
    capture,
    discover,
    identical,
    make_writers,
)
from dynprobe.testing._architectures import causal_types, tiny_causal_lm
from dynprobe.testing._own_model import OwnModel
from dynprobe.testing._own_states import compare_own_states
from dynprobe.testing._resume_trial import LIMIT, ROWS, logits_from, short_text, try_resume
from dynprobe.testing._writing_trial import Answer, try_writing

__all__ = ["CHECKS", "Answer", "ArchitectureVerdict", "try_architecture"]

CHECKS = ("blocks", "states", "null", "alone", "resume", "generation", "push")
VERDICTS = ("right", "fallback", "refused", "left out", "wrong")

#: Largest deviation of a padded row from the row alone that counts as rounding, in SD of the logits.
_ALONE = 1e-4
#: Largest error of the size of a write, relative to the size that was asked for.
_SIZE = 1e-4

#: Model type → setting that counts its blocks, where it is not one of those of the others.
_COUNTED = {"longcat_flash": "num_layers", "hrm_text": "H_cycles"}
_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer")


@dataclass(frozen=True)
class ArchitectureVerdict:
    """What the trial of one model type found.

    Attributes:
        model_type: Name in transformers.
        model_class: Its class.
        layers: Number of blocks found; 0 where none were.
        blocks: Pattern of their names.
        answers: The answer to each of :data:`CHECKS`.
    """

    model_type: str
    model_class: str
    layers: int = 0
    blocks: str = ""
    answers: Mapping[str, Answer] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The worst of the answers."""
        return max((a.verdict for a in self.answers.values()), key=VERDICTS.index, default="wrong")

    @property
    def only_resume(self) -> bool:
        """Whether everything is right, but that all blocks run where a forward is resumed."""
        others = {name: answer.verdict for name, answer in self.answers.items() if answer.verdict != "right"}
        return others == {"resume": "fallback"}


def everywhere(model_type: str, model_class: str, verdict: str, reason: str) -> ArchitectureVerdict:
    """The verdict on a type that has the same answer to every question."""
    return ArchitectureVerdict(model_type, model_class, answers=dict.fromkeys(CHECKS, Answer(verdict, reason)))


def try_architecture(
    model_type: str, *, checks: Sequence[str] = CHECKS, seed: int = 0, build: Callable[..., Any] = tiny_causal_lm
) -> ArchitectureVerdict:
    """Put questions to a tiny random model of one type.

    Args:
        model_type: Name in transformers.
        checks: Which questions.
        seed: Seed of weights and noise.
        build: What makes the model.

    Returns:
        The answers.

    Example:
        >>> try_architecture("llama").verdict
        'right'
    """
    from dynprobe.protocols._selfchecks import model_checks

    model_class = causal_types().get(model_type, "")
    try:
        model = build(model_type, seed=seed)
    except DynprobeError as error:
        reason = short_text(error).removeprefix(f"{model_type} is left out: ").removeprefix(f"{model_type} ")
        return everywhere(model_type, model_class, "left out", reason)
    model_class = type(model).__name__
    twin = copy.deepcopy(model)
    rows = [list(row) for row in ROWS]
    try:
        subject = discover(model, name=model_type)
        tapes = {side: capture(subject, rows, logits="all", padding=side) for side in ("left", "right")}
    except DynprobeError as error:
        return everywhere(model_type, model_class, "refused", short_text(error))
    tapes["one"] = capture(subject, rows[:1], logits="all")
    own = _own(subject, twin)
    said: Check | str = ""
    if {"alone", "generation"} & {*checks}:
        try:
            said = model_checks(subject, rows, fresh=True)["alone"]  # what a run consults
        except DynprobeError as error:
            said = f"runs refuse the model: {short_text(error)}"
    asked: dict[str, Callable[[], Answer]] = {
        "blocks": lambda: _blocks(subject),
        "states": lambda: _states(subject, own, tapes),
        "null": lambda: _null(subject, tapes),
        "alone": lambda: _alone(subject, tapes, said),
        "resume": lambda: _resume(model_type, seed, model),
        "generation": lambda: try_writing(subject, own, said),
        "push": lambda: _push(subject, tapes),
    }
    answers = {name: _asked(question) for name, question in asked.items() if name in checks}
    return ArchitectureVerdict(model_type, model_class, subject.n_layers, subject.block_path, answers)


def _asked(question: Callable[[], Answer]) -> Answer:
    try:
        return question()
    except DynprobeError as error:
        return Answer("refused", short_text(error))
    except Exception as error:  # a crash in the middle is as bad as a wrong number
        return Answer("wrong", f"{type(error).__name__}: {short_text(error)}")


def _own(subject: Subject, twin: Any) -> OwnModel:
    names = {id(module): name for name, module in subject.model.named_modules()}
    blocks = [names[id(block)] for block in subject.blocks]
    if twin.config.model_type == "hrm_text":  # its first state is its embedding, scaled
        return OwnModel(twin, blocks, "model.embed_tokens", twin.config.embedding_scale)
    return OwnModel(twin, blocks)


def _blocks(subject: Subject) -> Answer:
    config: Any = subject.model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    names = [_COUNTED[config.model_type]] if config.model_type in _COUNTED else _COUNTS
    expected = next((n for name in names if isinstance(n := getattr(text, name, None), int)), None)
    if expected is None:
        return Answer("wrong", "no setting of the configuration counts blocks")
    if expected != subject.n_layers:
        return Answer("wrong", f"{subject.n_layers} blocks found, {expected} configured")
    return Answer("right")


def _states(subject: Subject, own: OwnModel, tapes: Mapping[str, Tape]) -> Answer:
    notes: list[str] = []
    for name, tape in tapes.items():
        assert tape.token_ids is not None
        assert tape.logits is not None
        real = tape.mask
        states, logits = own.forward(tape.token_ids, real)
        if len(states) != len(tape.states):
            return Answer("wrong", f"{name}: {len(tape.states)} states captured, plain hooks see {len(states)}")
        for depth, (ours, theirs) in enumerate(zip(tape.states, states, strict=True)):
            if not identical(ours[real], theirs.reshape(ours.shape)[real]):
                return Answer("wrong", f"{name}: the state of depth {depth} is not what a plain hook sees")
        if not identical(tape.logits[real], logits[real]):
            return Answer("wrong", f"{name}: the logits are not those of the bare model")
        # Last, since asking for them leaves hooks of the library's on the copy.
        same, note = compare_own_states(own, subject.final_norm, tape)
        if not same:
            return Answer("wrong", f"{name}: {note}")
        notes.append(note)
    return Answer("right", next((note for note in notes if note), ""))


def _null(subject: Subject, tapes: Mapping[str, Tape]) -> Answer:
    spec = Perturb(alpha=0.0, layers="all", component="resid_post")
    for name, tape in tapes.items():
        written = _again(subject, tape, name, spec)
        assert tape.logits is not None
        assert written.logits is not None
        pairs = [(tape.logits, written.logits), *zip(tape.states, written.states, strict=True)]
        if not all(identical(a[tape.mask], b[tape.mask]) for a, b in pairs):
            return Answer("wrong", f"{name}: alpha=0 changes states or logits")
    return Answer("right")


def _again(subject: Subject, tape: Tape, name: str, spec: Perturb) -> Tape:
    rows = [list(row) for row in ROWS[: len(tape.mask)]]
    return capture(subject, rows, perturb=spec, logits="all", padding="left" if name == "left" else "right")


def _worst(a: Tensor, b: Tensor) -> float:
    difference = (a.double() - b.double()).abs()
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else math.inf


def from_alone(subject: Subject, tape: Tape, rows: list[list[int]]) -> float:
    """Largest deviation of a row's logits (in their SD) and states (relative to their norm) from the row alone."""
    assert tape.logits is not None
    found = 0.0
    spread = float(tape.logits[tape.mask].double().std())
    for i, row in enumerate(rows):
        alone = capture(subject, [row], logits="all")
        assert alone.logits is not None
        here = tape.mask[i]
        found = max(found, _worst(tape.logits[i][here], alone.logits[0]) / spread)
        for padded, bare in zip(tape.states, alone.states, strict=True):
            size = float(bare[0].double().flatten(1).norm(dim=-1).max())
            found = max(found, _worst(padded[i][here], bare[0]) / size)
    return found


def _alone(subject: Subject, tapes: Mapping[str, Tape], said: Check | str) -> Answer:
    rows = [list(row) for row in ROWS]
    by_side = {side: from_alone(subject, tapes[side], rows) for side in ("left", "right")}
    value = max(by_side.values())
    bad = [f"{side} padding: {found:.1g}" for side, found in by_side.items() if not found <= _ALONE]
    if isinstance(said, str):
        return Answer("refused" if bad else "right", "; ".join([*bad, said]), value)
    if bad and said.passed:
        return Answer("wrong", f"{', '.join(bad)}, and the self-test does not say so", value)
    if not bad:
        return Answer("right", value=value)
    equal = [row[:3] for row in rows]
    together = from_alone(subject, capture(subject, equal, logits="all"), equal)
    if not together <= _ALONE:
        return Answer("wrong", f"rows of one length differ from rows alone by {together:.1g}", together)
    return Answer("fallback", f"{', '.join(bad)}; rows of one length share a forward", value)


def _resume(model_type: str, seed: int, model: Any) -> Answer:
    found = try_resume(model_type, seed=seed, build=lambda *_, **__: model)
    verdict = "right" if found.verdict == "fast" else found.verdict
    return Answer(verdict, found.reason, found.worst)


def _push(subject: Subject, tapes: Mapping[str, Tape]) -> Answer:
    spec = Perturb(alpha=0.1)
    ((component, number),) = make_writers(subject, spec)[0].sites
    depth = number + (component == "resid_post")
    worst = 0.0
    for name, tape in tapes.items():
        pushed = _again(subject, tape, name, spec)
        assert tape.logits is not None
        assert pushed.logits is not None
        first = tape.mask & (tape.positions == 0)
        written = tape.mask & ~first
        for at in range(depth):
            if not identical(tape.states[at][tape.mask], pushed.states[at][tape.mask]):
                return Answer("wrong", f"{name}: a write at depth {depth} changes depth {at}")
        before, after = tape.states[depth].double(), pushed.states[depth].double()
        if not identical(tape.states[depth][first], pushed.states[depth][first]):
            return Answer("wrong", f"{name}: the first position is changed, which was not to be written")
        size = (after - before)[written].norm(dim=-1) / before[written].norm(dim=-1)
        worst = max(worst, float((size / 0.1 - 1).abs().max()))
        if not worst <= _SIZE:
            return Answer("wrong", f"{name}: the write is off by {worst:.1g} of the size that was asked for", worst)
        spread = float(tape.logits[tape.mask].double().std())
        if _worst(pushed.logits[written], tape.logits[written]) < 10 * LIMIT * spread:
            return Answer("wrong", f"{name}: no logit moves")
        wanted = logits_from(subject, tape, depth, pushed.states[depth])
        off = _worst(pushed.logits[tape.mask], wanted[tape.mask]) / spread
        if not off <= LIMIT:
            return Answer("wrong", f"{name}: logits are {off:.1g} SD from those of the same states by plain hooks", off)
    return Answer("right", value=worst)
