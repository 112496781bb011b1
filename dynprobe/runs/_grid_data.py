"""Responses of a sweep or a threshold run as one frame, for drawing.

A sweep keeps its responses in the samples, a threshold run in its trials. Pictures ask one question of both: what did
this prompt answer at this layer, under this scale, at this strength? Seeds are averaged inside their prompt where all
prompts saw the same strengths; in a search, where every seed has strengths of its own, each stays a curve of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError, did_you_mean
from dynprobe.runs._curves import curve
from dynprobe.runs._quantity import Quantity, has, per_position, write_name

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["chosen", "in_order", "mean_responses", "on_a_grid", "responses"]


def on_a_grid(run: Run) -> bool:
    """Return whether all prompts saw the same strengths."""
    return bool(run.manifest.config.get("alphas"))


def responses(run: Run, what: Quantity) -> pd.DataFrame:
    """Return one row per response that is drawn.

    Returns:
        ``write`` (its scale and kind), ``series`` (``perturbed``, ``sham``, or a control), ``layer``, ``alpha`` (its
        size), ``prompt_id``, ``curve`` (what is joined by a line) and ``value``, NaN where there is none.

    Raises:
        RunFolderError: Nothing was measured yet.
    """
    rows = _of_trials(run, what) if what.criterion is not None else _of_samples(run, what)
    if not rows["value"].notna().any():
        raise RunFolderError(
            f"{run.path} holds no {what.column} ({run.status}). Continue the run, or draw another column; "
            "run.samples['reasons'] says why values are missing."
        )
    return rows


def _of_samples(run: Run, what: Quantity) -> pd.DataFrame:
    samples = run.table("samples", columns=["prompt_id", "condition_id", "status", what.column])
    samples = samples[samples["status"].astype(str) != "not-written"]
    conditions = run.table("conditions").astype({"condition_id": object}).set_index("condition_id")
    of = conditions.loc[samples["condition_id"].astype(object).to_numpy()].reset_index()
    # A control that repeats an energy elsewhere is drawn where the energy comes from.
    source = conditions.reindex(of["matched_to"].astype(object).to_numpy()).reset_index()
    matched = (of["arm"].astype(str) == "energy-matched").to_numpy()

    def origin(column: str) -> np.ndarray:
        return np.where(matched, source[column].astype(object), of[column].astype(object))

    rows = pd.DataFrame(
        {
            "arm": of["arm"].astype(str), "variant": of["variant"].astype(str), "mode": of["decode_mode"].astype(str),
            "scale": origin("scale"), "kind": origin("kind"), "layer": origin("layer"),
            "alpha": pd.to_numeric(origin("alpha")), "prompt_id": samples["prompt_id"].astype(str).to_numpy(),
            "value": samples[what.column].to_numpy(np.float64),
        }
    )  # fmt: skip
    rows = rows[rows["arm"] != "clean"]
    forced = rows[rows["mode"] == "forced"]
    rows = forced if forced["value"].notna().any() else rows[rows["mode"] == "free"]
    rows["series"] = np.select(
        [rows["variant"] != "model", rows["arm"] != "perturbed", rows["alpha"] < 0],
        [rows["variant"], rows["arm"], "sign-flip"],
        "perturbed",
    )
    rows = rows[(rows["variant"] == "model") | (rows["arm"] == "perturbed") & (rows["alpha"] > 0)]
    rows = rows[(rows["series"] == "sham") | (rows["alpha"] != 0)]
    rows["write"] = [write_name(s, k) for s, k in zip(rows["scale"], rows["kind"], strict=True)]
    rows["layer"], rows["alpha"] = rows["layer"].astype(int), rows["alpha"].abs()
    keys = ["write", "series", "layer", "alpha", "prompt_id"]
    found = rows.groupby(keys, sort=True)["value"].mean().reset_index()
    # Nothing is written under one scale as under another: a layer has one sham for all.
    written, sham = found[found["series"] != "sham"], found[found["series"] == "sham"]
    found = pd.concat([written, *(sham.assign(write=write) for write in written["write"].unique())], ignore_index=True)
    return found.assign(curve=found["prompt_id"])


def _of_trials(run: Run, what: Quantity) -> pd.DataFrame:
    if per_position(run):
        raise RunFolderError(
            f"{run.path} has one threshold per position, so no response of a whole text; draw run.plot.fragility(), or "
            "run dynprobe threshold without --each-position"
        )
    has(run, "trials")
    rows = run.table("trials")
    rows = rows[rows["criterion"].astype(str) == what.criterion]
    found = pd.DataFrame(
        {
            "write": [write_name(s, k) for s, k in zip(rows["scale"], rows["kind"], strict=True)],
            "series": np.where(rows["alpha"] == 0, "sham", "perturbed"), "layer": rows["layer"].astype(int),
            "alpha": rows["alpha"].astype(float), "prompt_id": rows["prompt_id"].astype(str),
            "seed": rows["seed"].astype(int), "value": rows["response"].astype(float),
        }
    )  # fmt: skip
    if found["seed"].nunique() == 1 or on_a_grid(run):
        found = found.groupby(["write", "series", "layer", "alpha", "prompt_id"])["value"].mean().reset_index()
        return found.assign(curve=found["prompt_id"])
    return found.assign(curve=found["prompt_id"] + ", seed " + found["seed"].astype(str)).drop(columns="seed")


def mean_responses(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over prompts at every strength, with its interval where three prompts answered.

    Args:
        rows: What :func:`responses` returned, of a run in which all prompts saw the same strengths.

    Returns:
        ``write, series, layer, alpha, mean, low, high, n``.
    """
    frames = []
    for key, own in rows.groupby(["write", "series", "layer"], sort=False):
        write, series, layer = (str(part) for part in key)
        table = own.pivot_table(index="curve", columns="alpha", values="value", dropna=False)
        found = curve(table).set_index("x").reindex(table.columns).rename_axis("x").reset_index()
        found["n"] = found["n"].fillna(0).astype(int)  # a strength without any response is a gap, not left out
        found.loc[found["n"] < 3, ["low", "high"]] = np.nan
        frames.append(found.assign(write=write, series=series, layer=int(layer)))
    found = pd.concat(frames, ignore_index=True).rename(columns={"x": "alpha"})
    return found[["write", "series", "layer", "alpha", "mean", "low", "high", "n"]]


def chosen(rows: pd.DataFrame, run: Run, scale: str | None) -> pd.DataFrame:
    """Return the rows of one scale, or all.

    Raises:
        UsageError: The run has no such scale.
    """
    if scale is None:
        return rows
    known = sorted(set(rows["write"]))
    kept = rows[[scale in (write, write.split(",")[0]) for write in rows["write"]]]
    if kept.empty:
        raise UsageError(f"{run.path} has no scale {scale!r}; it has {', '.join(known)}.{did_you_mean(scale, known)}")
    return kept


def in_order(run: Run, writes: Iterable[str]) -> list[str]:
    """Return the writes once each, in the order in which their scales were asked for."""
    asked = [str(scale) for scale in run.manifest.config.get("scale") or ()]
    place = {scale: number for number, scale in enumerate(asked)}
    return sorted(set(writes), key=lambda write: (place.get(write.split(",")[0], len(place)), write))
