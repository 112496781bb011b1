"""Profiles of every run on normalised depth and as a path, and what separates two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.metrics.statistics import profile_difference, profile_interval
from dynprobe.metrics.statistics._sign_flips import least_flip_p
from dynprobe.runs._compare_columns import COMPANIONS, Quantity, common_columns, metric_facts
from dynprobe.runs._compare_depth import DepthProfile, along_depth, first_state, radial_steps
from dynprobe.runs._compare_pairs import Rows, Settings, correct
from dynprobe.runs._compare_read import Profile, Reader
from dynprobe.runs._compare_sides import Pairing, Side

__all__ = ["DepthTables", "Profiles", "depth_columns", "depth_tables", "read_profiles"]

#: Read whatever is asked for: what correlations of Δ and κ are made of.
_PARTS = ("kappa_phase", "delta_rel_prev", "delta_angle", "norm")
#: Radial part of Δ, derived from the norms.
RADIAL = "delta_radial"
#: Condition → run number → column → profiles.
Profiles = dict[str, dict[int, dict[str, DepthProfile]]]


@dataclass(frozen=True)
class DepthTables:
    """What a comparison says along depth.

    Attributes:
        axes: One row per run: its track, depths and steps.
        areas: Means of area and path, one row per condition, metric, measure and run.
        pairs: Paired differences of these.
        profiles: Means on the common grid with pointwise intervals.
        contrasts: For each pair, where profiles differ most, with p over the whole profile.
    """

    axes: pd.DataFrame
    areas: pd.DataFrame
    pairs: pd.DataFrame
    profiles: pd.DataFrame
    contrasts: pd.DataFrame


def depth_columns(
    sides: Sequence[Side], wanted: Sequence[str]
) -> tuple[list[Quantity], list[Quantity], list[dict[str, str]]]:
    """Return the metrics along depth that two runs have.

    A column of ``profiles`` is taken before one of ``depths``, whose rows are averaged over tokens.

    Returns:
        Those that were asked for; these with the parts of Δ and κ that correlations need; and of each run the table
        that holds each column.
    """
    facts, homes = [], []
    for side in sides:
        own, tokens = metric_facts(side, "profiles"), metric_facts(side, "depths")
        tokens = {name: row for name, row in tokens.items() if name not in own}
        facts.append({**own, **tokens})
        homes.append({**dict.fromkeys(own, "profiles"), **dict.fromkeys(tokens, "depths")})
    every = common_columns(sides, facts)
    # An angle in rad is κ of the step in another unit, and stands in profiles where these are.
    have = {q.column for q in every}
    every = [q for q in every if not (q.column == "angle" and "kappa_phase" in have)]
    names = {*wanted, *(COMPANIONS[w] for w in wanted if w in COMPANIONS)}  # a path is made of its steps
    asked = [q for q in every if not wanted or q.column in names]
    return asked, asked + [q for q in every if q.column in _PARTS and q not in asked], homes


def read_profiles(
    reader: Reader,
    sides: Sequence[Side],
    pairings: Sequence[Pairing],
    quantities: Sequence[Quantity],
    homes: Sequence[dict[str, str]],
    prompts: pd.DataFrame,
    grid: np.ndarray,
    track: str | None,
) -> tuple[Profiles, pd.DataFrame]:
    """Read the profiles of every condition and run, and say what depth means in each."""
    out: Profiles = {pairing.name: {} for pairing in pairings}
    axes: list[dict[str, Any]] = []
    for at, side in enumerate(sides):
        sources = {q.column: q.sources[at] for q in quantities}
        columns = {s[0]: homes[at][s[0]] for s in sources.values() if s is not None}
        if not columns:
            continue
        chosen = _track(reader, side, "profiles" if "profiles" in columns.values() else "depths", track)
        named = {pairing.name: i for pairing in pairings if (i := pairing.ids[at]) is not None}
        ids = list(dict.fromkeys(named.values()))
        read = reader.profiles(side, ids, columns, prompts, chosen, _sink(side))
        units = metric_units(side, homes[at])
        for name, condition in named.items():
            found, start = _profiles_of(read[condition], sources, units, grid)
            out[name][side.number] = found
            if found and not any(row["run"] == side.label for row in axes):
                end = int(read[condition].depths.max())
                axes.append(
                    {"run": side.label, "track": chosen, "first_depth": start, "last_depth": end, "steps": end - start}
                )
    return out, pd.DataFrame(axes)


def _profiles_of(
    read: Profile, sources: Mapping[str, Any], units: Mapping[str, str], grid: np.ndarray
) -> tuple[dict[str, DepthProfile], int]:
    """Return the profiles of one condition, converted, with the radial part of Δ; and the first state."""
    out: dict[str, DepthProfile] = {}
    start = first_state(read.depths, read.values)
    if start is None:
        return out, -1
    for name, source in sources.items():
        if source is None:
            continue
        values = read.values[source[0]]
        values = values if source[1] is None else source[1].scale * values + source[1].offset
        found = along_depth(read.depths, values, start, units[source[0]], grid)
        if found is not None:
            out[name] = found
    if "norm" in out and out["norm"].reach == 0:
        radial = radial_steps(read.values[sources["norm"][0]])
        radial[:, read.depths <= start] = np.nan
        found = along_depth(read.depths, radial, start, "1", grid)
        if found is not None:
            out[RADIAL] = found
    return out, start


def depth_tables(
    sides: Sequence[Side],
    found: Profiles,
    axes: pd.DataFrame,
    quantities: Sequence[Quantity],
    grid: np.ndarray,
    how: Settings,
) -> DepthTables:
    """Return means, differences and profiles along depth."""
    at_of = {side.number: at for at, side in enumerate(sides)}
    areas, pairs = Rows(how), Rows(how)
    profiles, contrasts = [], []
    for condition, runs in found.items():
        for q in quantities:
            held = {n: p[q.column] for n, p in runs.items() if q.column in p}
            held = {n: p for n, p in held.items() if np.isfinite(p.area).any()}
            allowed = [(a, b) for a, b in combinations(sorted(held), 2) if (at_of[a], at_of[b]) not in q.refused]
            for n in sorted({n for pair in allowed for n in pair}):
                label = {
                    "condition": condition,
                    "metric": q.column,
                    "metric_id": q.metric_id,
                    "run": sides[at_of[n]].label,
                }
                for measure, x, unit in _measures(held[n], q.unit):
                    areas.add({**label, "measure": measure, "unit": unit}, x)
                profiles.append(_profile_frame(label, held[n], grid, how))
            for a, b in allowed:
                label = {"condition": condition, "metric": q.column, "metric_id": q.metric_id}
                label |= {"a": sides[at_of[a]].label, "b": sides[at_of[b]].label}
                left, right = ({m: (x, u) for m, x, u in _measures(held[n], q.unit)} for n in (a, b))
                for measure in [m for m in left if m in right]:
                    delta = left[measure][0] - right[measure][0]
                    pairs.add({**label, "measure": measure, "unit": left[measure][1]}, delta, f"{q.column}.{measure}")
                contrasts.append({**label, **_contrast(held[a].profile, held[b].profile, grid, how)})
    return DepthTables(
        axes,
        areas.means(),
        correct(pairs.differences()),
        pd.concat(profiles, ignore_index=True) if profiles else pd.DataFrame(),
        pd.DataFrame(contrasts),
    )


def metric_units(side: Side, home: dict[str, str]) -> dict[str, str]:
    """Unit of each column along depth of a run."""
    facts = side.facts
    return {
        str(c): str(u)
        for t, c, u in zip(facts["table"], facts["column"], facts["unit"], strict=True)
        if home.get(str(c)) == t
    }


def _measures(p: DepthProfile, unit: str) -> list[tuple[str, np.ndarray, str]]:
    out = [("area", p.area, unit)]
    if p.cumulative is not None and np.isfinite(p.path).any():
        out.append(("path", p.path, p.path_unit))
    return out


def _profile_frame(label: dict[str, Any], p: DepthProfile, grid: np.ndarray, how: Settings) -> pd.DataFrame:
    mean, low, high = profile_interval(p.profile, **how.boot)
    columns: dict[str, Any] = {**label, "s": grid, "mean": mean, "low": low, "high": high}
    if p.cumulative is not None:
        mean, low, high = profile_interval(p.cumulative, **how.boot)
        columns |= {"path": mean, "path_low": low, "path_high": high, "path_unit": p.path_unit}
    return pd.DataFrame(columns)


def _contrast(a: np.ndarray, b: np.ndarray, grid: np.ndarray, how: Settings) -> dict[str, Any]:
    d = profile_difference(a, b, confidence=how.confidence, n_boot=0, seed=how.seed)
    if not np.isfinite(d.p_max).any():
        return {"s_largest": np.nan, "difference": np.nan, "p_max": np.nan, "p_least": np.nan,
                "n": d.n, "reason": "coverage"}  # fmt: skip
    at = int(np.nanargmax(np.abs(np.where(np.isfinite(d.p_max), d.value, np.nan))))
    alpha = 1 - how.confidence
    return {
        "s_largest": float(grid[at]), "difference": float(d.value[at]), "p_max": float(np.nanmin(d.p_max)),
        "p_least": least_flip_p(d.n, profile=True),
        "share_of_depth": float((d.p_max <= alpha).sum() / np.isfinite(d.p_max).sum()), "n": d.n, "reason": None,
    }  # fmt: skip


def _track(reader: Reader, side: Side, table: str, wanted: str | None) -> str:
    tracks = reader.tracks(side, table)
    if wanted is not None and wanted in tracks:
        return wanted
    if len(tracks) == 1:
        return tracks[0]
    structure = side.model.get("structure")
    own = side.run.manifest.config.get("track") or (structure.get("track") if isinstance(structure, dict) else None)
    if wanted is None and own in tracks:
        return str(own)
    near = did_you_mean(wanted, tracks) if wanted else ""
    raise UsageError(
        f"{side.label} has several tracks, whose depths count different updates: {', '.join(tracks)}.{near} "
        f"Name one: --track {tracks[-1]}"
    )


def _sink(side: Side) -> int:
    """First positions that stay out of means over tokens."""
    value = side.run.manifest.config.get("sink")
    return int(value) if isinstance(value, int) else 1
