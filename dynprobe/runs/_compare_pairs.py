"""Means of each run and paired differences between runs, with p corrected over the family.

The family of a correction is every test of one table: all metrics × pairs × conditions that were asked for. Naming the
metrics beforehand (``--metric``) makes a small, confirmatory family, for which Holm is meant; without it the family is
everything that two runs have in common, and Benjamini–Hochberg is the honest reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import adjusted, cluster_means, paired_differences
from dynprobe.metrics.statistics._sign_flips import least_flip_p
from dynprobe.runs._compare_columns import Quantity
from dynprobe.runs._compare_read import Reader
from dynprobe.runs._compare_sides import Pairing, Side

__all__ = ["LENGTHS", "Rows", "Settings", "SideValues", "correct", "sample_tables", "sample_values"]


@dataclass(frozen=True)
class Settings:
    """How the statistics are done.

    Attributes:
        confidence: Nominal coverage of intervals.
        n_boot: Bootstrap replicates.
        seed: Seed of the resampling.
        margins: Column → largest difference that does not matter.
    """

    confidence: float = 0.95
    n_boot: int = 2000
    seed: int = 0
    margins: Mapping[str, float] | None = None

    @property
    def boot(self) -> dict[str, Any]:
        """Arguments of the statistics."""
        return {"confidence": self.confidence, "n_boot": self.n_boot, "seed": self.seed}

    def margin(self, column: str) -> float | None:
        """Margin of a column, where one was declared."""
        return (self.margins or {}).get(column)


#: Counts of tokens, read beside the metrics.
LENGTHS = ("n_fed", "n_prompt", "n_new")

#: Condition name → run number → one row per shared text.
SideValues = dict[str, dict[int, pd.DataFrame]]


def sample_values(
    reader: Reader,
    sides: Sequence[Side],
    pairings: Sequence[Pairing],
    quantities: Sequence[Quantity],
    prompts: pd.DataFrame,
) -> SideValues:
    """Read every metric of every condition: one row per shared text, converted where a converter says so."""
    out: SideValues = {pairing.name: {} for pairing in pairings}
    for at, side in enumerate(sides):
        named = {pairing.name: i for pairing in pairings if (i := pairing.ids[at]) is not None}
        sources = {q.column: q.sources[at] for q in quantities}
        held = set(side.facts[side.facts["table"] == "samples"]["column"])
        lengths = [c for c in LENGTHS if c in held]
        columns = [s[0] for s in sources.values() if s is not None]
        read = reader.samples(side, list(dict.fromkeys(named.values())), [*lengths, *columns], prompts)
        for name, condition in named.items():
            frame = read[condition]
            values = {}
            for column, source in sources.items():
                if source is not None:
                    x = frame[source[0]].to_numpy(np.float64, na_value=np.nan)
                    values[column] = x if source[1] is None else source[1].scale * x + source[1].offset
            kept = frame[["n_rows", *lengths]]
            out[name][side.number] = pd.concat([kept, pd.DataFrame(values, index=frame.index)], axis=1)
    return out


def sample_tables(
    sides: Sequence[Side], values: SideValues, quantities: Sequence[Quantity], how: Settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the means of every run, and the paired differences of every pair that may be compared.

    Args:
        sides: The runs.
        values: From :func:`sample_values`.
        quantities: The metrics.
        how: Settings of the statistics.
    """
    means, pairs = Rows(how), Rows(how)
    by_number = {side.number: at for at, side in enumerate(sides)}
    for condition, found in values.items():
        for q in quantities:
            held = {n: frame[q.column].to_numpy() for n, frame in found.items() if q.column in frame}
            held = {n: x for n, x in held.items() if np.isfinite(x).any()}
            allowed = [p for p in combinations(sorted(held), 2) if (by_number[p[0]], by_number[p[1]]) not in q.refused]
            named = {"condition": condition, **_named(q)}
            for n in sorted({n for pair in allowed for n in pair}):
                means.add({**named, "run": sides[by_number[n]].label}, held[n])
            for a, b in allowed:
                labels = {"a": sides[by_number[a]].label, "b": sides[by_number[b]].label}
                pairs.add({**named, **labels}, held[a] - held[b], q.column)
    return means.means(), correct(pairs.differences())


class Rows:
    """Labels with one number per prompt each, whose statistics are done all at once.

    Args:
        how: Settings of the statistics.
    """

    def __init__(self, how: Settings) -> None:
        self._how = how
        self._labels: list[dict[str, Any]] = []
        self._values: list[np.ndarray] = []
        self._margins: list[float | None] = []

    def add(self, label: dict[str, Any], values: np.ndarray, column: str = "") -> None:
        """Add one row; ``column`` is the name under which a margin was declared."""
        self._labels.append(label)
        self._values.append(values)
        self._margins.append(self._how.margin(column))

    def means(self) -> pd.DataFrame:
        """Return a mean over prompts for each row."""
        if not self._labels:
            return pd.DataFrame()
        found = cluster_means(np.array(self._values).T, **self._how.boot)
        rows = [
            {
                **label, "mean": m.value, "low": m.low, "high": m.high, "sd": m.sd, "n": m.n, "n_asked": m.n_asked,
                "reason": m.reason or m.reason_interval,
            }
            for label, m in zip(self._labels, found, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def differences(self) -> pd.DataFrame:
        """Return a paired difference for each row, whose values are differences."""
        if not self._labels:
            return pd.DataFrame()
        found = paired_differences(np.array(self._values).T, self._margins, **self._how.boot)
        rows = []
        for label, margin, d in zip(self._labels, self._margins, found, strict=True):
            row = {
                **label, "difference": d.value, "low": d.low, "high": d.high, "effect_dz": d.effect,
                "effect_low": d.effect_low, "effect_high": d.effect_high, "p": d.p, "p_least": least_flip_p(d.n),
                "n": d.n, "n_asked": d.n_asked,
                "reason": d.reason or d.reason_interval,
            }  # fmt: skip
            rows.append(row if margin is None else row | {"margin": margin, "equivalent": d.equivalent})
        return pd.DataFrame(rows)


def correct(table: pd.DataFrame) -> pd.DataFrame:
    """Add Holm's and Benjamini–Hochberg's p over the family, which is the table."""
    if table.empty:
        return table
    p = table["p"].to_numpy(np.float64)
    at = list(table.columns).index("p") + 1
    for name, method in (("p_bh", "fdr_bh"), ("p_holm", "holm")):
        table.insert(at, name, adjusted(p, method))  # type: ignore[arg-type]
    table.insert(at + 2, "family", int(np.isfinite(p).sum()))
    return table


def _named(q: Quantity) -> dict[str, str]:
    return {"metric": q.column, "metric_id": q.metric_id, "unit": q.unit, "span": q.span}
