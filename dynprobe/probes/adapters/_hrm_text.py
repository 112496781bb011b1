"""HRM-Text, after the code of its authors."""

from __future__ import annotations

from typing import Any

from dynprobe.probes._turns import Loop, Start, scaled
from dynprobe.probes.adapters._paths import path_of

__all__ = ["hrm_text"]


def hrm_text(model: Any) -> Loop:
    """HRM-Text: the slow state z_H, refined by ``H_module`` once per cycle; it goes into the head as it is.

    The fast state z_L, which ``H_module`` takes in as well and which lives on between cycles, is another track and is
    not read. z_H begins as the scaled embedding, which no module hands out. The number of cycles that a model was made
    with shows in the slots of its cache (``num_hidden_layers``).
    """

    def choose(one: Any, T: int) -> None:
        one.config.H_cycles = T

    def made_with(one: Any) -> int:
        config = one.config
        return int(config.num_hidden_layers // (config.num_layers_per_stack * (config.L_cycles + 1)))

    start = Start(path_of(model, "embed_tokens"), lens=scaled(float(model.config.embedding_scale)))
    return Loop(
        ((path_of(model, "H_module"), "H", -1),), track="core", prefix=True, start=start,
        iterations=lambda m: m.config.H_cycles, set_iterations=choose, trained=made_with,
    )  # fmt: skip
