"""What happened inside the recursions of one forward: iterates, energies, step lengths, predicted descent.

Watching changes nothing: the energies are computed beside the forward, from the same states, in float32 or better, so
outputs with and without a trace are the same bit for bit. A callback may replace an iterate, which is how one step of
one sub-layer of one block is perturbed. Layers have no common energy, and nothing here adds theirs up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.models._cem_step import EnergyStep

__all__ = ["CemDynamics", "CemSubTrace", "CemTrace", "Recorder"]

_KEEPS = ("cpu", "device", "reduce")
_WHAT = ("x", "u", "energy", "energy_head", "delta", "delta_rel", "slope", "psd_margin")
_REDUCED = ("energy", "delta")

#: (layer, kind, t, x, u, energy) → x to go on with, or None. ``u`` and ``energy`` are None for untied sub-layers.
IterationCallback = Callable[[int, str, int, Tensor, "Tensor | None", "Tensor | None"], "Tensor | None"]


@dataclass(frozen=True)
class CemDynamics:
    """What to keep of a forward's recursions.

    Args:
        layers: Blocks to watch; None for all.
        keep: ``reduce`` (numbers per token only: energy and delta, unless ``what`` says otherwise), ``device`` (where
            the model is, with gradients if they are on) or ``cpu`` (detached copies).
        steps: ``all`` or ``ends`` (of x, u and energies, the first and the last).
        what: Any of x, u, energy, energy_head, delta, delta_rel, slope, psd_margin; None for energy and delta under
            ``reduce`` and for x, energy and delta otherwise.
        callback: Called at every iterate with (layer, kind, t, x, u, energy); a tensor that it returns replaces x.

    Raises:
        UsageError: A word is not known.
    """

    layers: Collection[int] | None = None
    keep: str = "reduce"
    steps: str = "all"
    what: Collection[str] | None = None
    callback: IterationCallback | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("keep", self.keep, _KEEPS), ("steps", self.steps, ("all", "ends"))):
            if value not in known:
                raise UsageError(f"CemDynamics takes {name}={'|'.join(known)}, not {value!r}.")
        for word in self.what or ():
            if word not in _WHAT:
                raise UsageError(f"CemDynamics keeps {', '.join(_WHAT)}, not {word!r}.{did_you_mean(word, _WHAT)}")

    def wants(self, word: str) -> bool:
        """Whether something is kept."""
        if self.what is not None:
            return word in self.what
        return word in (_REDUCED if self.keep == "reduce" else ("x", *_REDUCED))


@dataclass
class CemSubTrace:
    """One recursion: of the attention (interaction energy) or MLP (element-wise energy) of one block.

    Attributes:
        kind: ``interaction``, ``elementwise`` or ``none`` (an untied sub-layer, which has no energy).
        x: x^(0) … x^(T), [T+1, batch, S, D].
        u: The point at which the energy is taken, likewise.
        energy: ε or ξ at u, [T+1, batch, S], float32 or better.
        energy_head: ε per head, [T+1, batch, K, S].
        delta: ‖x^(t+1) − x^(t)‖₂, [T, batch, S].
        delta_rel: The same over ‖x^(t)‖₂; NaN where that is 0.
        slope: ⟨s, x^(t+1) − x^(t)⟩ with s = −∂E/∂u at u^(t), the decrease that a linear energy would show.
        psd_margin: Smallest margin of the preconditioners, or None where there is none.
    """

    kind: str
    x: Tensor | None = None
    u: Tensor | None = None
    energy: Tensor | None = None
    energy_head: Tensor | None = None
    delta: Tensor | None = None
    delta_rel: Tensor | None = None
    slope: Tensor | None = None
    psd_margin: float | None = None


@dataclass
class CemTrace:
    """All recursions of one forward, by block."""

    attn: dict[int, CemSubTrace] = field(default_factory=dict)
    mlp: dict[int, CemSubTrace] = field(default_factory=dict)


class Recorder:
    """Sees every iterate of one forward; made anew for each.

    Args:
        dynamics: What to keep.
        always_energy: Whether energies are kept of all layers and steps whatever ``dynamics`` says.
    """

    def __init__(self, dynamics: CemDynamics | None, always_energy: bool = False) -> None:
        self.dynamics, self.always_energy = dynamics, always_energy
        self.trace = CemTrace()
        self.energies: dict[str, dict[int, Tensor | None]] = {"attention": {}, "mlp": {}}
        self._open: dict[str, list[Tensor]] = {}
        self._every: list[Tensor] = []
        self._last: tuple[Tensor, Tensor | None] | None = None

    def visit(self, layer: int, kind: str, t: int, steps: int, x: Tensor, step: Any, field: Any) -> Tensor:
        """Note x^(t), the t-th of ``steps`` + 1 iterates, and return the one to go on with."""
        dynamics = self.dynamics
        if dynamics is not None and dynamics.layers is not None and layer not in dynamics.layers:
            dynamics = None
        if t == 0:
            self._open, self._every, self._last = {}, [], None
        source: EnergyStep | None = step if isinstance(step, EnergyStep) else None
        callback = None if dynamics is None else dynamics.callback
        u = energy = heads = None
        if source is not None and (self.always_energy or dynamics is not None):
            u, heads, energy = self._measure(source, x, field, dynamics)
        if callback is not None:
            written = callback(layer, kind, t, x, u, energy)
            if written is not None:
                if written.shape != x.shape:
                    raise UsageError(
                        f"the callback returned {tuple(written.shape)} for the iterate {tuple(x.shape)} of {kind} "
                        f"{layer}, step {t}. Return a tensor of the same shape, or None."
                    )
                x = written.to(x)
                if source is not None:
                    u, heads, energy = self._measure(source, x, field, dynamics)
        if self.always_energy and energy is not None:
            self._every.append(energy)
        if dynamics is not None:
            self._note(dynamics, t, steps, x, u, energy, heads, source, field)
        if t == steps:
            self._close(layer, kind, source, dynamics)
        return x

    def _measure(
        self, step: EnergyStep, x: Tensor, field: Any, dynamics: CemDynamics | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        u = step.argument(x)
        if dynamics is not None and dynamics.wants("energy_head"):
            heads = step.energy_per_head(u, field)
            if heads is not None:
                return u, heads, heads.sum(1)
        wanted = self.always_energy or (dynamics is not None and (dynamics.wants("energy") or dynamics.callback))
        return u, None, step.energy(u, field) if wanted else None

    def _note(
        self, dynamics: CemDynamics, t: int, steps: int, x: Tensor, u: Tensor | None, energy: Tensor | None,
        heads: Tensor | None, source: EnergyStep | None, field: Any,
    ) -> None:  # fmt: skip
        if dynamics.steps == "all" or t in (0, steps):
            for word, value in (("x", x), ("u", u), ("energy", energy), ("energy_head", heads)):
                if value is not None and dynamics.wants(word):
                    self._keep(word, value, dynamics)
        if self._last is not None:
            before, force = self._last
            move = x - before
            delta = torch.linalg.vector_norm(move, dim=-1)
            if dynamics.wants("delta"):
                self._keep("delta", delta, dynamics)
            if dynamics.wants("delta_rel"):
                norm = torch.linalg.vector_norm(before, dim=-1)
                self._keep("delta_rel", torch.where(norm > 0, delta / norm, torch.nan), dynamics)
            if force is not None:
                self._keep("slope", (force * move).sum(-1), dynamics)
        force = source.force(u, field) if source is not None and u is not None and dynamics.wants("slope") else None
        self._last = (x, force)

    def _keep(self, word: str, value: Tensor, dynamics: CemDynamics) -> None:
        if dynamics.keep != "device":
            value = value.detach()
        self._open.setdefault(word, []).append(value.to("cpu", copy=True) if dynamics.keep == "cpu" else value)

    def _close(self, layer: int, kind: str, source: EnergyStep | None, dynamics: CemDynamics | None) -> None:
        if self.always_energy:
            self.energies[kind][layer] = torch.stack(self._every) if self._every else None
        if dynamics is None:
            return
        name = "none" if source is None else {"attention": "interaction", "mlp": "elementwise"}[kind]
        sub = CemSubTrace(name, **{word: torch.stack(values) for word, values in self._open.items()})  # type: ignore[arg-type]
        if source is not None and dynamics.wants("psd_margin"):
            margin = source.psd_margin()
            sub.psd_margin = None if margin is None else float(margin.min())
        (self.trace.attn if kind == "attention" else self.trace.mlp)[layer] = sub
