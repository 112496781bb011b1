"""CEM, this package's reference model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dynprobe.probes._turns import Loop

__all__ = ["cem"]


def cem(model: Any) -> Loop | None:
    """CEM: in each layer the attention's recursion, then the MLP's; sub-layers that do not iterate are turns too.

    With ``norm_mode="inplace"`` a recursion begins at the normed state and not at the residual stream: then there is no
    one track through the iterations, and the model is read by its layers.
    """
    if model.config.norm_mode == "inplace":
        return None
    modules = []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last == "step":
            modules.append((name, str(module.kind), int(model.get_submodule(parent).layer)))
    kinds = list(dict.fromkeys(kind for _, kind, _ in modules))

    def choose(one: Any, T: int) -> None:
        one.set_steps(T, T)

    def restore(one: Any) -> Callable[[], None]:
        core = one.base_model
        steps = core.steps_attention, core.steps_mlp

        def back() -> None:
            core.steps_attention, core.steps_mlp = steps

        return back

    return Loop(
        tuple(modules), track="resid", iterations=lambda m: max(m.base_model.steps_attention, m.base_model.steps_mlp),
        set_iterations=choose, restore=restore, trained=lambda m: max(m.config.steps_attention, m.config.steps_mlp),
        components=((kinds[0], "resid_mid"),) if len(kinds) > 1 else (), energy=_cem_energy,
    )  # fmt: skip


def _cem_energy(step: Any, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """E at the point that the step's energy is taken at, where the sub-layer is one that descends an energy."""
    if not hasattr(step, "curvature_bound"):  # an ordinary Llama sub-layer inside a CEM
        return None
    field = kwargs.get("field", args[1] if len(args) > 1 else None)
    return step.energy(step.argument(state), field)
