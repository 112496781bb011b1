"""Statistics of thresholds: from responses at a few strengths to a number that can be quoted.

- One curve: :func:`first_crossing` → :class:`Crossing`.
- A population: :func:`prompt_threshold` (median of α*), :func:`mean_threshold` (crossing of the mean response) →
  :class:`Threshold`; :func:`ratio_threshold` → :class:`Ratio`.
- Yes-or-no responses: :func:`fit_psychometric` → :class:`PsychometricFit`.
- Where to look next: :class:`BracketSearch` for repeatable responses, :class:`PosteriorSearch` for random ones.
- Without a formula: :func:`isotonic_threshold`, :func:`spearman_karber`, :func:`mann_kendall`,
  :func:`monotonicity_test`, :func:`proportion_interval`.
- Kinks: :func:`broken_stick`, :func:`nonlinear`.

Arrays in, small frozen records out, each with a ``status`` and a ``reason``. A number that cannot be computed is
NaN; an open end of an interval is infinite. Corrections for multiplicity are
``statsmodels.stats.multitest.multipletests``.
"""

from __future__ import annotations

from dynprobe.metrics.statistics._bracket import BracketSearch, Trial
from dynprobe.metrics.statistics._breakpoint import BrokenStick, Nonlinearity, broken_stick, nonlinear
from dynprobe.metrics.statistics._crossing import Crossing, Status, first_crossing
from dynprobe.metrics.statistics._mean import mean_threshold
from dynprobe.metrics.statistics._nonparametric import (
    IsotonicFit,
    Proportion,
    SpearmanKarber,
    isotonic_threshold,
    proportion_interval,
    spearman_karber,
)
from dynprobe.metrics.statistics._population import Threshold, prompt_threshold
from dynprobe.metrics.statistics._posterior import Answer, PosteriorSearch, PosteriorThreshold
from dynprobe.metrics.statistics._psychometric import PsychometricFit, fit_psychometric
from dynprobe.metrics.statistics._ratio import Ratio, ratio_threshold
from dynprobe.metrics.statistics._trend import Monotonicity, Trend, mann_kendall, monotonicity_test

__all__ = [
    "Answer",
    "BracketSearch",
    "BrokenStick",
    "Crossing",
    "IsotonicFit",
    "Monotonicity",
    "Nonlinearity",
    "PosteriorSearch",
    "PosteriorThreshold",
    "Proportion",
    "PsychometricFit",
    "Ratio",
    "SpearmanKarber",
    "Status",
    "Threshold",
    "Trend",
    "Trial",
    "broken_stick",
    "first_crossing",
    "fit_psychometric",
    "isotonic_threshold",
    "mann_kendall",
    "mean_threshold",
    "monotonicity_test",
    "nonlinear",
    "prompt_threshold",
    "proportion_interval",
    "ratio_threshold",
    "spearman_karber",
]
