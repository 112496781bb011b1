"""Tables over models: where the variance of a metric lies, and what the models' skeletons explain of it.

One function per table. All take observations in the long form, one row per model, condition, prompt and seed, and work
through every condition by itself: a strength or a temperature is no replicate of another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import (
    VarianceTable,
    adjusted_rand,
    nakagawa_r2,
    regime_shares,
    skeleton_r2,
    stable_clusters,
)
from dynprobe.metrics.statistics._crossed_design import CrossedDesign, crossed_design
from dynprobe.metrics.statistics._variance import table_of
from dynprobe.metrics.statistics._variance_components import components_of

__all__ = [
    "component_rows",
    "few_models",
    "regime_rows",
    "skeleton_rows",
    "topology_rows",
    "usable_covariates",
    "variance_rows",
]

#: So many models of each kind are the least for a statement about a kind.
FEWEST = 3


def variance_rows(observations: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Return the sums of squares of every metric in every condition, one row per term.

    Args:
        observations: Columns ``model``, ``category``, ``prompt_id``, those of ``by`` and the metrics.
        by: Columns that make a condition.
        metrics: Metrics; one without a value in a condition has no rows there.
    """
    rows = []
    for label, design in _designs(observations, by, metrics):
        table = table_of(design)
        facts = {
            "n": table.n, "n_asked": table.n_asked, "n_models": table.n_models, "n_categories": table.n_categories,
            "n_prompts": table.n_prompts, "copies": table.copies, "balanced": table.balanced,
        }  # fmt: skip
        for row in table.rows:
            rows.append({
                **label, "term": row.term, "df": row.df, "ss": row.ss, "ss_last": row.ss_last, "ms": row.ms,
                "eta2": row.eta2, "omega2": row.omega2, "against": row.against, "F": row.F, "p": row.p,
                "omega2_against": row.omega2_against, "includes": ", ".join(row.includes), **facts,
                "reason": row.reason,
            })  # fmt: skip
    return pd.DataFrame(rows)


def component_rows(observations: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Return the REML variance components of every metric in every condition, one row per term."""
    rows = []
    for label, design in _designs(observations, by, metrics):
        table: VarianceTable = table_of(design)
        found = components_of(design, table=table)
        fixed = components_of(design, table=table, fixed="category")
        r2 = fixed.r2 if fixed.status == "resolved" else nakagawa_r2(float("nan"), [], float("nan"))
        shares = found.shares
        terms = [row.term for row in table.rows if row.df > 0] or ["model"]
        for term in terms:
            rows.append({
                **label, "term": term, "variance": found.components.get(term, np.nan),
                "share": shares.get(term, np.nan), "includes": ", ".join(found.includes.get(term, ())),
                "at_zero": term in found.singular, "method": found.method, "r2_marginal": r2.marginal,
                "r2_conditional": r2.conditional, "n": found.n, "reason": found.reason,
            })  # fmt: skip
    return pd.DataFrame(rows)


def skeleton_rows(
    observations: pd.DataFrame,
    by: Sequence[str],
    metrics: Sequence[str],
    covariates: Mapping[str, Mapping[str, Any]],
    families: Mapping[str, str] | None = None,
    n_permutations: int = 9999,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the skeletons explain of every metric in every condition, and the share of each covariate.

    Args:
        observations: As for :func:`variance_rows`.
        by: Columns that make a condition.
        metrics: Metrics.
        covariates: Covariate → model → value; one that is not known of every model is left out, and named.
        families: Model → family.
        n_permutations: Permutations where there are too many to take all.
    """
    rows, parts = [], []
    for label, part, metric in _parts(observations, by, metrics):
        known = part[part[metric].notna()]
        held = list(dict.fromkeys(known["model"]))
        usable, lacking = usable_covariates(covariates, held)
        # Means over the prompts that all these models have: else a missing prompt would move a model.
        shared = known.groupby("prompt_id", observed=True)["model"].nunique()
        known = known[known["prompt_id"].isin(shared.index[shared == len(held)])]
        per_prompt = known.groupby(["model", "prompt_id"], observed=True, sort=False)[metric].mean().reset_index()
        found = skeleton_r2(
            per_prompt[metric], list(per_prompt["model"]), usable, families=families, n_permutations=n_permutations
        )
        runs = skeleton_r2(known[metric], list(known["model"]), usable, n_permutations=0)
        dropped = {**lacking, **found.dropped}
        rows.append({
            **label, "n_models": found.n, "n_skeletons": found.n_skeletons, "p": found.p,
            "covariates": ", ".join(c for c in usable if c not in found.dropped), "r2": found.r2,
            "r2_adjusted": found.r2_adjusted, "r2_null": found.null, "p_permutation": found.p_value,
            "reason_p": found.reason_p, "p_least": found.p_least, "permutations": found.permutations,
            "exact": found.exact, "permuted": found.permuted, "r2_leave_model": found.r2_leave_model,
            "r2_leave_skeleton": found.r2_leave_skeleton,
            "r2_leave_family": found.r2_leave_family, "reason_family": found.reason_family, "r2_runs": runs.r2_runs,
            "eta2_model": runs.eta2_model, "consistent": runs.consistent, "n_prompts": known["prompt_id"].nunique(),
            "left_out": json.dumps(dropped, ensure_ascii=False) if dropped else "", "reason": found.reason,
        })  # fmt: skip
        parts += [{**label, "covariate": name, "share": share} for name, share in found.shares.items()]
    return pd.DataFrame(rows), pd.DataFrame(parts)


def usable_covariates(
    covariates: Mapping[str, Mapping[str, Any]], models: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Split covariates into those known of every model and those that are not, with the models that lack them."""
    usable, lacking = {}, {}
    for name, given in covariates.items():
        without = [m for m in models if given.get(m) is None or given.get(m) != given.get(m)]
        if without:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            lacking[name] = f"not known of {without[0]}{more}"
        else:
            usable[name] = {m: given[m] for m in models}
    return usable, lacking


def topology_rows(
    observations: pd.DataFrame, by: Sequence[str], metrics: Sequence[str], families: Mapping[str, str],
    n_boot: int = 1000,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Return the clusters of models in every condition, and the cluster of each model."""
    rows, members = [], []
    for label, part in _conditions(observations, by):
        held = [m for m in metrics if m in part and part[m].notna().any()]
        models = list(dict.fromkeys(part["model"]))
        means = part.groupby(["model", "prompt_id"], observed=True)[held].mean()
        prompts = list(dict.fromkeys(part["prompt_id"]))
        grid = pd.MultiIndex.from_product([models, prompts])
        cube = means.reindex(grid).to_numpy(np.float64).reshape(len(models), len(prompts), len(held))
        # A metric that some model lacks altogether would leave no prompt.
        kept = [i for i in range(len(held)) if np.isfinite(cube[:, :, i]).any(1).all()]
        found = stable_clusters(cube[:, :, kept], models, n_boot=n_boot)
        rand = None
        if found.labels and len({families[m] for m in models}) > 1:
            rand = adjusted_rand(found.labels, [families[m] for m in models], n_permutations=1999)
        rows.append({
            **label, "metrics": ", ".join(held[i] for i in kept), "n_models": len(models),
            "n_prompts": found.n_prompts, "n_clusters": found.n_clusters, "silhouette": found.silhouette,
            "largest_stable": len(found.stable[0]) if found.stable else 0, "fragmentation": found.fragmentation,
            "threshold": found.threshold, "ari_family": np.nan if rand is None else rand.value,
            "ari_null_low": np.nan if rand is None else rand.null_low,
            "ari_null_high": np.nan if rand is None else rand.null_high,
            "ari_p": np.nan if rand is None else rand.p, "n_boot": found.n_boot, "reason": found.reason,
        })  # fmt: skip
        place = {m: number for number, cluster in enumerate(found.stable) for m in cluster}
        members += [
            {**label, "model": m, "cluster": found.labels[i], "stable_cluster": place[m]}
            for i, m in enumerate(models) if found.labels
        ]  # fmt: skip
    return pd.DataFrame(rows), pd.DataFrame(members)


def regime_rows(observations: pd.DataFrame, by: Sequence[str], n_boot: int = 1000) -> pd.DataFrame:
    """Return the regime of each model, over all prompts and per category."""
    rows = []
    if "limen_ratio" not in observations:
        return pd.DataFrame()
    for label, part in _conditions(observations, by):
        for model, own in part.groupby("model", sort=False, observed=True):
            groups = [("all", own), *own.groupby("category", sort=False, observed=True)]
            for category, some in groups:
                found = regime_shares(some["limen_ratio"], list(some["prompt_id"]), n_boot=n_boot)
                tokens = some["n_new"].mean() if "n_new" in some else np.nan
                rows.append({
                    **label, "model": model, "category": category, "ratio": found.ratio, "regime": found.label,
                    "share": found.shares.get(found.label, np.nan), "shares": json.dumps(found.shares),
                    "runs": json.dumps(found.runs), "mean_new_tokens": tokens, "n": found.n, "n_asked": found.n_asked,
                    "reason": found.reason,
                })  # fmt: skip
    return pd.DataFrame(rows)


def few_models(families: Mapping[str, str]) -> str | None:
    """Say where there are too few models for a statement about their families; None where there are enough."""
    count = pd.Series(dict(families), dtype=object).value_counts()
    few = [f"{n} {name}" for name, n in count.items() if n < FEWEST]
    if not few:
        return None
    return (
        f"too few models per family ({', '.join(few)}; {FEWEST} of each are the least): differences between families "
        "are differences of these models"
    )


def _conditions(observations: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    for key, part in observations.groupby(list(by), sort=False, observed=True, dropna=False):
        yield dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)), part


def _parts(
    observations: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, str]]:
    for label, part in _conditions(observations, by):
        for metric in metrics:
            if metric in part and part[metric].notna().any():
                yield {**label, "metric": metric}, part, metric


def _designs(
    observations: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]
) -> Iterator[tuple[dict[str, Any], CrossedDesign]]:
    for label, part, metric in _parts(observations, by, metrics):
        yield (
            label,
            crossed_design(part[metric], list(part["model"]), list(part["category"]), list(part["prompt_id"])),
        )
