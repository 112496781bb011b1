"""Find, in any decoder, where the residual stream enters, is refined, and leaves.

There is no table of model names. One short trial forward is watched: the blocks are the longest list of modules that
each map a state to a state of the same shape, called once each and in order, every one taking in what the one before
gave out. The final norm is the first module that receives the last block's output. Attention and MLP outputs are the
two updates inside a block whose sum is exactly what the block adds. What is not found this way is reported as missing
and refused when asked for; nothing is guessed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dynprobe.errors import ModelError, SiteError, did_you_mean
from dynprobe.probes._adapters import adapted
from dynprobe.probes._placement import refuse_without_weights
from dynprobe.probes._subject import Subject
from dynprobe.probes._trained import warn_beyond
from dynprobe.probes._trial import watch
from dynprobe.probes._trial_calls import TrialError
from dynprobe.probes._trial_loop import watch_loop
from dynprobe.probes._turns import Loop
from dynprobe.probes._twins import refuse_tied
from dynprobe.probes._unreadable import refuse_unreadable

__all__ = ["blocks_by_pattern", "discover"]


def _path_of(model: nn.Module, getter: str) -> str | None:
    """Path of the module that ``model.<getter>()`` returns, or None."""
    function: Callable[[], nn.Module | None] | None = getattr(model, getter, None)
    if function is None:
        return None
    try:
        target = function()
    except (NotImplementedError, AttributeError):
        return None
    return next((name for name, module in model.named_modules() if module is target), None)


def blocks_by_pattern(model: nn.Module, pattern: str) -> tuple[nn.Module, ...]:
    names = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")]
    if not found:
        near = did_you_mean(pattern, {".".join([*n.split(".")[:-1], "*"]) for n in names if n.split(".")[-1].isdigit()})
        raise SiteError(f"layers={pattern!r} matches no module of {type(model).__name__}.{near}")
    return tuple(model.get_submodule(name) for name in found)


def discover(
    model: nn.Module,
    *,
    layers: str | None = None,
    loop: Loop | str | None = None,
    tokenizer: Any = None,
    name: str = "model",
    facts: dict[str, Any] | None = None,
    trial_input: Tensor | None = None,
) -> Subject:
    """Make a subject of a module by watching one short forward.

    Args:
        model: Any module; it is put into evaluation mode, since dropout would make every number random.
        layers: Pattern of the blocks' names (``"encoder.blocks.*"``); None finds them structurally.
        loop: What runs again and again: the path of a module, or a :class:`Loop`; its calls are then the depth axis.
        tokenizer: Tokenizer to keep with it.
        name: Name for tables.
        facts: Provenance to keep with it.
        trial_input: Input of the trial forward; None uses a few token ids. Where that fails, ``layers`` is believed
            without a trial, and what needs one (attention and MLP outputs, resume, readout) is refused.

    Returns:
        The subject.

    Raises:
        ModelError: If no chain of blocks is found, or the named modules do not run once each and in order.
        SiteError: If ``layers`` matches nothing.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> discover(net, layers="*", trial_input=torch.zeros(1, 2, 4)).n_layers
        3
    """
    model.eval()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder–decoder, whose two streams have positions of their own; dynprobe reads one stream. "
            "Pass one half alone: model.get_decoder()"
        )
    refuse_unreadable(model)
    refuse_without_weights(model, name)
    subject = Subject(model, tokenizer, name, facts=dict(facts or {}))
    subject.embedding = _path_of(model, "get_input_embeddings")
    subject.head = _path_of(model, "get_output_embeddings")
    named = layers is not None
    if loop is None and layers is None:
        layers, loop, found = adapted(model)
        subject.facts |= found
    if loop is not None:
        return _with_turns(subject, loop, trial_input)
    subject.block_path = layers or ""
    subject.blocks = blocks_by_pattern(model, layers) if layers is not None else ()
    try:
        trial = watch(model, subject.blocks or None, trial_input)
    except TrialError:
        if not named or trial_input is not None:  # what an adapter says is tried, or not believed
            raise
        return subject  # a module whose input we do not know: the first real call tells the rest
    subject.block_path = layers or trial.block_path
    for fact in (
        "blocks",
        "dim",
        "state_dtype",
        "chained",
        "final_norm",
        "updates",
        "sequential",
        "mutates",
        "wrappers",
    ):
        setattr(subject, fact, getattr(trial, fact))
    return subject


def _with_turns(subject: Subject, loop: Loop | str, trial_input: Tensor | None) -> Subject:
    """Fill in what a trial of a looped model shows."""
    described = loop if isinstance(loop, Loop) else Loop(((loop, "core", -1),))
    paths = [path for path, _, _ in described.modules]
    refuse_tied(subject.model, paths)
    trial, subject.turns = watch_loop(subject.model, described, trial_input)
    subject.loop = trial.loop
    subject.block_path = paths[0] if len(paths) == 1 else "+".join(dict.fromkeys(p.split(".")[-1] for p in paths))
    for fact in ("blocks", "dim", "state_dtype", "chained", "final_norm", "mutates", "wrappers"):
        setattr(subject, fact, getattr(trial, fact))
    warn_beyond(subject)
    return subject
