"""Running the refinement: how many iterations, when a position stops, and who may look or push.

Depth is an argument of the call. A run of K iterations is a prefix of every longer one, because nothing in an
iteration knows how many there will be. A position halts when its Δ, the root mean square change of ŝ, has stayed below
a tolerance for some consecutive updates; from then on it keeps its state, whatever the rest of the batch does, so a row
halts at the same iteration alone and in a batch.

``on_iteration(k, state, stage="core", energy=None)`` is called with s⁰ and after each update. A tensor it returns takes
the place of the state; returning None leaves it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.models._csm_energy import CsmRefinement

__all__ = ["DeltaHalt", "OnIteration", "Refined", "refine"]

OnIteration = Callable[..., "Tensor | None"]


@dataclass(frozen=True)
class DeltaHalt:
    """Stop refining a position when it hardly moves.

    Args:
        tol: Δ below which an update counts as still; Δ = sqrt(mean over slots and dims of (ŝ^{k+1} − ŝ^k)²).
        patience: Consecutive still updates after which the position keeps its state.

    Raises:
        UsageError: The tolerance is negative or the patience below one.

    Example:
        >>> DeltaHalt(0.01)
        DeltaHalt(tol=0.01, patience=2)
    """

    tol: float
    patience: int = 2

    def __post_init__(self) -> None:
        if not self.tol >= 0 or self.patience < 1:
            raise UsageError(f"DeltaHalt: tol ≥ 0 and patience ≥ 1, found tol={self.tol}, patience={self.patience}.")


@dataclass
class Refined:
    """What a run of the refinement leaves behind; K is the number of iterations that were run.

    Attributes:
        state: s^K ``[batch, pos, slot, dim]``.
        iterations: K.
        states: s⁰ … s^K where asked for.
        energies: E of each of them ``[batch, pos]`` where asked for.
        deltas: Δ of each update ``[batch, pos]`` where asked for; NaN once a position has halted.
        halted_at: Updates made when the position halted, −1 where it did not ``[batch, pos]``; None without halting.
    """

    state: Tensor
    iterations: int = 0
    states: list[Tensor] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    halted_at: Tensor | None = None


@dataclass(frozen=True)
class _Wanted:
    states: bool
    energies: bool
    deltas: bool
    on_iteration: OnIteration | None


def refine(
    step: CsmRefinement,
    state: Tensor,
    drive: Tensor,
    gates: Tensor,
    *,
    iterations: int,
    real: Tensor | None = None,
    halt: DeltaHalt | None = None,
    grad_iterations: int | None = None,
    states: bool = False,
    energies: bool = False,
    deltas: bool = False,
    on_iteration: OnIteration | None = None,
) -> Refined:
    """Iterate from s⁰.

    Args:
        step: The update and its energy.
        state: s⁰ ``[batch, pos, slot, dim]``.
        drive: b, same shape.
        gates: γ ``[batch, pos, slot, memory]``.
        iterations: Updates T at most.
        real: Positions that are no padding ``[batch, pos]``; the others do not keep a batch from stopping.
        halt: When a position stops; None runs all iterations.
        grad_iterations: Only the last so many iterations are differentiated; None differentiates all.
        states: Keep every state.
        energies: Keep the energy of every state.
        deltas: Keep Δ of every update.
        on_iteration: Called with s⁰ and after each update.

    Returns:
        The final state and what was asked for.
    """
    wanted = _Wanted(states, energies, deltas, on_iteration)
    out = Refined(state)
    _note(out, wanted, step, state, drive, gates, k=0)
    frozen: Tensor | None = None
    still: Tensor | None = None
    if halt is not None:
        frozen = torch.zeros(state.shape[:2], dtype=torch.bool, device=state.device)
        still = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)
        out.halted_at = torch.full_like(still, -1)
    before = out.state
    for k in range(1, iterations + 1):
        blind = grad_iterations is not None and k <= iterations - grad_iterations
        with torch.no_grad() if blind else nullcontext():
            after = step(before, drive, gates) if frozen is None else step(before, drive, gates, frozen)
        if deltas or halt is not None:
            delta = _delta(step, before, after)
            if deltas:
                out.deltas.append(delta if frozen is None else delta.masked_fill(frozen, float("nan")))
            if halt is not None and frozen is not None and still is not None and out.halted_at is not None:
                still = torch.where(delta < halt.tol, still + 1, 0)
                stops = (still >= halt.patience) & ~frozen
                out.halted_at[stops] = k
                frozen = frozen | stops
        out.state, out.iterations = after, k
        _note(out, wanted, step, after, drive, gates, k=k)
        before = out.state
        if frozen is not None and bool((frozen if real is None else frozen | ~real).all()):
            break
    return out


def _delta(step: CsmRefinement, before: Tensor, after: Tensor) -> Tensor:
    with torch.no_grad():
        wide = torch.promote_types(after.dtype, torch.float32)
        change = step.unit(after).to(wide) - step.unit(before).to(wide)
        return change.square().mean((-1, -2)).sqrt()


def _note(
    out: Refined, wanted: _Wanted, step: CsmRefinement, state: Tensor, drive: Tensor, gates: Tensor, *, k: int
) -> None:
    energy = step.energy(state, drive, gates) if wanted.energies else None
    if wanted.on_iteration is not None:
        answer: Any = wanted.on_iteration(k, state, stage="core", energy=energy)
        if answer is not None:
            if not isinstance(answer, Tensor) or answer.shape != state.shape:
                found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise UsageError(
                    f"on_iteration returned {found} at iteration {k}; return None to leave the state alone, or a "
                    f"tensor [batch, pos, slot, dim] = {list(state.shape)} to put in its place."
                )
            out.state = state = answer.to(state.dtype)
            energy = step.energy(state, drive, gates) if wanted.energies else None
    if wanted.states:
        out.states.append(state)
    if energy is not None:
        out.energies.append(energy)
