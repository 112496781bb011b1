"""What an evaluation says: accuracy of each arm, and the change from clean, paired by document.

Documents are the unit. A share of right answers has the exact interval of Clopper and Pearson (Biometrika 26:404,
1934). The change of a share is paired, since both arms answer the same questions: its interval is Newcombe's
square-and-add from Wilson limits (Statistics in Medicine 17:2635, 1998, method 10), which stays honest where few
answers or none changed, and the test beside it is McNemar's exact one. A metric that is not 0 or 1 has the expanded
percentile bootstrap over documents that the rest of dynprobe uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.errors import ModelError
from dynprobe.metrics.statistics import mean_interval, proportion_interval
from dynprobe.protocols._evaluate_rows import ITEM_FACTS

__all__ = ["numbers_of", "paired_difference", "summary_of"]

_CONFIDENCE = 0.95
_LABELS = {"task", "doc_id", "condition_id", "prompt_id", "sample_id", "category", *ITEM_FACTS}


def paired_difference(before: Any, after: Any) -> dict[str, float]:
    """Return the change of a share of right answers on the same documents, with interval and exact test.

    Args:
        before: Right or not, of each document: a sequence of booleans.
        after: Likewise in the other arm.

    Returns:
        ``difference`` (after − before), its 95 % interval ``low``, ``high`` (Newcombe 1998, method 10), ``lost`` and
        ``gained`` documents, ``p`` of McNemar's exact test.

    Example:
        >>> found = paired_difference([True] * 8 + [False] * 2, [True] * 5 + [False] * 5)
        >>> round(found["difference"], 3), found["lost"], found["gained"], found["p"]
        (-0.3, 3, 0, 0.25)
    """
    from scipy.stats import binomtest
    from statsmodels.stats.proportion import proportion_confint

    x, y = np.asarray(before, bool), np.asarray(after, bool)
    n = len(x)
    if n == 0:
        return dict.fromkeys(("difference", "low", "high", "lost", "gained", "p"), math.nan)
    both, gained = int((x & y).sum()), int((~x & y).sum())
    lost, none = int((x & ~y).sum()), int((~x & ~y).sum())
    p1, p2 = float(y.mean()), float(x.mean())
    (l1, u1), (l2, u2) = (proportion_confint(int(v.sum()), n, alpha=1 - _CONFIDENCE, method="wilson") for v in (y, x))
    margins = (both + gained) * (lost + none) * (both + lost) * (gained + none)
    agreement: float = both * none - gained * lost
    if agreement > 0:  # Newcombe's correction for continuity, on the positive side only
        agreement = max(agreement - n / 2, 0.0)
    phi = agreement / math.sqrt(margins) if margins else 0.0
    difference = p1 - p2
    down, up = p1 - l1, u1 - p1
    down2, up2 = p2 - l2, u2 - p2
    low = difference - math.sqrt(max(down**2 - 2 * phi * down * up2 + up2**2, 0.0))
    high = difference + math.sqrt(max(up**2 - 2 * phi * up * down2 + down2**2, 0.0))
    changed = lost + gained
    p = float(binomtest(lost, changed, 0.5).pvalue) if changed else 1.0
    return {
        "difference": difference, "low": max(low, -1.0), "high": min(high, 1.0), "lost": lost, "gained": gained, "p": p
    }  # fmt: skip


def numbers_of(results: Any) -> dict[str, Any]:
    """Return the harness's own numbers by task, without its texts."""
    return {
        str(task): {str(name): value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results.items()
    }


def summary_of(items: pd.DataFrame, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Return one entry for each task, filter, metric and arm.

    Args:
        items: The items of all arms.
        arms: The conditions, the clean one first.

    Raises:
        ModelError: Two arms were asked different questions, so that nothing can be paired.
    """
    out = []
    for (task, kind), rows in items.groupby(["task", "filter"], sort=False, observed=True):
        by_arm = {arm: rows[rows["condition_id"] == arm].set_index("doc_id").sort_index() for arm in arms}
        clean = by_arm[arms[0]]
        metrics = [name for name in clean.columns if name not in _LABELS and clean[name].notna().any()]
        for arm, found in by_arm.items():
            _same_questions(clean, found, str(task), arm)
        for metric in metrics:
            share = set(rows[metric].dropna().unique()) <= {0.0, 1.0}
            for arm, found in by_arm.items():
                entry = {"task": str(task), "filter": str(kind), "metric": metric, "arm": arm}
                entry |= _of_arm(found, metric, share)
                out.append(entry | ({} if arm == arms[0] else {"change": _change(clean, found, metric, share)}))
    return out


def _same_questions(clean: pd.DataFrame, arm: pd.DataFrame, task: str, name: str) -> None:
    same = clean.index.equals(arm.index) and all(
        (clean[key].astype(str) == arm[key].astype(str)).all() for key in ("doc_hash", "prompt_hash")
    )
    if not same:
        raise ModelError(
            f"the arms clean and {name} of {task} were asked different questions, so they cannot be compared document "
            "by document; does the task draw its prompts at random?"
        )


def _of_arm(rows: pd.DataFrame, metric: str, share: bool) -> dict[str, Any]:
    values = rows[metric].dropna().to_numpy(np.float64)
    n, choices = len(values), rows["n_choices"].to_numpy(np.float64)
    entry: dict[str, Any] = {"n": n, "missing": len(rows) - n, "mean": float(values.mean()) if n else math.nan}
    if share:
        found = proportion_interval(int(values.sum()), n, method="exact")
        entry |= {"low": found.low, "high": found.high, "method": "clopper-pearson", "right": found.k}
        entry["chance"] = float(np.mean(1 / choices)) if (choices > 0).all() else math.nan
    else:
        low, high = mean_interval(values)
        entry |= {"low": low, "high": high, "method": "expanded-percentile"}
    if rows["choice_margin"].notna().any():
        entry["choice_margin"] = float(rows["choice_margin"].mean())
    return entry


def _change(clean: pd.DataFrame, arm: pd.DataFrame, metric: str, share: bool) -> dict[str, Any]:
    pairs = pd.DataFrame({"before": clean[metric], "after": arm[metric]}).dropna()
    before, after = pairs["before"].to_numpy(np.float64), pairs["after"].to_numpy(np.float64)
    if share:
        return {**paired_difference(before > 0, after > 0), "method": "newcombe-10", "n": len(pairs)}
    low, high = mean_interval(after - before)
    mean = float((after - before).mean()) if len(pairs) else math.nan
    return {"difference": mean, "low": low, "high": high, "method": "expanded-percentile", "n": len(pairs)}
