"""What a study of dissociation says: the task's own dose–response, the detector, the arms, the verdicts, the harm.

Everything is computed from the tables of the run, so that a continued run and a read one say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import (
    delta_min,
    dissociation,
    iatrogenic_rate,
    recovery_fraction,
    semantic_refusal,
    spearman_interval,
)
from dynprobe.probes import Perturb
from dynprobe.protocols._dissociate_config import SEMANTIC, DissociateConfig, by_construction
from dynprobe.protocols._item_arms import rung
from dynprobe.protocols._item_dose import (
    ABOVE_CHANCE,
    DROP,
    ByItem,
    accuracy,
    by_item,
    chance_of,
    crossing_of,
    dynamics_of,
    ladder_of,
    means_of,
    refusal_of,
)
from dynprobe.protocols._recover_arms import Arm
from dynprobe.protocols._recover_summary import why_blind
from dynprobe.runs import Run

__all__ = ["dissociation_summary"]


def dissociation_summary(
    run: Run, config: DissociateConfig, perturb: Perturb, ladder: Sequence[float], arms: Sequence[Arm],
    dose: float | None,
) -> tuple[dict[str, Any], pd.DataFrame]:  # fmt: skip
    """Return the summary of a finished study, and its fits.

    Args:
        run: The run.
        config: Its settings.
        perturb: The noise, at any strength.
        ladder: Strengths of the dose–response.
        arms: Arms with a mode.
        dose: Strength they were run at; None where there was none.
    """
    by_arm = by_item(run)
    chance = chance_of(run)
    response = ladder_of(run, config, perturb, ladder)
    reached = {row["alpha"]: row["right"]["value"] for row in response}
    clean = accuracy(by_arm["clean"])["value"]
    worst = reached[dose] if dose is not None else min((x for x in reached.values() if np.isfinite(x)), default=np.nan)
    refusal = semantic_refusal(
        clean, worst, chance, alphas=list(reached), accuracies=list(reached.values()), drop=DROP,
        above_chance=ABOVE_CHANCE,
    )  # fmt: skip
    crossing = crossing_of(by_arm, ladder, perturb)
    found: dict[str, Any] = {
        "task": {
            "items": config.items, "n": len(by_arm["clean"]), "chance": chance, "clean": accuracy(by_arm["clean"]),
            "categories": by_arm["clean"]["category"].nunique(),
        },
        "dynamic": config.dynamic, "semantic": config.semantic, "dose_response": response,
        "crossing": crossing,
        "dose": {"alpha": dose, "how": "given" if config.fixed else "chosen", "scale": perturb.scale,
                 "where": str(perturb.where)},
        "refusal": refusal_of(refusal, clean, worst, chance, ladder, fixed=config.fixed),
        "floor": _floors(by_arm),
    }  # fmt: skip
    if dose is None:
        empty: dict[str, Any] = {name: [] for name in ("arms", "verdicts", "recovery", "iatrogenic", "spearman")}
        return {**found, "detector": {}, **empty}, _fits(crossing, response, [])
    by_arm["perturbed"] = by_arm[rung(dose).name]
    detector = next(row["detector"] for row in response if row["alpha"] == dose)
    done = [arm for arm in arms if arm.name in by_arm]
    acting = [arm for arm in done if arm.perturbed]
    why = None if refusal is None else refusal.reason
    verdicts = [
        _verdict(arm, by_arm, semantic, config, detector, why)
        for arm in acting
        for semantic in ("right", "nll_right", "choice_margin")
    ]
    return {
        **found,
        "detector": detector,
        "arms": [_arm_entry("clean", None, by_arm, config), _arm_entry("perturbed", None, by_arm, config)]
        + [_arm_entry(arm.name, arm, by_arm, config) for arm in done],
        "verdicts": verdicts,
        "recovery": [row for arm in acting for row in _fractions(arm, by_arm, config, detector)],
        "iatrogenic": [_harm(arm, by_arm) for arm in done if arm.kind == "iatrogenic"],
        "spearman": _correlations(acting, by_arm, config),
    }, _fits(crossing, response, verdicts)  # fmt: skip


def _arm_entry(name: str, arm: Arm | None, by_arm: ByItem, config: DissociateConfig) -> dict[str, Any]:
    rows = by_arm[name]
    return {
        "condition": name, "arm": name if arm is None else arm.kind, "mode": arm and arm.mode,
        "timing": arm and arm.timing, "n": len(rows), "right": accuracy(rows), **means_of(rows, config),
    }  # fmt: skip


def _floors(by_arm: ByItem) -> dict[str, float]:
    """Largest difference of a clean item between its stream and one forward: what arithmetic alone makes."""
    a, b = by_arm["clean"], by_arm["clean.oneforward"].reindex(by_arm["clean"].index)
    return {name: float((a[name] - b[name]).abs().max()) for name in ("nll_right", "choice_margin")}


def _smallest(name: str, by_arm: ByItem) -> float:
    """Smallest effect on a metric that is worth dividing by."""
    clean = by_arm["clean"]
    if name == "kl_clean_pert":
        return float(np.nan_to_num(delta_min(by_arm["clean.oneforward"][name].to_numpy(float))))
    once = by_arm["clean.oneforward"].reindex(clean.index)[name]
    return float(np.nan_to_num(delta_min((once - clean[name]).to_numpy(float))))


def _triple(name: str, arm: str, by_arm: ByItem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clean, perturbed and recovered values of the same items; clean text has no divergence from itself."""
    index = by_arm["clean"].index
    base = pd.Series(0.0, index) if name == "kl_clean_pert" else by_arm["clean"][name]
    one, other, third = (t.astype(float).to_numpy() for t in (base, *(
        by_arm[a].reindex(index)[name] for a in ("perturbed", arm)
    )))  # fmt: skip
    return one, other, third


def _blind(arm: Arm, by_arm: ByItem, detector: Mapping[str, Any]) -> str | None:
    """Why a fraction would say nothing about a mode."""
    return why_blind(arm, detector, lambda name: float(by_arm[name]["duty"].mean()) if name in by_arm else float("nan"))


def _ends(found: Any) -> dict[str, Any]:
    return {"value": float(found.value), "low": float(found.low), "high": float(found.high), "reason": found.reason}


def _verdict(
    arm: Arm, by_arm: ByItem, semantic: str, config: DissociateConfig, detector: Mapping[str, Any], refused: str | None
) -> dict[str, Any]:
    found = dissociation(
        _triple(config.dynamic, arm.name, by_arm), _triple(semantic, arm.name, by_arm), list(by_arm["clean"].index),
        delta_min=(_smallest(config.dynamic, by_arm), _smallest(semantic, by_arm)),
        reason=_blind(arm, by_arm, detector), reason_semantic=refused,
    )  # fmt: skip
    return {
        "condition": arm.name, "mode": arm.mode, "timing": arm.timing, "arm": arm.kind, "dynamic": config.dynamic,
        "semantic": semantic, "primary": semantic == config.semantic, "verdict": found.verdict, "reason": found.reason,
        "rf_dyn": _ends(found.dynamic), "rf_sem": _ends(found.semantic), "tost": list(found.tost),
        "equivalent": found.equivalent, "margin": found.margin, "n": found.n, "metric_id": found.metric_id,
    }  # fmt: skip


def _fractions(arm: Arm, by_arm: ByItem, config: DissociateConfig, detector: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recovery fraction of every metric by itself, over all items that have it."""
    out = []
    for name in (*SEMANTIC, *dynamics_of(config)):
        if name not in by_arm["perturbed"]:
            continue
        clean, pert, rec = _triple(name, arm.name, by_arm)
        smallest = _smallest(name, by_arm)
        rf = recovery_fraction(
            clean, pert, rec, list(by_arm["clean"].index), delta_min=smallest, reason=_blind(arm, by_arm, detector)
        )
        out.append({
            "condition": arm.name, "mode": arm.mode, "timing": arm.timing, "arm": arm.kind, "metric": name,
            "rf": rf.value, "low": rf.low, "high": rf.high, "reason": rf.reason, "clean": rf.clean,
            "perturbed": rf.pert, "recovered": rf.rec, "n": rf.n, "delta_min": smallest,
            "acted_on": by_construction(name, config.detector, arm.mode),
        })  # fmt: skip
    return out


def _harm(arm: Arm, by_arm: ByItem) -> dict[str, Any]:
    """Share of clean items with another answer, or a right answer less likely than arithmetic can make it."""
    clean = by_arm["clean"]
    mine = by_arm[arm.name].reindex(clean.index)
    floor = _floors(by_arm)["nll_right"]
    rate = iatrogenic_rate(
        clean["nll_right"].to_numpy(float), mine["nll_right"].to_numpy(float), floor if np.isfinite(floor) else 0.0,
        clean_answers=list(clean["chosen"]), mode_answers=list(mine["chosen"]),
    )  # fmt: skip
    return {
        "condition": arm.name, "mode": arm.mode, **_ends(rate), "n": rate.n, "limit": 3.0 * floor,
        "answers_changed": int((clean["chosen"] != mine["chosen"]).sum()), "right": accuracy(mine),
        "nll_change": float((mine["nll_right"] - clean["nll_right"]).mean()), "duty": float(mine["duty"].mean()),
        "energy_written": float(mine["energy_written"].mean()),
    }  # fmt: skip


def _correlations(arms: Sequence[Arm], by_arm: ByItem, config: DissociateConfig) -> list[dict[str, Any]]:
    """Spearman's ρ over items between the change of the dynamics and that of the NLL of the right answer."""
    index = list(by_arm["clean"].index)
    pairs = [("perturbed − clean", "perturbed", "clean")]
    pairs += [(f"{arm.name} − perturbed", arm.name, "perturbed") for arm in arms]
    out = []
    for said, one, other in pairs:
        a, b = by_arm[one].reindex(index), by_arm[other].reindex(index)
        found = spearman_interval(
            (a[config.dynamic] - b[config.dynamic]).to_numpy(float), (a["nll_right"] - b["nll_right"]).to_numpy(float),
            index,
        )  # fmt: skip
        out.append({"change": said, "condition": one, **_ends(found), "n": found.n})
    return out


def _fits(
    crossing: Mapping[str, Any], response: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """One row for the crossing, one per strength and metric, one per verdict."""
    rows: list[dict[str, Any]] = [dict(crossing)]
    for row in response:
        for name in (n for n, entry in row.items() if isinstance(entry, Mapping) and n != "detector"):
            entry = row[name]
            rows.append({
                "fit_id": f"{name}|{row['condition']}", "estimator": "mean", "metric": name, "alpha": row["alpha"],
                "condition_id": row["condition"], "value": entry.get("value", entry.get("mean")), "low": entry["low"],
                "high": entry["high"], "n": entry["n"],
            })  # fmt: skip
    for found in verdicts:
        sides = {
            f"{side}{end}": found[side][key]
            for side in ("rf_dyn", "rf_sem")
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
        }  # fmt: skip
        rows.append({
            "fit_id": f"{found['condition']}|{found['semantic']}", "estimator": found["metric_id"],
            "metric": found["semantic"], "dynamic": found["dynamic"], "condition_id": found["condition"],
            "verdict": found["verdict"], "reason": found["reason"], "n": found["n"], **sides,
            "tost_low": found["tost"][0], "tost_high": found["tost"][1], "primary": found["primary"],
        })  # fmt: skip
    kinds = {"primary": "boolean", "status": "string", "reason": "string"}
    return pd.DataFrame(rows).astype({name: kind for name, kind in kinds.items() if name in rows[0] or verdicts})
