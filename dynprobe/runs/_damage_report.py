"""One thing that is wrong with a run folder."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Damage"]


@dataclass(frozen=True)
class Damage:
    """One finding.

    Attributes:
        kind: ``manifest``, ``identity``, ``missing``, ``cut``, ``changed``, ``layout``, ``orphan``, ``temporary``,
            ``batch``, ``calibration``, ``events`` or ``summary``.
        path: The file, relative to the folder.
        what: What is wrong with it, and what was lost.
        remedy: What a repair does; empty where it can do nothing.
        table: The table that the file is a part of.
        batch: The batch it was written in.
        rows: Rows that cannot be read any more.

    Example:
        >>> print(Damage("cut", "depths/part-00000.parquet", "it is cut short", "make batch 0 again", batch=0))
        depths/part-00000.parquet: it is cut short. Repair: make batch 0 again.
    """

    kind: str
    path: str
    what: str
    remedy: str
    table: str | None = None
    batch: int | None = None
    rows: int | None = None

    def __str__(self) -> str:
        mend = f"Repair: {self.remedy}." if self.remedy else "It cannot be repaired."
        return f"{self.path}: {self.what}. {mend}"
