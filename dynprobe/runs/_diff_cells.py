"""The difference of two runs at every token and depth.

With hidden states stored on both sides the difference is measured:

    e = ‖a − b‖ / max(‖a‖, ‖b‖)            (0 where both are zero, ∞ where one is not finite and the other is)

in double precision; where a depth has several slots, e is that of the slot that differs most. States are read row
group by row group and joined by their labels, so a run larger than memory can be compared.

Without states the stored metrics still prove a smallest difference. With e the larger of the relative errors of the two
states that a step joins,

    | ‖a‖ − ‖b‖ | / max(‖a‖, ‖b‖) ≤ e        |angle_a − angle_b| ≤ 2·asin e        |Δ_a − Δ_b| ≤ 2·e·(1 + max Δ)

to first order, so the largest of the three left sides, solved for e, is a lower bound. A cell whose bound is above the
floor does differ; one whose bound is below it may differ in a direction that no metric sees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynprobe.errors import UsageError
from dynprobe.runs._run import Run
from dynprobe.runs._states import decode_bfloat16, read_group, state_groups
from dynprobe.runs._tables import part_path

__all__ = ["LABELS", "cells_of"]

#: What says where a state is, beside its key.
LABELS = ("stage", "layer", "iteration", "component")
_KEY = ["pos", "track", "depth"]
_HELD = 4
_ROWS = 4096


def cells_of(a: Run, b: Run, samples: pd.DataFrame) -> tuple[pd.DataFrame, str, tuple[int, int]]:
    """Return the difference at every token and depth, what it was taken from, and how many cells only one run has.

    Args:
        a: One run.
        b: The other.
        samples: Pairs: ``a`` and ``b``, the ids whose rows stand for them, and ``n_same``, their common tokens.

    Returns:
        One row per distinct pair of ids, pos, track and depth: ``a, b, pos, track, depth, rel, equal``, and ``slot``
        where there are several; labels of run A. Then ``states``, ``metrics`` or ``none``. Then how many cells among
        the common tokens only A has, and only B.

    Raises:
        UsageError: The states have different widths, or the runs share no cell.
    """
    pairs = samples.groupby(["a", "b"], sort=False, dropna=False)["n_same"].max().reset_index()
    held = [run.manifest.rows() for run in (a, b)]
    if all(rows.get("states") for rows in held):
        found, alone = _from_states(a, b, pairs)
        if len(found):
            return found, "states", alone
    if all(rows.get("depths") for rows in held):
        found, alone = _from_metrics(a, b, pairs)
        return found, "metrics", alone
    return pd.DataFrame(columns=["a", "b", *_KEY, "rel", "equal"]), "none", (0, 0)


def _common(rows: pd.DataFrame) -> int:
    """Count rows before the first token that differs."""
    return int((rows["n_same"].isna() | (rows["pos"] < rows["n_same"])).sum())


def _from_states(a: Run, b: Run, pairs: pd.DataFrame) -> tuple[pd.DataFrame, tuple[int, int]]:
    index = _index(b, set(pairs["b"]))
    if not len(index):
        return index, (0, 0)
    n_a, n_b, n_both = 0, _common(index.merge(pairs, on="b")), 0
    groups = _Groups(b)
    frames = []
    for keys, left, dtype in _groups_of(a, set(pairs["a"])):
        asked = keys.assign(row_a=np.arange(len(keys))).merge(pairs, left_on="sample_id", right_on="a")
        joined = asked.merge(index, on=["b", *_KEY], how="inner")
        n_a, n_both = n_a + _common(asked), n_both + _common(joined)
        if not len(joined):
            continue
        rel, equal, slot = (np.empty(len(joined), dtype=t) for t in (np.float64, bool, np.int32))
        places = joined["place"].to_numpy(np.int64)
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            right, other = groups.get(int(place))
            _same_shape(a, b, joined.iloc[rows[0]], left, right)
            for start in range(0, len(rows), _ROWS):
                part = rows[start : start + _ROWS]
                x = left[joined["row_a"].to_numpy()[part]]
                y = right[joined["row_b"].to_numpy()[part]]
                same = dtype == other and _bits_equal(x, y)
                rel[part], slot[part] = relative(_wide(x, dtype), _wide(y, other))
                equal[part] = same
        kept = joined[["a", "b", *_KEY, *(c for c in LABELS if c in joined)]]
        frames.append(kept.assign(rel=rel, equal=equal, **({"slot": slot} if left.ndim > 2 else {})))
    return (pd.concat(frames, ignore_index=True) if frames else index.iloc[:0]), (n_a - n_both, n_b - n_both)


def relative(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Return the relative difference of states ``[row, …, dim]``, and the slot in which it is largest.

    Example:
        >>> relative(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.5], [0.0, 0.0]]))[0].round(4).tolist()
        [0.0925, 0.0]
    """
    a, b = (x.reshape(len(x), -1, x.shape[-1]) for x in (a, b))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        apart = np.linalg.norm(a - b, axis=-1)
        size = np.maximum(np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1))
        found = np.where(apart == 0, 0.0, apart / size)
    broken = ~np.isfinite(found)
    if broken.any():  # equal where the same coordinates are not finite in the same way, else infinitely far
        same = ((a == b) | (np.isnan(a) & np.isnan(b))).all(-1)
        found[broken] = np.where(same[broken], 0.0, np.inf)
    worst = found.argmax(1)
    return found[np.arange(len(found)), worst], worst.astype(np.int32)


def _bits_equal(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_]:
    kind = f"u{x.dtype.itemsize}"
    x, y = (np.ascontiguousarray(v).view(kind).reshape(len(v), -1) for v in (x, y))
    same: NDArray[np.bool_] = (x == y).all(1)
    return same


def _wide(x: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    return (decode_bfloat16(x) if dtype == "bfloat16" else x).astype(np.float64)


def _same_shape(a: Run, b: Run, row: pd.Series, left: NDArray[Any], right: NDArray[Any]) -> None:
    if left.shape[1:] != right.shape[1:]:
        raise UsageError(
            f"at depth {row['depth']} of track {row['track']} a state has shape {list(left.shape[1:])} in {a.path} and "
            f"{list(right.shape[1:])} in {b.path}: these are not the same model, and states of two models have no "
            "difference. dynprobe compare sets different models beside each other."
        )


def _groups_of(run: Run, wanted: set[str]) -> Iterator[tuple[pd.DataFrame, NDArray[Any], str]]:
    for part in run.manifest.parts_of("states"):
        path = part_path(run.path, part)
        for number, keys in state_groups(path):
            keys = _text(keys)
            if not keys["sample_id"].isin(wanted).any():
                continue
            array, dtype = read_group(path, number)
            yield keys, array, dtype


def _index(run: Run, wanted: set[str]) -> pd.DataFrame:
    """Return where every wanted state lies: ``b`` and key → number of the row group, row in it."""
    frames = []
    for place, (_, _, keys) in enumerate(_places(run)):
        keys = _text(keys)[["sample_id", *_KEY]].assign(place=place, row_b=np.arange(len(keys)))
        frames.append(keys[keys["sample_id"].isin(wanted)].rename(columns={"sample_id": "b"}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["b", *_KEY, "place", "row_b"])


def _places(run: Run) -> Iterator[tuple[Any, int, pd.DataFrame]]:
    for part in run.manifest.parts_of("states"):
        path = part_path(run.path, part)
        for number, keys in state_groups(path):
            yield path, number, keys


class _Groups:
    """The row groups of one run's states; the last few stay in memory, as both sides go through them in one order."""

    def __init__(self, run: Run) -> None:
        self._places = [(path, number) for path, number, _ in _places(run)]
        self._held: OrderedDict[int, tuple[NDArray[Any], str]] = OrderedDict()

    def get(self, place: int) -> tuple[NDArray[Any], str]:
        if place not in self._held:
            path, number = self._places[place]
            self._held[place] = read_group(path, number)
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(place)
        return self._held[place]


def _from_metrics(a: Run, b: Run, pairs: pd.DataFrame) -> tuple[pd.DataFrame, tuple[int, int]]:
    left, right = (_depths(run, set(pairs[side])) for run, side in ((a, "a"), (b, "b")))
    columns = [c for c in _METRICS if c in left and c in right]
    if not columns:
        raise UsageError(
            f"{a.path} and {b.path} share none of the columns {', '.join(_METRICS)} in depths; run both with --states"
        )
    labels = [c for c in LABELS if c in left]
    merged_a = left[["sample_id", *_KEY, *labels, *columns]].merge(pairs, left_on="sample_id", right_on="a")
    merged = merged_a.merge(
        right[["sample_id", *_KEY, *columns]].rename(columns={"sample_id": "b"}), on=["b", *_KEY], suffixes=("", "_b")
    )
    n_both = _common(merged)
    n_a = _common(merged_a)
    n_b = _common(right[["sample_id", "pos"]].merge(pairs, left_on="sample_id", right_on="b"))
    bound, equal, known = np.zeros(len(merged)), np.ones(len(merged), dtype=bool), np.zeros(len(merged), dtype=bool)
    for column in columns:
        x, y = (merged[name].to_numpy(np.float64, na_value=np.nan) for name in (column, f"{column}_b"))
        equal &= (x == y) | (np.isnan(x) & np.isnan(y))
        known |= ~(np.isnan(x) & np.isnan(y))
        bound = np.maximum(bound, proved(column, x, y))
    # A cell of which neither run knows a number was not compared.
    found = merged[["a", "b", *_KEY, *labels]].assign(rel=bound, equal=equal)[known]
    return found.reset_index(drop=True), (n_a - n_both, n_b - n_both)


def proved(column: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest relative difference of states that two values of a metric prove.

    It is 0 where both are equal or both are NaN, and ∞ where they are not and no bound can be computed from them.

    Example:
        >>> proved("norm", np.array([1.0, np.inf, np.nan]), np.array([2.0, 3.0, np.nan])).tolist()
        [0.5, inf, 0.0]
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = _METRICS[column](x, y)
    found = np.where(np.isnan(found), np.inf, found)
    return np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, found)


def _depths(run: Run, wanted: set[str]) -> pd.DataFrame:
    known = set(run.columns().query("table == 'depths'")["column"])
    columns = ["sample_id", *_KEY, *(c for c in (*LABELS, *_METRICS) if c in known)]
    frame = run.table("depths", columns)
    frame = frame[frame["sample_id"].isin(wanted)]
    return _text(frame)


def _text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.astype({c: object for c in frame if isinstance(frame[c].dtype, pd.CategoricalDtype)})


def _norm_bound(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.abs(x - y) / np.maximum(np.abs(x), np.abs(y))
    return found


def _angle_bound(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sin(np.minimum(np.abs(x - y), np.pi) / 2)


def _delta_bound(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(x - y) / (2 * (1 + np.maximum(x, y)))


_METRICS: Mapping[str, Any] = {
    "norm": _norm_bound,
    "angle": _angle_bound,
    "delta_rel_prev": _delta_bound,
    "delta_rel_next": _delta_bound,
}
