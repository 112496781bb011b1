"""Looped models that are known: which modules run again and again, and how their number of iterations is chosen.

A loop is described, never guessed: that a module runs several times in a forward does not make what it returns a state
of one track. What is described is tried like everything else: the calls are counted in a trial forward, and each must
map a state to a state. Any other loop is named by hand, ``dp.load(model, loop="path.of.module")``.

HRM-Text, Huginn and Ouro are described after the code of their authors. That of Huginn and Ouro is not in transformers
and needs the hub, so these two are tested on small stand-ins only. What looks like such a loop and is none that can be
read (latents that are no positions, shared weights between which other layers run) is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._noise import gaussian_rows
from dynprobe.probes._turns import Loop, Start, leading, scaled

__all__ = ["KNOWN_LOOPS", "known_loop", "refuse_ambiguous", "refuse_unreadable"]


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


def _path(model: nn.Module, last: str) -> str:
    """Path of the first module called ``last``, with or without a head around it."""
    found = next((name for name, _ in model.named_modules() if name == last or name.endswith(f".{last}")), None)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} has no module {last}, through which its loop was expected to go; describe it "
            "yourself: dp.load(model, loop=dynprobe.probes.Loop(…))"
        )
    return found


def _hrm_text(model: Any) -> Loop:
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

    start = Start(_path(model, "embed_tokens"), lens=scaled(float(model.config.embedding_scale)))
    return Loop(
        ((_path(model, "H_module"), "H", -1),), track="core", prefix=True, start=start,
        iterations=lambda m: m.config.H_cycles, set_iterations=choose, trained=made_with,
    )  # fmt: skip


def _ouro(model: Any) -> Loop:
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
        ((norm, "core", -1),), prefix=True, start=_path(model, "embed_tokens"),
        iterations=lambda m: m.base_model.total_ut_steps, set_iterations=choose,
        trained=lambda m: getattr(m.config, "total_ut_steps", None),
    )  # fmt: skip


def _huginn(model: Any) -> Loop:
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
    core = _path(model, "core_block")

    def choose(one: Any, T: int) -> None:
        one.config.mean_recurrence = T

    return Loop(
        ((f"{core}.{len(model.get_submodule(core)) - 1}", "core", -1),), prefix=True, arguments=_noise_of_position,
        start=Start(_path(model, "adapter"), "input", 0, leading(int(config.n_embd))),
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


#: ``model_type`` → the loops of such a model. Huginn and Ouro: tested on stand-ins only.
KNOWN_LOOPS: dict[str, Callable[[Any], Loop | None]] = {
    "dynprobe_cem": _cem, "dynprobe_csm": _csm, "albert": _albert, "hrm_text": _hrm_text, "huginn_raven": _huginn,
    "ouro": _ouro,
}  # fmt: skip


def refuse_unreadable(model: nn.Module) -> None:
    """Refuse models whose iterations cannot stand on a track of token positions, however they are named.

    Raises:
        ModelError: The model is one of them; the message says what to do instead.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind == "perceiver":
        raise ModelError(
            f"{type(model).__name__} refines latent vectors that belong to no token: there is no position to read or "
            "write them at. Measure them from your own forward, with the latents as state vectors: "
            "dp.trace_callback(dims='batch,state,dim') (see docs/trajectories.md)"
        )
    steps = max((int(getattr(m, "z_steps", 0) or 0) for m in model.modules()), default=0)
    if steps > 1 and str(kind).startswith("deberta"):
        raise ModelError(
            f"{type(model).__name__} has z_steps={steps}: its enhanced mask decoder refines the query of its last "
            "layer against a state that stays, which is no track of states, and transformers 5.23 cannot run it (it "
            "appends to a tuple). With z_steps = 0 its layers are read"
        )


def refuse_ambiguous(model: nn.Module) -> None:
    """Refuse models with several chains of blocks of which the longest is not about tokens, unless one was named.

    Raises:
        ModelError: The model is one of them; the message says which chains can be named.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "blt":
        raise ModelError(
            f"{type(model).__name__} has a chain of blocks over bytes on either side of one over patches, whose "
            "positions are no tokens; name the one to read: layers='model.local_decoder.layers.*'"
        )


def known_loop(model: nn.Module) -> Loop | None:
    """Return the loops of a model of a known type, or None.

    Example:
        >>> import torch
        >>> known_loop(torch.nn.Linear(2, 2)) is None
        True
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return KNOWN_LOOPS[kind](model) if kind in KNOWN_LOOPS else None
