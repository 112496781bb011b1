"""What ``diff`` found: where two runs part, by how much, and what else is different about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import UsageError
from dynprobe.runs._atomic import write_bytes
from dynprobe.runs._csv import as_csv
from dynprobe.runs._diff_floor import Floor
from dynprobe.runs._json import dumps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["APART", "EQUAL", "NOTHING", "WITHIN", "Difference", "place"]

#: The verdicts; the last is followed by the place.
EQUAL, WITHIN, NOTHING, APART = "equal bit for bit", "equal within noise floor", "nothing to compare", "part"


@dataclass(repr=False)
class Difference:
    """The result of :func:`diff`.

    Attributes:
        a: Folder of one run.
        b: Folder of the other.
        basis: ``states`` (differences measured on hidden states), ``metrics`` (lower bounds from stored metrics) or
            ``none`` (only tokens were compared).
        floor: The noise floor.
        samples: One row per condition, prompt and replicate: verdict, first place beyond the floor in token order
            (``token_*``) and in depth order (``depth_*``), largest difference, growth per depth, tokens compared, first
            differing token, top-1 flips, NLL.
        conditions: One row per condition: the same over its samples.
        depths: One row per condition, track and depth: median and largest difference, floor, share of cells beyond.
        cells: One row per condition, prompt, replicate, track, pos and depth: ``rel``, ``floor``, ``beyond``.
        facts: What differs between the manifests: ``fact, a, b``.
        only_a: What only run A has.
        only_b: What only run B has.
        warnings: What a reader must know.
    """

    a: Path
    b: Path
    basis: str
    floor: Floor
    samples: pd.DataFrame
    conditions: pd.DataFrame
    depths: pd.DataFrame
    cells: pd.DataFrame
    facts: pd.DataFrame
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def parts(self) -> bool:
        """Whether the runs part beyond the noise floor anywhere."""
        return bool(self.samples["verdict"].str.startswith(APART).any())

    @property
    def compared(self) -> bool:
        """Whether every sample had something to compare."""
        return not bool((self.samples["verdict"] == NOTHING).any())

    @property
    def verdict(self) -> str:
        """One sentence: equal bit for bit, equal within noise floor, nothing to compare, or where a condition parts."""
        for row in self.conditions.to_dict("records"):
            if str(row["verdict"]).startswith(APART):
                return f"{row['verdict']} ({row['condition_id']}, {row['prompt_id']})"
        empty = self.samples["verdict"] == NOTHING
        if empty.all():
            return (
                f"{NOTHING}: the runs share no stored number of a state, a depth or a read-out; run both with --states"
            )
        if (self.samples.loc[~empty, "verdict"] == EQUAL).all():
            said = EQUAL if self.basis == "states" else f"{EQUAL} in every stored number"
        else:
            said = WITHIN
        return said + (f"; {NOTHING} in {int(empty.sum())} of {len(empty)} samples" if empty.any() else "")

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the cells as plain lists and mappings; a number that is not known is None."""
        tables = {name: _records(getattr(self, name)) for name in ("samples", "conditions", "depths", "facts")}
        return {
            "verdict": self.verdict, "parts": self.parts, "basis": self.basis, "floor": self.floor.as_dict(),
            "a": str(self.a), "b": str(self.b), "only_a": self.only_a, "only_b": self.only_b,
            "warnings": self.warnings, **tables,
        }  # fmt: skip

    def save(self, target: str | Path) -> Path:
        """Write everything but the cells to ``.json``, or the cells to ``.csv`` or ``.parquet``.

        Raises:
            UsageError: The ending is another, or the folder is not there.
        """
        target = Path(target)
        if target.suffix not in (".json", ".csv", ".parquet"):
            raise UsageError(f"--out {target}: the ending says the format, one of .json, .csv, .parquet")
        if not target.parent.is_dir():
            raise UsageError(f"--out {target}: there is no folder {target.parent}")
        if target.suffix == ".json":
            data = (dumps(self.to_dict(), indent=1) + "\n").encode("utf-8")
        elif target.suffix == ".csv":
            data = as_csv(self.cells).encode("utf-8")
        else:
            data = self.cells.to_parquet(index=False)
        write_bytes(target, data)
        return target

    def figure(self, condition: str | None = None, prompt: str | None = None, track: str | None = None) -> Figure:
        """Return the picture: log10 of the relative difference over depth × token, and its growth along depth.

        Args:
            condition: Condition; default the first that parts, else the first.
            prompt: Prompt; default the first of that condition that parts, else the first.
            track: Track; default the first.
        """
        from dynprobe.runs._plot_diff import draw_difference

        return draw_difference(self, condition, prompt, track)

    def draw(self, target: str | Path, **choice: Any) -> Path:
        """Save the picture; the ending chooses the format."""
        from dynprobe.runs._canvas import save_figure

        return save_figure(self.figure(**choice), target)

    def __repr__(self) -> str:
        return (
            f"Difference of {self.a.name} and {self.b.name} (from {self.basis}): {self.verdict}\n"
            f"{len(self.samples)} samples, {len(self.cells)} cells, noise floor {self.floor}\n"
            f"{len(self.facts)} facts differ, {len(self.warnings)} warnings"
        )


def place(row: Any, prefix: str) -> str:
    """Return where a cell is, in words: ``layer 3 (depth 4), token 17``.

    Args:
        row: Mapping with ``pos``, ``depth`` and what is known of ``layer``, ``iteration``, ``stage``, ``track``, each
            with ``prefix`` before it.
        prefix: ``"token_"`` or ``"depth_"``.
    """
    depth, layer, iteration = (row.get(f"{prefix}{name}") for name in ("depth", "layer", "iteration"))
    stage, slot = row.get(f"{prefix}stage"), row.get(f"{prefix}slot")
    if depth == 0 or stage == "embed":
        where = "the embedding (depth 0)"
    elif _known(layer) and layer >= 0 and not (_known(iteration) and iteration > 0):
        where = f"layer {int(layer)} (depth {int(depth)})"
    elif _known(iteration) and iteration > 0:
        inside = f"{stage}, " if isinstance(stage, str) and stage else ""
        inside += f"layer {int(layer)}, " if _known(layer) and layer >= 0 else ""
        where = f"iteration {int(iteration)} ({inside}depth {int(depth)})"
    else:
        where = f"depth {int(depth)}"
    track = row.get(f"{prefix}track")
    where += f" of {track}" if isinstance(track, str) and track not in ("resid", "core") else ""
    where += f", slot {int(slot)}" if _known(slot) and slot >= 0 else ""
    return f"{where}, token {int(row[f'{prefix}pos'])}"


def _known(value: Any) -> bool:
    return value is not None and not pd.isna(value)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(k): _plain(v) for k, v in row.items()} for row in plain.to_dict("records")]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
