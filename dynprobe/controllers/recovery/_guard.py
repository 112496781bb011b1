"""``recovery.guard/1``: a semantic guard, which knows nothing of states and takes tokens back.

It fires when the mean NLL of the last eight own tokens is above the 99 % quantile that clean text of the same model has
in such windows (``nll_mean8`` of the calibration), or when the newest four tokens have stood three times in the new
text, overlaps counted. Then eight tokens are taken back (all, where there are fewer) and the same number is drawn anew
at temperature 0.7 with seed + 10000 · attempt, also in a run that is greedy otherwise. After them the run's own way of
choosing holds again. At most twice in a row's text.

The NLL is what a guard could see: under the model as it runs, perturbed or not, and at temperature 1. That text of the
model's own is judged by a level of text it only read makes it lenient: own tokens are likelier.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from dynprobe.controllers._controller import Controller, Memory, Restart
from dynprobe.controllers.recovery._mode import Mode
from dynprobe.errors import CalibrationError
from dynprobe.probes import Calibration, Subject

__all__ = ["GUARD_WINDOW", "MODE", "Guard", "repeats"]

#: Tokens over which the NLL is averaged, and tokens that are taken back.
GUARD_WINDOW: Final = 8
_SIGNAL: Final = f"nll_mean{GUARD_WINDOW}"
_QUANTILE: Final = 0.99
_NGRAM, _TIMES = 4, 3
_TEMPERATURE: Final = 0.7
_SEED_SHIFT: Final = 10_000


def repeats(new: list[int], n: int = _NGRAM) -> int:
    """How often the last ``n`` tokens stand in a text, overlaps counted; 0 where it is shorter.

    Example:
        >>> repeats([7, 7, 7, 7, 7, 7]), repeats([1, 2, 3, 4, 9, 1, 2, 3, 4]), repeats([1, 2])
        (3, 2, 0)
    """
    last = new[-n:]
    return sum(new[i : i + n] == last for i in range(len(new) - n + 1))


class Guard(Controller):
    """Take tokens back when they are unlikely or go round in circles.

    Args:
        max_restarts: Restarts of one row at most.
        name: Id in tables.

    Attributes:
        limit: Mean NLL above which it fires, nats.
    """

    restarts = True
    min_new_tokens = _NGRAM + _TIMES - 1

    def __init__(self, max_restarts: int = 2, *, name: str = "recovery.guard/1") -> None:
        self.id, self.max_restarts = name, max_restarts
        self.limit = float("nan")

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Take the level from the calibration of this model.

        Raises:
            CalibrationError: If there is none, or it lacks the signal.
        """
        if calibration is None:
            raise CalibrationError(
                f"{self.id} judges the NLL against a calibration and there is none; make one with: "
                "dynprobe calibrate MODEL"
            )
        if _SIGNAL not in calibration.signals:
            raise CalibrationError(
                f"the calibration does not hold {_SIGNAL}, which {self.id} needs (texts of more than {GUARD_WINDOW} "
                "tokens give it); make it again with: dynprobe calibrate MODEL --force"
            )
        self.limit = calibration.quantile(_SIGNAL, _QUANTILE)

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows."""
        return {
            "active": np.zeros(n_rows, bool), "signal": np.full(n_rows, np.nan),
            "restarts": np.zeros(n_rows, dtype=np.int64),
        }  # fmt: skip

    def survives(self) -> tuple[str, ...]:
        """The number of restarts."""
        return ("restarts",)

    def restart(self, new: list[int], nll: list[float], memory: Memory) -> Restart | None:
        """Ask for eight tokens to be taken back where one of the two rules is met."""
        mean = float(np.mean(nll[-GUARD_WINDOW:])) if len(new) >= GUARD_WINDOW else float("nan")
        memory["signal"] = np.array([mean])
        why = self._why(mean, repeats(new))
        attempt = int(memory["restarts"][0]) + 1
        if why is None or attempt > self.max_restarts:
            return None
        memory["restarts"] = np.array([attempt])
        keep = max(0, len(new) - GUARD_WINDOW)
        return Restart(keep, _TEMPERATURE, _SEED_SHIFT * attempt, hold=len(new) - keep, why=f"{self.id}: {why}")

    def _why(self, mean: float, times: int) -> str | None:
        if mean > self.limit:
            return f"mean NLL {mean:.3g} of the last {GUARD_WINDOW} tokens > {self.limit:.3g}"
        return f"{_NGRAM} tokens stood there {times} times" if times >= _TIMES else None


#: A guard keeps texts that are likely and do not go in circles.
MODE = Mode(lambda timing, site=None, **_: Guard(), selects=("nll_bare", "repetition"))
