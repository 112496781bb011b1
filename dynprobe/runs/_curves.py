"""Numbers behind the pictures: one frame per picture, which static figures and the report both draw.

A picture that is printed and the same picture on a page must never disagree, so neither computes anything itself.
Frames are long: one row per point, with labels. A curve is a mean over prompts; replicates are averaged inside their
prompt first. Its interval is that of every mean over prompts (:func:`~dynprobe.metrics.statistics.mean_interval`),
missing below three of them and where fewer than half of them reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError
from dynprobe.metrics.statistics import interval_words, profile_interval, proportion_interval
from dynprobe.runs._protocol import protocol_of
from dynprobe.runs._tables import read_frame

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = [
    "INTERVAL", "ITERATED", "accuracy_numbers", "curve", "iteration_numbers", "main_track", "perturbed_depth",
    "profile_numbers", "regime_numbers", "shown_conditions",
]  # fmt: skip

#: How the intervals of all curves are said.
INTERVAL = f"{interval_words()} (2,000 resamples), pointwise"
_COMPONENTS = ("attn_out", "mlp_out")
#: Columns that may be drawn against the number of iterations: words, unit, whether the axis is logarithmic.
ITERATED = {
    "nll": ("loss", "nats per token", False),
    "delta_last": ("Δ of the last update", "‖h′−h‖/‖h‖", True),
    "kappa_phase": ("κ phase over all updates", "half-turns", False),
    "energy_last": ("energy of the last state", "", False),
    "right": ("share of right answers", "", False),
}


def curve(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over prompts of each column with its interval.

    Args:
        table: One row per prompt, one column per point of the axis.

    Returns:
        ``x, mean, low, high, n``; a point that no prompt has is left out.
    """
    table = table.dropna(axis=1, how="all")
    values = table.to_numpy(np.float64)
    if not values.size:
        return pd.DataFrame({name: [] for name in ("x", "mean", "low", "high", "n")})
    _, low, high = profile_interval(values)
    return pd.DataFrame(
        {"x": table.columns.to_numpy(), "mean": np.nanmean(values, axis=0), "low": low, "high": high,
         "n": np.isfinite(values).sum(axis=0)}
    )  # fmt: skip


def main_track(run: Run, table: str) -> str:
    """Return the track that a picture along depth shows: the run's own, else the first that is no component."""
    known = [str(t) for t in read_frame(run.path, run.manifest, table, ["track"])["track"].unique()]
    tracks = sorted(t for t in known if t not in _COMPONENTS)
    structure = run.manifest.model.get("structure") if isinstance(run.manifest.model, dict) else None
    own = run.manifest.config.get("track") or (structure.get("track") if isinstance(structure, dict) else None)
    if own in tracks:
        return str(own)
    if not tracks:
        raise RunFolderError(f"{run.path} has no state track in {table}; it holds {', '.join(known) or 'nothing'}")
    return tracks[0]


def shown_conditions(run: Run, table: str, most: int = 6) -> tuple[list[str], int]:
    """Return the conditions that a picture along depth shows, in the order of the run, and how many have rows.

    Clean and perturbed ones come first, then recovered and others; controls only where there is room.
    """
    labels = run.samples[["sample_id", "condition_id"]].astype(str).set_index("sample_id")["condition_id"]
    there = set(labels.reindex(run.table(table, columns=["sample_id"])["sample_id"].unique().astype(str)).dropna())
    conditions = run.conditions.astype({"condition_id": str})
    if "arm" in conditions:
        rank = {"clean": 0, "perturbed": 1, "recovered": 2, "random-control": 4, "sham": 5}
        conditions = conditions.assign(rank=[rank.get(str(a), 3) for a in conditions["arm"]])
    order = [c for c in conditions["condition_id"] if c in there]
    order += sorted(there - set(order))
    if protocol_of(run.manifest.config) == "iterate":
        plain = [c for c in order if "|" not in c]
        at = np.unique(np.linspace(0, len(plain) - 1, min(most, len(plain))).round().astype(int))
        return [plain[i] for i in at], len(order)
    if "rank" in conditions:
        ranks = dict(zip(conditions["condition_id"], conditions["rank"], strict=True))
        best = sorted(order, key=lambda c: ranks.get(c, 3))[:most]
        return [c for c in order if c in best], len(order)
    return order[:most], len(order)


def _labelled(run: Run, table: str, columns: Sequence[str], conditions: Sequence[str]) -> pd.DataFrame:
    """Rows of a table along depth of these conditions, with prompt and condition, on the main track."""
    track = main_track(run, table)
    labels = run.samples[["sample_id", "prompt_id", "condition_id"]].astype(str)
    labels = labels[labels["condition_id"].isin(list(conditions))]
    rows = run.table(table, columns=["sample_id", "track", *columns])
    rows = rows[(rows["track"].astype(str) == track) & rows["sample_id"].isin(labels["sample_id"])]
    of = rows["sample_id"].astype(str).map(labels.set_index("sample_id")["prompt_id"])
    at = rows["sample_id"].astype(str).map(labels.set_index("sample_id")["condition_id"])
    return rows.drop(columns=["track", "sample_id"]).assign(prompt_id=of, condition_id=at)


def profile_numbers(run: Run, columns: Sequence[str], conditions: Sequence[str]) -> pd.DataFrame:
    """Return metrics along depth, as the run stored them per sample: mean over prompts and interval.

    Returns:
        ``measure`` (a column of profiles), ``condition``, ``depth``, ``mean``, ``low``, ``high``, ``n``; measures that
        are paired differences from the clean text end in ``_d``.
    """
    rows = _labelled(run, "profiles", ["depth", *columns], conditions)
    frames = []
    for column in columns:
        tables: dict[str, pd.DataFrame] = {
            str(c): own.pivot_table(index="prompt_id", columns="depth", values=column, aggfunc="mean")
            for c, own in rows.groupby("condition_id")
        }
        clean = next((c for c in conditions if c == "clean" or c.startswith("clean.")), None)
        for c in conditions:
            if c not in tables or tables[c].empty:
                continue
            frames.append(curve(tables[c]).assign(measure=column, condition=c))
            # Only a given text pairs token by token.
            if clean is not None and clean in tables and c != clean and c.endswith(".forced"):
                paired = tables[c] - tables[clean]
                frames.append(curve(paired).assign(measure=f"{column}_d", condition=c))
    if not frames:
        raise RunFolderError(f"{run.path} has no values of {', '.join(columns)} along depth")
    found = pd.concat(frames, ignore_index=True).rename(columns={"x": "depth"})
    return found[["measure", "condition", "depth", "mean", "low", "high", "n"]]


def perturbed_depth(run: Run, column: str, condition: str) -> pd.DataFrame:
    """Return ``[prompt, depth]`` means over tokens after position 0 of a column of ``depths``."""
    rows = _labelled(run, "depths", ["pos", "depth", column], [condition])
    rows = rows[rows["pos"] >= 1]
    table = rows.groupby(["prompt_id", "depth"], observed=True)[column].mean().unstack("depth")
    return table.dropna(axis=1, how="all")


def iteration_numbers(run: Run) -> pd.DataFrame:
    """Return what more iterations buy: ``measure, arm, iterations, mean, low, high, n``.

    Raises:
        RunFolderError: The run was not read at several numbers of iterations.
    """
    if run.summary.get("protocol") != "iterate" and "iterations" not in run.samples:
        raise RunFolderError(f"{run.path} was not read at several numbers of iterations; see dynprobe iterate")
    samples = run.samples
    ids = samples["condition_id"].astype(str)
    frames = []
    for measure in ITERATED:
        if measure not in samples or not samples[measure].notna().any():
            continue
        for arm, ending in (("clean", ""), ("perturbed", "|perturbed")):
            mine = samples[ids == "T" + samples["iterations"].astype(str) + ending]
            table = mine.pivot_table(index="prompt_id", columns="iterations", values=measure, observed=True)
            if not table.empty:
                frames.append(curve(table).assign(measure=measure, arm=arm))
    if not frames:
        raise RunFolderError(f"{run.path} holds no loss, Δ, κ or energy at any number of iterations")
    found = pd.concat(frames, ignore_index=True).rename(columns={"x": "iterations"})
    return found[["measure", "arm", "iterations", "mean", "low", "high", "n"]]


def regime_numbers(run: Run, column: str = "limen_regime") -> pd.DataFrame:
    """Return the share of samples in each regime: ``condition, regime, count, share, n``.

    Raises:
        RunFolderError: No regime was called.
    """
    samples = run.samples
    if column not in samples or not samples[column].notna().any():
        raise RunFolderError(f"{run.path} calls no regime; it takes LIMEN's ratio (see dynprobe metrics)")
    # A ratio with a remark (too few steps) says nothing, and neither does the regime it would fall in.
    if "reasons" in samples:
        remarked = samples["reasons"].astype(object).fillna("").str.contains('"limen_ratio"', regex=False)
        samples = samples[~remarked]
    rows = []
    order = run.conditions["condition_id"].astype(str)
    called = samples[samples[column].notna()].astype({"condition_id": str, column: str})
    for condition in order:
        own = called.loc[called["condition_id"] == condition, column].value_counts(sort=False).sort_index()
        rows += [
            {"condition": condition, "regime": regime, "count": int(k), "share": k / own.sum(), "n": int(own.sum())}
            for regime, k in own.items()
        ]
    if not rows:
        raise RunFolderError(f"{run.path} has no regime without a remark on its ratio")
    return pd.DataFrame(rows)


def accuracy_numbers(run: Run) -> pd.DataFrame:
    """Return the share of right answers: ``task, condition, right, n, mean, low, high`` (Wilson, 95 %).

    Raises:
        RunFolderError: The run answered no items.
    """
    if not run.manifest.rows().get("items"):
        raise RunFolderError(f"{run.path} answered no task items; see dynprobe eval")
    items = run.table("items")
    if "correct" not in items or not items["correct"].notna().any():
        raise RunFolderError(f"the items of {run.path} have no right and wrong")
    order = {str(c): i for i, c in enumerate(run.conditions["condition_id"])}
    rows: list[Mapping[str, Any]] = []
    items = items.astype({"task": str, "condition_id": str})
    groups = {(str(t), str(c)): own for (t, c), own in items.groupby(["task", "condition_id"], sort=False)}
    for (task, condition), own in sorted(groups.items(), key=lambda g: (g[0][0], order.get(g[0][1], len(order)))):
        answers = own["correct"].dropna().astype(bool)
        found = proportion_interval(int(answers.sum()), len(answers))
        rows.append(
            {"task": task, "condition": condition, "right": int(answers.sum()), "n": len(answers),
             "mean": found.value, "low": found.low, "high": found.high}
        )  # fmt: skip
    return pd.DataFrame(rows)
