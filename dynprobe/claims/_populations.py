"""Numbers about a population of models: shares of variance, and R² on the skeleton.

The share η² is that of a panel of this design. Its interval resamples prompts inside their categories, all models of
a prompt together; the models are those of the panel and stay, so it says nothing about other models. Resampled prompts
repeat, which by itself raises the share of the categories, so the draws are moved as a whole to the observed share. The
interval has their expanded percentiles for so many prompts as its ends, as that of every mean.

The interval of R² inverts the non-central F distribution (fixed covariates, normal errors: Steiger and Fouladi 1992):
the population's ρ² = λ/(λ + n), λ such that the observed F is its 2.5 % or 97.5 % quantile. With few models and some
covariates that interval is wide and starts at 0, as it should: the null expectation of R² is p/(n − 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import f as fisher
from scipy.stats import ncf

from dynprobe.claims._intervals import Sides, estimate_of, nothing
from dynprobe.claims._parts import Skeleton, Term, VarianceShare
from dynprobe.claims._sides import Side, clusters
from dynprobe.claims._verdict import Estimate
from dynprobe.metrics.statistics import skeleton_r2, variance_table
from dynprobe.metrics.statistics._bootstrap import interval

__all__ = ["r2_interval", "skeleton", "variance"]

_RESAMPLES, _SEED = 2000, 0
_FEWEST = 3
#: R² needs none; that it beats chance is read off its interval.
_PERMUTATIONS = 99


def variance(part: VarianceShare, sides: Sides, k: int = 1) -> list[Estimate]:
    """Return η² of a factor over models × categories × prompts."""
    label = part.label or f"η² {part.factor}"
    frames = []
    for side in (s for found in sides.values() for s in found):
        rows = side.rows(part.table, part.where, (part.value, "prompt_id", "category"))
        words = rows[["prompt_id", "category"]].astype(str)
        frames.append(words.assign(y=pd.to_numeric(rows[part.value], errors="coerce"), model=side.name))
    whole = pd.concat(frames, ignore_index=True)
    names = [s.name for found in sides.values() for s in found]
    if len(set(names)) < _FEWEST:
        return [nothing(f"models<{_FEWEST}", label)]
    value = _share(whole, part.factor)
    draws, n_prompts = _draws(whole, part.factor), int(whole["prompt_id"].nunique())

    def ends(confidence: float) -> tuple[float, float, float, int, str | None]:
        known = draws[np.isfinite(draws)]
        known = known - (known.mean() - value) if len(known) else known
        if not len(known) or not math.isfinite(value):
            return value, math.nan, math.nan, len(set(names)), "zero-denominator"
        low, high = interval(known, known, confidence, n_prompts)
        return value, max(low, 0.0), min(high, 1.0), n_prompts, None

    return [estimate_of(ends, label, k)]


def _share(rows: pd.DataFrame, factor: str) -> float:
    table = variance_table(rows["y"], list(rows["model"]), list(rows["category"]), list(rows["prompt_id"]))
    model, category = table["model"].eta2, table["category"].eta2
    return {"model": model, "category": category, "rest": 1 - model - category}[factor]


def _draws(rows: pd.DataFrame, factor: str) -> np.ndarray:
    """Shares of resampled panels: prompts are drawn inside categories, with all their models."""
    cells = rows.groupby(["model", "prompt_id"])["y"].agg(["mean", "size"])
    table = cells["mean"].unstack()
    category = rows.drop_duplicates("prompt_id").set_index("prompt_id")["category"].reindex(table.columns)
    strata = [np.flatnonzero(category == c) for c in sorted(category.unique())]
    rng = np.random.default_rng(_SEED)
    picks = [np.concatenate([s[rng.integers(0, len(s), len(s))] for s in strata]) for _ in range(_RESAMPLES)]
    if table.notna().all(axis=None) and (cells["size"] == 1).all():
        sizes, y = [len(s) for s in strata], table.to_numpy(float)
        return np.array([_balanced(y[:, pick], sizes, factor) for pick in picks])
    by_prompt = {str(p): group for p, group in rows.groupby("prompt_id", sort=True)}
    names = [str(p) for p in table.columns]
    return np.array([
        _share(pd.concat([by_prompt[names[j]].assign(prompt_id=f"{i}") for i, j in enumerate(pick)]), factor)
        for pick in picks
    ])  # fmt: skip


def _balanced(y: np.ndarray, sizes: Sequence[int], factor: str) -> float:
    """η² of y[model, prompt] with one value per cell, prompts in order of category (what variance_table gives)."""
    grand, n_models, n_prompts = y.mean(), *y.shape
    total = float(((y - grand) ** 2).sum())
    if total == 0:
        return math.nan
    model = n_prompts * float(((y.mean(axis=1) - grand) ** 2).sum()) / total
    blocks = np.split(y, np.cumsum(sizes)[:-1], axis=1)
    category = n_models * sum(b.shape[1] * (float(b.mean()) - grand) ** 2 for b in blocks) / total
    return {"model": model, "category": float(category), "rest": float(1 - model - category)}[factor]


def skeleton(part: Skeleton, sides: Sides, k: int = 1) -> list[Estimate]:
    """Return R² of model means on the skeleton's covariates."""
    label = part.label or "R² on the skeleton"
    chosen = [s for found in sides.values() for s in found]
    values = [clusters(s, Term(where=part.where), part.table, part.value, "prompt_id", {}) for s in chosen]
    shared = pd.concat(values, axis=1, join="inner").dropna()  # else a missing prompt would move a model
    if not len(shared):
        return [nothing("no prompt that every side has", label)]
    names = [f"{i}" for i in range(len(values)) for _ in range(len(shared))]
    covariates: dict[str, Mapping[Any, Any]] = {
        str(c): {f"{i}": _covariate(s, c) for i, s in enumerate(chosen)} for c in part.covariates
    }
    found = skeleton_r2(shared.to_numpy().T.ravel(), names, covariates, n_permutations=_PERMUTATIONS, seed=_SEED)
    if not math.isfinite(found.r2):
        return [nothing(found.reason or "missing", label)]
    r2, n, p = found.r2, found.n, found.p

    def ends(confidence: float) -> tuple[float, float, float, int, str | None]:
        return (r2, *r2_interval(r2, n, p, confidence), n, None)

    return [estimate_of(ends, label, k)]


def r2_interval(r2: float, n: int, p: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the population's R² by inverting the non-central F distribution.

    Args:
        r2: Observed R².
        n: Rows.
        p: Covariates.
        confidence: Coverage.

    Example:
        >>> low, high = r2_interval(0.341, 17, 2)
        >>> low, round(high, 2)
        (0.0, 0.57)
    """
    if not 0 <= r2 < 1:
        return (1.0, 1.0) if r2 >= 1 else (math.nan, math.nan)
    df = n - p - 1
    observed = (r2 / p) / ((1 - r2) / df)
    tail = (1 - confidence) / 2

    def bound(level: float) -> float:
        if fisher.cdf(observed, p, df) <= level:
            return 0.0
        top = 1.0
        while ncf.cdf(observed, p, df, top) > level and top < 1e6:
            top *= 2
        rate = brentq(lambda rate: ncf.cdf(observed, p, df, rate) - level, 1e-9, top)
        return float(rate / (rate + n))

    return bound(1 - tail), bound(tail)


def _covariate(side: Side, name: str) -> float:
    if name == "log_parameters":
        n = side.facts.get("n_parameters", math.nan)
        return math.log10(n) if n > 0 else math.nan
    return float(side.facts.get(name, math.nan))
