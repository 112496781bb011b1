"""Modules by the last part of their path, with or without a head around the model."""

from __future__ import annotations

from torch import nn

from dynprobe.errors import ModelError

__all__ = ["path_of"]


def path_of(model: nn.Module, last: str) -> str:
    """Path of the first module called ``last``, with or without a head around it."""
    found = next((name for name, _ in model.named_modules() if name == last or name.endswith(f".{last}")), None)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} has no module {last}, through which its loop was expected to go; describe it "
            "yourself: dp.load(model, loop=dynprobe.probes.Loop(…))"
        )
    return found
