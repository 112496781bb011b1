"""Adapters: how the blocks or loops of a model family are found, where a trial forward alone cannot tell.

A plain decoder needs none: its blocks are found by watching one forward. A loop is described, never guessed, for that a
module runs several times in a forward does not make what it returns a state of one track; and a family whose longest
chain of blocks is not about tokens needs the pattern of the one that is. What an adapter says is tried like everything
else: the calls are counted in a trial forward, and each must map a state to a state. Without one, a loop or a pattern
is named by hand: ``dp.load(model, loop="path.of.module")``, ``dp.load(model, layers="path.of.blocks.*")``.

An adapter is a function of the model, one file in ``adapters/`` and one line below, under its ``model_type``. It
returns a :class:`Loop`, a pattern of blocks, or None where this model is read like any other. Another package adds one
through the entry-point group ``dynprobe.adapters``; :func:`dynprobe.testing.check_adapter` tries it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from dynprobe._plugins import Registry
from dynprobe.errors import PluginError
from dynprobe.probes._turns import Loop
from dynprobe.probes._unreadable import refuse_ambiguous

__all__ = ["ADAPTERS", "Adapter", "adapted"]

Adapter: TypeAlias = Callable[[Any], "Loop | str | None"]


def _plugin(name: str, found: Any) -> Adapter:
    if not callable(found):
        raise TypeError(f"it is a {type(found).__name__}, not a function of the model")
    adapter: Adapter = found
    return adapter


ADAPTERS: Registry[Adapter] = Registry(
    "dynprobe.adapters", "adapter",
    {
        "dynprobe_cem": "dynprobe.probes.adapters._cem:cem",
        "dynprobe_csm": "dynprobe.probes.adapters._csm:csm",
        "albert": "dynprobe.probes.adapters._albert:albert",
        "hrm_text": "dynprobe.probes.adapters._hrm_text:hrm_text",
        "huginn_raven": "dynprobe.probes.adapters._huginn:huginn",
        "ouro": "dynprobe.probes.adapters._ouro:ouro",
    },
    _plugin,
)  # fmt: skip


def adapted(model: nn.Module) -> tuple[str | None, Loop | None, dict[str, Any]]:
    """Return what an adapter says of a model: the pattern of its blocks or its loop, and what is recorded of it.

    Raises:
        ModelError: The model has several chains of blocks, and none is named.
        PluginError: The adapter of this family cannot be loaded, or said something else.

    Example:
        >>> import torch
        >>> adapted(torch.nn.Linear(2, 2))
        (None, None, {})
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    if kind not in ADAPTERS:
        refuse_ambiguous(model)
        return None, None, {}
    said, facts = ADAPTERS[kind](model), {} if kind in ADAPTERS.builtin else {"adapter": kind}
    if said is None:
        refuse_ambiguous(model)
    if said is not None and not isinstance(said, Loop | str):
        raise PluginError(
            f"the adapter {ADAPTERS.plugin(kind) or kind} said {said!r} of {type(model).__name__}; it should return a "
            "Loop, a pattern of blocks, or None. Name them by hand: dp.load(model, layers=…) or loop=…"
        )
    return (said, None, facts) if isinstance(said, str) else (None, said, facts)
