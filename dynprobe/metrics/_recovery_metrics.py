"""``recovery.fraction`` and ``dissoc.rf2``: what was recovered, as definitions with ids.

Intervals and everything else live in :mod:`dynprobe.metrics.statistics`; here is what makes two numbers comparable: the
definition and its digest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result
from dynprobe.metrics.statistics._dissociation import dissociation
from dynprobe.metrics.statistics._recovery import recovery_fraction

__all__: list[str] = []


def _kept(x: Any, mask: Any) -> Any:
    if mask is None:
        return x
    keep = np.asarray(mask, bool)
    if keep.shape != x.shape[-1:]:
        raise MetricError(f"The mask has shape {list(keep.shape)}, expected {[x.shape[-1]]}: one flag per run.")
    return x[..., keep]


def _share(n_pairs: int, n_missing: int) -> float:
    return n_pairs / (n_pairs + n_missing) if n_pairs + n_missing else float("nan")


def _fraction(
    inputs: tuple[Any, ...],
    mask: Any,
    params: dict[str, Any],
    metric_id: str,
    delta_min: float = 0.0,
    prompts: Any = None,
    reason: str | None = None,
) -> Result:
    clean, pert, rec = (_kept(as_array(x, metric_id)[0], mask) for x in inputs)
    rf = recovery_fraction(clean, pert, rec, prompts, delta_min=delta_min, reason=reason)
    extras = {
        "low": rf.low, "high": rf.high, "clean": rf.clean, "pert": rf.pert, "rec": rf.rec, "status": rf.status,
        "delta_min": rf.delta_min,
    }  # fmt: skip
    coverage = _share(rf.n_pairs, rf.n_missing)
    return Result(rf.value, rf.reason, coverage, rf.n, rf.n_pairs, metric_id, extras=extras)


def _dissociation(
    inputs: tuple[Any, ...],
    mask: Any,
    params: dict[str, Any],
    metric_id: str,
    delta_min: Any = (0.0, 0.0),
    prompts: Any = None,
    chance: float | None = None,
    reason: str | None = None,
) -> Result:
    dynamic, semantic = (_kept(as_array(x, metric_id)[0], mask) for x in inputs)
    for x in (dynamic, semantic):
        if x.ndim != 2 or len(x) != 3:
            raise MetricError(f"{metric_id} takes two tables [3, run] (clean, pert, rec), found {list(x.shape)}.")
    d = dissociation(
        dynamic, semantic, prompts, delta_min=tuple(delta_min), chance=chance, reason=reason, margin=params["margin"]
    )
    extras = {
        "rf_dyn": d.dynamic.value, "rf_dyn_low": d.dynamic.low, "rf_dyn_high": d.dynamic.high,
        "rf_sem": d.semantic.value, "rf_sem_low": d.semantic.low, "rf_sem_high": d.semantic.high,
        "tost_low": d.tost[0], "tost_high": d.tost[1], "equivalent": d.equivalent,
    }  # fmt: skip
    coverage = _share(d.n_pairs, d.dynamic.n_missing)
    return Result(d.verdict, d.reason, coverage, d.n, d.n_pairs, metric_id, extras=extras)


register(
    MetricSpec(
        id="recovery.fraction/1",
        sentence="Share of what a perturbation did to a metric that a recovery mode undid.",
        formula=(
            "RF = (Σ m_pert − Σ m_rec)/(Σ m_pert − Σ m_clean) over paired runs; |mean pert − mean clean| < δ_min, or 0 "
            "up to rounding, → NaN no-effect; δ_min = 3·SD (ddof 1) of the clean–clean difference; interval: cluster "
            "bootstrap over prompts, replicates without an effect open it on both sides"
        ),
        latex=(
            r"\mathrm{RF} = \frac{\sum m_{\mathrm{pert}}-\sum m_{\mathrm{rec}}}{\sum m_{\mathrm{pert}}-\sum "
            r"m_{\mathrm{clean}}}"
        ),
        input="values×3: clean, perturbed, recovered, paired",
        value_range="(−∞, ∞); 1 full recovery, 0 none, < 0 harm, > 1 overshoot",
        unit="1",
        invariances=frozenset({"P", "S", "shift"}),
        source="dynprobe",
        vectors=(
            "rf-1: clean .2, pert .6, rec .3 / .7 / .1 → 0.75 / −0.25 / 1.25",
            "clean = pert → NaN no-effect",
        ),
        groups=frozenset({"paired", "recovery"}),
    ),
    _fraction,
    arity=3,
)
register(
    MetricSpec(
        id="dissoc.rf2/1",
        sentence="Whether the dynamics and the meaning recovered together, apart, or cannot be told.",
        formula=(
            "RF_dyn and RF_sem (recovery.fraction/1) of the same runs, prompts resampled jointly; COUPLED: both 95 % "
            "intervals above 0.1; DISSOCIATED: RF_dyn interval above 0.5 and 90 % interval of RF_sem inside ±margin "
            "(TOST at 5 %); else INDETERMINATE; accuracy: RF_sem refused when clean − perturbed < 0.2 or clean − "
            "chance < 0.3"
        ),
        latex=(
            r"\begin{cases} \text{COUPLED} & I_{95}(\mathrm{RF}_{\mathrm{dyn}}) > 0.1 \text{ and } "
            r"I_{95}(\mathrm{RF}_{\mathrm{sem}}) > 0.1 \\"
            r"\text{DISSOCIATED} & I_{95}(\mathrm{RF}_{\mathrm{dyn}}) > 0.5 \text{ and } "
            r"I_{90}(\mathrm{RF}_{\mathrm{sem}})\subset(-\mathrm{margin},\,\mathrm{margin}) \\"
            r"\text{INDETERMINATE} & \text{otherwise} \end{cases}"
        ),
        input="table[3,run]×2: clean, perturbed, recovered of the dynamic and of the semantic metric",
        value_range="COUPLED, DISSOCIATED, INDETERMINATE, DETECTOR_BLIND",
        unit="label",
        invariances=frozenset({"S", "shift"}),
        source="dynprobe",
        params={"margin": 0.1},
        vectors=(
            "RF_dyn [0.6, 0.9], RF_sem [−0.05, 0.08] → DISSOCIATED",
            "RF_dyn [0.6, 0.9], RF_sem [−0.3, 0.4] → INDETERMINATE",
        ),
        groups=frozenset({"paired", "recovery"}),
    ),
    _dissociation,
    arity=2,
)
