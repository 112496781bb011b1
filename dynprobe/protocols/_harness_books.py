"""What was written into each document, over all forwards that the harness made for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynprobe.probes import Instrument
from dynprobe.protocols._columns import PASSPORT, WRITTEN

__all__ = ["Books"]


@dataclass(eq=False)
class Books:
    """Sums over forwards, by the name of the row."""

    _sums: dict[str, dict[str, float]] = field(default_factory=dict)
    _weights: dict[str, dict[str, float]] = field(default_factory=dict)
    _new: dict[str, list[int]] = field(default_factory=dict)
    _actions: dict[str, list[float]] = field(default_factory=dict)

    def enter(self, names: Sequence[str], instrument: Instrument, fed: np.ndarray) -> None:
        """Add what an instrument wrote in one sequence.

        Args:
            names: The rows.
            instrument: It carried the writers.
            fed: Tokens of each row's text; what was written to a row after its end does not count.
        """
        size = instrument.passport(fed) if all(len(step.positions) == len(names) for step in instrument.steps) else {}
        if size:
            asked, alone = (np.asarray(size[name]) for name in WRITTEN)
            for i, name in enumerate(map(_document, names)):
                sums, weights = self._sums.setdefault(name, {}), self._weights.setdefault(name, {})
                for key, value in zip(WRITTEN, (asked[i], alone[i]), strict=True):
                    sums[key] = sums.get(key, 0.0) + float(value)
                for key in PASSPORT:
                    value, weight = float(size[key][i]) if key in size else np.nan, float(asked[i] - alone[i])
                    if np.isfinite(value) and weight > 0:
                        sums[key] = sums.get(key, 0.0) + weight * value
                        weights[key] = weights.get(key, 0.0) + weight
        for steerer in instrument.steerers:
            actions: Any = getattr(steerer, "actions", None)
            if actions is None:
                continue
            table = actions(fed)
            # What acts by tokens knows no state of being active: it acted where it wrote.
            by_tokens = bool(getattr(getattr(steerer, "controller", None), "by_tokens", False))
            for i, name in enumerate(map(_document, names)):
                rows = table[table["row"] == i]
                tokens = rows.drop_duplicates("pos")  # a token that is written at several sites has a row for each
                held = self._actions.setdefault(name, [0.0, 0.0, 0.0])
                held[0] += float(rows.loc[rows["energy"] > 0, "pos"].nunique() if by_tokens else tokens["active"].sum())
                held[1] += float(fed[i] if by_tokens else len(tokens))
                held[2] += float(rows["energy"].sum())

    def note_new(self, names: Sequence[str], new: np.ndarray) -> None:
        """Note how many tokens each row wrote."""
        for name, count in zip(map(_document, names), new.tolist(), strict=True):
            self._new.setdefault(name, []).append(int(count))

    def row(self, name: str, *, written: bool, steered: bool) -> dict[str, Any]:
        """Return the columns of one document.

        Args:
            name: The document.
            written: Whether a perturbation acted.
            steered: Whether a controller did.
        """
        out: dict[str, Any] = {"n_new": int(np.mean(self._new[name])) if self._new.get(name) else 0}
        if written:
            sums, weights = self._sums.get(name, {}), self._weights.get(name, {})
            out |= {key: sums[key] / weights[key] if weights.get(key) else np.nan for key in PASSPORT}
            out |= {key: int(sums.get(key, 0)) for key in WRITTEN}
        if steered:
            active, tokens, energy = self._actions.get(name, [0.0, 0.0, 0.0])
            out |= {"duty_cycle": active / tokens if tokens else np.nan, "control_energy": energy}
        return out


def _document(name: str) -> str:
    """The document of a row: windows of one text belong together."""
    task, colon, place = name.rpartition(":")
    return task + colon + place.partition("#")[0]
