"""Responses of a sweep: one line per write and strength, means over prompts with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import mean_interval
from dynprobe.runs import Run

__all__ = ["RESPONSES", "response_table"]

#: What is averaged, in order.
RESPONSES = ("kl_clean_pert", "flip_rate", "nll_d", "kappa_phase_d", "diverge_angle", "repetition")
_KEYS = ("variant", "decode_mode", "arm", "scale", "kind", "layer", "matched", "alpha")


def response_table(run: Run) -> pd.DataFrame:
    """Average the samples of a sweep over seeds inside each prompt, then over prompts.

    Args:
        run: A sweep.

    Returns:
        One row per variant, arm, scale, kind, layer and α (and, where an energy is repeated, per write that is
        ``matched``): for each response its mean, its 95 % interval over prompts (``_low``,
        ``_high``) and ``n`` prompts. NaN where no prompt has a value.
    """
    conditions = run.table("conditions").drop(columns=["seed"], errors="ignore")
    conditions["matched"] = [_write_of(name) for name in conditions["matched_to"]]
    samples = run.samples
    samples = samples[samples["status"] != "not-written"]
    joined = samples[["prompt_id", "condition_id", *(c for c in RESPONSES if c in samples)]].merge(
        conditions[["condition_id", *_KEYS]], on="condition_id"
    )
    joined = joined[joined["arm"] != "clean"]
    for key in ("scale", "kind", "variant", "arm", "decode_mode"):
        joined[key] = joined[key].astype(object).where(joined[key].notna(), "")
    joined["alpha"] = joined["alpha"].astype(float).where(joined["arm"] != "energy-matched", _matched(joined))
    held = [c for c in RESPONSES if c in joined]
    per_prompt = joined.groupby([*_KEYS, "prompt_id"], observed=True, dropna=False)[held].mean().reset_index()
    rows: list[dict[str, Any]] = []
    for values_of_key, group in per_prompt.groupby(list(_KEYS), observed=True, dropna=False, sort=True):
        row: dict[str, Any] = dict(zip(_KEYS, values_of_key, strict=True))
        values = group[held].to_numpy(np.float64)
        row["n"] = len(values)
        for column, name in enumerate(held):
            row |= _interval(name, values[:, column])
        rows.append(row)
    return pd.DataFrame(rows)


def _matched(joined: pd.DataFrame) -> pd.Series:
    """The strength of the cell whose energy a control repeats: the last part of the control's name."""
    return (
        joined["condition_id"]
        .astype(str)
        .str.rsplit("|", n=1)
        .str[-1]
        .where(joined["arm"] == "energy-matched", "nan")
        .astype(float)
    )


def _write_of(name: Any) -> str:
    """The write and layer whose energy a control repeats, of whatever seed and strength; empty for other arms."""
    return str(name).rsplit("|", 2)[0] if isinstance(name, str) else ""


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    finite = np.isfinite(values)
    counted = {f"{name}_n": float(finite.sum())}
    if not finite.any():
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan, **counted}
    low, high = mean_interval(values)
    return {name: float(values[finite].mean()), f"{name}_low": low, f"{name}_high": high, **counted}
