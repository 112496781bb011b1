"""What one arm of a recovery study did to each text, in one line, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import onsets, sustained_max
from dynprobe.probes import Perturb
from dynprobe.protocols._arms import Text

__all__ = ["WINDOWS", "all_actions", "first_written", "row_lines"]

#: Tokens before the present one that a signal looks back on: so long it cannot be calm again, whatever the model does.
WINDOWS = {"limen_ct": 2}


def first_written(perturbs: Sequence[Perturb], n_prompt: int, n_watched: int) -> int:
    """Number of the first new token that any perturbation writes at; ``n_watched`` where none does.

    Example:
        >>> [first_written([Perturb.parse(f"alpha=1,positions={at}:")], n_prompt=5, n_watched=10) for at in (8, 1)]
        [3, 0]
    """
    pos = np.arange(n_prompt, n_prompt + n_watched)[None]
    asked = [p.defaults_filled().where.mask(pos, np.array([n_prompt]), positions="1:")[0] for p in perturbs]
    hits = np.flatnonzero(np.any(asked, axis=0)) if asked else np.zeros(0, int)
    return int(hits[0]) if len(hits) else n_watched


def all_actions(tables: Sequence[tuple[str, pd.DataFrame]], watched: pd.DataFrame) -> pd.DataFrame:
    """All controllers' actions with the detector's signal at every token.

    Args:
        tables: Name of each controller and what it did.
        watched: What the detector that only looks on saw.
    """
    seen = watched[["row", "pos", "signal", "active"]].drop_duplicates(["row", "pos"])
    seen = seen.rename(columns={"active": "detected"})
    if not tables:
        alone = watched.assign(active=False, gain=0.0, controller="")
        return alone.merge(seen[["row", "pos", "detected"]], on=["row", "pos"])
    named = [t.drop(columns="signal").assign(controller=name) for name, t in tables]
    return pd.concat(named, ignore_index=True).merge(seen, on=["row", "pos"], how="left")


def row_lines(
    texts: Sequence[Text],
    actions: pd.DataFrame,
    watched: pd.DataFrame,
    restarts: Sequence[Sequence[Any]],
    *,
    signal: str,
    m: int,
    level: float,
) -> pd.DataFrame:
    """Return one line per text: what the detector saw and what was done.

    Args:
        texts: The rows.
        actions: From :func:`all_actions`.
        watched: What the detector that only looks on saw.
        restarts: Of each row.
        signal: What the detector follows.
        m: Tokens above its upper level before it fires.
        level: Its lower level.
    """
    lines: list[dict[str, Any]] = []
    for row, (text, made) in enumerate(zip(texts, restarts, strict=True)):
        n, last = len(text.prompt), len(text.fed)
        seen = watched[(watched["row"] == row) & (watched["pos"] >= n) & (watched["pos"] < last)]
        mine = actions[(actions["row"] == row) & (actions["pos"] >= n) & (actions["pos"] < last)]
        acted = np.zeros(last - n, bool)
        acted[mine.loc[mine["active"] | (mine["energy"] > 0), "pos"].to_numpy(int) - n] = True
        for restart in made:  # what was taken back was written anew, which is an action at each of its tokens
            acted[restart.kept : restart.kept + len(restart.dropped)] = True
        first = int(np.argmax(acted)) if acted.any() else None
        values = seen["signal"].to_numpy(np.float64)
        fires = onsets(seen["active"].to_numpy())
        lines.append({
            "duty": float(acted.mean()) if len(acted) else np.nan, "n_active": int(acted.sum()),
            "energy_written": float(mine["energy"].sum()), "n_watched": len(seen),
            "signal_score": sustained_max(values, m),
            "signal_mean": float(np.nanmean(values)) if np.isfinite(values).any() else np.nan,
            "n_fires": len(fires), "detector_duty": float(seen["active"].mean()) if len(seen) else np.nan,
            "acted_after": np.nan if first is None else float(first),
            "recovered_after": _calm(values, first, level, WINDOWS.get(signal, 0)),
            "n_restarts": len(made), "n_taken_back": sum(len(r.dropped) for r in made),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _calm(signal: np.ndarray, first: int | None, level: float, window: int) -> float:
    """Tokens from the first action until the signal is below a level, less those it looks back on.

    NaN where it never is, or nothing acted.
    """
    if first is None:
        return float("nan")
    below = np.flatnonzero(signal[first:] < level)
    return float(max(0, below[0] - window)) if len(below) else float("nan")
