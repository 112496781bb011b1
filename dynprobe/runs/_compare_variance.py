"""Where the variance lies between the runs of a comparison: models, categories, prompts, seeds.

Runs of the same weights in the same dtype are one model; where they differ in their seed, they are replicates of it.
Another dtype is another model here: its rounding is no seed, and would hide in that row. It is no further model for a
statement about skeletons, though, which reads one dtype of each weights. One value per prompt and run goes in, as in
every other table of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from dynprobe.metrics.statistics import adjusted
from dynprobe.runs._compare_columns import CORE, Quantity
from dynprobe.runs._compare_pairs import SideValues
from dynprobe.runs._compare_sides import Side
from dynprobe.runs._panel_statistics import FEWEST, skeleton_rows, variance_rows

__all__ = ["variance_tables"]

#: R² needs more models than covariates and two.
_FEWEST_SKELETON = 4


def variance_tables(
    sides: Sequence[Side], values: SideValues, quantities: Sequence[Quantity], prompts: pd.DataFrame,
    wanted: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:  # fmt: skip
    """Return the variance table, the skeleton table, and what a reader must know.

    Args:
        sides: Runs that have samples.
        values: One row per shared text, by condition and run.
        quantities: The metrics; one that may not be compared between two of the runs has no rows.
        prompts: The shared prompts.
        wanted: Metrics that were named; default the core ones.
    """
    models = _models(sides)
    kinds = _kinds(sides, models)
    if len(kinds) < 2:
        return pd.DataFrame(), pd.DataFrame(), []
    held = [q for q in quantities if not q.refused]
    chosen = [q for q in held if q.column in (wanted or CORE)] or held[:8]
    frame = _observations(sides, models, values, [q.column for q in chosen], _categories(sides[0], prompts))
    if not len(frame):
        return pd.DataFrame(), pd.DataFrame(), []
    names = [q.column for q in chosen]
    ids = {q.column: q.metric_id for q in chosen}
    variance = variance_rows(frame, ["condition"], names)
    skeleton = pd.DataFrame()
    by_model = {models[kind[0].number]: kind[0] for kind in kinds}
    if len(by_model) >= _FEWEST_SKELETON:
        frame = frame[frame["model"].isin(list(by_model))]
        skeletons = {name: side.model.get("skeleton") or {} for name, side in by_model.items()}
        known = list(dict.fromkeys(key for found in skeletons.values() for key in found))
        covariates = {key: {name: found.get(key) for name, found in skeletons.items()} for key in known}
        families = {name: side.model_type for name, side in by_model.items()}
        skeleton, _ = skeleton_rows(frame, ["condition"], names, covariates, families)
    for table in (variance, skeleton):
        if len(table):
            table.insert(2, "metric_id", table["metric"].map(ids))
    for name, column in (("variance", "p"), ("skeleton", "p_permutation")):
        table = variance if name == "variance" else skeleton
        if len(table):
            table.insert(list(table.columns).index(column) + 1, "p_holm", adjusted(table[column], "holm"))
    notes = [
        f"{' and '.join(dict.fromkeys(models[side.number] for side in kind))} are one model in several dtypes: each "
        "stands as a model of its own, and the share of the models holds what the dtype does"
        for kind in kinds if len({models[side.number] for side in kind}) > 1
    ]  # fmt: skip
    if len(by_model) < FEWEST:
        notes.append(
            f"variance over {len(by_model)} models ({FEWEST} are the least): the share of the models is about these "
            "and not about models"
        )
    return variance, skeleton, notes


def _models(sides: Sequence[Side]) -> dict[int, str]:
    """Run number → name of its model; runs of the same weights in one dtype have one name, that of the first."""
    first: dict[tuple[str, str], str] = {}
    return {side.number: first.setdefault((_weights(side), side.dtype), side.label) for side in sides}


def _kinds(sides: Sequence[Side], models: dict[int, str]) -> list[list[Side]]:
    """The runs of each weights, one of each dtype."""
    out: dict[str, dict[str, Side]] = {}
    for side in sides:
        out.setdefault(_weights(side), {})[models[side.number]] = side
    return [list(found.values()) for found in out.values()]


def _weights(side: Side) -> str:
    """The hash of a run's weights; a run without one is of a model of its own."""
    return side.weights or f"run {side.number}"


def _categories(side: Side, prompts: pd.DataFrame) -> dict[Any, str]:
    """Text → category, as the first run has it."""
    table = side.run.prompts
    if "category" not in table:
        return {}
    named = dict(zip(table["prompt_id"].astype(str), table["category"].astype(object), strict=True))
    return {
        cluster: str(named[str(p)])
        for p, cluster in zip(prompts["prompt_id"], prompts["cluster"], strict=True)
        if isinstance(named.get(str(p)), str)
    }


def _observations(
    sides: Sequence[Side], models: dict[int, str], values: SideValues, columns: Sequence[str],
    categories: dict[Any, str],
) -> pd.DataFrame:  # fmt: skip
    parts = []
    for condition, found in values.items():
        for side in sides:
            frame = found.get(side.number)
            if frame is None:
                continue
            kept = frame[[c for c in columns if c in frame]]
            front = pd.DataFrame({
                "condition": condition, "model": models[side.number], "prompt_id": list(frame.index),
                "category": [categories.get(text, "all") for text in frame.index],
            })  # fmt: skip
            parts.append(pd.concat([front, kept.reset_index(drop=True)], axis=1))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
