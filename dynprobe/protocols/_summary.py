"""The first table a person sees: one line per arm, means over prompts with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import mean_interval

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["HEADLINE", "asked_columns", "summarise", "without_remarks"]

#: Columns of the summary, in order.
HEADLINE = (
    "kappa_phase", "kappa_phase_d", "kappa_path", "kappa_geom", "kappa_geom_d", "kl_clean_pert", "flip_rate", "nll",
    "nll_d", "entropy", "limen_ct", "limen_ratio", "delta_rel_prev", "repetition", "n_new", "alpha_relnorm",
    "alpha_coordstd", "alpha_mad", "alpha_cos",
)  # fmt: skip
#: Rows that were not perturbed as asked: their effect is none of the perturbation's and would thin out its mean.
_NOT_AS_ASKED = ("not-written", "isokl-unreached")


def asked_columns(run: Run) -> list[str]:
    """Return the numeric columns of samples that a run has because their metrics were asked for by id."""
    asked = list(run.manifest.config.get("metrics") or ())
    facts = run.columns()
    names = facts.loc[(facts["table"] == "samples") & facts["id"].isin(asked), "column"]
    return [name for name in names if pd.api.types.is_numeric_dtype(run.samples[name])]


def summarise(samples: pd.DataFrame, asked: Sequence[str] = ()) -> dict[str, Any]:
    """Reduce the samples table to one entry per condition.

    Replicates of a prompt are averaged first, so that the unit of the interval is the prompt. Rows that could not be
    perturbed as asked (their status says so) are counted as missing. A column without any value stays, with the reason
    that most of its rows give; one that the condition does not have is left out.

    Args:
        samples: The samples table.
        asked: Further columns, see :func:`asked_columns`.

    Returns:
        ``{condition: {column: {mean, sd, low, high, n, missing, reasons}}}`` (intervals as
        :func:`~dynprobe.metrics.statistics.mean_interval` has them) and, per condition, the regimes' shares.
    """
    out: dict[str, Any] = {}
    for condition, rows in samples.groupby("condition_id", sort=False, observed=True):
        entry: dict[str, Any] = {"samples": len(rows)}
        every, rows = rows, rows[~rows["status"].isin(_NOT_AS_ASKED)]
        rows = without_remarks(rows)
        why = _reasons(every)
        held = [c for c in dict.fromkeys((*HEADLINE, *asked)) if c in rows and (rows[c].notna().any() or c in why)]
        per_prompt = rows[held].astype(np.float64).groupby(rows["prompt_id"], observed=True).mean()
        for column in held:
            values = per_prompt[column].dropna().to_numpy()
            low, high = mean_interval(values)
            entry[column] = {
                "mean": float(values.mean()) if len(values) else float("nan"),
                "sd": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
                "low": low, "high": high, "n": len(values), "missing": every["prompt_id"].nunique() - len(values),
            }  # fmt: skip
            if entry[column]["missing"]:
                entry[column]["reasons"] = why.get(column, {})
            if not len(values):
                entry[column]["reason"] = max(why[column], key=why[column].__getitem__)
        if "limen_regime" in rows and rows["limen_regime"].notna().any():
            entry["regimes"] = rows["limen_regime"].value_counts(normalize=True, sort=True).round(4).to_dict()
        entry["status"] = {str(k): int(v) for k, v in every["status"].value_counts().items() if v}
        if "equal_to" in rows and rows["equal_to"].notna().any():
            entry["equal_to"] = {str(k): int(v) for k, v in rows["equal_to"].value_counts().items()}
        out[str(condition)] = entry
    return out


def without_remarks(rows: pd.DataFrame) -> pd.DataFrame:
    """Drop values that carry a reason, such as a ratio over one step: they say nothing about the model."""
    texts = rows["reasons"].dropna() if "reasons" in rows else pd.Series(dtype=object)
    remarked: dict[str, list[Any]] = {}
    for index, text in texts.items():
        for name in json.loads(text) if isinstance(text, str) else text:
            if name in rows and pd.api.types.is_numeric_dtype(rows[name]):
                remarked.setdefault(name, []).append(index)
    if not remarked:
        return rows
    rows = rows.copy()
    for name, at in remarked.items():
        rows.loc[at, name] = np.nan
        if name == "limen_ratio" and "limen_regime" in rows:
            rows.loc[at, "limen_regime"] = None
    return rows


def _reasons(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Column → reason → rows that give it."""
    counts: dict[str, dict[str, int]] = {}
    for text in rows["reasons"].dropna() if "reasons" in rows else ():
        for column, reason in (json.loads(text) if isinstance(text, str) else text).items():
            if reason:
                of = counts.setdefault(column, {})
                of[reason] = of.get(reason, 0) + 1
    return counts
