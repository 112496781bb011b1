"""The dose of a study of items: what every strength costs, where accuracy has fallen, and when that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import Refusal, mean_interval, mean_threshold, onsets, proportion_interval
from dynprobe.probes import Perturb
from dynprobe.protocols._dissociate_config import DissociateConfig
from dynprobe.protocols._item_arms import rung
from dynprobe.protocols._recover_summary import detector_entry
from dynprobe.runs import Run

__all__ = [
    "ABOVE_CHANCE",
    "DROP",
    "ByItem",
    "accuracy",
    "by_item",
    "chance_of",
    "crossing_of",
    "dose_of",
    "dynamics_of",
    "ladder_of",
    "means_of",
    "refusal_of",
]

#: Fall of accuracy that makes a dose, and least distance of the clean accuracy from chance.
DROP, ABOVE_CHANCE = 0.2, 0.3
_SLACK = 1e-12
#: Dynamic metrics that stand beside the one that was asked for.
_BESIDE = ("kappa_geom", "kappa_phase", "delta_rel_prev", "limen_ct")
_HEAD = ("duty", "energy_written", "detector_duty")

#: Samples of each arm, by item.
ByItem = dict[str, pd.DataFrame]


def dose_of(run: Run, ladder: Sequence[float], fixed: float | None) -> float | None:
    """Return the strength that recovery is judged at.

    Args:
        run: A run whose dose–response is there.
        ladder: Its strengths.
        fixed: The one that was given; None chooses.

    Returns:
        The smallest strength whose accuracy lies 0.2 below clean; None where there is none, or the clean accuracy is
        so near chance that a fall says nothing.
    """
    if fixed is not None:
        return fixed
    by_arm = by_item(run)
    clean = accuracy(by_arm["clean"])["value"]
    if not clean - chance_of(run) >= ABOVE_CHANCE - _SLACK:
        return None
    fallen = (a for a in sorted(ladder) if a > 0 and clean - accuracy(by_arm[rung(a).name])["value"] >= DROP - _SLACK)
    return next(fallen, None)


def ladder_of(run: Run, config: DissociateConfig, perturb: Perturb, ladder: Sequence[float]) -> list[dict[str, Any]]:
    """Return the response of the task, of the dynamics and of the detector to every strength."""
    by_arm, actions = by_item(run), run.table("actions")
    fires = _fires(actions)

    def watched(name: str) -> pd.DataFrame:
        rows = by_arm[name].reset_index()
        seen = pd.Series([fires.get(s, []) for s in rows["sample_id"]], rows.index, dtype=object)
        return rows.assign(fires=seen, n_prompt=config.prefill)

    clean, rows = watched("clean"), []
    for alpha in ladder:
        name = rung(alpha).name
        mine = by_arm[name]
        rows.append({
            "alpha": alpha, "condition": name, "n": len(mine), "right": accuracy(mine), **means_of(mine, config),
            "detector": detector_entry(clean, watched(name), config, [perturb.replace(alpha=alpha)]),
        })  # fmt: skip
    return rows


def crossing_of(by_arm: ByItem, ladder: Sequence[float], perturb: Perturb) -> dict[str, Any]:
    """Strength at which the mean accuracy has fallen by 0.2, interpolated between strengths."""
    clean = by_arm["clean"]["right"]
    alphas = [a for a in ladder if a > 0]
    lost = np.stack([(clean - by_arm[rung(a).name]["right"].reindex(clean.index)).to_numpy(float) for a in alphas], 1)
    found = mean_threshold(lost, alphas, DROP)
    return {
        "fit_id": f"accuracy-{DROP:g}", "criterion": "task", "level": DROP, "scale": perturb.scale,
        "estimator": found.metric_id, "alpha50": found.value, "low": found.low, "high": found.high,
        "status": found.status, "reason": found.reason, "n": found.n,
    }  # fmt: skip


def refusal_of(
    found: Refusal | None, clean: float, worst: float, chance: float, ladder: Sequence[float], *, fixed: bool
) -> dict[str, Any] | None:
    """The refusal in words, with what to do."""
    if found is None:
        return None
    dose = found.dose
    would = None if dose is None or dose.status != "resolved" else dose.value
    if found.reason.startswith("clean-chance"):
        text = (
            f"clean accuracy {clean:.3f} is less than {ABOVE_CHANCE:g} above chance ({chance:.3f}): the model does not "
            "know enough for a loss to mean anything. Take easier items (--items FILE.jsonl) or a model that can "
            "answer them"
        )
    elif found.reason.startswith("clean-perturbed") and fixed:
        text = f"accuracy falls only from {clean:.3f} to {worst:.3f}, less than {DROP:g}: nothing was lost to recover. "
        text += _stronger(would, ladder)
    elif found.reason.startswith("clean-perturbed"):
        text = f"no strength of the ladder costs {DROP:g} of the clean accuracy {clean:.3f}. " + _stronger(None, ladder)
    else:
        text = "fewer than half of the items have finite scores, so there is no accuracy"
    return {"reason": found.reason, "text": text, "dose": would, "clean": clean, "perturbed": worst, "chance": chance}


def _stronger(would: float | None, ladder: Sequence[float]) -> str:
    if would is not None:
        return f"The dose that would do is α = {would:.3g}: --perturb alpha={would * 1.05:.3g},…"
    return f"No α up to {max(ladder):g} would do; give stronger ones: --alphas {max(ladder):g},{2 * max(ladder):g}"


def by_item(run: Run) -> ByItem:
    """Samples of each arm, by item."""
    samples = run.samples.copy()
    for column in ("sample_id", "prompt_id", "condition_id", "category"):
        samples[column] = samples[column].astype(object)
    return {str(name): rows.set_index("prompt_id") for name, rows in samples.groupby("condition_id", sort=False)}


def chance_of(run: Run) -> float:
    items = run.table("items")
    return float((1.0 / items.loc[items["condition_id"] == "clean", "n_choices"]).mean())


def accuracy(rows: pd.DataFrame) -> dict[str, Any]:
    """Share of right answers with its interval; NaN where fewer than half of the items have an answer."""
    right = rows["right"].dropna()
    if 2 * len(right) < len(rows):
        return {"value": np.nan, "low": np.nan, "high": np.nan, "n": len(right)}
    found = proportion_interval(int(right.sum()), len(right))
    return {"value": found.value, "low": found.low, "high": found.high, "n": len(right)}


def means_of(rows: pd.DataFrame, config: DissociateConfig) -> dict[str, Any]:
    names = ("nll_right", "choice_margin", "kl_clean_pert", *dynamics_of(config), *_HEAD, "alpha_relnorm")
    out = {}
    for name in (n for n in names if n in rows):
        values = rows[name].astype(float).dropna().to_numpy()
        low, high = mean_interval(values)
        mean = float(values.mean()) if len(values) else np.nan
        out[name] = {"mean": mean, "low": low, "high": high, "n": len(values)}
    return out


def dynamics_of(config: DissociateConfig) -> list[str]:
    return list(dict.fromkeys((config.dynamic, *_BESIDE)))


def _fires(actions: pd.DataFrame) -> dict[str, list[int]]:
    """Streamed tokens at which the detector came on, of each sample."""
    first = actions.drop_duplicates(["sample_id", "pos"]).sort_values("pos", kind="stable")
    return {
        str(name): list(onsets(rows["detected"].to_numpy(bool)))
        for name, rows in first.groupby("sample_id", observed=True)
    }
