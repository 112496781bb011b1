"""Where attention would go if it descended on its interaction energy, and where it goes.

For a Transformer the energy is taken with the model's own queries and keys. Keys are constants; the pull of a query,
−∂ε/∂q = Σ_j α_ij k_j, is known in closed form, and is brought back to the layer's input by the transposed Jacobian of
the map from input to query. That map is the model's own code, differentiated: W_Q with its bias, and whatever rotation,
scaling or norm the model has between projection and attention (for rotary attention: Σ_h W_Qᵀ R_iᵀ Σ_j α_ij k_j).
The point is the layer's *input*, which is the normalised state, as in CEM; the update is what the attention module
returns, before any norm that follows.

A CEM states its energies itself: they come from its trace, and its force from its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.metrics._energy import interaction
from dynprobe.metrics._result import Array
from dynprobe.models import CemDynamics
from dynprobe.models._cem_attention import InteractionStep
from dynprobe.probes._attention_calls import AttentionCall, AttentionWatch
from dynprobe.probes._attention_match import deviation, tolerance
from dynprobe.probes._attention_weights import AttentionWeights, Refusal, attention_weights
from dynprobe.probes._dispatch import attach
from dynprobe.probes._evaluating import evaluating
from dynprobe.probes._inputs import make_batch
from dynprobe.probes._subject import Subject

__all__ = ["Descent", "Lens", "energy_probe"]


@dataclass(frozen=True, eq=False)
class Descent:
    """One layer on one row at one iteration.

    Attributes:
        layer: The block.
        iteration: Updates that the layer made before; 0 for a Transformer.
        energy: ε of every head ``[head, pos]``.
        force: −∇ε at the point the layer reads, ``[pos, dim]``; None at the last iterate, which is not left.
        crossed: The same with every head's pull sent back through another head's W_Q; None where there is none.
        update: What the layer adds, ``[pos, dim]``.
    """

    layer: int
    iteration: int
    energy: Array
    force: Array | None
    crossed: Array | None
    update: Array | None


@dataclass(frozen=True, eq=False)
class Lens:
    """Attention of a subject made ready for rows.

    Attributes:
        weights: The matrices of each layer, or why there are none.
        descend: Maps the token ids of one row to the descents of its layers and the refusals.
    """

    weights: tuple[AttentionWeights | Refusal, ...]
    descend: Callable[[Sequence[int]], list[Descent | Refusal]]


def energy_probe(subject: Subject) -> Lens:
    """Make the lens of a subject: of a CEM by its trace, of anything else by its attention calls.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> first = energy_probe(tiny_llama()).descend([5, 6, 7])[0]
        >>> first.energy.shape, first.force.shape
        ((4, 3), (3, 32))
    """
    model: Any = subject.model
    steps = [m for m in model.modules() if isinstance(m, InteractionStep)]
    if steps:
        n = int(model.config.num_hidden_layers)
        return Lens(_cem_weights(steps, n), lambda row: _cem(subject, steps, row, n))
    weights = attention_weights(subject)
    return Lens(weights, lambda row: _attention(subject, weights, row))


class _Layer:
    """The pass of one row through one attention module."""

    def __init__(self, weights: AttentionWeights) -> None:
        self.weights = weights
        self.point: Tensor | None = None
        self.found: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None
        self.result: Descent | Refusal = Refusal(weights.layer, "attention was not called")

    def enter(self, x: Tensor) -> Tensor:
        self.point = x.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return self.point

    def see(self, call: AttentionCall) -> None:
        assert self.point is not None
        w = self.weights
        with torch.no_grad():
            energy, pull = interaction(
                call.q.detach().double() / w.factor, call.k.detach().double(), scale=w.scale, bias=call.bias
            )
            turned = pull.roll(max(1, w.heads // 2), 1) if w.heads > 1 else None
            made = w.output(call.mixed())
        force = self._back(call.q, pull)
        if force is None:
            reason = "the queries do not depend on the first state that attention is given"
            self.result = Refusal(w.layer, reason)
            return
        self.found = energy, force, None if turned is None else self._back(call.q, turned), made

    def _back(self, q: Tensor, pull: Tensor) -> Tensor | None:
        """Transpose of the model's own map from the layer's input to its queries."""
        assert self.point is not None
        weighted = (pull / self.weights.factor).to(q.dtype)
        (force,) = torch.autograd.grad(q, self.point, weighted, retain_graph=True, allow_unused=True)
        return force

    def leave(self, y: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        y = y.detach()
        if self.found is not None:
            energy, force, crossed, made = self.found
            off = deviation(made, y.reshape(made.shape))
            if off <= tolerance(y.dtype):
                along, across, added = (
                    None if t is None else _numpy(t.reshape(made.shape)[0]) for t in (force, crossed, y)
                )
                self.result = Descent(self.weights.layer, 0, _numpy(energy[0]), along, across, added)
            else:
                reason = f"the output recomputed from the weights is off by {off:.1e}"
                self.result = Refusal(self.weights.layer, reason)
        self.point = self.found = None
        return y


def _attention(
    subject: Subject, weights: Sequence[AttentionWeights | Refusal], row: Sequence[int]
) -> list[Descent | Refusal]:
    inputs = make_batch(subject, [row]).model_inputs(subject)
    layers = [None if isinstance(w, Refusal) else _Layer(w) for w in weights]
    inside: list[_Layer] = []

    def enter(layer: _Layer) -> Callable[[Tensor], Tensor]:
        def begin(x: Tensor) -> Tensor:
            inside.append(layer)
            return layer.enter(x)

        return begin

    def leave(layer: _Layer) -> Callable[[Tensor], Tensor]:
        def end(y: Tensor) -> Tensor:
            inside.clear()
            return layer.leave(y)

        return end

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # also puts gradients back where an attention module fails half-way
        stack.enter_context(evaluating(subject.model))
        for layer in layers:
            if layer is not None:
                module = layer.weights.module
                stack.callback(attach(module, side="input", write=enter(layer)).remove)
                stack.callback(attach(module, side="output", write=leave(layer)).remove)
        if any(layer is not None for layer in layers):
            stack.enter_context(AttentionWatch(lambda call: inside[0].see(call) if inside else None))
            subject.model(**inputs)
    return [w if layer is None else layer.result for w, layer in zip(weights, layers, strict=True)]  # type: ignore[misc]


def _cem_weights(steps: Sequence[InteractionStep], n: int) -> tuple[AttentionWeights | Refusal, ...]:
    found: list[AttentionWeights | Refusal] = [
        Refusal(i, "an untied attention inside a CEM has no energy of its own") for i in range(n)
    ]
    for step in steps:
        q, k = (m.weight.detach().view(step.heads, step.head_dim, -1) for m in (step.q_proj, step.k_proj))
        out = q if step.preconditioner is None else step.preconditioner(q).detach()
        found[step.layer] = AttentionWeights(step.layer, "", step, q, k, k, out, None, 1 / step.tau, 1.0, False, 0.0)
    return tuple(found)


def _cem(subject: Subject, steps: Sequence[InteractionStep], row: Sequence[int], n: int) -> list[Descent | Refusal]:
    inputs = make_batch(subject, [row]).model_inputs(subject)
    moves: dict[int, list[tuple[Array, Array]]] = {step.layer: [] for step in steps}

    def note(step: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(step, InteractionStep)
        x, field = args
        force = _cem_force(step, step.argument(x), field)
        moves[step.layer].append((_numpy(force[0]), _numpy(output[0]) - _numpy(x[0])))

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(subject.model))
        for step in steps:
            stack.callback(step.register_forward_hook(note).remove)
        trace = subject.model(**inputs, dynamics=CemDynamics(keep="cpu", what=("energy_head",))).dynamics
    found: list[Descent | Refusal] = []
    for layer in range(n):
        if layer not in moves:
            found.append(Refusal(layer, "an untied attention inside a CEM has no energy of its own"))
            continue
        heads = trace.attn[layer].energy_head
        for t in range(len(heads)):
            force, update = moves[layer][t] if t < len(moves[layer]) else (None, None)
            found.append(Descent(layer, t, _numpy(heads[t, 0]), force, None, update))
    return found


def _cem_force(step: InteractionStep, u: Tensor, field: Any) -> Tensor:
    if step.exact or step.diagonal is None:
        return step.force(u, field)
    # The literal algorithm's own force leaves the diagonal's part of the gradient out; the energy does not.
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(step.energy(u, field).sum(), u)
    return -gradient


def _numpy(x: Tensor) -> Array:
    return np.asarray(x.detach().double().cpu().numpy())
