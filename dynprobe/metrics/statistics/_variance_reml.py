r"""Restricted likelihood of a panel's variance components, maximised three ways.

All have components θ ≥ 0 and the same likelihood. Seeds of a cell enter only through the mean of the cell and the
scatter about it, which are independent: with σ² the variance of the seeds, SS_w and df_w inside the cells, and
V = σ²·diag(1/n) + Σ θ_i Z_i Z_iᵀ over the cells,

    −2ℓ = ln|V| + ln|XᵀV⁻¹X| + rᵀV⁻¹r + df_w ln σ² + SS_w/σ².

It is climbed by Fisher scoring; a component that is driven to zero is held there while its score is negative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dynprobe.metrics.statistics._crossed_design import CrossedDesign
from dynprobe.metrics.statistics._crossing import Array

__all__ = ["reml_of_cells", "reml_of_mean_squares", "reml_of_rows"]

_STEPS, _DONE, _FLOOR = 200, 1e-12, 1e-10


def reml_of_mean_squares(expected: Array, ms: Array, df: Array) -> Array:
    """Components of a balanced design.

    Args:
        expected: How often each component counts in each expected mean square [term, component].
        ms: Mean squares [term].
        df: Degrees of freedom [term].
    """

    def derivatives(theta: Array) -> tuple[float, Array, Array]:
        mean = expected @ theta
        score = -0.5 * expected.T @ (df * (mean - ms) / mean**2)
        information = 0.5 * expected.T @ (expected * (df / mean**2)[:, None])
        return -0.5 * float((df * (np.log(mean) + ms / mean)).sum()), score, information

    scale = float(ms.max())
    found = _climb(lambda theta: derivatives(theta * scale), len(ms), scale)
    return found * scale


def reml_of_cells(design: CrossedDesign, terms: Sequence[str], fixed: NDArray[np.int64]) -> tuple[Array, Array] | None:
    """Components of any design, and the fixed part of each row; None where the climb does not end.

    Args:
        design: The design.
        terms: Terms that have a component, the innermost last.
        fixed: Group of each row that has a mean of its own.
    """
    from scipy.linalg import cho_factor
    from scipy.linalg.lapack import dpotri

    group = np.zeros(len(design.count), dtype=np.int64)
    group[design.cell] = fixed
    X = (group[:, None] == np.unique(group)[None, :]).astype(np.float64)
    scale = float(design.y.std())
    mean = (design.mean - design.y.mean()) / scale
    seeds = "seed" in terms
    within = float(((design.y - design.mean[design.cell]) ** 2).sum()) / scale**2 if seeds else 0.0
    df_within = design.n - len(design.count) if seeds else 0
    roots = [_root(design, t) for t in terms]
    same = [np.diag(r) if r.ndim == 1 else r @ r.T for r in roots]

    def variance(theta: Array) -> Array:
        return np.asarray(sum(value * part for value, part in zip(theta, same, strict=True)))

    def derivatives(theta: Array) -> tuple[float, Array, Array]:
        chol = cho_factor(variance(theta), lower=True)
        half = np.tril(dpotri(chol[0], lower=1)[0])  # the inverse, of which LAPACK fills one triangle
        inverse = half + np.tril(half, -1).T
        A = inverse @ X
        C = X.T @ A
        P = inverse - A @ np.linalg.solve(C, A.T)
        Py = P @ mean
        value = 2 * np.log(np.diag(chol[0])).sum() + np.linalg.slogdet(C)[1] + mean @ Py
        # S = Z Zᵀ has few columns: tr(P S) and tr(P S P S') need P Z and not P S.
        moved = [None if r.ndim == 1 else P @ r for r in roots]
        score = np.array([-0.5 * (_trace(P, r, w) - _square(r, Py)) for r, w in zip(roots, moved, strict=True)])
        pairs = list(zip(roots, moved, strict=True))
        information = np.array([[0.5 * _between(P, *a, *b) for b in pairs] for a in pairs])
        if seeds:
            at = list(terms).index("seed")
            value += df_within * np.log(theta[at]) + within / theta[at]
            score[at] -= 0.5 * (df_within / theta[at] - within / theta[at] ** 2)
            information[at, at] += 0.5 * df_within / theta[at] ** 2
        return -0.5 * float(value), score, information

    try:
        theta = _climb(derivatives, len(terms), 1.0)
    except np.linalg.LinAlgError:
        return None
    inverse = np.linalg.inv(variance(theta))
    beta = np.linalg.solve(X.T @ inverse @ X, X.T @ inverse @ mean)
    return theta * scale**2, (X @ beta)[design.cell] * scale


def reml_of_rows(design: CrossedDesign, terms: Sequence[str], fixed: NDArray[np.int64]) -> tuple[Array, Array] | None:
    """The same as :func:`reml_of_cells` by statsmodels' ``MixedLM`` over the rows."""
    from statsmodels.regression.mixed_linear_model import MixedLM, VCSpec

    named, dummies = list(terms[:-1]), {}
    for term in named:
        codes = _codes(design, term)[design.cell]
        dummies[term] = (codes[:, None] == np.unique(codes)[None, :]).astype(np.float64)
    scale = float(design.y.std())
    y = (design.y - design.y.mean()) / scale
    X = (fixed[:, None] == np.unique(fixed)[None, :]).astype(np.float64)
    columns = [[[f"{t}{i}" for i in range(dummies[t].shape[1])]] for t in named]
    spec = VCSpec(named, columns, [[dummies[t]] for t in named])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is looked for in the fit below
            fit = MixedLM(y, X, np.zeros(design.n), exog_vc=spec).fit(reml=True, method="bfgs", gtol=1e-9)
    except (np.linalg.LinAlgError, ValueError):
        return None
    found = np.append(fit.vcomp, fit.scale) * scale**2
    return (found, X @ np.asarray(fit.fe_params) * scale) if fit.converged and np.isfinite(found).all() else None


def _codes(design: CrossedDesign, term: str) -> NDArray[np.int64]:
    """Level of a term in each cell."""
    cells = {
        "model": design.cell_model, "category": design.cell_category, "prompt": design.cell_prompt,
        "model:prompt": np.arange(len(design.count)),
        "model:category": design.cell_model * (int(design.cell_category.max()) + 1) + design.cell_category,
    }  # fmt: skip
    return cells[term]


def _root(design: CrossedDesign, term: str) -> Array:
    """Z with Z Zᵀ 1 where two cells share a level of the term; the diagonal alone where no two do (1/n for seeds)."""
    if term == "seed":
        return 1 / design.count.astype(np.float64)
    codes = _codes(design, term)
    levels = np.unique(codes)
    # A design without replicates has no seeds: what is left is the innermost term, whose cells are the rows.
    return np.ones(len(codes)) if len(levels) == len(codes) else (codes[:, None] == levels[None, :]).astype(np.float64)


def _trace(P: Array, root: Array, moved: Array | None) -> float:
    """tr(P S)."""
    return float(np.diag(P) @ root) if moved is None else float((moved * root).sum())


def _square(root: Array, x: Array) -> float:
    """xᵀ S x."""
    return float(root @ x**2) if root.ndim == 1 else float(((root.T @ x) ** 2).sum())


def _between(P: Array, a: Array, moved_a: Array | None, b: Array, moved_b: Array | None) -> float:
    """tr(P S_a P S_b)."""
    if moved_a is None and moved_b is None:
        return float(a @ P**2 @ b)
    if moved_b is None:
        return _between(P, b, moved_b, a, moved_a)
    return float(a @ (moved_b**2).sum(1)) if moved_a is None else float(((a.T @ moved_b) ** 2).sum())


def _climb(derivatives: Callable[[Array], tuple[float, Array, Array]], n: int, scale: float) -> Array:
    """Fisher scoring under θ ≥ 0; the last component stays above zero.

    Args:
        derivatives: Log-likelihood, score and expected information at ``θ``; the last two per unit of ``θ·scale``.
        n: Components.
        scale: Unit of θ.
    """
    theta = np.full(n, 1.0 / n)
    value, score, information = derivatives(theta)
    score, information = score * scale, information * scale**2
    for _ in range(_STEPS):
        free = (theta > 0) | (score > 0)
        free[-1] = True
        step = np.zeros(n)
        step[free] = np.linalg.lstsq(information[np.ix_(free, free)], score[free], rcond=None)[0]
        size = 1.0
        for _ in range(40):
            new = np.maximum(theta + size * step, 0.0)
            new[-1] = max(new[-1], theta[-1] / 10)
            new[:-1][new[:-1] < _FLOOR * new.max()] = 0.0
            now = derivatives(new)
            if now[0] >= value - 1e-13 * abs(value):
                break
            size /= 2
        else:
            break
        moved = float(np.abs(new - theta).max())
        theta, value, score, information = new, now[0], now[1] * scale, now[2] * scale**2
        if moved <= _DONE * float(theta.max()):
            break
    return theta
