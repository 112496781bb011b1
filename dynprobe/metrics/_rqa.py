"""Recurrence quantification of a token sequence: how often, and in what patterns, states come back.

Two tokens recur when the cosine distance of their states is at most ε. Diagonal lines of the recurrence matrix are
stretches that are walked again in the same order (DET, ENTR), vertical lines are stretches that stay where they are
(LAM). By default ε is the 10 % quantile of all distances: then RR is 10 % by construction and carries no information;
give a fixed ``eps`` to compare recurrence rates.

Neighbouring tokens recur trivially. A Theiler window w leaves |i − j| < w out of every sum. RR, DET and ENTR have at
least w = 1 (the main diagonal is no recurrence); LAM as published has w = 0, main diagonal included on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._geometry import NEAR_ZERO, norms_and_validity
from dynprobe.metrics._inputs import as_tokens
from dynprobe.metrics._pairwise import pairwise
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, Scorer, register
from dynprobe.metrics._result import Array, Bools, Result, Scores, first_reason

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = ["READINGS", "Recurrence", "recurrences", "rqa"]

_SLACK = NEAR_ZERO * float(np.finfo(np.float64).eps)


class Recurrence(NamedTuple):
    """One row: which pairs of tokens exist [n, n], which recur, and ε."""

    pair: Bools
    recurrent: Bools
    eps: float


def recurrences(x: torch.Tensor, norm: Array, ok: Bools, *, q: float, eps: float) -> list[Recurrence]:
    """Recurrence matrices of the rows of one depth.

    Args:
        x: States [B, T, dim].
        norm: Their norms [B, T].
        ok: Valid tokens that take part [B, T].
        q: Quantile of the distances of i < j that is ε.
        eps: ε itself; 0 = take the quantile.
    """
    if not 0.0 <= q <= 1.0 or not eps >= 0.0:
        raise MetricError(f"rqa: q is a quantile in [0, 1] and eps at least 0, found q={q:g}, eps={eps:g}.")
    places = np.flatnonzero(ok.any(0))
    span = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
    chord, _ = pairwise(x[:, span], norm[:, span], ok[:, span], cosine=True)
    out = []
    for row in range(len(ok)):
        distance = 0.5 * chord[row] ** 2
        pair = ~np.isnan(distance)
        above = distance[np.triu(pair, 1)]
        limit = eps if eps > 0 else float(np.quantile(above, q)) if len(above) else float("nan")
        with np.errstate(invalid="ignore"):
            # equal distances differ by rounding, and the quantile is often one of them
            out.append(Recurrence(pair, pair & (distance <= limit + _SLACK), limit))
    return out


def _runs(lines: Bools) -> NDArray[np.int64]:
    """Lengths of the runs of True along the last axis."""
    closed = np.zeros((lines.shape[0], lines.shape[1] + 2), np.int8)
    closed[:, 1:-1] = lines
    edges = np.diff(closed, axis=1)
    return np.asarray(np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1], dtype=np.int64)


def _beyond(n: int, w: int) -> Bools:
    i = np.arange(n)
    out: Bools = np.abs(i[:, None] - i) >= w
    return out


def _diagonals(r: Recurrence, w: int) -> NDArray[np.int64]:
    """Lengths of the diagonal lines of the upper triangle with j − i ≥ w."""
    n = len(r.recurrent)
    offset, i = np.arange(w, n)[:, None], np.arange(n)
    j = i + offset
    return _runs(r.recurrent[i, np.minimum(j, n - 1)] & (j < n))


def _rr(r: Recurrence, p: dict[str, Any]) -> float:
    counted = r.pair & _beyond(len(r.pair), int(p["theiler"]))
    return float(share((r.recurrent & counted).sum(), counted.sum()))


def _det(r: Recurrence, p: dict[str, Any]) -> float:
    lines = _diagonals(r, int(p["theiler"]))
    return float(share(lines[lines >= p["lmin"]].sum(), lines.sum()))


def _lam(r: Recurrence, p: dict[str, Any]) -> float:
    lines = _runs((r.recurrent & _beyond(len(r.pair), int(p["theiler"]))).T)
    return float(share(lines[lines >= p["vmin"]].sum(), lines.sum()))


def _entr(r: Recurrence, p: dict[str, Any]) -> float:
    lines = _diagonals(r, int(p["theiler"]))
    counts = np.bincount(lines[lines >= p["lmin"]])
    share_ = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(np.abs((share_ * np.log2(share_)).sum())) if len(share_) else float("nan")


class _Reading(NamedTuple):
    read: Callable[[Recurrence, dict[str, Any]], float]
    line: str
    least_window: int


READINGS = {
    "rqa.rr/1": _Reading(_rr, "", 1),
    "rqa.det/1": _Reading(_det, "lmin", 1),
    "rqa.lam/1": _Reading(_lam, "vmin", 0),
    "rqa.entr/1": _Reading(_entr, "lmin", 1),
}


def _units_needed(metric: str, params: dict[str, Any]) -> int:
    """Tokens below which no pair, or no line of the shortest counted length, can exist."""
    reading, w = READINGS[metric], params["theiler"]
    shortest = params[reading.line] if reading.line else 1
    for name, value, least in (("theiler", w, reading.least_window), (reading.line or "theiler", shortest, 1)):
        if value != int(value) or value < least:
            raise MetricError(f"{metric}: {name} is a whole number of at least {least}, found {value}.")
    return int(w) + int(shortest)


def rqa(metric: str, found: list[Recurrence], ok: Bools, keep: Bools, params: dict[str, Any]) -> Scores:
    """Score every row of one depth.

    Args:
        metric: One of :data:`READINGS`.
        found: Recurrence matrices of the rows.
        ok: Valid tokens that take part [B, T].
        keep: Unmasked tokens [B, T].
        params: Parameters of the metric.
    """
    k = _units_needed(metric, params)
    n_ok, n_keep = ok.sum(-1), keep.sum(-1)
    value = np.array([READINGS[metric].read(r, params) if n else np.nan for r, n in zip(found, n_ok, strict=True)])
    reason = first_reason(
        len(ok),
        (n_keep == 0, "empty"),
        (n_ok < k, f"units<{k}"),
        (2 * n_ok < n_keep, "coverage"),
        (np.isnan(value), "zero-denominator"),
    )
    return Scores(
        value=np.where([r is not None for r in reason], np.nan, value),
        reason=reason,
        coverage=share(n_ok, n_keep),
        n_units=n_keep,
        n_steps=np.array([int(np.triu(r.pair, 1).sum()) for r in found], dtype=np.int64),
        extras={"eps": [r.eps for r in found], "n_invalid": (keep & ~ok).sum(-1)},
    )


def _computer(metric: str) -> Callable[..., Result]:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        (x,) = inputs
        t = as_tokens(x, mask, metric_id)
        norm, valid = norms_and_validity(t.states, t.keep)
        found = recurrences(t.states[0], norm[0], valid[0] & t.keep[0], q=params["q"], eps=params["eps"])
        return rqa(metric, found, valid[0] & t.keep[0], t.keep[0], params).result(0, metric_id, dtype=t.dtype)

    return compute


def _scorer(metric: str) -> Scorer:
    def score(c: Context, params: dict[str, Any]) -> Scores:
        found = c.recurrences(params["q"], params["eps"])
        return rqa(metric, found, c.w.valid[-1] & c.span, c.span, params)

    return score


_MATRIX = (
    "R_ij = [1 − cos(x_i, x_j) ≤ ε + 16·2⁻⁵²], ε the q-quantile (type 7) over i < j, or eps where eps > 0; pairs with "
    "|i − j| < theiler leave every sum; "
)
_COMMON: dict[str, Any] = {
    "input": "tokens[pos,dim]",
    "source": "Marwan et al. 2007; arXiv 2602.06266, cruiseresearchgroup/RQA-CoT with its line counts corrected",
    "levels": {"sample": "tokens of the last depth"},
    "groups": frozenset({"optional"}),
}
_INVARIANCES = frozenset({"R", "R_l", "S", "S_l", "scale-per-state"})
_TWO = "rqa-1: e₁,e₂,e₁,e₂,e₁,e₂ → "
_EPS = {"eps": 0.0, "q": 0.1}

register(
    MetricSpec(
        id="rqa.rr/1",
        span=True,
        sentence="Recurrence rate: share of pairs of tokens whose states recur.",
        formula=f"{_MATRIX}RR = Σ R/Σ 1 over i ≠ j",
        latex=(
            r"R_{ij} = \mathbb{1}\bigl[1-\cos(x_i,x_j)\le\varepsilon\bigr], \qquad "
            r"\mathrm{RR} = \frac{\sum_{|i-j|\ge w} R_{ij}}{\sum_{|i-j|\ge w} 1}, \quad w = \max(\mathrm{theiler},\,1)"
        ),
        value_range="[0, 1]",
        unit="1",
        params={**_EPS, "theiler": 1},
        column="rqa_rr",
        vectors=(f"{_TWO}0.4", "N = 1 → NaN units<2"),
        invariances=_INVARIANCES | {"P"},
        **_COMMON,
    ),
    _computer("rqa.rr/1"),
    score=_scorer("rqa.rr/1"),
)
register(
    MetricSpec(
        id="rqa.det/1",
        span=True,
        sentence="Determinism: share of recurrent pairs that lie on diagonal lines.",
        formula=f"{_MATRIX}DET = Σ_{{l ≥ lmin}} l·P(l)/Σ_l l·P(l), P(l) lines parallel to the main diagonal; N ≥ "
        "theiler + lmin",
        latex=(
            r"R_{ij} = \mathbb{1}\bigl[1-\cos(x_i,x_j)\le\varepsilon\bigr], \qquad "
            r"\mathrm{DET} = \frac{\sum_{l\ge l_{\min}} l\,P(l)}{\sum_{l} l\,P(l)}"
        ),
        value_range="[0, 1]",
        unit="1",
        params={**_EPS, "theiler": 1, "lmin": 3},
        column="rqa_det",
        vectors=(f"{_TWO}1 (lmin 2), 2/3 (lmin 3)", "no recurrence → NaN zero-denominator"),
        invariances=_INVARIANCES,
        **_COMMON,
    ),
    _computer("rqa.det/1"),
    score=_scorer("rqa.det/1"),
)
register(
    MetricSpec(
        id="rqa.lam/1",
        span=True,
        sentence="Laminarity: share of recurrent pairs that lie on vertical lines.",
        formula=f"{_MATRIX}LAM = Σ_{{v ≥ vmin}} v·P(v)/Σ_v v·P(v) over columns, theiler 0: main diagonal included; "
        "N ≥ theiler + vmin",
        latex=(
            r"R_{ij} = \mathbb{1}\bigl[1-\cos(x_i,x_j)\le\varepsilon\bigr], \qquad "
            r"\mathrm{LAM} = \frac{\sum_{v\ge v_{\min}} v\,P(v)}{\sum_{v} v\,P(v)}"
        ),
        value_range="[0, 1]",
        unit="1",
        params={**_EPS, "theiler": 0, "vmin": 3},
        column="rqa_lam",
        vectors=(f"{_TWO}0", "all recurrent, N = 10 → 1; theiler=1 → 84/90"),
        invariances=_INVARIANCES,
        **_COMMON,
    ),
    _computer("rqa.lam/1"),
    score=_scorer("rqa.lam/1"),
)
register(
    MetricSpec(
        id="rqa.entr/1",
        span=True,
        sentence="Entropy of the lengths of diagonal lines, in bits.",
        formula=f"{_MATRIX}ENTR = −Σ_{{l ≥ lmin}} p(l)·log₂ p(l), p(l) = P(l)/Σ_{{l ≥ lmin}} P(l), one triangle; N ≥ "
        "theiler + lmin",
        latex=(
            r"p(l) = \frac{P(l)}{\sum_{l'\ge l_{\min}} P(l')}, \qquad \mathrm{ENTR} = -\sum_{l\ge l_{\min}} "
            r"p(l)\log_2 p(l)"
        ),
        value_range="[0, ∞)",
        unit="bit",
        params={**_EPS, "theiler": 1, "lmin": 3},
        column="rqa_entr",
        vectors=(f"{_TWO}0 (lmin 3), 1 (lmin 2)", "no line → NaN zero-denominator"),
        invariances=_INVARIANCES,
        **_COMMON,
    ),
    _computer("rqa.entr/1"),
    score=_scorer("rqa.entr/1"),
)
