"""Looped models that are known: which modules run again and again, and how their number of iterations is chosen.

A loop is described, never guessed: that a module runs several times in a forward does not make what it returns a state
of one track. What is described is tried like everything else: the calls are counted in a trial forward, and each must
map a state to a state. Any other loop is named by hand, ``dp.load(model, loop="path.of.module")``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._turns import Loop

__all__ = ["KNOWN_LOOPS", "known_loop"]


def _cem(model: Any) -> Loop | None:
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


def _csm(model: Any) -> Loop:
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


def _albert(model: Any) -> Loop:
    """ALBERT: each group of layers runs ``num_hidden_layers / num_hidden_groups`` times."""
    paths = [n for n, m in model.named_modules() if type(m).__name__ == "AlbertLayerGroup"]

    def choose(one: Any, T: int) -> None:
        one.config.num_hidden_layers = T * len(paths)

    return Loop(
        tuple((path, "core", i if len(paths) > 1 else -1) for i, path in enumerate(paths)), track="resid",
        iterations=lambda m: m.config.num_hidden_layers // len(paths), set_iterations=choose,
    )  # fmt: skip


#: ``model_type`` → the loops of such a model.
KNOWN_LOOPS: dict[str, Callable[[Any], Loop | None]] = {"dynprobe_cem": _cem, "dynprobe_csm": _csm, "albert": _albert}


def known_loop(model: nn.Module) -> Loop | None:
    """Return the loops of a model of a known type, or None.

    Example:
        >>> import torch
        >>> known_loop(torch.nn.Linear(2, 2)) is None
        True
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return KNOWN_LOOPS[kind](model) if kind in KNOWN_LOOPS else None
