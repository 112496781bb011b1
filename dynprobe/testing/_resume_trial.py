"""Is ``dp.resume`` right on this architecture? Every depth, identity and perturbed, against a forward of its own.

The truth is computed without anything of dynprobe's: a plain hook on the block's module puts the wanted states in the
place of what the block handed out, and all blocks run. What is under trial is the resumed forward on the same rows. A
model type is

- ``fast``: the blocks below the depth do not run, and the logits are the truth's at every depth;
- ``fallback``: dynprobe found by itself that this would be wrong and let all blocks run; the logits are the truth's;
- ``refused``: dynprobe found no chain of blocks in the model and said so;
- ``left out``: the type cannot be built small, or is no decoder of texts;
- ``wrong``: anything else. There must be none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.errors import DynprobeError
from dynprobe.probes import Subject, Tape, capture, discover, resume
from dynprobe.testing._architectures import causal_types, tiny_causal_lm
from dynprobe.testing._own_model import own_inputs

__all__ = ["LIMIT", "ROWS", "ResumeVerdict", "logits_from", "short_text", "try_resume"]

#: Largest deviation of a logit from the truth, in standard deviations of the logits.
LIMIT = 1e-4
#: Token ids of the rows of a trial, of three lengths.
ROWS = ((5, 17, 9, 33, 21, 64, 90, 11, 42), (7, 100, 23, 51, 8, 77), (3, 88, 19))


@dataclass(frozen=True)
class ResumeVerdict:
    """What the trial of one model type found.

    Attributes:
        model_type: Name in transformers.
        model_class: Its class.
        verdict: ``fast``, ``fallback``, ``refused``, ``left out`` or ``wrong``.
        layers: Number of blocks found; 0 where none were.
        blocks: Pattern of their names.
        worst: Largest deviation of any logit from the truth, in standard deviations of the logits; NaN if not measured.
        reason: Why it is not ``fast``; empty where it is.
    """

    model_type: str
    model_class: str
    verdict: str
    layers: int = 0
    blocks: str = ""
    worst: float = math.nan
    reason: str = ""


@contextmanager
def _instead(module: nn.Module, side: str, state: Tensor, call: int = 0) -> Iterator[None]:
    """The truth's own hook: the first tensor of what enters or leaves one call of the module is replaced."""
    calls = itertools.count()

    def leave(_: nn.Module, _args: Any, output: Any) -> Any:
        if next(calls) != call:
            return output
        if isinstance(output, Tensor):
            return state
        if hasattr(output, "_replace"):  # a named tuple
            return output._replace(**{output._fields[0]: state})
        return (state, *output[1:]) if isinstance(output, tuple) else [state, *output[1:]]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    if side == "input":
        handle: Any = module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        handle = module.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


def _type_of(model: Any) -> str:
    """Name of a model's type in transformers; empty where it has none."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def logits_from(subject: Subject, tape: Tape, at: int, states: Tensor) -> Tensor:
    """The logits of the whole forward in which ``states`` enter block ``at``."""
    model: Any = subject.model
    times = len(states) // len(tape.mask)
    mask = tape.mask.repeat(times, 1)
    assert tape.token_ids is not None
    site = (subject.blocks[0], "input") if at == 0 else (subject.blocks[at - 1], "output")
    call = subject.turns[at - 1].call if at and subject.turns else 0
    if at == 0 and _type_of(model) == "hrm_text":  # its first state is its embedding, scaled
        site, states = (model.model.embed_tokens, "output"), states / model.config.embedding_scale
    with _instead(*site, states, call), torch.no_grad():
        return model(**own_inputs(model, tape.token_ids.repeat(times, 1), mask)).logits.clone()


def _inner_calls(subject: Subject, below: int, run: Callable[[], Tape]) -> tuple[Tape, int]:
    """Run, and count the calls of modules inside the blocks below a depth."""
    calls: list[int] = []
    own = {id(m) for block in subject.blocks[below:] for m in block.modules()}
    inner = [m for b in subject.blocks[:below] for m in b.modules() if m is not b and id(m) not in own]
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in inner]
    try:
        _ = subject.resumable  # hooks of others on the blocks make it another question, whose answer costs forwards
        calls.clear()
        return run(), len(calls)
    finally:
        for handle in handles:
            handle.remove()


def try_resume(model_type: str, *, seed: int = 0, build: Callable[..., Any] = tiny_causal_lm) -> ResumeVerdict:
    """Resume a tiny random model of one type from every depth and compare with the truth.

    Three rows of different lengths, padded on either side; at each depth two versions at once, the recorded state and
    one pushed by noise of a tenth of its size.

    Args:
        model_type: Name in transformers.
        seed: Seed of weights and noise.
        build: What makes the model.

    Returns:
        The verdict.

    Example:
        >>> try_resume("gpt2").verdict
        'fast'
    """
    model_class = causal_types().get(model_type, "")
    try:
        model = build(model_type, seed=seed)
    except DynprobeError as error:
        reason = short_text(error).removeprefix(f"{model_type} is left out: ").removeprefix(f"{model_type} ")
        return ResumeVerdict(model_type, model_class, "left out", reason=reason)
    model_class = type(model).__name__
    try:
        subject = discover(model, name=model_type)
        tapes = [capture(subject, [list(r) for r in ROWS], logits="all", padding=side) for side in ("left", "right")]
    except DynprobeError as error:
        return ResumeVerdict(model_type, model_class, "refused", reason=short_text(error))
    try:
        return _compare(subject, tapes, model_type, seed)
    except Exception as error:  # a crash in the middle of a resume is as bad as a wrong number
        text = f"{type(error).__name__}: {short_text(error)}"
        return ResumeVerdict(model_type, model_class, "wrong", subject.n_layers, subject.block_path, reason=text)


def _compare(subject: Subject, tapes: list[Tape], model_type: str, seed: int) -> ResumeVerdict:
    draw = torch.Generator().manual_seed(seed)
    fast = subject.resumable  # asked before anything is counted: the answer costs forwards of its own
    worst, ran, unmoved = 0.0, 0, _idle(subject, tapes[0])
    for tape in tapes:
        assert tape.logits is not None
        real = tape.mask
        spread = float(tape.logits[real].double().std())
        for at in range(subject.n_layers + 1):
            clean = tape.states[at]
            noise = torch.randn(clean.shape, generator=draw) * clean[real].std() * 0.1
            states = torch.cat([clean, clean + noise])
            wanted = logits_from(subject, tape, at, states)
            again, calls = _inner_calls(subject, at, partial(resume, tape, at, states))
            ran += calls
            assert again.logits is not None
            difference = (again.logits.double() - wanted.double())[real.repeat(2, 1)].abs()
            finite = bool(torch.isfinite(difference).all())
            worst = max(worst, float(difference.max()) / spread if finite else math.inf)
            clean_rows, pushed = wanted.chunk(2)
            if float((pushed - clean_rows)[real].abs().max()) < 10 * LIMIT * spread:
                unmoved.append(at)
    verdict, reason = ("fast", "") if fast else ("fallback", subject.road.reason)
    if fast and ran:
        verdict, reason = "wrong", f"modules of blocks below the depth ran {ran} times"
    if worst > LIMIT:
        verdict, reason = "wrong", f"the {verdict} road was taken and the logits are off"
    if unmoved:
        verdict = "wrong"
        reason = f"at depths {sorted(set(unmoved))} the block does nothing or no logit moves: the trial shows nothing"
    model_class = type(subject.model).__name__
    return ResumeVerdict(model_type, model_class, verdict, subject.n_layers, subject.block_path, worst, reason)


def _idle(subject: Subject, tape: Tape) -> list[int]:
    """Depths whose block hardly changes its state: left out or not, nobody could tell."""
    states, real = tape.states, tape.mask
    return [
        at
        for at in range(subject.n_layers)
        if float((states[at + 1] - states[at])[real].norm()) < 0.01 * float(states[at][real].norm())
    ]


def short_text(error: BaseException) -> str:
    """What an error says, on one line and of a bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "…"
