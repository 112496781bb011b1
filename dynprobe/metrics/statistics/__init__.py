"""Statistics of thresholds: from responses at a few strengths to a number that can be quoted.

- One curve: :func:`first_crossing` → :class:`Crossing`.
- A population: :func:`prompt_threshold` (median of α*), :func:`mean_threshold` (crossing of the mean response) →
  :class:`Threshold`; :func:`ratio_threshold` → :class:`Ratio`.
- Yes-or-no responses: :func:`fit_psychometric` → :class:`PsychometricFit`.
- Where to look next: :class:`BracketSearch` for repeatable responses, :class:`PosteriorSearch` for random ones.
- Without a formula: :func:`isotonic_threshold`, :func:`spearman_karber`, :func:`mann_kendall`,
  :func:`monotonicity_test`, :func:`proportion_interval`.
- Kinks: :func:`broken_stick`, :func:`nonlinear`.
- Recovery: :func:`recovery_fraction`, :func:`dissociation` and :func:`dissociation_verdict`,
  :func:`semantic_refusal`, :func:`iatrogenic_rate`, :func:`spearman_interval`.
- A mean over prompts: :func:`mean_interval`, which every command uses, inside :func:`cluster_mean` and, along an axis,
  :func:`profile_interval`; :func:`interval_words` is its name.
- Two sides of the same prompts: :func:`paired_difference`, :func:`profile_difference`, :func:`adjusted` (Holm,
  Benjamini–Hochberg).
- Panels of models: :func:`variance_table` (η², ω², each term by itself), :func:`variance_components` (ANOVA, REML) and
  :func:`nakagawa_r2`, :func:`icc1`, :func:`lmg_shares`, :func:`skeleton_r2`, :func:`adjusted_rand`,
  :func:`stable_clusters`, :func:`regime_shares`.
- Detectors: :func:`detector_power`, made of :func:`auc`, :func:`event_rate`, :func:`kaplan_meier` and
  :func:`proportion_interval`; :func:`detector_blind`, :func:`onsets`, :func:`sustained_max`.

Arrays in, small frozen records out, each with a ``status`` and a ``reason``. A number that cannot be computed is
NaN; an open end of an interval is infinite.
"""

from __future__ import annotations

from dynprobe.metrics.statistics._auc import Auc, auc
from dynprobe.metrics.statistics._bracket import BracketSearch, Trial
from dynprobe.metrics.statistics._breakpoint import BrokenStick, Nonlinearity, broken_stick, nonlinear
from dynprobe.metrics.statistics._correlation import Correlation, spearman_interval
from dynprobe.metrics.statistics._crossing import Crossing, Status, first_crossing
from dynprobe.metrics.statistics._detector import (
    DetectorPower,
    detector_blind,
    detector_power,
    onsets,
    sustained_max,
)
from dynprobe.metrics.statistics._dissociation import (
    Dissociation,
    Refusal,
    Verdict,
    dissociation,
    dissociation_verdict,
    semantic_refusal,
)
from dynprobe.metrics.statistics._icc import Icc, icc1
from dynprobe.metrics.statistics._mean import mean_threshold
from dynprobe.metrics.statistics._multiplicity import adjusted
from dynprobe.metrics.statistics._nonparametric import (
    IsotonicFit,
    Proportion,
    SpearmanKarber,
    isotonic_threshold,
    proportion_interval,
    spearman_karber,
)
from dynprobe.metrics.statistics._paired_difference import (
    PairedDifference,
    ProfileDifference,
    paired_difference,
    paired_differences,
    profile_difference,
)
from dynprobe.metrics.statistics._partitions import RandIndex, Topology, adjusted_rand, stable_clusters
from dynprobe.metrics.statistics._population import Threshold, prompt_threshold
from dynprobe.metrics.statistics._posterior import Answer, PosteriorSearch, PosteriorThreshold
from dynprobe.metrics.statistics._prompt_means import (
    ClusterMean,
    cluster_mean,
    cluster_means,
    interval_words,
    mean_interval,
    profile_interval,
)
from dynprobe.metrics.statistics._psychometric import PsychometricFit, fit_psychometric
from dynprobe.metrics.statistics._rates import EventRate, event_rate, iatrogenic_rate
from dynprobe.metrics.statistics._ratio import Ratio, ratio_threshold
from dynprobe.metrics.statistics._recovery import RecoveryFraction, delta_min, recovery_fraction
from dynprobe.metrics.statistics._regime_shares import RegimeShares, regime_shares
from dynprobe.metrics.statistics._shapley import lmg_shares
from dynprobe.metrics.statistics._skeleton import Skeleton, skeleton_r2
from dynprobe.metrics.statistics._survival import KaplanMeier, kaplan_meier
from dynprobe.metrics.statistics._trend import Monotonicity, Trend, mann_kendall, monotonicity_test
from dynprobe.metrics.statistics._variance import VarianceRow, VarianceTable, variance_table
from dynprobe.metrics.statistics._variance_components import (
    MixedR2,
    VarianceComponents,
    nakagawa_r2,
    variance_components,
)

__all__ = [
    "Answer",
    "Auc",
    "BracketSearch",
    "BrokenStick",
    "ClusterMean",
    "Correlation",
    "Crossing",
    "DetectorPower",
    "Dissociation",
    "EventRate",
    "Icc",
    "IsotonicFit",
    "KaplanMeier",
    "MixedR2",
    "Monotonicity",
    "Nonlinearity",
    "PairedDifference",
    "PosteriorSearch",
    "PosteriorThreshold",
    "ProfileDifference",
    "Proportion",
    "PsychometricFit",
    "RandIndex",
    "Ratio",
    "RecoveryFraction",
    "Refusal",
    "RegimeShares",
    "Skeleton",
    "SpearmanKarber",
    "Status",
    "Threshold",
    "Topology",
    "Trend",
    "Trial",
    "VarianceComponents",
    "VarianceRow",
    "VarianceTable",
    "Verdict",
    "adjusted",
    "adjusted_rand",
    "auc",
    "broken_stick",
    "cluster_mean",
    "cluster_means",
    "delta_min",
    "detector_blind",
    "detector_power",
    "dissociation",
    "dissociation_verdict",
    "event_rate",
    "first_crossing",
    "fit_psychometric",
    "iatrogenic_rate",
    "icc1",
    "interval_words",
    "isotonic_threshold",
    "kaplan_meier",
    "lmg_shares",
    "mann_kendall",
    "mean_interval",
    "mean_threshold",
    "monotonicity_test",
    "nakagawa_r2",
    "nonlinear",
    "onsets",
    "paired_difference",
    "paired_differences",
    "profile_difference",
    "profile_interval",
    "prompt_threshold",
    "proportion_interval",
    "ratio_threshold",
    "recovery_fraction",
    "regime_shares",
    "semantic_refusal",
    "skeleton_r2",
    "spearman_interval",
    "spearman_karber",
    "stable_clusters",
    "sustained_max",
    "variance_components",
    "variance_table",
]
