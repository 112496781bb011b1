"""Metrics where the effect is equal: runs that hold sweeps, read at one KL.

An α has no unit that two models share: 0.1 of a norm is a touch for one model and ruin for another. Where runs hold a
sweep, each metric is read at the strength that moves the output by the same KL(clean ‖ arm) in both, prompt by prompt:
the first crossing of the KL from below, linear in ln KL and ln α between neighbouring strengths, and the metric linear
in ln KL there. Nothing is extrapolated: outside the tested strengths there is no value.

Two writes are set beside each other when their noise scale, kind and positions are the same and they stand at the same
share of the depth, layer over layers, to within half a layer of the shallower model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.runs._compare_columns import Quantity
from dynprobe.runs._compare_pairs import Rows, Settings, correct
from dynprobe.runs._compare_read import Reader
from dynprobe.runs._compare_sides import Side

__all__ = ["at_equal_kl", "matched_kl", "n_layers", "same_place"]

_KL = "kl_clean_pert"
#: Never read at equal KL: the KL itself, and the sizes that were written.
_NOT = (_KL, "alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs", "alpha_cos", "alpha")
#: The strength itself, as a metric.
_STRENGTH = Quantity("ln_alpha", "", "ln scale", "", (), {})


@dataclass(frozen=True)
class Write:
    """One write at several strengths.

    Attributes:
        scale: Noise scale.
        kind: Kind of the write.
        positions: Positions that are written, in the mini-language.
        layer: Layer, NaN where the run does not say.
        layers: Number of layers of the model.
        conditions: Strength → conditions, one for each seed.
    """

    scale: str
    kind: str
    positions: str
    layer: float
    layers: float
    conditions: Mapping[float, tuple[str, ...]]

    @property
    def place(self) -> float:
        """Share of the depth."""
        return self.layer / self.layers

    @property
    def words(self) -> str:
        """The write in words, without the model."""
        depth = "" if math.isnan(self.place) else f" at {self.place:.0%} of depth"
        return f"{self.scale}, {self.kind}, positions {self.positions}{depth}"

    def beside(self, other: Write) -> bool:
        """Whether two writes are the same thing in two models."""
        mine, theirs = (self.scale, self.kind, self.positions), (other.scale, other.kind, other.positions)
        return mine == theirs and same_place(self.place, self.layers, other.place, other.layers)


def at_equal_kl(alphas: Any, kl: Any, values: Any, target: float) -> tuple[float, float]:
    """Return α and a value where KL first reaches a target; NaN where it is not bracketed.

    Args:
        alphas: Strengths [A], ascending, > 0.
        kl: KL at each strength [A].
        values: The value at each strength [A].
        target: KL in nats, > 0.

    Example:
        >>> alpha, value = at_equal_kl([0.1, 0.4], [0.01, 1.0], [2.0, 4.0], 0.1)
        >>> round(alpha, 12), round(value, 12)
        (0.2, 3.0)
    """
    a, k, v = (np.asarray(x, dtype=np.float64) for x in (alphas, kl, values))
    ok = np.isfinite(k) & (k > 0)
    a, k, v = a[ok], k[ok], v[ok]
    for i in range(len(a) - 1):
        if k[i] < target <= k[i + 1]:
            t = math.log(target / k[i]) / math.log(k[i + 1] / k[i])
            return float(a[i] * (a[i + 1] / a[i]) ** t), float(v[i] + t * (v[i + 1] - v[i]))
    return math.nan, math.nan


def matched_kl(
    reader: Reader,
    sides: Sequence[Side],
    quantities: Sequence[Quantity],
    prompts: pd.DataFrame,
    targets: Sequence[float],
    how: Settings,
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return means and paired differences of metrics at equal KL, and what could not be done.

    Args:
        reader: Reads the runs.
        sides: Runs with samples.
        quantities: The metrics.
        prompts: Shared prompts.
        targets: Values of KL in nats.
        how: Settings of the statistics.
    """
    writes = [_writes(side) for side in sides]
    swept = [at for at in range(len(sides)) if writes[at]]
    chosen = [q for q in quantities if q.column not in _NOT]
    means, pairs = Rows(how), Rows(how)
    notes: list[str] = []
    said: set[tuple[Any, ...]] = set()
    curves: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def curve(at: int, number: int) -> dict[str, np.ndarray]:
        if (at, number) not in curves:
            curves[at, number] = _curves(reader, sides[at], writes[at][number], at, chosen, prompts)
        return curves[at, number]

    for i, j in combinations(swept, 2):
        matched = [
            (x, y) for x in range(len(writes[i])) for y in range(len(writes[j])) if writes[i][x].beside(writes[j][y])
        ]
        if not matched:
            notes.append(_nothing_common(sides[i], writes[i], sides[j], writes[j]))
        for x, y in matched:
            for target in targets:
                read = [_read(curve(at, number), target) for at, number in ((i, x), (j, y))]
                out = [sides[at].label for at, r in zip((i, j), read, strict=True) if not _any(r[_STRENGTH.column])]
                if out:
                    notes.append(
                        f"equal KL: {target:g} nats ({writes[i][x].words}) lies outside the tested strengths of "
                        f"{' and '.join(out)}; --kl takes another"
                    )
                    continue
                for q in [_STRENGTH, *chosen]:
                    if (i, j) in q.refused or not all(q.column in r and _any(r[q.column]) for r in read):
                        continue
                    label = {
                        "kl": target, "write": writes[i][x].words,
                        "metric": q.column, "metric_id": q.metric_id, "unit": q.unit,
                    }  # fmt: skip
                    for at, number, r in ((i, x, read[0]), (j, y, read[1])):
                        key = (target, q.column, at, number)
                        if key not in said:
                            said.add(key)
                            means.add({**label, "run": sides[at].label}, r[q.column])
                    named = {**label, "a": sides[i].label, "b": sides[j].label}
                    pairs.add(named, read[0][q.column] - read[1][q.column], q.column)
    table = correct(pairs.differences())
    if len(table):
        strength = table["metric"] == _STRENGTH.column
        for name, source in (("ratio", "difference"), ("ratio_low", "low"), ("ratio_high", "high")):
            table[name] = np.exp(table[source].where(strength))
    return means.means(), table, list(dict.fromkeys(notes))


def same_place(a: float, layers_a: float, b: float, layers_b: float) -> bool:
    """Whether two shares of depth are one place, to within half a layer of the shallower model.

    Example:
        >>> same_place(2 / 4, 4, 8 / 16, 16), same_place(1 / 4, 4, 8 / 16, 16)
        (True, False)
    """
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= 0.5 / min(layers_a, layers_b)


def n_layers(side: Side) -> float:
    """Number of layers (or updates) of the model of a run; NaN where the run does not say."""
    structure = side.model.get("structure")
    found = structure.get("n_layers") if isinstance(structure, dict) else None
    return float(found) if found else math.nan


def _writes(side: Side) -> list[Write]:
    """Return what a run wrote at two strengths or more, teacher-forced, without a controller."""
    table = side.conditions
    held = set(side.facts[side.facts["table"] == "samples"]["column"])
    if _KL not in held or not {"alpha", "scale", "arm", "kind"} <= set(table.columns):
        return []
    kept = table[(table["arm"].astype(str) == "perturbed") & (table["alpha"] > 0)]
    for column, plain in (("decode_mode", "forced"), ("controller", ""), ("variant", "model")):
        if column in kept:
            kept = kept[[pd.isna(v) or str(v) == plain for v in kept[column]]]
    groups: dict[tuple[str, str, str, float, str], dict[float, list[str]]] = {}
    for row in kept.to_dict("records"):
        layer = row.get("layer", math.nan)
        where = str(row.get("where") or "")
        key = (str(row["scale"]), str(row["kind"]), _positions(where), float(layer), where)
        groups.setdefault(key, {}).setdefault(float(row["alpha"]), []).append(str(row["condition_id"]))
    layers = n_layers(side)
    return [
        Write(*key[:4], layers, {a: tuple(c) for a, c in sorted(found.items())})
        for key, found in groups.items()
        if len(found) > 1
    ]


def _positions(where: str) -> str:
    """Return the positions of a place; those of the mini-language without one are 1:."""
    found = [part.partition("=")[2] for part in where.split(",") if part.startswith("positions=")]
    return found[0] if found else "1:"


def _curves(
    reader: Reader, side: Side, write: Write, at: int, quantities: Sequence[Quantity], prompts: pd.DataFrame
) -> dict[str, np.ndarray]:
    """Return KL, strengths and every metric ``[prompt, α]``, seeds averaged inside the prompt first."""
    sources = {q.column: s for q in quantities if (s := q.sources[at]) is not None}
    columns = [_KL, *(s[0] for s in sources.values())]
    read = reader.samples(side, [c for group in write.conditions.values() for c in group], columns, prompts)
    stacked = []
    for group in write.conditions.values():
        frames = np.array([read[c][columns].to_numpy(np.float64, na_value=np.nan) for c in group])
        known = np.isfinite(frames)
        count = known.sum(0)
        stacked.append(np.where(count > 0, np.where(known, frames, 0).sum(0) / np.maximum(count, 1), np.nan))
    values = np.array(stacked).transpose(2, 1, 0)
    out = {"": np.array(list(write.conditions)), _KL: values[0]}
    for number, (column, source) in enumerate(sources.items(), 1):
        out[column] = values[number]
        if source[1] is not None:
            out[column] = source[1].scale * values[number] + source[1].offset
    return out


def _read(curves: Mapping[str, np.ndarray], target: float) -> dict[str, np.ndarray]:
    """Return the strength, as ln α, and every metric where KL is the target, one value per prompt."""
    alphas, kl = curves[""], curves[_KL]
    out = {}
    for column, values in curves.items():
        if column not in ("", _KL):
            out[column] = np.array([at_equal_kl(alphas, k, v, target)[1] for k, v in zip(kl, values, strict=True)])
    out[_STRENGTH.column] = np.log([at_equal_kl(alphas, k, k, target)[0] for k in kl])
    return out


def _any(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _nothing_common(a: Side, left: Sequence[Write], b: Side, right: Sequence[Write]) -> str:
    said = ["; ".join(dict.fromkeys(w.words for w in writes)) for writes in (left, right)]
    return f"equal KL: {a.label} wrote {said[0]}, {b.label} wrote {said[1]}; no write is common"
