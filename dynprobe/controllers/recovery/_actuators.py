"""What is done to a state while the detector is active.

============  ============================================================================================
``slerp``     h_l ← slerp(h_l, h_{l−1}·‖h_l‖/‖h_{l−1}‖, g): halfway back along the last step's arc at g = 0.5
``shrink``    h_l ← μ_l + (1 − g)(h_l − μ_l): towards the calibration mean
``clamp``     ‖h_l‖ limited to the calibration's 99 % quantile, direction unchanged; g plays no part
``subspace``  h_l ← h_l − g·(I − U_lU_lᵀ)(h_l − μ_l): what lies outside the top calibration components shrinks
============  ============================================================================================

``slerp`` and ``shrink`` lower κ by construction, so a κ that falls under them is no evidence of recovery.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dynprobe.errors import CalibrationError
from dynprobe.probes import Calibration, Subject

__all__ = ["ACTUATORS", "Actuator", "Clamp", "Shrink", "Slerp", "Subspace"]

_NEARLY_ANTIPODAL = 1e-3


class Actuator(Protocol):
    """A change of states ``[batch, columns, dim]`` at one depth."""

    needs_below: bool

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Take what is needed from the calibration."""

    def __call__(self, state: Tensor, below: Tensor | None, depth: int, gain: Tensor) -> Tensor:
        """Return the changed states; ``gain`` is ``[batch, 1, 1]``, ``below`` the states one depth lower."""


class Slerp:
    """Turn the state back towards the one before, along the great circle; its norm stays.

    At the first depth, between antipodal states and at zero states nothing is done.
    """

    needs_below = True

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Nothing is needed."""

    def __call__(self, state: Tensor, below: Tensor | None, depth: int, gain: Tensor) -> Tensor:
        """Return the turned states."""
        if below is None:
            return state
        h, b = state.double(), below.double()
        size = h.norm(dim=-1, keepdim=True)
        x, y = h / size, b / b.norm(dim=-1, keepdim=True)
        theta = 2 * torch.atan2((x - y).norm(dim=-1, keepdim=True), (x + y).norm(dim=-1, keepdim=True))
        turned = (torch.sin((1 - gain) * theta) * x + torch.sin(gain * theta) * y) / torch.sin(theta)
        defined = turned.isfinite().all(-1, keepdim=True) & (theta > 0) & (theta < torch.pi - _NEARLY_ANTIPODAL)
        return torch.where(defined, size * turned, h).to(state.dtype)


class _Calibrated:
    """An actuator with statistics of every depth."""

    needs_below = False
    needed: tuple[str, ...] = ()

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Take the statistics.

        Raises:
            CalibrationError: If there are none.
        """
        kind = type(self).__name__.lower()
        if calibration is None:
            raise CalibrationError(
                f"the actuator {kind} needs a calibration and there is none; make one with: dynprobe calibrate MODEL"
            )
        missing = [name for name in self.needed if name not in calibration.tensors]
        if missing:
            raise CalibrationError(
                f"the actuator {kind} needs {missing[0]!r} and the calibration does not hold it; make it again with: "
                "dynprobe calibrate MODEL"
            )
        self.tensors = {name: calibration.tensors[name].double() for name in self.needed}

    def at(self, name: str, depth: int, state: Tensor) -> Tensor:
        """One statistic of one depth, on the device of a state."""
        return self.tensors[name][depth].to(state.device)


class Shrink(_Calibrated):
    """Move the state towards the calibration mean of its depth."""

    needed = ("mean",)

    def __call__(self, state: Tensor, below: Tensor | None, depth: int, gain: Tensor) -> Tensor:
        """Return the moved states."""
        mean = self.at("mean", depth, state)
        return (mean + (1 - gain) * (state.double() - mean)).to(state.dtype)


class Clamp(_Calibrated):
    """Limit the norm to the calibration's 99 % quantile at its depth."""

    needed = ("norm_q99",)

    def __call__(self, state: Tensor, below: Tensor | None, depth: int, gain: Tensor) -> Tensor:
        """Return the limited states."""
        h = state.double()
        size, limit = h.norm(dim=-1, keepdim=True), self.at("norm_q99", depth, state)
        return torch.where(size > limit, h * (limit / size), h).to(state.dtype)


class Subspace(_Calibrated):
    """Shrink the part of the state that lies outside the top calibration components."""

    needed = ("mean", "pcs")

    def __call__(self, state: Tensor, below: Tensor | None, depth: int, gain: Tensor) -> Tensor:
        """Return the changed states."""
        mean, pcs = self.at("mean", depth, state), self.at("pcs", depth, state)
        h = state.double()
        off = (h - mean).flatten(2)
        outside = off - (off @ pcs.T) @ pcs
        return (h - gain * outside.reshape(h.shape)).to(state.dtype)


#: Mode → its actuator.
ACTUATORS: dict[str, type[Slerp] | type[Shrink] | type[Clamp] | type[Subspace]] = {
    "slerp": Slerp, "shrink": Shrink, "clamp": Clamp, "subspace": Subspace,
}  # fmt: skip
