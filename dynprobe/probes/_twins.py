"""Modules that are several objects and one set of weights.

A block may be shared in two ways: one module that is called again (ALBERT), or several modules tied to the same
parameters (Zamba). Who names one of the latter as a loop hears only one of its applications, and between them other
layers run: that is no iteration of one state.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dynprobe.errors import ModelError

__all__ = ["refuse_tied", "twins_of"]


def twins_of(model: nn.Module, path: str) -> list[str]:
    """Return the paths of other modules of the same kind that hold the same first parameter, ``path`` itself first.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)])
        >>> net[2].weight = net[0].weight
        >>> twins_of(net, "0"), twins_of(net, "1")
        (['0', '2'], ['1'])
    """
    module = model.get_submodule(path)
    held = next(module.parameters(), None)
    if held is None:
        return [path]
    others = [
        name
        for name, other in model.named_modules()
        if other is not module and type(other) is type(module) and next(other.parameters(), None) is held
    ]
    return [path, *others]


def refuse_tied(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse a loop that names one of several modules tied to the same weights, and not the others.

    Raises:
        ModelError: It does; the message names the others.
    """
    known = {name for name, _ in model.named_modules()}
    for path in paths:
        missing = [name for name in twins_of(model, path)[1:] if name not in paths] if path in known else []
        if missing:
            raise ModelError(
                f"the weights of {path} are shared by other modules ({', '.join(missing[:3])}"
                f"{', …' if len(missing) > 3 else ''}), so it alone is no loop: its block runs in each of them, with "
                "other layers in between. dp.load(model) without loop= reads the state after each layer; where the "
                "modules hand a state on to each other, name them all: dynprobe.probes.Loop(((path, 'core', -1), …))"
            )
