"""What the two runs say at their output: NLL, entropy, and whether the most likely token is another.

A run stores NLL, entropy and the margin p₁ − p₂ of every position, not which token was the most likely. Still, with p
the probability of the position's target,

    2p + margin > 1   proves that the target is the most likely token,
    p < margin        proves that it is not,

so a position where one run proves the first and the other the second has changed its top-1 token for certain; so has
the position at which two greedy texts part. Where neither can be said the position counts as unknown, never as equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynprobe.runs._run import Run

__all__ = ["heads_of"]

_COLUMNS = ("nll", "entropy", "margin")
_SLACK = 1e-5
_EMPTY = {
    "nll_max": np.nan, "nll_pos": pd.NA, "head_pos": pd.NA, "top1_flips": 0, "top1_unknown": 0,
    "head_equal": False, "n_head": 0,
}  # fmt: skip


def heads_of(a: Run, b: Run, samples: pd.DataFrame, limit: float) -> pd.DataFrame:
    """Compare the read-outs of every pair of samples.

    Args:
        a: One run.
        b: The other.
        samples: Pairs with ``a, b, n_same``.
        limit: Floor of NLL and entropy, in nats.

    Returns:
        One row per pair, in its order: ``nll_max`` (largest |difference|, nats), ``nll_pos`` (where), ``head_pos``
        (first position whose NLL or entropy differs by more than the floor), ``top1_flips``, ``top1_unknown``,
        ``n_head`` (positions of which either run knows a number), ``head_equal`` (there are such, and all are
        the same).
    """
    left, right = _read(a, set(samples["a"])), _read(b, set(samples["b"]))
    shared = [c for c in _COLUMNS if c in left and c in right]
    if not shared:
        return pd.DataFrame([_EMPTY] * len(samples), index=samples.index)
    mine, theirs = (dict(list(f.groupby("sample_id", sort=False))) for f in (left, right))
    rows = [
        _one(mine.get(x), theirs.get(y), shared, n, limit)
        for x, y, n in zip(samples["a"], samples["b"], samples["n_same"], strict=True)
    ]
    return pd.DataFrame(rows, index=samples.index)


def _one(x: Any, y: Any, shared: list[str], n_same: float, limit: float) -> dict[str, Any]:
    out: dict[str, Any] = dict(_EMPTY)
    if x is None or y is None:
        return out
    both = x.merge(y, on="pos", suffixes=("", "_b")).sort_values("pos")
    # A distribution follows from the tokens up to its position; its NLL also from the next one.
    both = both[both["pos"] < n_same]
    pos = both["pos"].to_numpy()
    value = {c: (_floats(both[c]), _floats(both[f"{c}_b"])) for c in shared}
    known = pos + 1 < n_same
    apart = {c: _apart(*value[c]) for c in shared}
    if "nll" in apart:
        apart["nll"][~known] = 0.0
    given = np.logical_or.reduce(
        [~(np.isnan(x) & np.isnan(y)) & (known if c == "nll" else True) for c, (x, y) in value.items()]
    )
    out["n_head"] = int(given.sum())
    out["head_equal"] = bool(given.any() and all((apart[c] == 0).all() for c in shared))
    if "nll" in apart and (known & given).any():
        at = int(apart["nll"].argmax())
        out |= {"nll_max": float(apart["nll"][at]), "nll_pos": int(pos[at])}
    beyond = np.maximum.reduce([apart[c] for c in shared if c != "margin"] or [np.zeros(len(pos))]) > limit
    out["head_pos"] = int(pos[beyond][0]) if beyond.any() else pd.NA
    if {"nll", "margin"} <= set(shared):
        top, off = zip(*(_proved(value["nll"][side], value["margin"][side]) for side in (0, 1)), strict=True)
        flips = (top[0] & off[1]) | (off[0] & top[1])
        settled = flips | (top[0] & top[1])
        out["top1_flips"], out["top1_unknown"] = int((flips & known).sum()), int((~settled & known).sum())
    return out


def _proved(nll: NDArray[np.float64], margin: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the target is certainly the most likely token, and where it certainly is not."""
    p = np.exp(-nll)
    return 2 * p + margin > 1 + _SLACK, p < margin - _SLACK


def _apart(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        found = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
    return np.where(np.isnan(found), np.inf, found)


def _floats(values: pd.Series) -> NDArray[np.float64]:
    return values.to_numpy(np.float64, na_value=np.nan)


def _read(run: Run, wanted: set[str]) -> pd.DataFrame:
    if not run.manifest.rows().get("tokens"):
        return pd.DataFrame()
    known = set(run.columns().query("table == 'tokens'")["column"])
    frame = run.table("tokens", ["sample_id", "pos", *(c for c in _COLUMNS if c in known)])
    frame = frame[frame["sample_id"].isin(wanted)]
    return frame.astype({"sample_id": object})
