"""From intervals to a verdict: survived, falsified, inconclusive.

A prediction is a side of a margin. It *survives* where the whole interval lies on the claimed side, is *falsified*
where the whole interval lies on the other, and everything else is *inconclusive*: a mean on the right side with an
interval across the margin has shown nothing, and fewer than six prompts (or models) decide nothing. A number that says
exactly what "no effect" says (an interval that ends at the margin of ``above`` or ``below``) is on the other side, for
those claims are strict.

``within`` is equivalence: it survives where the 90 % interval lies inside (two one-sided tests at 5 %) and is falsified
where the 95 % interval lies outside altogether. ``outside`` is its negation.

A claim of several numbers (a monotone course is one number per step, and a claim may have several parts) survives where
all do, which needs no correction (intersection–union), and is falsified where one is, with the confidence raised to
1 − 0.05/k (Bonferroni): among many steps one misses by chance. A part of m steps among n parts has k = m·n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dynprobe.claims._parts import Prediction

__all__ = ["Estimate", "Finding", "Outcome", "Verdict", "confidence_of", "judge", "verdict_of"]

#: Clusters without which nothing is decided: with five, no pattern of signs reaches p < 0.05.
FEWEST = 6
Outcome = Literal["survived", "falsified", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the intervals that a verdict reads.

    Args:
        value: The number, or NaN.
        low: Lower end of the 95 % interval.
        high: Upper end.
        inner: 90 % interval, for equivalence.
        outer: Interval at 1 − 0.05/k, for a refutation among k numbers.
        n: Clusters.
        label: What it is of.
        reason: Why a number or an interval is missing.
    """

    value: float
    low: float
    high: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    n: int
    label: str = ""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """An estimate held against its prediction."""

    metric: str
    estimate: Estimate
    expect: str
    margin: float | tuple[float, float]
    unit: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the data say of a claim.

    Args:
        claim: Its id.
        outcome: ``survived``, ``falsified`` or ``inconclusive``.
        reason: In words.
        effect: The number that decided: the first that falsified it, or did not survive, or the first.
        low: Lower end of its 95 % interval.
        high: Upper end.
        n: Its clusters.
        findings: Every number.
        notes: What to bear in mind: a small panel, models other than the published ones, data older than the plan.
        runs: Folders of the runs.
        record: Id of the record in the log, where one was written.
    """

    claim: str
    outcome: Outcome
    reason: str
    effect: float
    low: float
    high: float
    n: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    runs: tuple[str, ...] = field(default=())
    record: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def confidence_of(k: int) -> float:
    """Return the confidence at which one of k numbers may refute.

    Example:
        >>> round(confidence_of(1), 3), round(confidence_of(5), 3)
        (0.95, 0.99)
    """
    return 1 - 0.05 / max(k, 1)


def judge(estimate: Estimate, prediction: Prediction) -> tuple[Outcome, str]:
    """Return the outcome of one number, and why.

    Example:
        >>> e = Estimate(0.3, 0.1, 0.5, (0.12, 0.48), (0.1, 0.5), 12)
        >>> judge(e, Prediction(expect="above", margin=0.0))[0], judge(e, Prediction(expect="above", margin=0.2))[0]
        ('survived', 'inconclusive')
    """
    ends = (estimate.low, estimate.high, *estimate.inner, *estimate.outer)
    if any(math.isnan(x) for x in (estimate.value, *ends)):
        what = "value" if math.isnan(estimate.value) else "interval"
        return "inconclusive", f"no {what} ({_WHY.get(estimate.reason or '', estimate.reason) or 'missing'})"
    if estimate.n < FEWEST:
        return "inconclusive", f"{_said(estimate, prediction)}: fewer than {FEWEST} prompts (or models) decide nothing"
    lower, upper = prediction.bounds
    low, high = estimate.outer
    if prediction.expect == "above":
        yes, no = estimate.low > lower, high <= lower
    elif prediction.expect == "below":
        yes, no = estimate.high < upper, low >= upper
    else:
        inside = lower < estimate.inner[0] and estimate.inner[1] < upper
        if prediction.expect == "within":
            yes, no = inside, high < lower or low > upper
        else:
            yes, no = estimate.high < lower or estimate.low > upper, inside
    outcome: Outcome = "survived" if yes else "falsified" if no else "inconclusive"
    return outcome, f"{_said(estimate, prediction)}: {_WORDS[outcome]}"


def verdict_of(claim: str, findings: Sequence[Finding]) -> Verdict:
    """Return the verdict of all numbers together: every one must survive, and one refutes."""
    outcomes = [f.outcome for f in findings]
    outcome: Outcome = (
        "falsified" if "falsified" in outcomes
        else "survived" if findings and all(o == "survived" for o in outcomes)
        else "inconclusive"
    )  # fmt: skip
    if not findings:
        nan = math.nan
        return Verdict(claim, outcome, "nothing could be measured", nan, nan, nan, 0, ())
    chosen = findings[outcomes.index(outcome)]
    e = chosen.estimate
    return Verdict(claim, outcome, chosen.reason, e.value, e.low, e.high, e.n, tuple(findings))


_WHY = {
    "empty": "empty: no prompt has one",
    "coverage": "coverage: fewer than half of the prompts have one",
    "prompts<3": "prompts<3: fewer than three prompts have a value",
}
_WORDS = {
    "survived": "the whole interval lies on the claimed side",
    "falsified": "the whole interval lies on the other side",
    "inconclusive": "the interval lies on both sides",
}


def _said(e: Estimate, p: Prediction) -> str:
    margin = f"({p.bounds[0]:g}, {p.bounds[1]:g})" if p.expect in ("within", "outside") else f"{p.bounds[0]:g}"
    unit = f" {p.unit}" if p.unit else ""
    label = f"{e.label}: " if e.label else ""
    return f"{label}{e.value:.4g} [{e.low:.4g}, {e.high:.4g}]{unit}, n = {e.n}, claimed {p.expect} {margin}"
