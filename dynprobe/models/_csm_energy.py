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
import torch.nn.functional as F
from torch import Tensor, nn

from dynprobe.models._cem_phi import silu_integral
from dynprobe.models._csm_config import CsmConfig
from dynprobe.models._csm_writer import rms

__all__ = ["CsmLandscape", "CsmRefinement"]

_HALF = (torch.float16, torch.bfloat16)


class _Rows:
    """How states [batch, pos, slot, dim] are laid out for one product with V: slots apart, or all rows alike."""

    def __init__(self, config: CsmConfig) -> None:
        self.shared = config.memory == "shared"

    def split(self, x: Tensor) -> Tensor:
        """[batch, pos, slot, n] → [slot, rows, n], or [1, rows·slot, n] with one memory for all."""
        rows = x.flatten(0, 1)
        return rows.flatten(0, 1)[None] if self.shared else rows.transpose(0, 1)

    def join(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The inverse."""
        return x.reshape(shape) if self.shared else x.transpose(0, 1).reshape(shape)


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
        self.rows = _Rows(config)

    def forward(self, memory: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drive and the gates of every position.

        Args:
            memory: m ``[batch, pos, slot, dim]``.
            context: c ``[batch, pos, 1, dim]``.

        Returns:
            b ``[batch, pos, slot, dim]`` and γ ``[batch, pos, slot, memory]``.
        """
        unit = rms(memory, self.eps)
        drive = self.drive_gain * unit + context + self.drive_bias
        open_ = torch.matmul(self.rows.split(unit + context), self.gates.mT)
        gates = self.rows.join(open_, torch.Size((*memory.shape[:-1], open_.shape[-1])))
        return drive, gates + self.gate_bias


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
        self.rows = _Rows(config)

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
        seen = torch.matmul(self.rows.split(unit), self.memory.mT)
        recalled = torch.matmul(self.rows.split(gates) * F.silu(seen), self.memory)
        return drive + self.kappa * self.rows.join(recalled, unit.shape) + self._coupled(unit)

    def _coupled(self, unit: Tensor) -> Tensor:
        # One product with the slots last; a batch of tiny 16×16 products is an order of magnitude slower.
        mixed = (unit.transpose(-1, -2) @ self.symmetric_coupling.to(unit.dtype)).transpose(-1, -2)
        return self.coupling_gain * mixed

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
        moved = (1.0 - alpha) * state + alpha * self.force(self.unit(state), drive, gates)
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
        unit = rms(state.to(kind), self.eps)
        seen = torch.matmul(self.rows.split(unit), self.memory.to(kind).mT)
        stored = self.rows.split(gates.to(kind)) * silu_integral(seen)
        recalled = self.rows.join(stored, torch.Size((*unit.shape[:-1], seen.shape[-1]))).sum((-1, -2))
        pairs = (unit.transpose(-1, -2) @ self.symmetric_coupling.to(kind)).transpose(-1, -2)
        coupled = (unit * self.coupling_gain.to(kind) * pairs).sum((-1, -2))
        return -(unit * drive.to(kind)).sum((-1, -2)) - self.kappa * recalled - 0.5 * coupled
