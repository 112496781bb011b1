"""The subject: a loaded model whose embedding, blocks or turns, norm and head are known, and its places by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dynprobe._types import COMPONENTS
from dynprobe.errors import SiteError, UsageError, did_you_mean
from dynprobe.probes._dispatch import hooks_of_others, live_hooks
from dynprobe.probes._outputs import Wrapper
from dynprobe.probes._placement import device_of
from dynprobe.probes._turns import Loop, Place, Turn, sites_of_loop
from dynprobe.probes._where import Where

__all__ = ["Road", "Subject"]


@dataclass
class Road:
    """Whether resuming may leave out the blocks below; shared by all subjects of one module.

    Attributes:
        fast: The verdict; None where nothing was tried yet.
        reason: Why not, where it may not.
        hooks: Hooks that were on the blocks when it was tried; others make it another question.
    """

    fast: bool | None = None
    reason: str = ""
    hooks: tuple[int, ...] = ()


@dataclass(eq=False)
class Subject:
    """A loaded model whose embedding, blocks, final norm and head are known.

    Attributes:
        model: The module itself; dynprobe never changes its parameters.
        tokenizer: Its tokenizer, or None.
        name: What to call it in tables.
        block_path: Pattern of the blocks' names, e.g. ``model.layers.*``.
        blocks: The blocks in order; ``len(blocks)`` is L.
        embedding: Path of the token embedding, or None.
        final_norm: Path of the module that takes the last block's output, or None.
        head: Path of the output projection, or None.
        dim: Width of the residual stream, or None where no trial was run.
        state_dtype: Dtype of the states (some models keep them in float32 beside bf16 weights), or None likewise.
        chained: Whether every block takes in exactly what the one before gave out.
        updates: Relative paths of attention and MLP inside each block, keyed ``attn_out`` and ``mlp_out``.
        sequential: Whether the MLP reads the state after attention (then ``resid_mid`` exists).
        mutates: Whether blocks change tensors in place after handing them on (then captures are copied).
        wrappers: Per block, what puts a state into the container that it returns; empty where no trial was run.
        road: What is known of resuming: whether a forward may begin at a depth with the blocks below not run.
        facts: Everything recorded about where the weights came from.
        loop: What is known of a looped model's loops; None where every block runs once.
        turns: Its updates in order, one per entry of ``blocks``, in which a module then stands as often as it runs.
        backend: What reads and writes its states: ``"hooks"``, or ``"nnsight"`` traces.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> subject = tiny_llama()
        >>> subject.n_layers, subject.dim, subject.block_path, subject.updates["mlp_out"][0]
        (3, 32, 'model.layers.*', 'mlp')
    """

    model: nn.Module
    tokenizer: Any = None
    name: str = "model"
    block_path: str = ""
    blocks: tuple[nn.Module, ...] = ()
    embedding: str | None = None
    final_norm: str | None = None
    head: str | None = None
    dim: int | None = None
    state_dtype: torch.dtype | None = None
    chained: bool = True
    updates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sequential: bool = False
    mutates: bool = False
    wrappers: tuple[Wrapper, ...] = ()
    road: Road = field(default_factory=lambda: Road())
    facts: dict[str, Any] = field(default_factory=dict)
    loop: Loop | None = None
    turns: tuple[Turn, ...] = ()
    backend: str = "hooks"

    @property
    def n_layers(self) -> int:
        """Number of updates on the track, L: of blocks, or of the turns of a looped model; depths run from 0 to L."""
        return len(self.blocks)

    @property
    def n_slots(self) -> int | None:
        """State vectors per position, or None where a state is one vector."""
        return self.loop.slots if self.loop is not None else None

    @property
    def width(self) -> int:
        """Numbers in the state of one position, all slots together; 1 where it is not known."""
        return (self.dim or 1) * (self.n_slots or 1)

    @property
    def track(self) -> str:
        """Name of the state that is refined."""
        return self.loop.track if self.loop is not None else "resid"

    @property
    def device(self) -> torch.device:
        """Device of the input: that of the first parameter, or where an offloaded model is brought to."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, or None where there is none."""
        if self.embedding is None:
            return None
        weight = getattr(self.model.get_submodule(self.embedding), "weight", None)
        return int(weight.shape[0]) if weight is not None else None

    @property
    def resumable(self) -> bool:
        """Whether a forward may begin at a depth with the blocks below not run; tried when it is first asked."""
        hooks = self._foreign_hooks()
        if self.road.fast is None or (hooks is not None and hooks != self.road.hooks):
            from dynprobe.probes._road import try_road_unasked

            self.road.hooks = hooks if hooks is not None else self.road.hooks

            trial = try_road_unasked(self)
            self.road.fast, self.road.reason = trial.passed, trial.reason
        return self.road.fast

    @resumable.setter
    def resumable(self, fast: bool) -> None:
        self.road.fast, self.road.reason, self.road.hooks = fast, "", self._foreign_hooks() or ()

    def _foreign_hooks(self) -> tuple[int, ...] | None:
        """Hooks that others keep inside the blocks: with them a block is another block. None while ours are on too."""
        if live_hooks(self.model):
            return None
        return tuple(number for block in dict.fromkeys(self.blocks) for number in hooks_of_others(block))

    def accepts(self, argument: str) -> bool:
        """Whether the model's forward names this argument."""
        return argument in inspect.signature(self.model.forward).parameters

    @property
    def token_argument(self) -> str:
        """Name under which the model's forward takes token ids: ``input_ids``, or its first argument."""
        parameters = inspect.signature(self.model.forward).parameters.values()
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return "input_ids" if "input_ids" in named or not named else named[0]

    def sites(self, where: Where, *, writing: bool = False) -> list[tuple[str, int]]:
        """Return the sites that a place names, as ``(component, number of the block or turn)``.

        Args:
            where: The place; positions, phase and slots are not looked at.
            writing: Whether it is written there, which fills in other defaults than reading does.

        Raises:
            SiteError: If a layer, iteration or component does not exist.
            UsageError: If the place counts what this model does not have.
        """
        if self.turns:
            if where.slots is not None and self.n_slots is None:
                raise UsageError(f"{self.name} has one state vector per position and no slots; leave slots out")
            return sites_of_loop(self.turns, where, self.name, writing=writing)
        if where.iterations is not None or where.slots is not None:
            raise UsageError(f"{self.name} has layers and no iterations or slots; write layers=… instead")
        layers = where.resolve_layers(self.n_layers)
        return [(component, layer) for component in where.components() for layer in layers]

    def where_of(self, site: tuple[str, int]) -> Where:
        """Return the place that names one site, the inverse of :meth:`sites`."""
        component, number = site
        if not self.turns:
            return Where(layers=number, component=component)
        if component == "resid_pre" and number == 0:
            turn = self.turns[0]
            begin = {"iterations": 0} | ({"layers": turn.layer, "component": turn.component} if turn.layer >= 0 else {})
            return Where(**begin)  # type: ignore[arg-type]
        turn = self.turns[number - (component == "resid_pre")]
        if turn.layer < 0:
            return Where(iterations=turn.iteration)
        return Where(layers=turn.layer, iterations=turn.iteration, component=turn.component)

    def door(self, depth: int) -> Place:
        """Return where the state of a depth can be touched: the input of the first block, or an output."""
        origin = self.loop.origin if self.loop is not None else None
        if depth == 0 and origin is not None:
            root = None if origin.call is None else self.model
            return Place(self.model.get_submodule(origin.module), origin.side, origin.call, root, origin.lens)
        if depth == 0:
            return Place(self.blocks[0], "input", *self._call(0))
        return Place(self.blocks[depth - 1], "output", *self._call(depth - 1))

    def _call(self, number: int) -> tuple[int | None, nn.Module | None]:
        return (self.turns[number].call, self.model) if self.turns else (None, None)

    def module_at(self, component: str, layer: int) -> Place:
        """Return the place where a component of a layer (of a turn, in a looped model) can be touched.

        One state has one place: what enters block l > 0 is touched where block l − 1 hands it out, so that a write at
        either name is seen by a read at the other.

        Raises:
            SiteError: If the layer is out of range or the component was not found in this model.
        """
        if not 0 <= layer < self.n_layers:
            raise SiteError(f"layer {layer} was asked for; {self.name} has layers 0…{self.n_layers - 1}")
        if component == "resid_post":
            return self.door(layer + 1)
        if component == "resid_pre":
            if layer and not self.chained and not self.turns:
                raise SiteError(
                    f"{self.name} changes the state between its blocks, so what enters layer {layer} is no state of "
                    f"the track; use resid_post of layer {layer - 1}"
                )
            return self.door(layer)
        if component == "attn_in" and component in self.updates:  # put there by who looked for the attention modules
            return Place(self.blocks[layer].get_submodule(self.updates[component][layer]), "input")
        if component in self.updates:
            return Place(self.blocks[layer].get_submodule(self.updates[component][layer]), "output")
        if component == "resid_mid" and self.sequential:
            raise SiteError("resid_mid is read as resid_pre + attn_out and cannot be written; write attn_out instead")
        if component == "resid_mid" and "mlp_out" in self.updates:
            raise SiteError(f"{self.name} runs attention and MLP side by side; it has no resid_mid")
        if component not in COMPONENTS:
            near = did_you_mean(component, COMPONENTS)
            raise SiteError(f"unknown component {component!r}; known: {', '.join(COMPONENTS)}.{near}")
        raise SiteError(
            f"{component} was asked for, and no module of {self.name}'s blocks adds exactly that update to the "
            "residual stream; use resid_pre or resid_post"
        )

    def describe(self) -> dict[str, Any]:
        """Return what was found, for ``doctor`` and the manifest."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "blocks": f"{self.block_path} ({self.n_layers} × {type(self.blocks[0]).__name__})",
            "n_layers": self.n_layers,
            **({"track": self.track, "slots": self.n_slots, "turns": self._turns_in_words()} if self.turns else {}),
            "dim": self.dim,
            "embedding": self.embedding,
            "final_norm": self.final_norm,
            "head": self.head,
            "attn_out": self.updates.get("attn_out", ("",))[0] or None,
            "mlp_out": self.updates.get("mlp_out", ("",))[0] or None,
            "resid_mid": self.sequential,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "vocab_size": self.vocab_size,
        }

    def _turns_in_words(self) -> str:
        layers = {t.layer for t in self.turns}
        stages: dict[str, set[int]] = {}
        for turn in self.turns:  # layers may differ: an ordinary sub-layer runs once
            stages.setdefault(turn.stage, set()).add(turn.of)
        loops = " + ".join(f"{'/'.join(map(str, sorted(of)))} × {stage}" for stage, of in stages.items())
        return f"{len(layers)} layers × ({loops})" if self.turns[0].layer >= 0 else loops

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        if self.turns:
            return f"Subject({self.name!r}: {kind}, {self._turns_in_words()} iterations × {self.dim}, {self.dtype})"
        return f"Subject({self.name!r}: {kind}, {self.n_layers} layers × {self.dim}, {self.block_path}, {self.dtype})"
