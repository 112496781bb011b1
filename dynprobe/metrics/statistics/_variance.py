r"""Where the variance of a metric lies: in models, categories, their interaction, prompts, or seeds.

A panel runs every model on every prompt. The model of a value is

    y_{mcps} = μ + a_m + b_c + (ab)_{mc} + π_{p(c)} + (aπ)_{mp(c)} + ε_s

and each term has its row. Nothing is pooled: what an additive report calls "76 % noise" is here split into the
interaction, the prompts, how models differ over prompts, and what seeds bring. Where the design cannot part two terms
(one prompt in a category, one seed in a cell), the row says in ``includes`` what else it holds.

**Shares.** η² = SS / SS_total. In a balanced design the sums of squares do not depend on the order of the terms. In an
unbalanced one they do; the SS here is then the mean over all orders in which a term follows the terms it is made of
(Lindeman, Merenda and Gold's average, the Shapley share of R²), so that the rows still add up to the total.
``ss_last`` is what a term adds after all terms that do not contain it (type II).

**Tests.** Prompts and seeds are a sample of those one could have taken, so a model is tested against how models differ
over prompts, not against the repetition of a run: ``against`` names the row that is the yardstick. ω² takes the
residual of the full fit, the seeds; it is NaN with ``df<1`` where a cell holds one run. ``omega2_against`` takes the
yardstick of the test instead and is known for such designs too.

Seeds that change nothing (greedy text, nothing drawn) give copies of a run. Copies are found and left out: they would
make every test infinitely sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from dynprobe.metrics.statistics._crossed_design import TERMS, CrossedDesign, crossed_design

__all__ = ["VarianceRow", "VarianceTable", "variance_table"]

NAN = float("nan")

#: What must stand before a term in every order.
_BEFORE = {
    "model:category": ("model", "category"),
    "prompt": ("category",),
    "model:prompt": ("model:category", "prompt"),
}
#: The row a term is tested against. Where the design has no such row, nothing else is taken for it: one prompt in each
#: category says nothing of how models differ over prompts, however often it is repeated.
_AGAINST = {
    "model": "model:prompt",
    "category": "prompt",
    "model:category": "model:prompt",
    "prompt": "model:prompt",
    "model:prompt": "seed",
}


@dataclass(frozen=True, slots=True)
class VarianceRow:
    """One term of a :class:`VarianceTable`.

    Attributes:
        term: ``model``, ``category``, ``model:category``, ``prompt``, ``model:prompt`` or ``seed``.
        df: Degrees of freedom.
        ss: Sum of squares, averaged over orders where the design is unbalanced; the rows add up to the total.
        ss_last: Sum of squares after every term that does not contain this one.
        ms: ``ss_last / df``.
        eta2: Share of the total, SS/SS_total.
        omega2: (SS − df·MS_e)/(SS_total + MS_e), MS_e that of the seeds.
        against: The row this one is tested against.
        F: Ratio of the mean squares.
        p: Its p.
        omega2_against: ω² with the mean square of ``against`` for MS_e.
        includes: Terms this row holds too, because the design cannot part them.
        reason: Why a number is missing.
    """

    term: str
    df: int
    ss: float
    ss_last: float
    ms: float
    eta2: float
    omega2: float
    against: str | None
    F: float
    p: float
    omega2_against: float
    includes: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class VarianceTable:
    """Sums of squares of a panel.

    Attributes:
        rows: One per term, in the order of the model.
        ss_total: Sum of squares about the mean.
        n: Rows with a value; copies not counted.
        n_asked: Rows handed in.
        n_models: Models.
        n_categories: Categories.
        n_prompts: Prompts.
        copies: Rows left out as copies of another.
        balanced: Whether every model has every prompt equally often and every category as many prompts.
        reason: Why there is no table: ``empty``, ``coverage``, ``models<2``, ``zero-denominator``.
    """

    rows: tuple[VarianceRow, ...]
    ss_total: float
    n: int
    n_asked: int
    n_models: int
    n_categories: int
    n_prompts: int
    copies: int = 0
    balanced: bool = True
    reason: str | None = None

    def __getitem__(self, term: str) -> VarianceRow:
        return next(row for row in self.rows if row.term == term)


def variance_table(
    y: Any, model: Sequence[Any], category: Sequence[Any] | None, prompt: Sequence[Any] | None = None
) -> VarianceTable:
    """Split the variance of a panel into its terms.

    Args:
        y: One value per row: a model on a prompt under a seed.
        model: Model of each row.
        category: Category of each row, or None.
        prompt: Prompt of each row; default one prompt per category.

    Returns:
        The table. Rows of one model and prompt are seeds.

    Raises:
        MetricError: Lengths differ, or a prompt lies in two categories.

    Source:
        Reference §9.1, §14.1 (ANOVA). Order averages: Lindeman, Merenda and Gold 1980; Grömping, JSS 17(1), 2006.

    Example:
        >>> table = variance_table([0, 0, 0, 4], ["a", "a", "b", "b"], ["x", "y", "x", "y"])
        >>> [(row.term, round(row.eta2, 4)) for row in table.rows if row.df]
        [('model', 0.3333), ('category', 0.3333), ('model:category', 0.3333)]
    """
    if prompt is None:
        prompt = ["all"] * len(model) if category is None else list(category)
    return table_of(crossed_design(y, model, category, prompt))


def table_of(design: CrossedDesign) -> VarianceTable:
    """:func:`variance_table` of a design."""
    facts: dict[str, Any] = {
        "n": design.n, "n_asked": design.n_asked, "n_models": design.n_models, "n_categories": design.n_categories,
        "n_prompts": design.n_prompts, "copies": design.copies, "balanced": design.n > 0 and design.balanced,
    }  # fmt: skip
    why = _refusal(design)
    if why:
        rows = tuple(VarianceRow(t, 0, *(NAN,) * 5, None, NAN, NAN, NAN, (), why) for t in TERMS)
        return VarianceTable(rows, NAN, **facts, reason=why)
    total = design.total
    known: dict[frozenset[str], tuple[float, int]] = {}

    def left(terms: frozenset[str]) -> tuple[float, int]:
        if terms not in known:
            known[terms] = design.residual(terms)
        return known[terms]

    fitted = TERMS[:-1]
    ss = _averaged(left)
    last, df = {}, {}
    for term in fitted:
        others = frozenset(t for t in fitted if term != t and term not in _ancestors(t))
        (rss0, rank0), (rss1, rank1) = left(others), left(others | {term})
        last[term], df[term] = max(rss0 - rss1, 0.0), rank1 - rank0
    rss, rank = left(frozenset(fitted))
    ss["seed"] = last["seed"] = rss
    df["seed"] = design.n - rank
    ms = {t: last[t] / df[t] if df[t] > 0 else NAN for t in TERMS}
    return VarianceTable(tuple(_row(t, df, ss, last, ms, total, design) for t in TERMS), total, **facts)


def _refusal(design: CrossedDesign) -> str | None:
    if not design.n:
        return "empty"
    if 2 * (design.n + design.copies) < design.n_asked:
        return "coverage"
    if design.n_models < 2:
        return "models<2"
    return "zero-denominator" if design.constant else None


def _averaged(left: Any) -> dict[str, float]:
    """Mean over all orders of what each term adds."""
    fitted = TERMS[:-1]
    orders = [
        order
        for order in permutations(fitted)
        if all(order.index(b) < order.index(t) for t, before in _BEFORE.items() for b in before)
    ]
    ss = dict.fromkeys(fitted, 0.0)
    for order in orders:
        done: frozenset[str] = frozenset()
        for term in order:
            ss[term] += (left(done)[0] - left(done | {term})[0]) / len(orders)
            done |= {term}
    return {term: max(value, 0.0) for term, value in ss.items()}


def _ancestors(term: str) -> set[str]:
    out: set[str] = set()
    for before in _BEFORE.get(term, ()):
        out |= {before} | _ancestors(before)
    return out


def _row(
    term: str, df: dict[str, int], ss: dict[str, float], last: dict[str, float], ms: dict[str, float], total: float,
    design: CrossedDesign,
) -> VarianceRow:  # fmt: skip
    if df[term] < 1:
        missing = "copies" if term == "seed" and design.copies else "df<1"
        return VarianceRow(term, 0, 0.0, 0.0, NAN, NAN, NAN, None, NAN, NAN, NAN, (), missing)
    against = next((t for t in [_AGAINST.get(term)] if t is not None and df[t] > 0), None)
    yardstick = ms[against] if against is not None else NAN
    F = p = NAN
    why: str | None = None if df["seed"] > 0 or term == "seed" else "copies" if design.copies else "df<1"
    if against is not None and yardstick > 1e-12 * total:
        from scipy.special import fdtrc

        F = ms[term] / yardstick
        p = float(fdtrc(df[term], df[against], F))
    elif against is not None:
        why = why or "zero-denominator"
    elif term != "seed":  # the row it would be tested against is not there
        why = why or ("df<1" if _AGAINST[term] == "seed" else "prompts<2")
    e = ms["seed"] if term != "seed" else NAN
    omega = (ss[term] - df[term] * e) / (total + e)
    omega_against = (ss[term] - df[term] * yardstick) / (total + yardstick)
    return VarianceRow(
        term, df[term], ss[term], last[term], ms[term], ss[term] / total, omega, against, F, p, omega_against,
        _held_too(term, df), why,
    )  # fmt: skip


def _held_too(term: str, df: dict[str, int]) -> tuple[str, ...]:
    """Terms without a row of their own that go into this one."""
    inside = {"category": ("prompt",), "model:category": ("model:prompt",), "model": ("model:category",)}
    out: list[str] = []
    for other in inside.get(term, ()):
        if df[other] < 1:
            out.append(other)
            if other == "model:category" and df["model:prompt"] < 1:
                out.append("model:prompt")
    if df["seed"] < 1 and (term == "model:prompt" or "model:prompt" in out):
        out.append("seed")
    return tuple(out)


def shares_of(table: VarianceTable) -> dict[str, float]:
    """η² of each term that has a row.

    Example:
        >>> found = variance_table([1, 3, 3, 5], ["a", "a", "b", "b"], ["x", "y", "x", "y"])
        >>> {term: round(share, 12) for term, share in shares_of(found).items()}
        {'model': 0.5, 'category': 0.5, 'model:category': 0.0}
    """
    return {row.term: row.eta2 for row in table.rows if not np.isnan(row.eta2)}
