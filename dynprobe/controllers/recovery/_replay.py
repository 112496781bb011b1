"""``random:<mode>``: the same rows, tokens, sites and energies as another mode, in directions that mean nothing.

What a mode does can help because of its direction, or only because something was changed. This control answers: its
writes have the relative energy ‖u‖²/‖h‖² that the mode had at the same token of the same row, and a direction drawn
from the noise function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Seen
from dynprobe.probes import Site, Subject
from dynprobe.probes._noise import gaussian

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Replay"]

#: Relative error of a length that needs no correction, and corrections at most.
_EXACT, _CORRECTIONS = 1e-8, 6


class Replay(Controller):
    """Write with the energies of a table of actions, in random directions.

    Energies agree to rounding: 1e-6 of themselves in float32 for writes that are not small beside the state (a write of
    a thousandth of it: 1e-4), 1e-2 in bfloat16.

    Args:
        actions: From :meth:`Steering.actions`, columns ``row pos site energy``; rows are those of the same batch.
        mode: Mode it stands beside.
        seed: Seed of the directions.
    """

    def __init__(self, actions: pd.DataFrame, mode: str, seed: int = 0) -> None:
        self.id, self.mode, self.seed = f"recovery.random:{mode}/1", mode, seed
        written = actions[actions["energy"] > 0]
        self._plan: dict[str, dict[tuple[int, int], float]] = {}
        for row, pos, site, energy in written[["row", "pos", "site", "energy"]].itertuples(index=False):
            plan = self._plan.setdefault(site, {})  # two controllers may have written the same state
            plan[int(row), int(pos)] = plan.get((int(row), int(pos)), 0.0) + float(energy)

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """The sites that the mode wrote at."""
        if not writing:
            return []
        return [(name.split(".")[0], int(name.split(".")[1])) for name in self._plan]

    def start(self, n_rows: int) -> Memory:
        """Nothing is remembered: the plan is known."""
        return {"active": np.zeros(n_rows, bool)}

    def act(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, seen: Seen, memory: Memory
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Write where the mode wrote."""
        name = f"{site[0]}.{site[1]}"
        plan, step = self._plan[name], seen.step
        rows = np.arange(len(state)) if step.rows is None else step.rows
        after = state
        for i, row in enumerate(rows):
            for column, pos in enumerate(step.positions[i]):
                energy = plan.get((int(row), int(pos)))
                if energy is None:
                    continue
                direction = gaussian(
                    self.seed, step.row_keys[i], f"random/{self.mode}/{name}", int(pos), state[i, 0].numel()
                )
                after = after.clone() if after is state else after
                after[i, column] = _moved(state[i, column], torch.from_numpy(direction), energy)
        return after


def _moved(state: Tensor, direction: Tensor, energy: float) -> Tensor:
    """The state with ``energy`` · ‖h‖² added along a direction, as near as its dtype can say it.

    A shift that is small beside the state loses digits when it is added; corrections of its length make up for it.
    """
    h = state.double().flatten()
    direction = direction.to(h) / direction.to(h).norm()
    wanted = length = energy**0.5 * float(h.norm())
    best, nearest = state, float("inf")
    for _ in range(_CORRECTIONS):
        moved = (h + length * direction).to(state.dtype)
        found = float((moved.double() - h).norm())
        if abs(found - wanted) < nearest:
            best, nearest = moved.reshape(state.shape), abs(found - wanted)
        if nearest <= _EXACT * wanted or not found > 0:
            break
        length *= wanted / found
    return best
