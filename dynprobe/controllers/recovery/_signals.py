"""Streaming signals: one number per token, from that token and those before it.

====================  ==============================================================================================
``kappa_phase_zmax``  max_l (θ_l/π − μ_l)/σ_l against the calibration profile of the same model (the default)
``kappa_phase``       mean_l θ_l/π
``kappa_phase_z``     mean_l max(0, (θ_l/π − μ_l)/σ_l)
``norm_step_zmax``    max_l (|ln ‖x_l‖ − ln ‖x_{l−1}‖| − μ_l)/σ_l
``entropy``           of the next-token distribution, nats
``limen_ct``          of the last depth, from the last three tokens
====================  ==============================================================================================

θ_l is the angle between a token's states at depths l − 1 and l; depths start where those of metrics do (a Transformer's
embedding takes no part). They are the same numbers as the token metrics of a whole run, computed as the token comes.
No signal works everywhere, so none is trusted before its power on held-out runs has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.controllers._controller import Memory, Seen
from dynprobe.errors import CalibrationError, UsageError, did_you_mean
from dynprobe.metrics._limen_ct import ct_series
from dynprobe.probes import Calibration, Subject

__all__ = ["SIGNALS", "Signal"]

#: Name → which part of the calibration it is compared with.
SIGNALS = ("kappa_phase_zmax", "kappa_phase", "kappa_phase_z", "norm_step_zmax", "entropy", "limen_ct")


@dataclass
class Signal:
    """One streaming signal of a model.

    Args:
        name: One of :data:`SIGNALS`.

    Attributes:
        first: First depth that takes part.
        n_layers: Depths run to this.
    """

    name: str
    first: int = 0
    n_layers: int = 0

    def __post_init__(self) -> None:
        if self.name not in SIGNALS:
            near = did_you_mean(self.name, SIGNALS)
            raise UsageError(f"unknown signal {self.name!r}; known: {', '.join(SIGNALS)}.{near}")
        self._mu = self._sigma = torch.zeros(0)

    @property
    def reads_depths(self) -> bool:
        """Whether it needs the states of all depths."""
        return self.name in ("kappa_phase_zmax", "kappa_phase", "kappa_phase_z", "norm_step_zmax")

    @property
    def reads(self) -> str | None:
        """What must be observed for it."""
        if self.reads_depths:
            return "layers=all"
        return "layers=last" if self.name == "limen_ct" else None

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Take the profile of a model.

        Raises:
            CalibrationError: If there is no calibration, or it lacks what the signal is compared with.
        """
        self.first, self.n_layers = (0 if subject.loop is not None else 1), subject.n_layers
        kind = {"kappa_phase_zmax": "kappa_token", "kappa_phase_z": "kappa_token", "norm_step_zmax": "norm_step"}
        prefix = kind.get(self.name)
        if calibration is None:
            raise CalibrationError(
                f"the signal {self.name} is judged against a calibration and there is none; make one with: "
                "dynprobe calibrate MODEL"
            )
        if self.name not in calibration.signals or (prefix and f"{prefix}_mu" not in calibration.tensors):
            raise CalibrationError(
                f"the calibration does not hold the signal {self.name}; make it again with: dynprobe calibrate MODEL"
            )
        if prefix:
            self._mu, self._sigma = (
                calibration.tensors[f"{prefix}_{of}"][self.first + 1 :].double() for of in ("mu", "sigma")
            )

    def start(self, n_rows: int) -> Memory:
        """Return what the signal remembers of a row."""
        if self.name != "limen_ct":
            return {}
        return {"ct_past": torch.full((n_rows, 2, 1), torch.nan)}

    def measure(self, seen: Seen, memory: Memory, width: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the signal at the last columns, and the depth it stands at where it is one depth's.

        Args:
            seen: The forward.
            memory: Of the rows.
            width: Columns at most. The entropy is known at the last only: a prompt's other logits are not computed.

        Returns:
            ``[batch, columns]`` each; NaN at padding and at position 0.
        """
        counted = seen.step.positions[:, -width:] >= 1
        if self.name == "entropy":
            entropy = torch.special.entr(torch.softmax(seen.logits, -1)).sum(-1)
            return np.where(counted[:, -1:], entropy.cpu().numpy()[:, None], np.nan), None
        if self.name == "limen_ct":
            return np.where(counted, self._turning(seen, memory, counted.shape[1]), np.nan), None
        held = [self._state(seen, depth) for depth in range(self.first, self.n_layers + 1)]
        there = held[0].device  # the columns that are looked at, not the text, where layers are on several devices
        states = torch.stack([state[:, -width:].to(there) for state in held])
        of_step = metrics.norm_step if self.name == "norm_step_zmax" else metrics.phase_lag
        # Few numbers from here on: one transfer, and float64 as in the calibration.
        steps = of_step(states).cpu().double()
        steps = steps.mean(-1) if steps.ndim == 4 else steps  # slots of one position together
        depth: np.ndarray | None = None
        if self.name == "kappa_phase":
            value = _mean(steps.numpy())
        elif self.name == "kappa_phase_z":
            value = metrics.step_z(steps, self._mu, self._sigma).numpy()
        else:
            value, at = (found.numpy() for found in metrics.step_zmax(steps, self._mu, self._sigma))
            depth = np.where(at < 0, -1, at + self.first + 1)
        return np.where(counted, value, np.nan), depth

    def _state(self, seen: Seen, depth: int) -> Tensor:
        return seen.states["resid_post", depth - 1] if depth else seen.states["resid_pre", 0]

    def _turning(self, seen: Seen, memory: Memory, width: int) -> np.ndarray:
        state = seen.states["resid_post", self.n_layers - 1][:, -(width + 2) :].flatten(2)
        state = state if state.dtype == torch.float64 else state.float()
        real = torch.from_numpy(seen.step.positions[:, -state.shape[1] :] >= 1).to(state.device)
        state = torch.where(real[..., None], state, torch.nan)
        past = memory["ct_past"].to(state)
        if past.shape[-1] != state.shape[-1]:
            past = state.new_full((len(state), 2, state.shape[-1]), torch.nan)
        run = torch.cat([past, state], 1)
        memory["ct_past"] = run[:, -2:].clone()
        keep = run.isfinite().all(-1).cpu().numpy()
        series = ct_series(run, keep, torch.finfo(run.dtype).eps)[0]
        return np.where(series.ok, series.ct, np.nan)[:, -width:]


def _mean(steps: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is known, where that is at least one half."""
    known = np.isfinite(steps)
    count = known.sum(0)
    total = np.where(known, steps, 0.0).sum(0)
    return np.where(2 * count >= max(len(steps), 1), total / np.maximum(count, 1), np.nan)
