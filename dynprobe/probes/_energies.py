"""Energies of a looped model's states, read while its own forward runs.

An iteration of an energy model goes down an energy that the forward itself never needs. Each turn is asked for two
values: the energy of the state it takes and of the state it hands out, both under its own energy (every loop has one of
its own: a layer's attention, its MLP), so that whether it fell can be read off one row. The energy of what was handed
out is that of the state the model goes on with, after all writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.probes._outputs import hidden_argument, hidden_of
from dynprobe.probes._subject import Subject

__all__ = ["EnergyTap"]


class EnergyTap:
    """Reads two energies per turn while an instrument's forwards run.

    Args:
        subject: A subject whose loop has an energy.
    """

    def __init__(self, subject: Subject) -> None:
        assert subject.loop is not None
        assert subject.loop.energy is not None
        self._energy: Callable[..., Tensor | None] = subject.loop.energy
        self._turns = {(id(m), t.call): i for i, (m, t) in enumerate(zip(subject.blocks, subject.turns, strict=True))}
        self._modules = list(dict.fromkeys(subject.blocks))
        self._calls: dict[int, int] = {}
        self._listening = False
        self._steps: list[dict[int, Tensor]] = []
        self._last: tuple[Tensor | None, Tensor | None, nn.Module | None] = (None, None, None)
        self._handles: list[Any] = []

    def open(self) -> None:
        """Go on the model; the hooks come after those that write."""
        self._handles = [m.register_forward_hook(self._note, with_kwargs=True) for m in self._modules]

    def close(self) -> None:
        """Come off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, *, new: bool) -> None:
        """A forward begins; a new sequence where ``new``."""
        if new:
            self._steps.clear()
        self._steps.append({})
        self._calls.clear()
        self._listening = True

    def rewind(self, columns: int) -> None:
        """Forget the last forwards: their tokens were taken back."""
        del self._steps[-columns:]

    def end(self) -> None:
        """The forward is over."""
        self._listening = False
        self._last = (None, None, None)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._listening:
            return
        call = self._calls.get(id(module), 0)
        self._calls[id(module)] = call + 1
        turn = self._turns.get((id(module), call))
        if turn is None:
            return
        with torch.no_grad():
            taken, given = hidden_argument(args, kwargs), hidden_of(output)
            # Inside one loop a turn takes in what the turn before handed out, under the same energy.
            before = self._last[1] if self._last[0] is taken and self._last[2] is module else None
            before = self._energy(module, taken, args, kwargs) if before is None else before
            after = self._energy(module, given, args, kwargs)
            self._last = (given, after, module)
        if before is not None and after is not None:
            self._steps[-1][turn] = torch.stack([end.detach().double().cpu() for end in (before, after)])

    def joined(self, lay: Callable[[Tensor, int], Tensor], n_depths: int) -> dict[str, Tensor]:
        """Return ``energy`` and ``energy_prev`` ``[depths, batch, pos]``, NaN where a turn has no energy.

        Row d holds the energy of state d and of state d − 1 under turn d's energy; row 0 that of the first state.

        Args:
            lay: ``fn(values [batch, columns], step)``: lay the rows of a step in their place among all rows.
            n_depths: Depths of the track.
        """
        parts = []
        for number, found in enumerate(self._steps):
            if not found:
                return {}
            like = next(iter(found.values()))
            grid = like.new_full((n_depths, 2, *like.shape[1:]), torch.nan)
            for turn, (before, after) in found.items():
                grid[turn + 1] = torch.stack([after, before])
            if 0 in found:
                grid[0, 0] = found[0][0]
            parts.append(torch.stack([torch.stack([lay(values, number) for values in ends]) for ends in grid]))
        whole = torch.cat(parts, dim=-1)
        return {"energy": whole[:, 0], "energy_prev": whole[:, 1]}
