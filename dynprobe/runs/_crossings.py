"""The crossings of a search: where the response of each prompt first reaches the level, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from dynprobe.metrics.statistics import Crossing, first_crossing

__all__ = ["Crossings", "crossings_of"]

#: A level below so many noise floors is not resolved.
_FACTOR = 10.0


@dataclass(frozen=True)
class Crossings:
    """First crossings of one write under one criterion.

    Attributes:
        found: One per prompt and seed.
        prompts: Prompt of each.
        unsure: Whether the search left its bracket wide, and said so.
    """

    found: list[Crossing]
    prompts: list[str]
    unsure: list[bool]

    @property
    def n_wide(self) -> int:
        """Number of crossings whose bracket was left wide."""
        return sum(a is not b for a, b in zip(self.found, self.at("low"), strict=True))

    def at(self, end: Literal["low", "high"]) -> list[Crossing]:
        """Return the crossings with those in wide brackets moved to one end of them.

        A crossing inside a wide bracket is interpolated: its prompt is known no better than the bracket's ends. An
        interval that counts this runs from where all of them cross at their lower ends to where they cross at their
        upper ends. Coverage of nominal 95 % intervals of the median at 6, 12 and 24 prompts (300 experiments, ln α*
        normal with σ = 0.5, wavy and saturating responses): with four evaluations per prompt, nearly all brackets wide,
        0.90, 0.90, 0.80 without and 1.00 with this; with six, 0.91 – 0.94 and 0.99 – 1.00; with ten, none wide, 0.94 –
        0.95 either way.

        Args:
            end: Which end.
        """
        return [
            replace(c, value=getattr(c, end))
            if doubt and c.status == "resolved" and 0 < c.low < c.high < math.inf
            else c
            for c, doubt in zip(self.found, self.unsure, strict=True)
        ]


def crossings_of(trials: pd.DataFrame, level: float, floor: float) -> Crossings:
    """Return the first crossing of every prompt and seed.

    Args:
        trials: Trials of one write under one criterion.
        level: Level of the response.
        floor: Numerical noise floor of the response.
    """
    searched = trials[trials["alpha"] > 0]
    # A search does not look into the noise of a text's group, and for no level at all; such a text is not left out.
    prompts = sorted({*trials["prompt_id"].astype(str)} - {*searched["prompt_id"].astype(str)})
    why = f"level<{_FACTOR:g}×floor" if math.isfinite(level) else "no level"
    found = [Crossing(math.nan, math.nan, math.nan, "not-resolved", why)] * len(prompts)
    unsure = [False] * len(prompts)
    # By name: categories sort as they came, and then an interval would depend on the order of the prompts.
    for (prompt, _), rows in searched.groupby([searched["prompt_id"].astype(str), "seed"], observed=True, sort=True):
        found.append(first_crossing(rows["alpha"].to_numpy(), rows["response"].to_numpy(), level, floor=floor))
        prompts.append(str(prompt))
        unsure.append(bool("remark" in rows and rows["remark"].notna().any()))
    return Crossings(found, prompts, unsure)
