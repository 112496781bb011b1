"""One step down an energy: the shared part of attention and MLP, and the four solvers.

A step is a module call: it takes the iterate x^(t) and returns x^(t+1), so a forward hook on it reads and writes
every iteration. What stays constant during the recursion (keys, gates, folded weights) is its *field*, made once per
forward from the block's input. With u = norm(x), s = −∂E/∂u and a preconditioner P the solvers are

- ``gradient``: x ← x + η P s, the published update. It is not the derivative of E(norm(x)) with respect to x.
- ``chain``: x ← x + η P Jᵀ s with J = ∂u/∂x. It is.
- ``line_search``: ``gradient`` with η halved per token until E does not rise; where no step helps, none is made.
- ``cccp``: as a function of the point x̂ on the sphere before the norm's gain g, E is bounded from above by its tangent
  plus L/2 ‖x̂' − x̂‖², which on a sphere is linear, so its minimiser is known: the iterate keeps its length and turns to
  g ∘ s + L x̂, and E cannot rise. L = 0 for the interaction energy, which is concave. η and P have no part in it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynprobe.models._cem_norm import CemRMSNorm

if TYPE_CHECKING:
    from dynprobe.models._cem_config import CemConfig
    from dynprobe.models._cem_frame import Frame

__all__ = ["EnergyStep", "Field", "wide"]

#: Halvings that ``line_search`` tries before it stays where it is.
MAX_HALVINGS = 30


def wide(t: Tensor) -> Tensor:
    """Return ``t`` in float32 if it is of half precision: energies are sums whose noise would hide their descent."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


@dataclass(kw_only=True)
class Field:
    """What a recursion does not change; subclasses say what that is.

    Args:
        start: In training, x^(0) and its norm, which is the block's normalised input and need not be computed twice.
    """

    start: tuple[Tensor, Tensor] | None = None


class EnergyStep(nn.Module, abc.ABC):
    """x^(t) ↦ x^(t+1) for one energy; subclasses say which.

    Args:
        config: The model's configuration.
        eta: Step size η.
    """

    kind = ""

    def __init__(self, config: CemConfig, eta: float) -> None:
        super().__init__()
        self.eta, self.update = eta, config.update
        self.norm_mode, self.norm_in_recursion = config.norm_mode, config.norm_in_recursion
        self.norm = CemRMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_gain)
        separate = not config.share_norm and config.norm_in_recursion
        self.inner_norm = CemRMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_gain) if separate else None

    def prepare(self, h: Tensor, frame: Frame) -> tuple[Tensor, Any]:
        """Return x^(0) and the field, from the block's input h [batch, S, D]."""
        n = self.norm(h)
        field = self.field(n, frame)
        if self.norm_mode == "inplace":
            return n, field
        if self.training and self.norm_in_recursion and self.inner_norm is None:
            field.start = h, n
        return h, field

    @abc.abstractmethod
    def field(self, n: Tensor, frame: Frame) -> Any:
        """Return everything that the recursion does not change, from the normalised input."""

    def finish(self, field: Any, frame: Frame) -> None:
        """Be told that the recursion is over."""

    @abc.abstractmethod
    def energy(self, u: Tensor, field: Any) -> Tensor:
        """Return E(u), [batch, S], in float32 or better."""

    def energy_per_head(self, u: Tensor, field: Any) -> Tensor | None:
        """Return the energy's terms per head, [batch, K, S], or None where there are no heads."""
        return None

    @abc.abstractmethod
    def move(self, u: Tensor, field: Any) -> Tensor:
        """Return P s, the update without η."""

    @abc.abstractmethod
    def force(self, u: Tensor, field: Any, through: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return s = −∂E/∂u; with ``through`` given, P through(s), where P may differ from head to head."""

    @abc.abstractmethod
    def curvature_bound(self, field: Any) -> Tensor | float:
        """Return L such that E(u) − L/2 ‖u‖² is concave, a number or [batch, S, 1]."""

    def psd_margin(self) -> Tensor | None:
        """Return how far the preconditioner is from indefinite, or None where there is none."""
        preconditioner = getattr(self, "preconditioner", None)
        return None if preconditioner is None else preconditioner.psd_margin()

    def recursion_norm(self) -> CemRMSNorm:
        """Return the norm that the iterate passes."""
        return self.norm if self.inner_norm is None else self.inner_norm

    def argument(self, x: Tensor) -> Tensor:
        """Return u, the point at which the energy is taken."""
        return self.recursion_norm()(x) if self.norm_in_recursion else x

    def forward(self, x: Tensor, field: Any) -> Tensor:
        """Make one step.

        Args:
            x: Iterate [batch, S, D].
            field: What :meth:`prepare` made.
        """
        start = field.start
        u = start[1] if start is not None and start[0] is x else self.argument(x)
        if self.update == "gradient":
            return torch.add(x, self.move(u, field), alpha=self.eta)
        if self.update == "chain":
            norm = self.recursion_norm()
            return x + self.eta * self.force(u, field, lambda s: norm.pull_back(_like(x, s), s))
        if self.update == "cccp":
            norm = self.recursion_norm()
            steepest = 1.0 if norm.weight is None else norm.weight.detach().square().max()
            aim = norm.scale(self.force(u, field)) + self.curvature_bound(field) * steepest * norm.unit(x)
            length = torch.linalg.vector_norm(aim, dim=-1, keepdim=True)
            turned = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / length.clamp_min(1e-30) * aim
            return torch.where(length > 0, turned, x)
        return self._searched(x, u, field)

    def _searched(self, x: Tensor, u: Tensor, field: Any) -> Tensor:
        direction = self.move(u, field)
        with torch.no_grad():
            start = self.energy(u, field)
            eta = torch.full_like(x[..., :1], self.eta)
            for _ in range(MAX_HALVINGS):
                rises = ~(self.energy(self.argument(x + eta * direction), field) <= start)
                if not bool(rises.any()):
                    break
                eta = torch.where(rises[..., None], eta / 2, eta)
            else:
                rises = ~(self.energy(self.argument(x + eta * direction), field) <= start)
                eta = torch.where(rises[..., None], 0.0, eta)
        return x + eta * direction


def _like(x: Tensor, s: Tensor) -> Tensor:
    """Give the states [batch, S, D] the head axis that a force per head [batch, K, S, D] has."""
    return x if s.dim() == x.dim() else x[:, None]
