"""Where a model takes its input.

A model may be spread over several devices, and parts of it may be on the disk or in the memory of the CPU while nobody
needs them: such parameters stand on the ``meta`` device until accelerate's hooks bring them in. So the device of a
model is where its first parameter is, and where that is nowhere, where the hooks say that it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dynprobe.errors import ModelError

__all__ = ["device_of", "refuse_without_weights"]


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's input has to be on.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    first = next(model.parameters(), None)
    if first is None:
        return torch.device("cpu")
    if first.device.type != "meta":
        return first.device
    there = _executes_on(model)
    if there is not None:
        return there
    return next((p.device for p in model.parameters() if p.device.type != "meta"), first.device)


def _executes_on(model: nn.Module) -> torch.device | None:
    """Where the hooks of accelerate bring the parameters to; the root's hook knows, and each offloaded module's."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            place = getattr(one, "execution_device", None)
            if place is not None and not isinstance(place, dict):
                return torch.device(f"cuda:{place}") if isinstance(place, int) else torch.device(place)
    return None


def refuse_without_weights(model: nn.Module, name: str) -> None:
    """Refuse a model that was only laid out.

    Raises:
        ModelError: If it has parameters without storage that nothing will bring in.
    """
    if any(getattr(module, "_hf_hook", None) is not None for module in model.modules()):
        return  # accelerate spread it, and brings in what a module needs
    for path, module in model.named_modules():
        empty = [key for key, p in module.named_parameters(recurse=False) if p.device.type == "meta"]
        if empty:
            raise ModelError(
                f"{name} has no weights in place: {path + '.' if path else ''}{empty[0]} is on the meta device, where "
                "a tensor has a shape and no numbers. Load it by its name, dp.load('…', device_map='auto'), or fill it "
                "with model.to_empty(device='cpu') and load_state_dict(…)"
            )
