"""What a recovery study says: the detector first, then every arm, then what came back and what was harmed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.controllers.recovery._modes import selected_by
from dynprobe.metrics.statistics import (
    delta_min,
    detector_blind,
    detector_power,
    iatrogenic_rate,
    kaplan_meier,
    mean_interval,
    onsets,
    proportion_interval,
    recovery_fraction,
)
from dynprobe.probes import Calibration, Perturb
from dynprobe.protocols._recover_arms import Arm, acts_by_itself
from dynprobe.protocols._recover_config import RecoverConfig
from dynprobe.protocols._recover_rows import WINDOWS, first_written
from dynprobe.runs import Run

__all__ = [
    "FORCED_METRICS",
    "FREE_METRICS",
    "acted_on",
    "detector_entry",
    "detector_summary",
    "fraction_table",
    "recovery_summary",
    "why_blind",
]

#: Metrics that a recovery fraction is given for: semantic ones first.
FORCED_METRICS = ("nll", "kl_clean_pert", "entropy", "kappa_geom", "kappa_phase", "delta_rel_prev", "limen_ct")
FREE_METRICS = ("nll_bare", "repetition", "entropy", "kappa_geom", "kappa_phase", "delta_rel_prev", "limen_ct")
_HEAD = ("duty", "energy_written", "detector_duty", "acted_after", "recovered_after", "n_restarts")


def acted_on(metric: str, detector: str, mode: str | None = None) -> bool:
    """Whether a metric falls by construction.

    That is: the step angles that actuators turn, the signal that is followed, or what a mode selects by itself.

    Example:
        >>> [acted_on(name, "entropy") for name in ("kappa_phase", "kappa_geom", "entropy")]
        [True, False, True]
        >>> acted_on("nll_bare", "entropy", "slerp"), acted_on("nll_bare", "entropy", "sampling")
        (False, True)
    """
    if metric in ("kappa_phase", "delta_rel_prev") or (mode is not None and metric in selected_by(mode)):
        return True
    return metric == {"limen_ct": "limen_ct", "entropy": "entropy"}.get(detector)


def detector_summary(run: Run, config: RecoverConfig, perturbs: Sequence[Perturb]) -> dict[str, Any]:
    """Power of the detector on clean and perturbed texts that no mode has touched, by decoding mode.

    Args:
        run: A run whose texts without a mode are all there.
        config: Its settings.
        perturbs: What acts in the perturbed texts; latencies count from the first token they write.
    """
    samples = _labelled(run)
    samples = samples[samples["condition_id"].str.fullmatch(r"(clean|perturbed)\.(forced|free)")].copy()
    samples["fires"] = _fires(run.table("actions"), samples)
    out: dict[str, Any] = {}
    for road in ("forced", "free"):
        clean = samples[samples["condition_id"] == f"clean.{road}"]
        pert = samples[samples["condition_id"] == f"perturbed.{road}"]
        if len(clean):
            out[road] = detector_entry(clean, pert, config, perturbs)
    return out


def detector_entry(
    clean: pd.DataFrame, pert: pd.DataFrame, config: RecoverConfig, perturbs: Sequence[Perturb]
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "signal": config.detector, "runs_clean": len(clean), "runs_perturbed": len(pert),
        "duty_clean": float(clean["detector_duty"].mean()),
    }  # fmt: skip
    if not len(pert):
        return entry
    begin = [first_written(perturbs, *row) for row in pert[["n_prompt", "n_watched"]].itertuples(index=False)]
    power = detector_power(
        clean["signal_score"].to_numpy(), pert["signal_score"].to_numpy(),
        clean_fires=list(clean["fires"]), pert_fires=list(pert["fires"]),
        clean_tokens=clean["n_watched"].to_numpy(), pert_tokens=pert["n_watched"].to_numpy(),
        start=begin, prompts_clean=list(clean["prompt_id"]), prompts_pert=list(pert["prompt_id"]),
    )  # fmt: skip
    duty = float(pert["detector_duty"].mean())
    never = sum(not any(t >= at for t in fires) for fires, at in zip(pert["fires"], begin, strict=True))
    return entry | {
        "duty_perturbed": duty, "blind": detector_blind(duty, entry["duty_clean"]),
        "auc": _with_interval(power.auc), "fire_rate_clean": _with_interval(power.fire_clean),
        "fire_rate_perturbed": _with_interval(power.fire_pert),
        "false_fires_per_1000": _with_interval(power.false_fires),
        "latency_median": power.latency.median, "latency_censored": never,
    }  # fmt: skip


def _with_interval(found: Any) -> dict[str, Any]:
    return {
        "value": float(found.value), "low": float(found.low), "high": float(found.high),
        "reason": getattr(found, "reason", None), "reason_interval": getattr(found, "reason_interval", None),
    }  # fmt: skip


def _labelled(run: Run) -> pd.DataFrame:
    samples = run.samples.copy()
    for column in ("sample_id", "condition_id", "prompt_id"):
        samples[column] = samples[column].astype(str)
    return samples


def _fires(actions: pd.DataFrame, samples: pd.DataFrame) -> list[list[int]]:
    """Tokens after the prompt at which the detector came on, of each untouched run."""
    by_sample = {str(name): rows for name, rows in actions.groupby("sample_id", observed=True)}
    found: list[list[int]] = []
    for sample, n_prompt, watched in samples[["sample_id", "n_prompt", "n_watched"]].itertuples(index=False):
        rows = by_sample[sample]
        after = rows[(rows["pos"] >= n_prompt) & (rows["pos"] < n_prompt + watched)]
        after = after.drop_duplicates("pos").sort_values("pos")
        found.append(list(onsets(after["detected"].to_numpy(bool))))
    return found


def recovery_summary(
    run: Run, arms: Sequence[Arm], config: RecoverConfig, calibration: Calibration, perturbs: Sequence[Perturb]
) -> dict[str, Any]:
    """Return detector, arms, recovery and harm of a finished study."""
    samples = _labelled(run)
    detector = detector_summary(run, config, perturbs)
    by_arm = {str(name): rows.set_index("prompt_id") for name, rows in samples.groupby("condition_id", sort=False)}
    floor = _floor(by_arm)
    recovered = [a for a in arms if a.mode is not None and a.perturbed]
    untouched = [a for a in arms if a.kind == "iatrogenic"]
    tokens = _new_tokens(run) if any(a.decode == "free" for a in untouched) else {}
    return {
        "detector": detector,
        "band": {
            "signal": config.detector, "lower": config.q_lo, "upper": config.q_hi,
            "q_lo": calibration.quantile(config.detector, config.q_lo),
            "q_hi": calibration.quantile(config.detector, config.q_hi), "m": config.m, "m_off": config.m_off,
        },
        "arms": [
            _arm_entry(arm, by_arm[arm.condition_id], WINDOWS.get(config.detector, 0))
            for arm in arms
            if arm.condition_id in by_arm
        ],
        "recovery": [entry for arm in recovered for entry in _fractions(arm, by_arm, detector, config)],
        "iatrogenic": [_harm(arm, by_arm, floor) for arm in untouched if arm.decode == "forced"],
        "changed": [_changed(arm, by_arm, tokens) for arm in untouched if arm.decode == "free"],
        "nll_floor": floor,
    }  # fmt: skip


def _arm_entry(arm: Arm, rows: pd.DataFrame, window: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "condition": arm.condition_id, "arm": arm.kind, "mode": arm.mode, "timing": arm.timing, "decode": arm.decode,
        "n": len(rows),
    }  # fmt: skip
    names = FORCED_METRICS if arm.decode == "forced" else FREE_METRICS
    for name in (n for n in (*_HEAD, *names) if n in rows):
        values = rows[name].astype(float).dropna().to_numpy()
        low, high = mean_interval(values)
        mean = float(values.mean()) if len(values) else np.nan
        entry[name] = {"mean": mean, "low": low, "high": high, "n": len(values)}
    return entry | {"calm": _calm_of(rows, window)}


def _calm_of(rows: pd.DataFrame, window: int) -> dict[str, Any]:
    """Time from the first action to calm over the texts that were acted on; one that never was calm is censored."""
    acted = rows[rows["acted_after"].notna()]
    after = acted["recovered_after"].astype(float)
    watched = (acted["n_watched"] - acted["acted_after"] - window).astype(float).clip(lower=0.0)
    found = kaplan_meier(after.fillna(watched).to_numpy(), after.notna().to_numpy())
    return {"median": found.median, "exceeds": found.exceeds, "never": found.n_censored, "n": found.n}


def _floor(by_arm: Mapping[str, pd.DataFrame]) -> float:
    """Largest NLL difference of a clean text between two ways of the same arithmetic."""
    if "clean.forced" not in by_arm or "clean.oneforward" not in by_arm:
        return float("nan")
    a, b = by_arm["clean.forced"]["nll"], by_arm["clean.oneforward"]["nll"]
    return float((a - b.reindex(a.index)).abs().max())


def why_blind(arm: Arm, detector: Mapping[str, Any], duty_of: Callable[[str], float]) -> str | None:
    """Return why a fraction would say nothing about a mode: it did not act where it should, or as much elsewhere.

    A mode that waits for the detector is judged by the duty cycle the detector has on texts that no mode has touched; a
    mode with a trigger of its own by how often it acted itself. What acts at every perturbed token waits for nothing.

    Args:
        arm: The arm of the mode, or of its random control.
        detector: Power of the detector on the same way of reading.
        duty_of: Duty cycle of an arm by its name, such as ``clean+slerp``; NaN where there is no such arm.

    Returns:
        ``"DETECTOR_BLIND"``; ``"no-action"`` for an oracle of noise that is on at no new token; or None.
    """
    assert arm.mode is not None
    if ".always" in arm.name or ".oracle" in arm.name:
        return "no-action" if duty_of(arm.name.replace("random:", "")) == 0 else None
    if not acts_by_itself(arm.mode, arm.decode):
        blind = detector.get("blind")
        return None if blind is None else str(blind)
    mine = duty_of(f"perturbed+{arm.mode}")
    return None if mine == 1 else detector_blind(mine, duty_of(f"clean+{arm.mode}"))


def _fractions(
    arm: Arm, by_arm: Mapping[str, pd.DataFrame], detector: Mapping[str, Any], config: RecoverConfig
) -> list[dict[str, Any]]:
    clean = by_arm[f"clean.{arm.decode}"]
    mine, pert = (by_arm[name].reindex(clean.index) for name in (arm.condition_id, f"perturbed.{arm.decode}"))

    def duty_of(name: str) -> float:
        rows = by_arm.get(f"{name}.{arm.decode}")
        return float("nan") if rows is None else float(rows["duty"].mean())

    reason = why_blind(arm, detector.get(arm.decode, {}), duty_of)
    out = []
    for metric in FORCED_METRICS if arm.decode == "forced" else FREE_METRICS:
        if metric not in mine or metric not in pert:
            continue
        # The divergence of the clean text from itself is 0 by definition and not stored.
        base = clean[metric] if metric in clean and metric != "kl_clean_pert" else pd.Series(0.0, clean.index)
        smallest = 0.0
        if arm.decode == "forced" and metric in by_arm["clean.oneforward"]:
            once = by_arm["clean.oneforward"].reindex(clean.index)[metric]
            smallest = float(np.nan_to_num(delta_min((once - base).to_numpy(float))))
        rf = recovery_fraction(
            base.to_numpy(float), pert[metric].to_numpy(float), mine[metric].to_numpy(float), list(clean.index),
            delta_min=smallest, reason=reason,
        )  # fmt: skip
        out.append({
            "condition": arm.condition_id, "mode": arm.mode, "timing": arm.timing, "arm": arm.kind,
            "decode": arm.decode, "metric": metric, "rf": rf.value, "low": rf.low, "high": rf.high,
            "reason": rf.reason, "clean": rf.clean, "perturbed": rf.pert, "recovered": rf.rec,
            "acted_on": acted_on(metric, config.detector, arm.mode), "n": rf.n, "delta_min": smallest,
        })  # fmt: skip
    return out


def fraction_table(recovery: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The recovery fractions as a table of fits."""
    table = pd.DataFrame(recovery).rename(columns={"condition": "condition_id", "decode": "decode_mode"})
    table.insert(0, "fit_id", table["condition_id"] + "|" + table["metric"])
    return table.assign(estimator="recovery.fraction/1")


def _harm(arm: Arm, by_arm: Mapping[str, pd.DataFrame], floor: float) -> dict[str, Any]:
    """Share of clean texts whose continuation became less likely than arithmetic can make it."""
    clean = by_arm["clean.forced"]["nll"].astype(float)
    rows = by_arm[arm.condition_id].reindex(clean.index)
    mine = rows["nll"].astype(float)
    rate = iatrogenic_rate(clean.to_numpy(), mine.to_numpy(), floor if np.isfinite(floor) else 0.0)
    return {
        "condition": arm.condition_id, "mode": arm.mode, **_with_interval(rate), "n": int((mine - clean).notna().sum()),
        "nll_change": float((mine - clean).mean()), "limit": 3.0 * floor, "duty": float(rows["duty"].mean()),
        "energy_written": float(rows["energy_written"].mean()),
    }  # fmt: skip


def _changed(arm: Arm, by_arm: Mapping[str, pd.DataFrame], tokens: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Share of clean texts that the mode made another text: a mode that never acts on clean text changes none."""
    clean = by_arm["clean.free"]
    rows = by_arm[arm.condition_id].reindex(clean.index)
    pairs = list(zip(clean["sample_id"], rows["sample_id"], strict=True))
    changed = sum(tokens.get(str(a)) != tokens.get(str(b)) for a, b in pairs)
    return {
        "condition": arm.condition_id, "mode": arm.mode, "changed": changed, "n": len(pairs),
        **_with_interval(proportion_interval(changed, len(pairs), method="exact")),
        "duty": float(rows["duty"].mean()),
    }  # fmt: skip


def _new_tokens(run: Run) -> dict[str, tuple[int, ...]]:
    """The text of each sample as token ids."""
    table = run.table("tokens", columns=["sample_id", "pos", "target_id"]).sort_values("pos", kind="stable")
    return {str(name): tuple(rows) for name, rows in table.groupby("sample_id", observed=True)["target_id"]}
