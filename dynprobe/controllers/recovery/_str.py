"""STR with the gate of Dynamic Operator Mixing (Haelio), and a stand-in for its operators.

STR_t is :func:`dynprobe.metrics.str_kernel` over the last four states at the last depth, with the bandwidth of clean
text of the same model (``str_sigma`` of the calibration: median distance among four consecutive states). A PD rule on
its error mixes two operators, one that contracts and one that expands, and their mixture is added to the last block's
output (:class:`Gate`, :class:`LoraPair`). ``dom`` takes the operators from a file. ``str``, whose id is
``recovery.str_standin/1``, is the same gate with operators made of the calibration's top components
(:class:`TopComponents`); it is not DOM.

The published code leaves four things to be decided.

1. *Sign.* The prototype mixes with σ(+raw), the experiments with σ(−raw). Here it is σ(−raw), the sign that closes the
   loop negatively: states too alike (e > 0) expand, states too far apart contract.
2. *Scale.* u = γ(…)/mean‖H‖ does not change when all states are scaled, so its relative size falls with their norm.
   ``dom`` keeps that, and the energy that is booked shows it. The stand-in does not divide, and is equivariant.
3. *Recovery time* measured on STR cannot be shorter than its window of four tokens (``window``); what is reported is
   the time minus the window, or a signal without one.
4. *Noise* of the published shock is absolute. Shocks are perturbations here, and ``scale=abs`` is theirs.

As published, a token's STR is that of its state before the write, and the write follows in the same forward; the last
depth is the one place where that is possible. Error and gate begin at the first new token. Where a convention of this
package stands against the published code, the convention holds: states are those before the final norm, position 0 is
left out of the window and of mean‖H‖ (over the row's tokens so far), the window does not hold the last prompt token
twice, and the prompt's own forward is not acted on. A write at the last block's output reaches the logits and no
later token's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Seen
from dynprobe.controllers.recovery._mode import Mode
from dynprobe.controllers.recovery._operators import LoraPair, Operators, TopComponents
from dynprobe.errors import CalibrationError, UsageError
from dynprobe.metrics import str_kernel
from dynprobe.probes import Calibration, Site, Subject

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["DOM", "MODE", "STR_WINDOW", "Gate", "StrControl"]

#: States that STR is computed over.
STR_WINDOW: Final = 4
_TAU_W: Final = 3.0


@dataclass(frozen=True)
class Gate:
    """The PD rule of DOM with its dead band.

    e = STR − (τ ± band) beyond the nearer edge, 0 inside; Δe = e_t − e_{t−1}, with e = 0 before the first;
    raw = κ_p·e + β·Δe − λ_d·|Δe|; α = clip(σ(−raw), floor, 1 − floor). Nothing is done where e = 0.

    Args:
        tau: Target of STR.
        band: Half width of the dead band.
        kappa_p: Proportional gain; 10 as published, 40 in the published shock experiment.
        beta: Gain of the change.
        lambda_d: Damping of the change's size.
        floor: Least share of either operator.

    Source:
        Dynamic Operator Mixing (Haelio, controlled-inference).

    Example:
        >>> alpha, error = Gate()(np.array([0.63, 0.80, 0.40]), np.zeros(3))
        >>> error.round(6).tolist(), alpha.round(6).tolist()
        ([0.0, 0.1, -0.16], [0.5, 0.268941, 0.903784])
    """

    tau: float = 0.63
    band: float = 0.07
    kappa_p: float = 10.0
    beta: float = 2.0
    lambda_d: float = 2.0
    floor: float = 0.05

    def __call__(self, score: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the share α of the contraction and the error e; an unknown STR has error 0.

        Args:
            score: STR of each row ``[batch]``.
            before: Error of the token before ``[batch]``.
        """
        low, high = self.tau - self.band, self.tau + self.band
        error = np.where(score > high, score - high, np.where(score < low, score - low, 0.0))
        change = error - before
        raw = self.kappa_p * error + self.beta * change - self.lambda_d * np.abs(change)
        return np.clip(1.0 / (1.0 + np.exp(raw)), self.floor, 1.0 - self.floor), error


class StrControl(Controller):
    """Keep STR in its band by mixing a contraction with an expansion at the last block's output.

    Args:
        operators: What is mixed.
        gamma: Size of a write; the published runs take 0.05 to 0.08.
        gate: The rule.

    Attributes:
        window: Tokens below which no recovery of STR can be told.
        sigma: Bandwidth, from the calibration.
    """

    window = STR_WINDOW

    def __init__(self, operators: Operators, *, gamma: float = 0.08, gate: Gate | None = None) -> None:
        if not gamma >= 0 or not np.isfinite(gamma):
            raise UsageError(f"gamma={gamma}; it is a size, 0 or more")
        self.id, self.operators, self.gamma, self.gate = operators.id, operators, gamma, gate or Gate()
        self.sigma = float("nan")

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Take the bandwidth from the calibration of this model, and prepare the operators.

        Raises:
            CalibrationError: If there is none, it lacks the bandwidth, or all its states are the same.
            UsageError: If the operators do not fit the model.
        """
        if calibration is None:
            raise CalibrationError(
                f"{self.id} takes its bandwidth from a calibration and there is none; make one with: "
                "dynprobe calibrate MODEL"
            )
        if "str_sigma" not in calibration.tensors:
            raise CalibrationError(
                f"the calibration does not hold 'str_sigma', the bandwidth that {self.id} needs; make it again with: "
                "dynprobe calibrate MODEL --force"
            )
        self.sigma = float(calibration.tensors["str_sigma"])
        if not (np.isfinite(self.sigma) and self.sigma > 0):
            raise CalibrationError(
                f"zero-denominator: the calibration's str_sigma is {self.sigma:g}, so STR is not defined; calibrate on "
                "longer texts"
            )
        self.operators.bind(subject, calibration)

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """The last block's output is where it writes, and what it looks at while writing."""
        return [("resid_post", subject.n_layers - 1)] if writing else []

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows."""
        zeros = np.zeros(n_rows)
        return {
            "active": np.zeros(n_rows, bool), "gain": zeros, "signal": np.full(n_rows, np.nan),
            "error": zeros.copy(), "alpha": np.full(n_rows, 0.5),
            "past": torch.full((n_rows, STR_WINDOW, 1), torch.nan), "norms": zeros.copy(),
            "n_states": np.zeros(n_rows, dtype=np.int64),
        }  # fmt: skip

    def act(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, seen: Seen, memory: Memory
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Measure STR with this token's state, and write where it is out of its band."""
        self._take_in(state, seen.step.positions >= 1, memory)
        if not seen.decoding:
            return state
        alpha, error = self.gate(memory["signal"], memory["error"])
        active = error != 0
        memory.update(alpha=alpha, error=error, active=active, gain=np.where(active, self.gamma, 0.0))
        if not active.any() or self.gamma == 0:
            return state
        shape = (-1, *[1] * (state.dim() - 1))
        share, norm, rows = (
            torch.from_numpy(values).to(state.device).reshape(shape)
            for values in (alpha, memory["norms"] / np.maximum(memory["n_states"], 1), active)
        )
        u = self.gamma * self.operators(state.double(), share, norm)
        return torch.where(rows, (state.double() + u).to(state.dtype), state)

    def _take_in(self, state: Tensor, counted: np.ndarray, memory: Memory) -> None:
        """Add the columns of a forward to the window and to the mean norm, and measure STR at the last of them."""
        known = torch.from_numpy(counted).to(state.device)
        x = state.detach().flatten(2).float()
        norm = torch.where(known, x.double().norm(dim=-1), 0.0).sum(1)
        memory["norms"] = memory["norms"] + norm.cpu().numpy()
        memory["n_states"] = memory["n_states"] + counted.sum(1)
        past = memory["past"].to(x)
        if past.shape[-1] != x.shape[-1]:
            past = x.new_full((len(x), STR_WINDOW, x.shape[-1]), torch.nan)
        x = torch.where(known[..., None], x, torch.nan)
        memory["past"] = run = torch.cat([past, x], 1)[:, -STR_WINDOW:].clone()
        memory["signal"] = np.array([self._score(row) for row in run])

    def _score(self, run: Tensor) -> float:
        there = run[~torch.isnan(run).any(-1)]
        if not len(there):
            return float("nan")
        return float(str_kernel(there, self.sigma, window=STR_WINDOW, tau=_TAU_W)[-1])


def _dom(timing: Any, site: str | None = None, operators: str | Path | None = None, **_: Any) -> Controller:
    if operators is None:
        raise UsageError(
            "dom mixes two operators that were trained for it; give operators=<a safetensors file>, or take the mode "
            "str, a stand-in along the calibration's components"
        )
    return StrControl(LoraPair(operators))


#: What draws the last states of consecutive tokens together lowers their turning.
MODE = Mode(lambda timing, site=None, **_: StrControl(TopComponents()), selects=("limen_ct",))
DOM = Mode(_dom, selects=MODE.selects)
