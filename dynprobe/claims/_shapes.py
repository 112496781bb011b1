"""From tables to numbers with intervals, one function per shape of analysis.

Prompts (or the stories that items share) are the unit: rows of one prompt are averaged first, prompts are resampled,
and sides that read the same prompts are compared inside them. The statistics are those of
:mod:`dynprobe.metrics.statistics`; what stands here is which numbers go into them. Every function takes the sides of a
test by role and returns one :class:`Estimate` per number (a course has one per step).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from scipy.special import ndtri

from dynprobe.claims._doses import nonlinearity, ratio, threshold
from dynprobe.claims._intervals import N_BOOT, SEED, Sides, estimate_of, mean_of, nothing, one
from dynprobe.claims._parts import (
    Contrast,
    Correlation,
    Dissociation,
    Ratio,
    Share,
    Steps,
    Term,
    Threshold,
)
from dynprobe.claims._populations import skeleton, variance
from dynprobe.claims._sides import Side, clusters, reason_of
from dynprobe.claims._verdict import Estimate, Finding, Verdict, confidence_of, judge, verdict_of
from dynprobe.metrics.statistics import (
    dissociation,
    proportion_interval,
    spearman_interval,
)

__all__ = ["analyse", "tables_of"]

_OTHER_TOKENS = "the models read the prompts as different tokens, so their losses do not compare"


def analyse(claim: Any, sides: Sequence[Side]) -> Verdict:
    """Return the verdict of a claim on tables.

    Args:
        claim: A testable claim.
        sides: One side per role, or any number of one role.

    Raises:
        UsageError: A side lacks a table or column that the claim rests on.
    """
    by_role: dict[str, list[Side]] = {}
    for side in sides:
        by_role.setdefault(side.role, []).append(side)
    findings = []
    for part in claim.parts:
        for estimate in _SHAPES[part.shape](part, by_role, len(claim.parts)):
            outcome, reason = judge(estimate, part.prediction)
            p = part.prediction
            findings.append(Finding(part.metric, estimate, p.expect, p.margin, p.unit, outcome, reason))
    return verdict_of(claim.id, findings)


def tables_of(part: Any) -> tuple[str, ...]:
    """Return the tables that a part reads."""
    if isinstance(part, Ratio | Threshold):
        return ("fits", "trials")
    if isinstance(part, Contrast) and any(t.keep for t in part.terms):
        return (part.table, "tokens")
    return (getattr(part, "table", "samples"),)


def _contrast(part: Contrast, sides: Sides, k: int = 1) -> list[Estimate]:
    judges = {role: found[0] for role, found in sides.items()}
    columns, kept = [], None
    for term in part.terms:
        side = one(sides, term.role)
        columns.append(term.weight * clusters(side, term, part.table, part.value, part.cluster, judges))
        if part.acted is not None and term.weight > 0 and part.acted in side.rows(part.table, {}):
            acted = clusters(side, term, part.table, part.acted, part.cluster, judges)
            kept = set(acted.index[acted > 0]) if kept is None else kept & set(acted.index[acted > 0])
    roles = [role for t in part.terms for role in (t.role, *(t.keep or ())[:1])]  # a judge's positions count too
    if part.metric == "output.nll/1" and not _same_tokens([one(sides, role) for role in roles]):
        return [nothing(_OTHER_TOKENS, part.label)]
    together = pd.concat(columns, axis=1, join="inner")
    values = together.sum(axis=1, skipna=False)
    if kept is not None:
        values = values[values.index.isin(kept)]
        if not len(values):
            return [nothing(f"{part.acted} is 0 everywhere: nothing acted", part.label)]
    if len(values) and values.isna().all():
        for term in part.terms:
            side = one(sides, term.role)
            if why := reason_of(side.rows(part.table, term.where), part.value):
                few = ", the model has too few layers" if why.startswith("depth<") else ""
                return [nothing(f"no text of {side.name} has {part.value}: {why}{few}", part.label)]
    return [mean_of(values, part.label, k)]


def _same_tokens(sides: Sequence[Side]) -> bool:
    """Whether every prompt has as many tokens in each model; a loss per token means nothing else."""
    known = [s.tables["samples"] for s in {id(s): s for s in sides}.values() if "n_prompt" in s.tables["samples"]]
    counts = [f.groupby(f["prompt_id"].astype(str))["n_prompt"].first() for f in known]
    pairs = [pd.concat([counts[0], other], axis=1, join="inner") for other in counts[1:]]
    return all(bool((p.iloc[:, 0] == p.iloc[:, 1]).all()) for p in pairs)


def _steps(part: Steps, sides: Sides, k: int = 1) -> list[Estimate]:
    side = one(sides, part.role)
    frame = side.rows(part.table, part.where, (part.value, part.over, part.cluster))
    levels = pd.to_numeric(frame[part.over], errors="coerce")
    numbers = pd.to_numeric(frame[part.value], errors="coerce").astype(float)
    table = numbers.groupby([frame[part.cluster].astype(str), levels]).mean().unstack()
    names = list(table.columns)
    if len(names) < 2:
        return [nothing(f"{part.over} has fewer than two values", part.label)]
    return [
        mean_of((table[b] - table[a]).dropna(), f"{part.over} {a:g} → {b:g}", k * (len(names) - 1))
        for a, b in itertools.pairwise(names)
    ]


def _share(part: Share, sides: Sides, k: int = 1) -> list[Estimate]:
    side = one(sides, part.role)
    column = part.holds[0]
    frame = side.rows(part.table, part.where, (column, part.cluster))
    if part.against is not None:  # the column becomes its difference to the other side's value for the same prompt
        base = clusters(one(sides, part.against.role), part.against, part.table, column, part.cluster, {})
        frame = frame.assign(**{column: frame[column].astype(float) - frame[part.cluster].astype(str).map(base)})
    known = frame[column].notna()
    holds = _holds(frame[column], part.holds)
    if part.agrees is not None:
        other = side.rows(part.table, part.where, (part.agrees[0],))[part.agrees[0]]
        holds, known = holds == _holds(other, part.agrees), known & other.notna()
    per = holds[known].astype(float).groupby(frame[part.cluster][known].astype(str)).mean()
    if per.isin([0.0, 1.0]).all():  # one answer per prompt: the exact interval, which needs no draws

        def ends(confidence: float) -> tuple[float, float, float, int, str | None]:
            p = proportion_interval(int(per.sum()), len(per), confidence=confidence, method="exact")
            return p.value, p.low, p.high, p.n, p.reason

        return [estimate_of(ends, part.label, k)] if len(per) else [nothing("empty", part.label)]
    return [mean_of(per, part.label, k)]


def _holds(column: pd.Series, condition: tuple[str, str, Any]) -> pd.Series:
    _, how, value = condition
    if how == "in":
        return column.isin(list(value))
    if how in (">", "<"):
        numbers = pd.to_numeric(column, errors="coerce").astype(float)
        return numbers > value if how == ">" else numbers < value
    same = column.astype(float) == float(value) if isinstance(value, bool) else column == value
    return same if how == "==" else ~same


def _correlation(part: Correlation, sides: Sides, k: int = 1) -> list[Estimate]:
    chosen = [s for found in sides.values() for s in found] if part.by_model else [one(sides, part.role)]
    if part.by_model and "nll" in (part.x, part.y) and not _same_tokens(chosen):
        return [nothing(_OTHER_TOKENS, part.label)]
    xs: list[float] = []
    ys: list[float] = []
    for side in chosen:
        columns = [_against(side, part, column) for column in (part.x, part.y)]
        both = pd.concat(columns, axis=1, join="inner").dropna()
        if part.by_model:
            xs.append(float(both.iloc[:, 0].mean()))
            ys.append(float(both.iloc[:, 1].mean()))
        else:
            xs, ys = both.iloc[:, 0].tolist(), both.iloc[:, 1].tolist()
    if len(xs) < 4:
        return [nothing("models<4" if part.by_model else "prompts<4", part.label)]

    def ends(confidence: float) -> tuple[float, float, float, int, str | None]:
        r = spearman_interval(xs, ys, [str(i) for i in range(len(xs))], confidence=confidence, n_boot=N_BOOT, seed=SEED)
        return r.value, r.low, r.high, r.n, r.reason or r.reason_interval

    return [estimate_of(ends, part.label or f"ρ({part.x}, {part.y})", k)]


def _against(side: Side, part: Correlation, column: str) -> pd.Series:
    here = clusters(side, Term(where=part.where), part.table, column, part.cluster, {})
    if part.minus is None:
        return here
    return here - clusters(side, Term(where=part.minus), part.table, column, part.cluster, {})


def _dissociation(part: Dissociation, sides: Sides, k: int = 1) -> list[Estimate]:
    side = one(sides, part.role)
    words = side.rows("samples", {"arm": "recovered"}, ("controller", "alpha"))
    detector = words[words["controller"].astype(str).str.contains("(detector)", regex=False)]
    if part.mode is not None:
        detector = detector[detector["controller"].astype(str).str.startswith(part.mode)]
    doses = pd.to_numeric(detector["alpha"], errors="coerce").dropna().unique()
    if len(doses) != 1 or detector["condition_id"].nunique() != 1:
        return [nothing("no dose at which the task breaks down" if not len(doses) else "several modes", part.label)]
    recovered = {"condition_id": detector["condition_id"].iloc[0]}
    if "duty" in detector and not (pd.to_numeric(detector["duty"]) > 0).any():
        return [nothing("DETECTOR_BLIND", part.label)]
    wheres = ({"condition_id": "clean"}, {"arm": "perturbed", "alpha": float(doses[0])}, recovered)
    series = {
        column: [clusters(side, Term(where=w), "samples", column, "prompt_id", {}) for w in wheres]
        for column in (part.dynamic, part.semantic)
    }
    table = pd.concat([s for found in series.values() for s in found], axis=1, join="inner").to_numpy(float)
    if not len(table):
        return [nothing("no item that every arm has", part.label)]
    d = dissociation(list(table[:, :3].T), list(table[:, 3:].T), n_boot=N_BOOT, seed=SEED, chance=_chance(side))
    f = d.dynamic if part.of == "dynamic" else d.semantic
    inner = d.tost if part.of == "semantic" else (f.low, f.high)
    reason = f.reason or f.reason_interval or d.reason
    # The joint bootstrap gives 95 %; for more numbers its ends move out as those of a normal number would.
    wider = float(ndtri(1 - (1 - confidence_of(k)) / 2) / ndtri(0.975))
    outer = (f.value - wider * (f.value - f.low), f.value + wider * (f.high - f.value))
    return [Estimate(f.value, f.low, f.high, inner, outer, d.n, part.label or f"RF_{part.of}", reason)]


def _chance(side: Side) -> float | None:
    if "items" not in side.tables or "n_choices" not in side.tables["items"]:
        return None
    return float((1 / side.tables["items"]["n_choices"].astype(float)).mean())


_SHAPES: dict[str, Callable[[Any, Sides, int], list[Estimate]]] = {
    "contrast": _contrast,
    "steps": _steps,
    "ratio": ratio,
    "threshold": threshold,
    "nonlinear": nonlinearity,
    "share": _share,
    "correlation": _correlation,
    "variance": variance,
    "skeleton": skeleton,
    "dissociation": _dissociation,
}
