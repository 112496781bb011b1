"""Ouro, after the code of its authors, which is not in transformers: tested on a small stand-in only."""

from __future__ import annotations

from typing import Any

from dynprobe.errors import ModelError
from dynprobe.probes._turns import Loop
from dynprobe.probes.adapters._paths import path_of

__all__ = ["ouro"]


def ouro(model: Any) -> Loop:
    """Ouro: all layers and the final norm, again and again; the normed state is fed back and goes into the head."""
    inner = model.base_model
    for name in ("early_exit_step", "early_exit_threshold"):
        if getattr(model, name, None) is not None:
            raise ModelError(
                f"{type(model).__name__} with {name}={getattr(model, name)} reads its logits out of an earlier state "
                f"than its last; set model.{name} = None, and read any iteration with dp.readout"
            )

    def choose(one: Any, T: int) -> None:
        one.base_model.total_ut_steps = T

    norm = next((name for name, module in model.named_modules() if module is inner.norm), "norm")
    return Loop(
        ((norm, "core", -1),), prefix=True, start=path_of(model, "embed_tokens"),
        iterations=lambda m: m.base_model.total_ut_steps, set_iterations=choose,
        trained=lambda m: getattr(m.config, "total_ut_steps", None),
    )  # fmt: skip
