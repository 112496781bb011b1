"""CSM-style models, this package's reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynprobe.errors import ModelError
from dynprobe.probes._turns import Loop

__all__ = ["csm"]


def csm(model: Any) -> Loop:
    if model.config.carry == "refined":
        raise ModelError(
            "a CSM-style model with carry='refined' refines one position after the other, each from where the one "
            "before ended, so that its iterations are not one track over the text; dynprobe reads carry='memory'"
        )
    path = next(name for name, module in model.named_modules() if type(module).__name__ == "CsmRefinement")

    def choose(one: Any, T: int) -> None:
        one.config.num_iterations = T

    return Loop(
        ((path, "core", -1),), prefix=True, iterations=lambda m: m.config.num_iterations, set_iterations=choose,
        trained=lambda m: getattr(m.config, "trained_iterations", None), energy=_csm_energy,
    )  # fmt: skip


def _csm_energy(step: Any, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    drive, gates = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in ((1, "drive"), (2, "gates")))
    energy: Tensor = step.energy(state, drive, gates)
    return energy
