"""How a comparison becomes a verdict: differences by seed, t intervals, Akima's interpolation, and the tables.

Arms of one seed read the same bytes in the same order, so comparisons are taken seed by seed; their mean has a 95 % t
interval. The verdict reads that interval against the published claim, and nothing else: it is never the sign of a mean.

============ ============================================================= ======================================
claim        holds                                                         reversed
============ ============================================================= ======================================
``below``    the interval lies below 0                                     above 0
``above``    the interval lies above 0                                     below 0
``equal``    the interval lies within ± the margin                         outside of ± the margin
``at_most``  the interval ends at or below the margin                      it begins above the margin
``unstable`` the interval lies above 0, or most left runs alone diverged   none diverged, it ends at the margin
============ ============================================================= ======================================

Everything else is "not resolved", and so is whatever has fewer than two seeds or a diverged run on one side of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _orderings import CLAIMS, RATES, TIERS, Best, Claim, full_name
from scipy.interpolate import Akima1DInterpolator
from scipy.stats import t as student

__all__ = ["MARGIN", "Interval", "Row", "akima_minimum", "contrast", "interval_of", "table", "verdict"]

#: Losses that differ by less are called equal, in nats per byte: about one per cent of what such a model reaches.
MARGIN = 0.02


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % t interval; the ends are NaN with fewer than two seeds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Row:
    """What the seeds say of one comparison.

    Attributes:
        values: The contrast of each seed in which every run is there; NaN where one of them diverged.
        left_diverged: Seeds in which the first arm diverged.
        right_diverged: Seeds in which another one did.
        edge: Seeds in which a best rate lies at the end of the sweep.
    """

    values: tuple[float, ...]
    left_diverged: int = 0
    right_diverged: int = 0
    edge: int = 0


def interval_of(values: Sequence[float]) -> Interval:
    """Return mean ± t(0.975, n − 1)·s/√n."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def akima_minimum(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float, bool]:
    """Return the rate of least loss, the loss there, and whether that rate is an end of the sweep.

    The losses are interpolated by Akima's cubics over log₂ of the rate; runs without a finite loss are left out.

    Args:
        rates: Peak learning rates.
        losses: Held-out loss of each.

    Returns:
        NaN, NaN, False with fewer than four finite losses.
    """
    at, loss = np.log2(np.asarray(rates, float)), np.asarray(losses, float)
    order = np.argsort(at)
    at, loss = at[order][np.isfinite(loss[order])], loss[order][np.isfinite(loss[order])]
    if len(at) < 4:
        return math.nan, math.nan, False
    curve = Akima1DInterpolator(at, loss)
    turns = np.asarray(curve.derivative().roots(extrapolate=False), float)
    places = np.concatenate([at, turns[np.isfinite(turns)]])
    best = float(places[np.argmin(curve(places))])
    return 2.0**best, float(curve(best)), bool(best in (at[0], at[-1]))


def contrast(claim: Claim | Best, losses: Mapping[str, Mapping[int, float]]) -> Row:
    """Return the comparison, seed by seed.

    Args:
        claim: What is compared.
        losses: Held-out loss of each run, by arm (``name@rate``) and seed; NaN for one that diverged.
    """
    runs = [(losses.get(full_name(point), {}), sign) for point, sign in claim.terms]
    seeds = sorted(set.intersection(*(set(of) for of, _ in runs)))
    if isinstance(claim, Best):
        half = len(RATES)
        both = [[akima_minimum(RATES, [of[s] for of, _ in part]) for s in seeds] for part in (runs[:half], runs[half:])]
        pairs = list(zip(*both, strict=True))
        if claim.what == "loss":
            values = tuple(a[1] - b[1] for a, b in pairs)
        else:
            values = tuple(math.log2(a[0] / b[0]) for a, b in pairs)
        return Row(values, edge=sum(a[2] or b[2] for a, b in pairs))
    return Row(
        tuple(sum(sign * of[s] for of, sign in runs) for s in seeds),
        sum(math.isnan(runs[0][0][s]) for s in seeds),
        sum(any(math.isnan(of[s]) for of, _ in runs[1:]) for s in seeds),
    )


def verdict(claim: Claim | Best, row: Row, margin: float = MARGIN) -> str:
    """Return ``holds``, ``reversed``, ``not resolved``, or a dash where nothing is claimed."""
    if not claim.expect:
        return "–"
    seeds, excess = len(row.values), row.left_diverged - row.right_diverged
    finite = [value for value in row.values if math.isfinite(value)]
    if seeds >= 2 and 2 * abs(excess) > seeds and len(claim.terms) == 2 and claim.expect != "equal":
        expected_above = claim.expect in ("above", "unstable")
        return "holds" if expected_above == (excess > 0) else "reversed"
    if len(finite) < max(2, seeds):
        return "not resolved"
    found = interval_of(finite)
    return _read(claim.expect, found.low, found.high, margin)


def _read(expect: str, low: float, high: float, margin: float) -> str:
    holds, reverse = {
        "below": (high < 0, low > 0),
        "above": (low > 0, high < 0),
        "equal": (-margin <= low and high <= margin, low > margin or high < -margin),
        "at_most": (high <= margin, low > margin),
        "unstable": (low > 0, high <= margin),
    }[expect]
    return "holds" if holds else "reversed" if reverse else "not resolved"


def table(lines: Sequence[Mapping[str, Any]], margin: float = MARGIN) -> str:
    """Return the two Markdown tables: the verdicts, and the runs.

    Args:
        lines: Finished runs of one setting: ``point`` (``name@rate``), ``seed``, ``loss`` (None where it diverged),
            ``diverged``, ``parameters``, ``macs``, ``worst_rise``, ``seconds``.
        margin: Losses that differ by less are equal.
    """
    losses: dict[str, dict[int, float]] = {}
    about: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        lost = line["diverged"] or line["loss"] is None
        losses.setdefault(line["point"], {})[line["seed"]] = math.nan if lost else float(line["loss"])
        about.setdefault(line["point"], []).append(line)
    parts = [
        "| topic | comparison | difference [95 % t] | seeds | weights | compute | published | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    parts += ["| " + " | ".join(_verdict_row(claim, losses, about, margin)) + " |" for claim in CLAIMS]
    parts += [
        "", "| run | loss | SD | seeds | diverged | worst rise | weights | compute | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    order = list(dict.fromkeys(full_name(point) for tier in TIERS for point in tier))
    parts += [_run_row(point, losses[point], about[point]) for point in order if point in about]
    return "\n".join(parts)


def _verdict_row(
    claim: Claim | Best, losses: dict[str, dict[int, float]], about: dict[str, list[Mapping[str, Any]]], margin: float
) -> list[str]:
    row = contrast(claim, losses)
    found = interval_of([value for value in row.values if math.isfinite(value)])
    shown = "–" if not found.n else f"{found.mean:+.4f}"
    if found.n > 1:
        shown += f" [{found.low:+.4f}, {found.high:+.4f}]"
    notes = [f"{row.left_diverged} left diverged"] * bool(row.left_diverged)
    notes += [f"{row.right_diverged} right diverged"] * bool(row.right_diverged)
    notes += [f"{row.edge} at an end of the sweep"] * bool(row.edge)
    ratios = ["", ""]
    if isinstance(claim, Claim) and len(claim.terms) == 2:
        pair = [about.get(full_name(point)) for point, _ in claim.terms]
        if pair[0] and pair[1]:
            ratios = [f"× {pair[0][0][key] / pair[1][0][key]:.2f}" for key in ("parameters", "macs")]
    if isinstance(claim, Best):
        name = f"{claim.left} − {claim.right}, best {claim.what}"
    elif len(claim.terms) == 2:
        name = f"{claim.terms[0][0]} − {claim.terms[1][0]}"
    else:
        a, b, c, d = (point for point, _ in claim.terms)
        name = f"({a} − {b}) − ({c} − {d})"
    decided = verdict(claim, row, margin) if row.values else "not run"
    return [claim.topic, name, "; ".join([shown, *notes]), str(len(row.values)), *ratios, claim.published, decided]


def _run_row(point: str, losses: dict[int, float], about: list[Mapping[str, Any]]) -> str:
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    rises = [line["worst_rise"] for line in about if line["worst_rise"] is not None]
    cells = [
        point,
        f"{np.mean(finite):.4f}" if finite else "–",
        f"{np.std(finite, ddof=1):.4f}" if len(finite) > 1 else "–",
        str(len(losses)),
        str(len(losses) - len(finite)),
        f"{max(rises):.3f}" if rises else "–",
        f"{about[0]['parameters']:,}",
        f"{about[0]['macs']:,.0f}",
        f"{np.mean([line['seconds'] for line in about]):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"
