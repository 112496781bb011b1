"""Huginn, after the code of its authors, which is not in transformers: tested on a small stand-in only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import ModelError
from dynprobe.probes._noise import gaussian_rows
from dynprobe.probes._turns import Loop, Start, leading
from dynprobe.probes.adapters._paths import path_of

__all__ = ["huginn"]


def huginn(model: Any) -> Loop:
    """Huginn: the blocks of ``core_block``, fed by an adapter that takes the state beside the prelude's output.

    Its first state is noise. In dynprobe's own forwards it is a draw from the same truncated normal that depends on the
    position alone, so that a text has one trajectory, alone or in a batch. It reads no attention mask and numbers
    columns, so padding stands on the right.
    """
    config = model.config
    if getattr(config, "test_time_noise", 0) > 0:
        raise ModelError(
            "a model with test_time_noise adds noise to every update, so its iterations do not repeat themselves; "
            "set model.config.test_time_noise = 0"
        )
    core = path_of(model, "core_block")

    def choose(one: Any, T: int) -> None:
        one.config.mean_recurrence = T

    return Loop(
        ((f"{core}.{len(model.get_submodule(core)) - 1}", "core", -1),), prefix=True, arguments=_noise_of_position,
        start=Start(path_of(model, "adapter"), "input", 0, leading(int(config.n_embd))),
        iterations=lambda m: int(m.config.mean_recurrence), set_iterations=choose,
    )  # fmt: skip


def _noise_of_position(model: Any, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """The forward's arguments with a first state of one row of noise per position, and without positions of our own."""
    config = model.config
    if not bool(mask[:, 0].all()):
        raise ModelError(
            f"{type(model).__name__} reads no attention mask, so a text behind padding would be another text; "
            "padding='right' keeps it whole"
        )
    std, width = float(config.init_values["std"]), int(config.n_embd)
    noise = torch.from_numpy(gaussian_rows(0, ["first-state"], "core.0", np.arange(mask.shape[1])[None], width))
    if std > 0:  # a normal cut off at 3 SD, through the two distribution functions
        low, high = (torch.special.ndtr(torch.tensor(edge, dtype=torch.float64)) for edge in (-3.0, 3.0))
        noise = torch.special.ndtri(low + (high - low) * torch.special.ndtr(noise.double()))
        noise = noise.clamp(-3, 3) * std * float(config.init_values["embed_scale"])
    else:
        noise = torch.zeros_like(noise)
    like = next(p for p in model.parameters() if p.is_floating_point())
    states = noise.to(like).expand(len(mask), -1, -1)
    return {name: v for name, v in inputs.items() if name != "position_ids"} | {"input_states": states}
