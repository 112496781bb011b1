"""Ratios of thresholds: how much more one model takes before it breaks.

A ratio is exp(ln α50(a) − ln α50(b)). It has a meaning under one noise scale, kind, criterion, level and share of depth
only; thresholds that differ in any of them are not set beside each other. Where the runs hold the trials of a search,
the crossings of the shared prompts are drawn together for both sides (:func:`ratio_threshold`); estimates that have no
threshold per prompt are combined from their own intervals on the log axis, as if independent (MOVER, Donner and Zou
2012).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import Crossing, Ratio, ratio_threshold
from dynprobe.runs._compare_matched import n_layers, same_place
from dynprobe.runs._compare_pairs import Settings
from dynprobe.runs._compare_sides import Side
from dynprobe.runs._crossings import Crossings, crossings_of

__all__ = ["mover", "threshold_ratios"]


def threshold_ratios(sides: Sequence[Side], prompts: pd.DataFrame, how: Settings) -> tuple[pd.DataFrame, list[str]]:
    """Return the ratios of thresholds of every pair of runs that searched them, and what could not be done."""
    fits = {side.number: _fits(side) for side in sides if side.tables.get("fits")}
    fits = {n: f for n, f in fits.items() if len(f)}
    rows, notes = [], []
    by_number = {side.number: side for side in sides}
    for a, b in combinations(sorted(fits), 2):
        left, right = fits[a], fits[b]
        found = 0
        for _, x in left.iterrows():
            for _, y in right.iterrows():
                same = all(x[k] == y[k] for k in ("criterion", "scale", "kind", "estimator", "level"))
                if same and same_place(x["place"], x["n_layers"], y["place"], y["n_layers"]):
                    row = _ratio(by_number[a], by_number[b], x, y, prompts, how)
                    rows.append({"a": by_number[a].label, "b": by_number[b].label, **row})
                    found += 1
        if not found:
            said = ["; ".join(sorted(set(f["fit_id"].astype(str)))[:3]) for f in (left, right)]
            notes.append(
                f"thresholds of {by_number[a].label} ({said[0]}) and {by_number[b].label} ({said[1]}) have no "
                "criterion, noise scale and place in common"
            )
    return pd.DataFrame(rows), notes


def mover(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return a ratio a/b with the interval that two independent intervals imply, on the log axis.

    Args:
        a: Value, low, high.
        b: Value, low, high.

    Example:
        >>> [round(x, 6) for x in mover((2.0, 1.0, 4.0), (1.0, 1.0, 1.0))]
        [2.0, 1.0, 4.0]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        (x, xl, xh), (y, yl, yh) = np.log(np.maximum(a, 0.0)), np.log(np.maximum(b, 0.0))
        low = x - y - np.sqrt((x - xl) ** 2 + (yh - y) ** 2)
        high = x - y + np.sqrt((xh - x) ** 2 + (y - yl) ** 2)
    return float(np.exp(x - y)), float(np.exp(low)), float(np.exp(high))


def _fits(side: Side) -> pd.DataFrame:
    table = side.run.table("fits")
    if not {"alpha50", "criterion", "scale", "layer", "estimator"} <= set(table.columns):
        return pd.DataFrame()
    table = table.astype({c: object for c in table if table[c].dtype == "category"})
    if "pos" in table:  # one position of one text is no population
        table = table[table["pos"].isna() | (table["pos"] < 0)]
    n = n_layers(side)
    return table.assign(place=table["layer"].astype(float) / n, n_layers=n)


def _ratio(a: Side, b: Side, x: pd.Series, y: pd.Series, prompts: pd.DataFrame, how: Settings) -> dict[str, Any]:
    row = {
        "criterion": x["criterion"], "level": x["level"], "scale": x["scale"], "kind": x["kind"],
        "place": x["place"], "estimator": x["estimator"], "alpha50_a": x["alpha50"], "alpha50_b": y["alpha50"],
    }  # fmt: skip
    if x["estimator"] == "threshold.prompt/1" and a.tables.get("trials") and b.tables.get("trials"):
        left, right = [_crossings(side, fit, prompts) for side, fit in ((a, x), (b, y))]
        r, low, high, wide = _of_crossings(left, right, how)
        return row | {
            "ratio": r.value, "ratio_low": low, "ratio_high": high, "status": r.status, "paired": r.paired,
            "n": r.n_common, "reason": r.reason, "n_wide": wide,
            "method": "cluster bootstrap of ln α50" + (" and wide brackets" if wide else ""),
        }  # fmt: skip
    value, low, high = mover((x["alpha50"], x["low"], x["high"]), (y["alpha50"], y["low"], y["high"]))
    known = math.isfinite(value)
    return row | {
        "ratio": value, "ratio_low": low, "ratio_high": high, "status": "resolved" if known else "missing",
        "paired": False, "n_wide": 0, "n": int(min(x.get("n", 0), y.get("n", 0))),
        "method": "intervals of both fits (MOVER)",
        "reason": None if known else str(x.get("reason") or y.get("reason") or "a side is missing"),
    }  # fmt: skip


def _of_crossings(a: Crossings, b: Crossings, how: Settings) -> tuple[Ratio, float, float, int]:
    """The ratio; its interval, widened by brackets that a search left wide, each side at its worse ends; how many."""

    def of(x: list[Crossing], y: list[Crossing]) -> Ratio:
        # A prompt without a threshold on one side leaves both: medians of unlike prompts have no ratio.
        return ratio_threshold(x, y, prompts_a=a.prompts, prompts_b=b.prompts, paired=True, **how.boot)

    found = of(a.found, b.found)
    low, high = found.low, found.high
    wide = a.n_wide + b.n_wide if found.status == "resolved" else 0
    if wide:
        ends = of(a.at("low"), b.at("high")), of(a.at("high"), b.at("low"))
        low = float(np.fmin.reduce([low, *(end.low for end in ends)]))
        high = float(np.fmax.reduce([high, *(end.high for end in ends)]))
    return found, low, high, wide


def _crossings(side: Side, fit: pd.Series, prompts: pd.DataFrame) -> Crossings:
    """Return the first crossing of every shared prompt and seed, the prompts by the name of their text."""
    trials = side.run.table("trials")
    trials = trials[
        (trials["criterion"].astype(str) == fit["criterion"]) & (trials["write"].astype(str) == fit["write"])
    ]
    trials = trials[trials["prompt_id"].astype(str).isin(set(prompts["prompt_id"]))]
    text = dict(zip(prompts["prompt_id"], prompts["cluster"], strict=True))
    found = crossings_of(trials, fit["level"], fit["floor"])
    return replace(found, prompts=[str(text[prompt]) for prompt in found.prompts])
