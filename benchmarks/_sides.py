"""What the parts of the sweep benchmark share: budgets and tables."""

from __future__ import annotations

from typing import Any

__all__ = ["COMPLETE", "TOLERANCE", "Table", "verdict"]

BUDGETS = {"all": 2.3, "last": 3.3, "position": 25.0, "1 prompt": 6.0, "2 prompts": 8.0}
#: Loops that are run to the end wherever that takes long.
COMPLETE = ("raw hooks", "nnsight")
#: Largest difference of logits, in their standard deviation.
TOLERANCE = 1e-4


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
