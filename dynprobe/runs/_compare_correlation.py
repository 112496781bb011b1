"""Does one model's Δ go with another's κ? Rank correlations across architectures.

Δ of a step has an angular part, which is κ, and a radial part, the growth of the norm: Δ² = (r − 1)² + 4·r·sin²(θ/2)
for each unit. A correlation of Δ with κ may therefore be one of κ with κ, or of growing norms with κ, and the parts are
given apart: ``delta_rel_prev`` (whole), ``delta_angle`` (angular), ``delta_radial`` = mean over steps of
|ln(n_d/n_{d−1})| of the mean norm (radial).

Two questions are kept apart:

* **prompts**: do the prompts that move one model far also turn the other far? Spearman's ρ over prompts, one value per
  prompt and run;
* **depth**: do the two profiles rise and fall together? Spearman's ρ along depth inside each prompt, the finer profile
  read at the steps of the coarser one, then the mean over prompts. Two profiles that both fall with depth have ρ near 1
  whatever the models do, and with S steps at most S numbers are compared, however fine the grid of a picture.

Three ranks can only agree, disagree, or nearly so: ρ of three is ±1 or ±½ and says nothing, so fewer than four prompts
or four steps have no ρ (``prompts<4``, ``steps<4``). Where every replicate of the bootstrap gives the same ρ there is
no interval (``no-spread``): it would claim to know ρ without error.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import cluster_mean, spearman_interval
from dynprobe.runs._compare_depth import DepthProfile
from dynprobe.runs._compare_pairs import Settings
from dynprobe.runs._compare_profiles import Profiles
from dynprobe.runs._compare_sides import Side

__all__ = ["PARTS", "delta_kappa", "rank_correlation"]

#: Column of Δ → its part.
PARTS = {"delta_rel_prev": "whole", "delta_angle": "angular", "delta_radial": "radial"}
_KAPPA = "kappa_phase"
#: Ranks that are compared, at the least.
_FEWEST = 4
#: An interval this narrow is rounding.
_NO_WIDTH = 1e-12


def delta_kappa(sides: Sequence[Side], found: Profiles, conditions: Sequence[str], how: Settings) -> pd.DataFrame:
    """Return the rank correlations of every run's Δ with every other run's κ, over prompts and along depth."""
    rows = []
    label = {side.number: side.label for side in sides}
    for condition in conditions:
        runs = found.get(condition, {})
        for a, b in permutations(sorted(runs), 2):
            kappa = runs[b].get(_KAPPA)
            if kappa is None:
                continue
            for column, part in PARTS.items():
                delta = runs[a].get(column)
                if delta is None:
                    continue
                named = {
                    "condition": condition, "delta_of": label[a], "kappa_of": label[b],
                    "delta": column, "part": part, "kappa": _KAPPA,
                }  # fmt: skip
                rows.append({**named, "over": "prompts", **_over_prompts(delta.area, kappa.area, how)})
                rows.append({**named, "over": "depth", **_along_depth(delta, kappa, how)})
    return pd.DataFrame(rows)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ of each row of two arrays ``[row, point]``; NaN where a row is constant or has a gap.

    Example:
        >>> rank_correlation(np.array([[1.0, 2.0, 9.0]]), np.array([[3.0, 5.0, 4.0]])).tolist()
        [0.5]
    """
    from scipy.stats import rankdata

    out = np.full(len(x), np.nan)
    ok = np.isfinite(x).all(1) & np.isfinite(y).all(1)
    if x.shape[1] < 2 or not ok.any():
        return out
    a, b = (rankdata(side[ok], axis=1) for side in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        out[ok] = np.where(size > 0, (a * b).sum(1) / size, np.nan)
    return out


def _over_prompts(x: np.ndarray, y: np.ndarray, how: Settings) -> dict[str, Any]:
    r = spearman_interval(x, y, **how.boot)
    if r.reason is None and r.n < _FEWEST:
        return _missing(r.n, r.n_runs, f"prompts<{_FEWEST}")
    return _known(r, r.n_runs)


def _along_depth(a: DepthProfile, b: DepthProfile, how: Settings) -> dict[str, Any]:
    coarse = a.nodes if len(a.nodes) <= len(b.nodes) else b.nodes
    points = len(coarse)
    if points < _FEWEST:
        return _missing(0, points, f"steps<{_FEWEST}")
    x, y = (np.array([np.interp(coarse, p.nodes, row) for row in p.values]) for p in (a, b))
    return _known(cluster_mean(rank_correlation(x, y), **how.boot), points)


def _known(found: Any, points: int) -> dict[str, Any]:
    """A ρ with its interval, without one that has no width."""
    low, high, why = found.low, found.high, found.reason or found.reason_interval
    if why is None and high - low <= _NO_WIDTH:
        low, high, why = np.nan, np.nan, "no-spread"
    return {"rho": found.value, "low": low, "high": high, "n": found.n, "points": points, "reason": why}


def _missing(n: int, points: int, reason: str) -> dict[str, Any]:
    return {"rho": np.nan, "low": np.nan, "high": np.nan, "n": n, "points": points, "reason": reason}
