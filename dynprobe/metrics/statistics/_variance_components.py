r"""Variance components of a panel: how much a model, a category, a prompt or a seed scatters by itself.

A share of a sum of squares depends on how many models and prompts were taken; a variance component does not. Three
estimators:

- **ANOVA** (balanced designs): the mean squares are set equal to their expectations and solved from the seeds upwards.
  An estimate may be negative: it is reported as it is, with the reason ``negative``, for it says that the component is
  small or the model wrong.
- **REML**: the components ≥ 0 under which the residual likelihood is largest. In a balanced design the likelihood
  depends on the data only through the mean squares, −2ℓ = Σ df_k (ln λ_k + MS_k/λ_k) with λ_k the expected mean square;
  it equals ANOVA where no estimate is negative. In any other design it is maximised over the cells.
- **MixedLM**: the same likelihood, maximised by statsmodels over the rows. Slow (minutes for a thousand rows) and less
  sharp in the last digits; it is here so that the other two can be held against it.

A component at zero is a singular fit. It is named in ``singular``, never passed over in silence.

With ``fixed="category"`` the categories are what the panel was built to compare, and their variance is σ_f² of
Nakagawa and Schielzeth's R².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics._crossed_design import TERMS, CrossedDesign, crossed_design
from dynprobe.metrics.statistics._crossing import Array
from dynprobe.metrics.statistics._variance import VarianceTable, table_of
from dynprobe.metrics.statistics._variance_reml import reml_of_cells, reml_of_mean_squares, reml_of_rows

__all__ = ["MixedR2", "VarianceComponents", "nakagawa_r2", "variance_components"]

NAN = float("nan")
#: The likelihood of an unbalanced design needs matrices of cells × cells (of rows × rows in MixedLM).
_MOST_CELLS = 2500
_ZERO = 1e-7


@dataclass(frozen=True, slots=True)
class VarianceComponents:
    """Variance components of a panel.

    Attributes:
        components: Term → variance, in squared units of the metric; a term the design cannot part is missing.
        method: ``anova``, ``reml`` or ``mixedlm``.
        fixed_variance: Variance of the fixed part over the rows (0 without one).
        singular: Components that are zero at the edge of what is allowed (REML), or negative (ANOVA).
        includes: Term → terms that its component holds too.
        n: Rows.
        status: ``resolved`` or ``missing``.
        reason: ``singular``, ``negative``, ``not-converged``, ``unbalanced``,
            ``cells>2500``, or that of the table.
    """

    components: dict[str, float]
    method: str
    fixed_variance: float
    singular: tuple[str, ...]
    includes: dict[str, tuple[str, ...]]
    n: int
    status: str
    reason: str | None

    @property
    def shares(self) -> dict[str, float]:
        """Each component over the sum of all, negative ones counted as zero."""
        total = sum(max(v, 0.0) for v in self.components.values())
        return {t: max(v, 0.0) / total if total > 0 else NAN for t, v in self.components.items()}

    @property
    def r2(self) -> MixedR2:
        """Marginal and conditional R² of the fit."""
        random = [max(v, 0.0) for t, v in self.components.items() if t != _last(self.components)]
        rest = self.components.get(_last(self.components), NAN)
        return nakagawa_r2(self.fixed_variance, random, max(rest, 0.0))


@dataclass(frozen=True, slots=True)
class MixedR2:
    """R² of a mixed model.

    Attributes:
        marginal: Share of the fixed effects.
        conditional: Share of fixed and random effects.
        reason: Why they are missing.
    """

    marginal: float
    conditional: float
    reason: str | None = None


def nakagawa_r2(fixed: float, random: Sequence[float], residual: float, distribution: float = 0.0) -> MixedR2:
    """Nakagawa and Schielzeth's R² from variances.

    Marginal σ_f²/(σ_f² + Σσ_l² + σ_e² + σ_d²), conditional (σ_f² + Σσ_l²)/(the same).

    Args:
        fixed: σ_f², variance of the fixed part.
        random: σ_l², one per random effect.
        residual: σ_e².
        distribution: σ_d², 0 for a Gaussian response.

    Source:
        Nakagawa and Schielzeth 2013; reference §10.5.

    Example:
        >>> found = nakagawa_r2(1.0, [1.0], 2.0)
        >>> found.marginal, found.conditional
        (0.25, 0.5)
    """
    parts = [fixed, *random, residual, distribution]
    if any(math.isnan(v) for v in parts):
        return MixedR2(NAN, NAN, "missing")
    if any(v < 0 for v in parts):
        raise MetricError(f"variances are 0 or above, found {min(parts):g}; a negative estimate is no variance.")
    total = sum(parts)
    if not total > 0:
        return MixedR2(NAN, NAN, "zero-denominator")
    return MixedR2(fixed / total, (fixed + sum(random)) / total)


def variance_components(
    y: Any,
    model: Sequence[Any],
    category: Sequence[Any] | None,
    prompt: Sequence[Any] | None = None,
    *,
    method: Literal["anova", "reml", "mixedlm"] = "reml",
    fixed: Literal["category"] | None = None,
) -> VarianceComponents:
    """Estimate the variance components of a panel.

    Args:
        y: One value per row.
        model: Model of each row.
        category: Category of each row, or None.
        prompt: Prompt of each row; default one per category.
        method: ``anova``, ``reml`` or ``mixedlm``.
        fixed: ``"category"`` makes the categories fixed effects.

    Returns:
        The components; ``status`` is missing with a reason where they cannot be estimated.

    Raises:
        MetricError: Lengths differ, or a prompt lies in two categories.

    Source:
        Reference §9.1, §10.5; Searle, Casella and McCulloch, Variance Components, 1992.

    Example:
        >>> found = variance_components([1, 2, 3, 5, 4, 9], ["a", "a", "b", "b", "c", "c"], None, ["p", "q"] * 3)
        >>> {term: round(value, 6) for term, value in found.components.items()}
        {'model': 5.166667, 'prompt': 2.833333, 'model:prompt': 2.166667}
    """
    if prompt is None:
        prompt = ["all"] * len(model) if category is None else list(category)
    return components_of(crossed_design(y, model, category, prompt), method=method, fixed=fixed)


def components_of(
    design: CrossedDesign, *, method: Literal["anova", "reml", "mixedlm"] = "reml", fixed: str | None = None,
    table: VarianceTable | None = None,
) -> VarianceComponents:  # fmt: skip
    """:func:`variance_components` of a design, whose table may be known already."""
    table = table_of(design) if table is None else table
    rows = {row.term: row for row in table.rows if row.df > 0}
    includes = {t: row.includes for t, row in rows.items() if row.includes}

    def missing(why: str) -> VarianceComponents:
        return VarianceComponents({}, method, NAN, (), includes, table.n, "missing", why)

    if table.reason is not None:
        return missing(table.reason)
    kept = [t for t in TERMS if t in rows and t != fixed]
    balanced = table.balanced and method != "mixedlm"
    if not balanced and method == "anova":
        return missing("unbalanced")
    if not balanced and (design.n if method == "mixedlm" else len(design.count)) > _MOST_CELLS:
        return missing(f"cells>{_MOST_CELLS}")
    by = design.category if fixed in rows else np.zeros_like(design.category)
    if balanced:
        expected, ms = _expected(design, kept), np.array([rows[t].ms for t in kept])
        found = np.linalg.solve(expected, ms)
        if method == "reml" and (found < 0).any():
            found = reml_of_mean_squares(expected, ms, np.array([rows[t].df for t in kept], dtype=np.float64))
        means = np.bincount(by, weights=design.y) / np.maximum(np.bincount(by), 1)
        predicted = means[by]
    else:
        fit = (reml_of_rows if method == "mixedlm" else reml_of_cells)(design, kept, by)
        if fit is None:
            return missing("not-converged")
        found, predicted = fit
    fixed_variance = float(np.var(predicted, ddof=1)) if fixed in rows else 0.0
    size = float(np.abs(found).max())
    edge = found < -_ZERO * size if method == "anova" else found <= _ZERO * size
    singular = tuple(t for t, low in zip(kept, edge, strict=True) if low)
    why = None if not singular else "negative" if method == "anova" else "singular"
    values = dict(zip(kept, map(float, found), strict=True))
    return VarianceComponents(values, method, fixed_variance, singular, includes, table.n, "resolved", why)


def _expected(design: CrossedDesign, kept: Sequence[str]) -> Array:
    """Expected mean squares: row k holds how often each component counts in the mean square of term k."""
    models, categories, r = design.n_models, design.n_categories, design.n / len(design.count)
    per = design.n_prompts / categories
    times = {
        "seed": 1.0, "model:prompt": r, "prompt": r * models, "model:category": r * per,
        "category": r * per * models, "model": r * per * categories,
    }  # fmt: skip
    # A component goes into the mean square of every term that it contains.
    holds = {
        "seed": set(TERMS), "model:prompt": set(TERMS) - {"seed"}, "prompt": {"prompt", "category"},
        "model:category": {"model:category", "category", "model"}, "category": {"category"}, "model": {"model"},
    }  # fmt: skip
    return np.array([[times[c] if t in holds[c] else 0.0 for c in kept] for t in kept])


def _last(components: dict[str, float]) -> str:
    """The innermost term: what the fit calls the residual."""
    return [t for t in TERMS if t in components][-1] if components else "seed"
