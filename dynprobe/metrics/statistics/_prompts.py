"""Thresholds of prompts as intervals in ln α, replicates inside prompts, and medians of both.

A resolved α* is a point, a censored one a half-line, and neither a missing nor a noise-drowned one takes part. The
median of a set of intervals is the pair of medians of their ends: whatever the true values are, their median lies
between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError, did_you_mean
from dynprobe.metrics.statistics._crossing import Array, Crossing, Status

__all__ = ["Prompts", "gather", "median_bounds", "median_draws", "medians"]

STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Replicates grouped by prompt.

    Args:
        keys: Prompts that have a replicate to use.
        low: Lower ends in ln α [prompt, seed], valid replicates first, NaN after them.
        high: Upper ends, likewise.
        n_seeds: Valid replicates per prompt.
        tally: Counts over prompts by name.
    """

    keys: tuple[Any, ...]
    low: Array
    high: Array
    n_seeds: NDArray[np.int64]
    tally: dict[str, int]

    @property
    def n(self) -> int:
        """Prompts that take part."""
        return len(self.keys)

    def counts(self) -> dict[str, Any]:
        """The counts a result carries."""
        return self.tally | {"n": self.n, "n_replicates": int(self.n_seeds.sum())}

    def refusal(self) -> tuple[Status, str] | None:
        """Status and reason when no median may be formed, else None."""
        out, lost = self.tally["n_notresolved"], self.tally["n_missing"]
        if self.n + out + lost == 0:
            return "missing", "empty"
        if out and 2 * self.n < self.n + out + lost:
            return "not-resolved", "level in the noise floor"
        return ("missing", "coverage") if 2 * self.n < self.n + out + lost else None


def medians(x: Array, tie: float) -> Array:
    """Median along the last axis, NaN skipped; −inf against +inf gives ``tie``."""
    x = np.sort(x, axis=-1)
    n = (~np.isnan(x)).sum(axis=-1, keepdims=True)
    a = np.take_along_axis(x, np.maximum((n - 1) // 2, 0), -1)[..., 0]
    b = np.take_along_axis(x, np.minimum(n // 2, x.shape[-1] - 1), -1)[..., 0]
    clash = np.isneginf(a) & np.isposinf(b)
    same = (a == b) | clash
    with np.errstate(invalid="ignore"):
        return np.where(clash, tie, np.where(same, a, a / 2 + b / 2))


def median_bounds(low: Array, high: Array) -> tuple[Array, Array]:
    """Medians of the lower and of the upper ends along the last axis."""
    return medians(low, -np.inf), medians(high, np.inf)


def median_draws(p: Prompts, pick: NDArray[np.int64], seed: int) -> tuple[Array, Array]:
    """Bootstrap draws of the population median for resampled prompts [n_boot, n], replicates resampled inside."""
    width = p.low.shape[1]
    if width == 1:
        return median_bounds(p.low[:, 0][pick], p.high[:, 0][pick])
    rng = np.random.default_rng([seed, 1])
    out = []
    for rows in np.array_split(pick, max(1, pick.size * width // 2_000_000)):
        count = p.n_seeds[rows][..., None]
        inner = (rng.random((*rows.shape, width)) * count).astype(np.int64)
        blank = np.arange(width) >= count
        ends = [np.where(blank, np.nan, x[rows[..., None], inner]) for x in (p.low, p.high)]
        out.append(median_bounds(*median_bounds(*ends)))
    low, high = (np.concatenate(side) for side in zip(*out, strict=True))
    return low, high


def gather(alpha_stars: Any, prompts: Sequence[Any] | None = None, status: Any = None) -> Prompts:
    """Group crossings, nested crossings or an array of α* by prompt."""
    items, rows, grouped = _flat(alpha_stars, status)
    n_rows = rows[-1] + 1 if rows else 0
    names = list(range(n_rows)) if prompts is None else list(prompts)
    if len(names) != n_rows or (grouped and len(set(names)) != n_rows):
        raise MetricError(
            f"prompts names the prompt of each of {n_rows} {'rows, all different' if grouped else 'entries'}; "
            f"found {len(names)} names, {len(set(names))} different."
        )
    groups: dict[Any, list[Crossing]] = {}
    for row, item in zip(rows, items, strict=True):
        groups.setdefault(names[row], []).append(item)
    kept: dict[Any, list[tuple[float, float]]] = {}
    tally = dict.fromkeys(("n_left", "n_right", "n_notresolved", "n_missing", "n_nonmonotone", "n_recrossing"), 0)
    for key, members in groups.items():
        ends = [_ends(c) for c in members if c.status not in ("missing", "not-resolved")]
        if ends:
            kept[key] = ends
            low, high = ends[0] if len(ends) == 1 else median_bounds(*np.array(ends).T)
            tally["n_left"] += bool(high == -np.inf or (low == -np.inf and high < np.inf))
            tally["n_right"] += bool(low == np.inf or (high == np.inf and low > -np.inf))
        else:
            drowned = any(c.status == "not-resolved" for c in members)
            tally["n_notresolved" if drowned else "n_missing"] += 1
        tally["n_nonmonotone"] += any(c.monotone is False for c in members)
        tally["n_recrossing"] += any(c.n_crossings > 1 for c in members)
    width = max((len(v) for v in kept.values()), default=1)
    table = np.full((2, len(kept), width), np.nan)
    for i, ends in enumerate(kept.values()):
        for j, pair in enumerate(ends):
            table[:, i, j] = pair
    n_seeds = np.array([len(v) for v in kept.values()], dtype=np.int64)
    return Prompts(tuple(kept), table[0], table[1], n_seeds, tally)


def _ends(c: Crossing) -> tuple[float, float]:
    if c.status == "resolved":
        return math.log(c.value), math.log(c.value)
    if c.status == "left-censored":
        return -np.inf, math.log(c.high) if c.high > 0 else -np.inf
    return math.log(c.low) if c.low > 0 else -np.inf, np.inf


def _flat(alpha_stars: Any, status: Any) -> tuple[list[Crossing], list[int], bool]:
    """Return entries, the row of each, and whether rows are groups of replicates."""
    if isinstance(alpha_stars, Sequence) and len(alpha_stars) and not isinstance(alpha_stars, str):
        if all(isinstance(c, Crossing) for c in alpha_stars):
            return list(alpha_stars), list(range(len(alpha_stars))), False
        rows = [row if isinstance(row, Sequence) else [row] for row in alpha_stars]
        if any(isinstance(c, Crossing) for row in rows for c in row):
            rows = [row or [_item(float("nan"), "missing")] for row in rows]
            if not all(isinstance(c, Crossing) for row in rows for c in row):
                raise MetricError("Either all replicates are crossings or none is.")
            return [c for row in rows for c in row], [i for i, row in enumerate(rows) for _ in row], True
    x = np.asarray(alpha_stars, dtype=np.float64)
    if x.ndim not in (1, 2):
        raise MetricError(f"α* is one value per prompt or [prompt, seed], found shape {list(x.shape)}.")
    words = np.full(x.shape, None, dtype=object) if status is None else np.asarray(status, dtype=object)
    if words.shape != x.shape:
        raise MetricError(f"status has the shape of the values, {list(x.shape)}; found {list(words.shape)}.")
    items = [_item(float(v), w) for v, w in zip(x.ravel(), words.ravel(), strict=True)]
    per_row = x.shape[1] if x.ndim == 2 else 1
    return items, np.repeat(np.arange(len(x)), per_row).tolist(), x.ndim == 2


def _item(value: float, word: Any) -> Crossing:
    nan, inf = float("nan"), float("inf")
    if word is None:
        word = "missing" if np.isnan(value) else "resolved" if 0 < value < inf else "right-censored"
        word = "left-censored" if value <= 0 else word
    if word not in STATUSES:
        raise MetricError(f"Unknown status {word!r}.{did_you_mean(str(word), STATUSES)} Known: {', '.join(STATUSES)}.")
    limit = value if 0 < value < inf else nan
    if word == "left-censored":
        return Crossing(nan, -inf, 0.0 if np.isnan(limit) else limit, word)
    if word == "right-censored":
        return Crossing(nan, inf if np.isnan(limit) else limit, inf, word)
    if word == "resolved" and np.isnan(limit):
        raise MetricError(f"A resolved α* is positive and finite, found {value!r}.")
    return Crossing(value, value, value, word)
