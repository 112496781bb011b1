"""What the parts of the sweep benchmark share: budgets, tables, and the noise that both sides write."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.probes import Subject
from dynprobe.probes._noise import gaussian_rows

__all__ = ["COMPLETE", "TOLERANCE", "Table", "directions", "verdict"]

BUDGETS = {"all": 2.3, "last": 3.3, "position": 25.0, "1 prompt": 6.0, "2 prompts": 8.0}
#: Loops that are run to the end wherever that takes long.
COMPLETE = ("raw hooks", "nnsight")
#: Largest difference of logits, in their standard deviation.
TOLERANCE = 1e-4


def directions(subject: Subject, key: str, layer: int, n: int) -> Tensor:
    """Unit vectors of the noise that dynprobe writes, ``[pos, dim]``; the first position gets none."""
    drawn = gaussian_rows(0, [key], f"resid_post.{layer}", np.arange(n)[None], subject.dim)[0]
    unit = torch.from_numpy(drawn)
    unit /= unit.norm(dim=-1, keepdim=True)
    unit[0] = 0
    return unit


class Table(list):
    """Rows of one table, printed as they come."""

    def __init__(self, *columns: str) -> None:
        super().__init__()
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: Any) -> None:
        """Print and keep one row."""
        self.append(cells)
        print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def verdict(value: float, name: str, quick: bool) -> str:
    """The budget, and whether it is met."""
    return (
        "" if quick or name not in BUDGETS else f"≥ {BUDGETS[name]:g}: {'met' if value >= BUDGETS[name] else 'MISSED'}"
    )
