"""A recovery mode: while the detector is on, the last step of the state is shortened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynprobe.controllers.recovery import Mode, Recovery
from dynprobe.probes import Calibration, Subject

__all__ = ["MODE", "Brake"]


class Brake:
    """h_l ← h_l − g·(h_l − h_{l−1}): of the step between two depths the share 1 − g is left."""

    needs_below = True

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Nothing is needed."""

    def __call__(self, state: Tensor, below: Tensor | None, depth: int, gain: Tensor) -> Tensor:
        """Return the changed states.

        Args:
            state: States [batch, columns, dim] at one depth.
            below: Those of the depth below; None where they were not seen.
            depth: The depth.
            gain: [batch, 1, 1].
        """
        if below is None:
            return state
        h = state.double()
        return torch.where(gain > 0, h - gain * (h - below.double()), h).to(state.dtype)


def make(timing: Any, site: str | None = None, **_: Any) -> Recovery:
    """Return the controller of one arm: dynprobe's timing, this package's actuator."""
    return Recovery(timing(), Brake(), site=site, name="recovery.brake/1")


MODE = Mode(make)
