"""The energy of the CSM-style model and one step down it.

With ŝ_r = s_r/RMS(s_r) the N state vectors of one position have the energy

    E(ŝ) = − Σ_r ⟨ŝ_r, b_r⟩ − κ Σ_r γ_rᵀ φ(V_r ŝ_r) − ½ Σ_{r≠c} J_rc ŝ_rᵀ(q ∘ ŝ_c),      φ = ∫SiLU, κ = 4/√Ma

where the drive b and the gates γ come from the memories and stay fixed while the state moves. Its negative gradient is
exactly the force F_r = b_r + κ V_rᵀ(γ_r ∘ SiLU(V_r ŝ_r)) + q ∘ (Jŝ)_r, and one iteration is s ← (1 − α)s + αF. The leak
leaves E alone because E sees only directions; for small α the energy therefore falls, dE = −α FᵀQF ≤ 0 with Q the
positive semidefinite Jacobian of the norm. Every ŝ_r lies on a sphere, so E is bounded below.

J is a fixed 16×16 matrix, not a softmax over anything: there is no attention. Nothing is promised about large α (the
tests ask for descent up to 0.4), and a falling energy does not imply a falling perplexity.

:class:`CsmRefinement` is called once per iteration: call k of a forward takes s^k in and hands s^{k+1} out, so a hook
with a call counter reads and writes any iteration and any slot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.models._cem_phi import silu_integral
from dynprobe.models._csm_config import CsmConfig
from dynprobe.models._csm_writer import rms

__all__ = ["CsmLandscape", "CsmRefinement"]

_HALF = (torch.float16, torch.bfloat16)


def _slots_first(x: Tensor) -> Tensor:
    """[batch, pos, slot, n] → contiguous [slot, rows, n]; no copy where the memory lies like that already."""
    return x.flatten(0, 1).transpose(0, 1).contiguous()


def _slots_last(x: Tensor, like: Tensor) -> Tensor:
    """The inverse, as a view; ``like`` gives batch and pos."""
    return x.transpose(0, 1).unflatten(0, like.shape[:2])


class CsmLandscape(nn.Module):
    """Memories and context to the drive b and the gates γ, fixed during refinement.

    Args:
        config: Sizes.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__()
        N, d, M = config.num_states, config.state_size, config.memory_size
        self.eps = config.state_eps
        self.drive_gain = nn.Parameter(torch.empty(N, d))
        self.drive_bias = nn.Parameter(torch.empty(N, d))
        self.gates = nn.Parameter(torch.empty(1 if config.memory == "shared" else N, M, d))
        self.gate_bias = nn.Parameter(torch.empty(N, M))

    def forward(self, memory: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drive and the gates of every position.

        Args:
            memory: m ``[batch, pos, slot, dim]``.
            context: c ``[batch, pos, 1, dim]``.

        Returns:
            b ``[batch, pos, slot, dim]`` and γ ``[batch, pos, slot, memory]``.
        """
        unit = _slots_first(rms(memory, self.eps))
        cue = unit + _slots_first(context)
        drive = self.drive_gain[:, None] * unit + _slots_first(context) + self.drive_bias[:, None]
        open_ = torch.matmul(_as_rows(cue, self.gates), self.gates.mT).view(*cue.shape[:2], -1)
        return _slots_last(drive, memory), _slots_last(open_ + self.gate_bias[:, None], memory)


def _as_rows(x: Tensor, memory: Tensor) -> Tensor:
    """[slot, rows, n] for one product with the memory of each slot; [1, slot·rows, n] where all share one."""
    return x if len(memory) == len(x) else x.reshape(1, -1, x.shape[-1])


class CsmRefinement(nn.Module):
    """One iteration, and the energy it descends.

    Args:
        config: Sizes and switches.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__()
        N, d, M = config.num_states, config.state_size, config.memory_size
        self.eps, self.kappa = config.state_eps, 4.0 / M**0.5
        self.memory = nn.Parameter(torch.empty(1 if config.memory == "shared" else N, M, d))
        self.coupling = nn.Parameter(torch.empty(N, N))
        self.coupling_gain = nn.Parameter(torch.empty(d))
        self.step = nn.Parameter(torch.empty(()))

    @property
    def alpha(self) -> Tensor:
        """Step size α ∈ (0, 1)."""
        return torch.sigmoid(self.step)

    @property
    def symmetric_coupling(self) -> Tensor:
        """J ``[slot, slot]``: the learned matrix made symmetric, with a zero diagonal."""
        J = 0.5 * (self.coupling + self.coupling.mT)
        return J - torch.diag(torch.diagonal(J))

    def unit(self, state: Tensor) -> Tensor:
        """ŝ: each state vector divided by its root mean square."""
        return rms(state, self.eps)

    def force(self, unit: Tensor, drive: Tensor, gates: Tensor) -> Tensor:
        """F = −∂E/∂ŝ.

        Args:
            unit: ŝ ``[batch, pos, slot, dim]``.
            drive: b, same shape.
            gates: γ ``[batch, pos, slot, memory]``.

        Returns:
            Force of the shape of ``unit``.
        """
        x, gate = _slots_first(unit), _slots_first(gates)
        seen = torch.matmul(_as_rows(x, self.memory), self.memory.mT)
        recalled = torch.matmul(_as_rows(gate, self.memory) * functional.silu(seen), self.kappa * self.memory).view_as(
            x
        )
        return _slots_last(_slots_first(drive) + recalled + self._coupled(x, self.coupling_gain), unit)

    def _coupled(self, x: Tensor, gain: Tensor) -> Tensor:
        """Return q ∘ (Jŝ) of [slot, rows, dim], one product for all rows."""
        mixed = (self.symmetric_coupling.to(x.dtype) @ x.flatten(1)).view_as(x)
        return gain.to(x.dtype) * mixed

    def forward(self, state: Tensor, drive: Tensor, gates: Tensor, frozen: Tensor | None = None) -> Tensor:
        """Make one update.

        Args:
            state: s ``[batch, pos, slot, dim]``.
            drive: b, same shape.
            gates: γ ``[batch, pos, slot, memory]``.
            frozen: Positions that have halted and keep their state ``[batch, pos]``.

        Returns:
            The next state.
        """
        alpha = self.alpha.to(state.dtype)
        moved = torch.lerp(state, self.force(self.unit(state), drive, gates), alpha)
        return moved if frozen is None else torch.where(frozen[..., None, None], state, moved)

    def energy(self, state: Tensor, drive: Tensor, gates: Tensor) -> Tensor:
        """E(ŝ) of every position, in float32 or better.

        Args:
            state: s ``[batch, pos, slot, dim]``; only its directions matter.
            drive: b, same shape.
            gates: γ ``[batch, pos, slot, memory]``.

        Returns:
            Energy ``[batch, pos]``.
        """
        kind = torch.float32 if state.dtype in _HALF else state.dtype
        x, gate = _slots_first(rms(state.to(kind), self.eps)), _slots_first(gates.to(kind))
        seen = torch.matmul(_as_rows(x, self.memory), self.memory.to(kind).mT).view_as(gate)
        parts = (
            (x * (_slots_first(drive.to(kind)) + 0.5 * self._coupled(x, self.coupling_gain))).sum((0, 2)),
            self.kappa * (gate * silu_integral(seen)).sum((0, 2)),
        )
        return -(parts[0] + parts[1]).view(state.shape[:2])
