"""Iterations as places on the track: one state, refined by modules that are called again and again.

Where a decoder has a list of blocks that run once each, a looped model calls one module many times, and what it hands
out after its k-th call is the state after k updates. Both are the same thing here: the track is a sequence of *turns*,
each the n-th call of some module, and depth d is the state after d turns. What differs is how a place is named. A plain
decoder counts layers; a loop without layers counts iterations; a model whose layers each hold a loop (CEM) counts both:
``layers=5,iterations=3`` is the third update of the last loop of layer 5, ``component=resid_mid`` names its first loop.

Iteration 0 is the state before the loop's first update, so a loop of T updates has the iterations 0 … T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, SiteError, UsageError
from dynprobe.probes._grammar import Percent
from dynprobe.probes._where import Where

__all__ = ["Lens", "Loop", "Place", "Start", "Turn", "changed_loop", "leading", "scaled", "sites_of_loop"]


class Lens(NamedTuple):
    """A state as a part of what a module takes or hands out.

    Attributes:
        get: ``fn(whole)``: the state in it.
        put: ``fn(whole, state)``: the same with another state; where the state is the old one, not a bit may change.
    """

    get: Callable[[Tensor], Tensor]
    put: Callable[[Tensor, Tensor], Tensor]


def scaled(factor: float) -> Lens:
    """Return the lens of a state that is ``factor`` times what a module hands out.

    Example:
        >>> lens = scaled(3.0)
        >>> lens.get(torch.ones(2)), lens.put(torch.ones(2), torch.tensor([3.0, 6.0]))
        (tensor([3., 3.]), tensor([1., 2.]))
    """

    def put(whole: Tensor, state: Tensor) -> Tensor:
        return torch.where(state == whole * factor, whole, state / factor)

    return Lens(lambda whole: whole * factor, put)


def leading(features: int) -> Lens:
    """Return the lens of a state that is the first ``features`` features of what a module takes.

    Example:
        >>> lens = leading(1)
        >>> lens.get(torch.ones(2)), lens.put(torch.ones(2), torch.tensor([5.0]))
        (tensor([1.]), tensor([5., 1.]))
    """
    return Lens(lambda whole: whole[..., :features], lambda w, s: torch.cat([s, w[..., features:]], dim=-1))


@dataclass(frozen=True)
class Start:
    """Where the state before the first turn passes, if no module hands it out as it is.

    Attributes:
        module: Path of the module.
        side: Whether it is in its ``"input"`` or its ``"output"``.
        call: In which of its calls, 0-based; None where it is called once.
        lens: How to find it there; None where it is all of it.
    """

    module: str
    side: str = "output"
    call: int | None = None
    lens: Lens | None = None


class Place(NamedTuple):
    """Where a state can be touched.

    Attributes:
        module: The module.
        side: ``"input"`` or ``"output"``.
        call: Which of its calls in one forward, 0-based; None where it is called once.
        root: The module whose calls are forwards; None where calls are not counted.
        lens: How to find the state in what passes there; None where it is all of it.
    """

    module: nn.Module
    side: str
    call: int | None = None
    root: nn.Module | None = None
    lens: Lens | None = None


@dataclass(frozen=True)
class Loop:
    """What an adapter says about the loops of a model.

    Attributes:
        modules: Paths of the modules whose calls are turns, with the stage and the layer each belongs to (layer −1 in
            a loop that has none).
        track: Name of the state that is refined.
        slots: Vectors per position; None where a state is one vector.
        prefix: Whether the loop feeds the readout directly, so that the state after k turns of a long run is the last
            state of a run of k turns.
        iterations: ``fn(model)``: the number of iterations that a call makes now.
        set_iterations: ``fn(model, T)``: let later calls make T iterations; None where that cannot be chosen.
        restore: ``fn(model)``: look at what ``set_iterations`` changes, and return a function without arguments that
            puts it back; None where ``set_iterations(model, iterations(model))`` does so.
        trained: ``fn(model)``: iterations that the model was trained with, or None where it is not known.
        components: Stage → component that its last state is, for models with layers.
        start: Path of the module whose output is the state before the first turn, or a :class:`Start`, where a turn
            takes in more than the state (HRM adds its other state, Ouro runs all layers in between); None where it is
            what the first turn takes in. Then each turn must take in what the one before handed out.
        arguments: ``fn(model, inputs, mask)``: the keyword arguments of the model's forward in dynprobe's own calls,
            made of those a plain decoder would get, for a model that would else draw its first state at random.
        energy: ``fn(module, state, args, kwargs)``: the energy ``[batch, pos]`` of a state under the module that was
            called with these arguments, or None where that module has none; None where the model has no energy.
    """

    modules: tuple[tuple[str, str, int], ...]
    track: str = "core"
    slots: int | None = None
    prefix: bool = False
    iterations: Callable[[Any], int] | None = None
    set_iterations: Callable[[Any, int], None] | None = None
    restore: Callable[[Any], Callable[[], None]] | None = None
    trained: Callable[[Any], int | None] | None = None
    components: tuple[tuple[str, str], ...] = ()
    start: str | Start | None = None
    arguments: Callable[[Any, dict[str, Any], Tensor], dict[str, Any]] | None = None
    energy: Callable[..., Any] | None = None

    @property
    def origin(self) -> Start | None:
        """Where the state before the first turn passes; None where it is what the first turn takes in."""
        return Start(self.start) if isinstance(self.start, str) else self.start

    @property
    def layered(self) -> bool:
        """Whether the model has layers besides iterations."""
        return any(layer >= 0 for _, _, layer in self.modules)


@dataclass(frozen=True)
class Turn:
    """One update of the track.

    Attributes:
        stage: Stage of the loop: ``core``, ``attn``, ``mlp``, ….
        layer: Layer it belongs to, −1 where there are none.
        iteration: Updates its loop has done after it, from 1 on.
        of: Updates its loop does in one forward.
        call: Which call of its module it is.
        component: What its state is once the loop is done.
    """

    stage: str
    layer: int
    iteration: int
    of: int
    call: int
    component: str = "resid_post"


def sites_of_loop(turns: Sequence[Turn], where: Where, name: str, *, writing: bool) -> list[tuple[str, int]]:
    """Return the sites on the track that a place names, as ``(component, turn)``.

    Args:
        turns: The turns of the model.
        where: The place.
        name: Name of the model, for messages.
        writing: Whether it is written there: then no iteration given means one of them, and not all.

    Raises:
        SiteError: A layer, iteration or component does not exist.
        UsageError: Layers were numbered in a model that has none.
    """
    layered = turns[0].layer >= 0
    stages = list(dict.fromkeys((t.layer, t.component) for t in turns))
    known = list(dict.fromkeys(component for _, component in stages))
    if where.component is None and not writing:
        wanted: Sequence[str] = known
    else:
        wanted = where.components()
    if wanted == ("resid_pre",):  # what enters the first of them
        return _entering(turns, where, name, layered)
    for component in wanted:
        if component not in known:
            raise SiteError(
                f"{component} was asked for; the loops of {name} end in {', '.join(known)}. The state after update t "
                f"is component={known[-1]},iterations=t"
            )
    if layered:
        layers = where.resolve_layers(1 + max(t.layer for t in turns), "50%" if writing else "all")
    else:
        where, layers = _on_iterations(where, name), (-1,)
    sites: list[tuple[str, int]] = []
    for layer, component in stages:
        if layer not in layers or component not in wanted:
            continue
        mine = [i for i, t in enumerate(turns) if (t.layer, t.component) == (layer, component)]
        default = ("last" if layered else "50%") if writing else "all"
        for t in where.resolve_iterations(len(mine) + 1, default):
            sites.append(("resid_post", mine[t - 1]) if t else _before(mine[0]))
    return list(dict.fromkeys(sites))


def _before(turn: int) -> tuple[str, int]:
    """The state before a turn: what the turn before it handed out."""
    return ("resid_post", turn - 1) if turn else ("resid_pre", 0)


def _entering(turns: Sequence[Turn], where: Where, name: str, layered: bool) -> list[tuple[str, int]]:
    if not layered:  # there is one beginning, which ``layers=0`` names too
        if where.layers not in (None, (0,)) or where.iterations is not None:
            _on_iterations(where.replace(component=None), name)
        return [("resid_pre", 0)]
    if where.iterations is not None:
        raise UsageError("component=resid_pre is the state before a layer's first loop; leave iterations out")
    layers = where.resolve_layers(1 + max(t.layer for t in turns))
    return [_before(next(i for i, t in enumerate(turns) if t.layer == layer)) for layer in layers]


def _on_iterations(where: Where, name: str) -> Where:
    """A place without layers: a share of the depth (``layers=50%``) is a share of the iterations."""
    if where.layers is None:
        return where
    if where.iterations is None and all(isinstance(item, Percent | str) for item in where.layers):
        return where.replace(layers=None, iterations=where.layers)
    raise UsageError(f"{name} has iterations and no layers; write iterations={'+'.join(map(str, where.layers))}")


def changed_loop(name: str, expected: int) -> ModelError:
    """Return the error of a loop whose length is another one than when its model was looked at."""
    return ModelError(
        f"a module of {name} was not called {expected} times in a forward, as it was when the model was looked at: "
        "its number of iterations was changed since, or it halts by itself. Look at it again (dp.load(model)), or use "
        "dp.iterate"
    )
