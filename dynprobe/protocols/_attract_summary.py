"""What an attractor study says: the doses first, then every measure against length, and where long texts break down.

Prompts are the unit: the samples of one prompt are averaged before anything else, and intervals are the expanded
percentile bootstrap over prompts (a cluster bootstrap, since all samples of a prompt move together). Differences are
paired: the arm's text of a prompt against the bare model's of the same prompt at the same length.

*Breakdown.* A text is broken at a length if it repeats itself more, or is less likely, than the bare model's own texts:
its 4-gram repetition lies above the 99 % quantile of bare texts decoded likewise, or its NLL under the bare model above
the 99 % quantile of bare texts that were *sampled* at temperature 1 (the smallest observed value that 99 % do not
exceed). Sampled, because greedy texts are the likeliest there are: beside them every other text, however sound, would
count as broken. A dose breaks long generation down if more than half of its texts are broken. The first such dose is
reported, or the largest that was tried.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import mean_interval, proportion_interval
from dynprobe.protocols._attract_config import AttractConfig
from dynprobe.protocols._attract_doses import Dose
from dynprobe.protocols._evaluate_summary import paired_difference
from dynprobe.protocols._summary import without_remarks
from dynprobe.runs import Run

__all__ = ["LENGTH_METRICS", "attract_summary", "dose_entries", "dose_table"]

#: Columns of the lengths that are averaged and compared.
LENGTH_METRICS = (
    "repetition", "distinct_1", "distinct_2", "distinct_3", "longest_repeat", "nll_bare", "nll", "drift",
    "attention_prompt", "kappa_phase", "kappa_geom", "limen_ratio", "limen_ct", "n_live", "strength_total", "hit_rate",
    "gain", "written",
)  # fmt: skip
_BROKEN_BY = ("repetition", "nll_bare")
_QUANTILE = 0.99
_RULE = (
    "repetition above the 99 % quantile of bare texts decoded likewise, or nll_bare above that of bare texts sampled "
    "at temperature 1"
)
#: Repetition of bare texts that leaves no room above it; bare texts below which their quantile is a matter of chance.
_FULL, _FEWEST = 0.95, 8


def dose_entries(doses: Sequence[Dose]) -> list[dict[str, Any]]:
    """Return the table dose → ε → KL as plain data, one entry per arm, settings and dose."""
    found: dict[str, dict[str, Any]] = {}
    for dose in doses:
        c = dose.condition
        if c.sampled:
            continue
        if c.reset == "never" and c.condition_id.removesuffix(";reset=never") in found:
            continue
        found[c.condition_id] = {
            "condition": c.condition_id, "arm": c.arm, "cell": c.cell.name, "dose": c.dose, "raw": c.raw,
            "strength": c.strength if dose.status != "unreached" and c.dose is not None else math.nan, "kl": dose.kl,
            "status": dose.status, "largest": dose.largest, "kl_largest": dose.kl_largest, "n_texts": dose.n_texts,
            "n_tokens": dose.n_tokens,
        }  # fmt: skip
    return list(found.values())


def dose_table(doses: Sequence[Dose]) -> pd.DataFrame:
    """Return the doses as a table of fits."""
    table = pd.DataFrame(dose_entries(doses)).rename(columns={"condition": "condition_id"})
    table.insert(0, "fit_id", "dose|" + table["condition_id"])
    table["dose"] = table["dose"].astype(float)
    return table.assign(estimator="attractor.dose/1")


def attract_summary(run: Run, config: AttractConfig, doses: Sequence[Dose]) -> dict[str, Any]:
    """Return the summary of a finished study."""
    said: dict[str, Any] = {"doses": dose_entries(doses)}
    names = [d.condition.condition_id for d in doses if d.status != "unreached"]
    if config.task != "generate":
        return said | {"items": _items(run.table("items"), names)}
    lengths = without_remarks(run.table("lengths")).astype({"condition_id": str, "prompt_id": str})
    return said | {
        "lengths": _lengths(lengths, names), "breakdown": _breakdown(lengths, doses, config.read_lengths),
        "attention": _attention(lengths),
        "hit_rate_bare": float(lengths.loc[lengths["condition_id"] == "none", "hit_rate"].mean()),
    }  # fmt: skip


def _attention(lengths: pd.DataFrame) -> str | None:
    """Why there is no attention mass, or None where there is."""
    if lengths["attention_prompt"].notna().any():
        return None
    for text in lengths["reasons"].dropna():
        found = json.loads(text) if isinstance(text, str) else text
        if found.get("attention_prompt"):
            return str(found["attention_prompt"])
    return "missing"


def _lengths(lengths: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    metrics = [m for m in LENGTH_METRICS if m in lengths]
    means = lengths.groupby(["condition_id", "length", "prompt_id"])[metrics].mean()  # samples of a prompt are one
    out = []
    for name in names:
        for length in sorted(lengths["length"].unique()):
            mine, bare = means.loc[name, length], means.loc["none", length]
            entry: dict[str, Any] = {"condition": name, "length": int(length), "n": len(mine)}
            for metric in metrics:
                value = _mean(mine[metric].to_numpy(np.float64))
                if name != "none":
                    change = mine[metric] - bare[metric].reindex(mine.index)
                    value["difference"] = _mean(change.to_numpy(np.float64))
                entry[metric] = value
            out.append(entry)
    return out


def _mean(values: np.ndarray) -> dict[str, Any]:
    kept = values[np.isfinite(values)]
    n = len(kept)
    low, high = mean_interval(kept)
    return {"mean": float(kept.mean()) if n else math.nan, "low": low, "high": high, "n": n}


def _breakdown(lengths: pd.DataFrame, doses: Sequence[Dose], at: Sequence[int]) -> dict[str, Any]:
    limits: dict[int, dict[str, float]] = {}
    free = next((d.condition.condition_id for d in doses if d.condition.sampled), "none")
    for length in at:
        of_length = lengths[lengths["length"] == length]
        limits[length] = {
            name: _limit(of_length.loc[of_length["condition_id"] == bare, name].to_numpy(np.float64))
            for name, bare in zip(_BROKEN_BY, ("none", free), strict=True)
        }
    n_bare = int((lengths[lengths["condition_id"] == "none"]["length"] == at[-1]).sum())
    shares = []
    for dose in doses:
        c = dose.condition
        if dose.status == "unreached":
            continue
        for length in at:
            rows = lengths[(lengths["condition_id"] == c.condition_id) & (lengths["length"] == length)]
            shares.append({
                "condition": c.condition_id, "arm": c.arm, "cell": c.cell.name, "dose": c.dose, "length": length,
                **_share(rows, limits[length]),
            })  # fmt: skip
    return {
        "rule": _RULE,
        "limits": [{"length": n, **limits[n]} for n in at], "shares": shares, "verdicts": _verdicts(shares, doses),
        "full": [n for n in at if limits[n]["repetition"] >= _FULL],
        "n_bare": n_bare, "reason": None if n_bare >= _FEWEST else "few-bare-texts",
    }  # fmt: skip


def _limit(values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(np.quantile(kept, _QUANTILE, method="higher")) if len(kept) else math.nan


def _share(rows: pd.DataFrame, limits: Mapping[str, float]) -> dict[str, Any]:
    grid = rows[list(_BROKEN_BY)].to_numpy(np.float64)
    known = np.isfinite(grid).all(1)
    over = grid[known] > np.array([limits[name] for name in _BROKEN_BY])
    broken, n = int(over.any(1).sum()), int(known.sum())
    found = proportion_interval(broken, n, method="exact")
    return {
        "broken": broken, "n": n, "missing": int((~known).sum()), "share": broken / n if n else math.nan,
        "low": found.low, "high": found.high,
        **{f"by_{name}": int(over[:, i].sum()) for i, name in enumerate(_BROKEN_BY)},
    }  # fmt: skip


def _verdicts(shares: Sequence[Mapping[str, Any]], doses: Sequence[Dose]) -> list[dict[str, Any]]:
    """The first dose of each arm, settings and length at which more than half are broken, or the largest tried."""
    tried = {d.condition.condition_id: d for d in doses}
    out = []
    groups = dict.fromkeys((s["arm"], s["cell"], s["length"]) for s in shares if s["dose"] is not None)
    for arm, cell, length in groups:
        mine = [s for s in shares if (s["arm"], s["cell"], s["length"]) == (arm, cell, length)]
        first = next((s for s in mine if s["share"] > 0.5), None)
        shown = first or mine[-1]
        dose = tried[shown["condition"]]
        out.append({
            "arm": arm, "cell": cell, "length": length, "breaks": first is not None, "dose": shown["dose"],
            "strength": dose.condition.strength, "kl": dose.kl, "share": shown["share"], "low": shown["low"],
            "high": shown["high"], "n": shown["n"],
        })  # fmt: skip
    return out


def _items(items: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy of each arm and task with exact intervals, and its change from the bare model and from a clean start."""
    items = items.copy()
    for name in ("task", "condition_id", "doc_id", "cluster"):
        items[name] = items[name].astype(str)
    out = []
    for task in dict.fromkeys(items["task"]):
        of_task = items[items["task"] == task]
        by_arm = {n: of_task[of_task["condition_id"] == n].set_index("doc_id") for n in names}
        for metric in ("correct", "chose_right"):
            if metric not in items or not of_task[metric].notna().any():
                continue
            for name, rows in by_arm.items():
                if rows[metric].isna().any():  # an arm that is not asked to choose
                    continue
                right = rows[metric].astype(bool)
                found = proportion_interval(int(right.sum()), len(right), method="exact")
                entry: dict[str, Any] = {
                    "task": task, "metric": metric, "condition": name, "n": len(right), "right": int(right.sum()),
                    "accuracy": float(right.mean()), "low": found.low, "high": found.high,
                    "chance": float(1 / rows["n_choices"].iloc[0]) if metric == "chose_right" else math.nan,
                }  # fmt: skip
                if name != "none":
                    entry["change"] = _change(by_arm["none"], rows, metric)
                clean = name.removesuffix(";reset=never")
                if clean != name and clean in by_arm:
                    entry["leak"] = _change(by_arm[clean], rows, metric)
                out.append(entry)
    return out


def _change(before: pd.DataFrame, after: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Paired change of a share: Newcombe's interval, McNemar's test, and the bootstrap over clusters."""
    before = before.reindex(after.index)
    x, y = before[metric].to_numpy(bool), after[metric].to_numpy(bool)
    change = pd.Series(y.astype(float) - x.astype(float))
    clusters = after["cluster"].to_numpy()
    sums = change.groupby(clusters).agg(["sum", "count"]).to_numpy(np.float64)
    found: dict[str, Any] = {**paired_difference(x, y), "n": len(x), "clusters": len(sums)}
    found["cluster_low"], found["cluster_high"] = mean_interval(sums[:, 0] / sums[:, 1], sums[:, 1])
    return found
