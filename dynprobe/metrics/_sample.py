"""How each metric is scored from one walk over a batch: the dispatch behind ``measure``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._block_influence import angular_distance, block_influence
from dynprobe.metrics._cka import cka
from dynprobe.metrics._convergence import contraction, iterations_to_tolerance
from dynprobe.metrics._curvature import curv_depth, curv_token, turn_defined
from dynprobe.metrics._debt import collapse_late, debt_cusum, debt_excess
from dynprobe.metrics._delta import delta_rel_next, delta_rel_prev, delta_rms, resid_norm
from dynprobe.metrics._kappa_geom import kappa_geom
from dynprobe.metrics._kappa_phase import check_centre, kappa_phase
from dynprobe.metrics._kappa_sync import kappa_sync
from dynprobe.metrics._kappa_xcorr import kappa_xcorr
from dynprobe.metrics._limen import gini, qratio, ratio, regimes
from dynprobe.metrics._limen_ct import CtSeries, around, ct_scores, past
from dynprobe.metrics._line_shape import line_shape
from dynprobe.metrics._order import order_parameter
from dynprobe.metrics._rank import RANKS, rank_scores
from dynprobe.metrics._residual import acceleration, deq_residual
from dynprobe.metrics._result import Array, Bools, Scores
from dynprobe.metrics._rqa import READINGS, Recurrence, recurrences, rqa
from dynprobe.metrics._rsa import rsa
from dynprobe.metrics._series import Values
from dynprobe.metrics._spectrum import Spectra, spectra
from dynprobe.metrics._twonn import twonn
from dynprobe.metrics._walk import Walk

__all__ = ["SCORERS", "Context"]


Scorer: TypeAlias = Callable[["Context", dict[str, Any]], Scores]


class Context:
    """What the scorers share: the walk, the span, the ct series of the last depth, and phase lags made once."""

    def __init__(
        self,
        w: Walk,
        states: Sequence[torch.Tensor],
        span: Bools,
        dtype: torch.dtype,
        theta: float | None,
        *,
        ct: bool,
        ct2: bool,
    ) -> None:
        self.w, self.states, self.span, self.dtype, self.theta = w, states, span, dtype, theta
        self.deep_span = np.broadcast_to(span, w.norm.shape)
        self.wants_ct, self.wants_ct2 = ct, ct2
        self._spectra: dict[tuple[str, bool], Spectra] = {}
        self._recurrences: dict[tuple[float, float], list[Recurrence]] = {}

    @cached_property
    def phase(self) -> Scores:
        """kappa.phase, shared with delta.angle."""
        return kappa_phase(self.w)

    @cached_property
    def ct(self) -> CtSeries:
        """The ct (and ct2) series at the last depth."""
        if not self.states:
            raise MetricError("limen.* needs at least one depth; with embed=0 depth 0 does not take part.")
        return CtSeries(
            self.states[-1].detach().to(self.dtype),
            self.w.norm[-1],
            self.w.valid[-1],
            self.w.eps,
            second=self.wants_ct2,
        )

    @cached_property
    def values(self) -> Values:
        """The ct values whose three tokens lie inside the span."""
        return Values(self.ct.ct, self.ct.ok, past(self.span), tokens=self.span.sum(-1))

    @cached_property
    def ratio(self) -> Scores:
        """limen.ratio, shared with limen.regime."""
        return ratio(self.values)

    def ct_scores(self, second: bool) -> Scores:
        """Mean ct or ct2 of the span."""
        norm, valid, span = self.w.norm[-1], self.w.valid[-1], self.span
        counts = (span.sum(-1), (span & np.isnan(norm)).sum(-1), (span & ~valid).sum(-1))
        s = self.ct
        if second:
            return ct_scores(s.ct2, s.ok2, around(span), s.stall2, *counts)
        return ct_scores(s.ct, s.ok, past(span), s.stall, *counts)

    @property
    def of_span(self) -> tuple[Sequence[torch.Tensor], Array, Bools, Bools]:
        """States, norms, validity and the span at every depth: what compares tokens as a set."""
        return self.states, self.w.norm, self.w.valid, self.deep_span

    def spectra(self, centre: str, unit: bool) -> Spectra:
        """Singular values of the span, made once for all ranks that read the same ones."""
        if (centre, unit) not in self._spectra:
            states, norm, valid, span = self.of_span
            self._spectra[centre, unit] = spectra(
                states, norm, valid & span, eps=self.w.eps, centre=centre, unit=unit
            )  # fmt: skip
        return self._spectra[centre, unit]

    def recurrences(self, q: float, eps: float) -> list[Recurrence]:
        """Recurrence matrices of the span at the last depth."""
        if not self.states:
            raise MetricError("rqa.* needs at least one depth; with embed=0 depth 0 does not take part.")
        if (q, eps) not in self._recurrences:
            ok = self.w.valid[-1] & self.span
            self._recurrences[q, eps] = recurrences(self.states[-1], self.w.norm[-1], ok, q=q, eps=eps)
        return self._recurrences[q, eps]

    def depth_rows(self, ids: frozenset[str]) -> dict[str, tuple[Array, Bools | None]]:
        """Columns of the depth table with their defined entries (None = all); rows are the last of the depth axis."""
        w = self.w
        ok = None if w.step_ok.all() else w.step_ok
        out: dict[str, tuple[Array, Bools | None]] = {}
        with np.errstate(divide="ignore", invalid="ignore"):
            if "resid.norm/1" in ids:
                out["norm"] = (w.norm, w.real)
            if ids & {"kappa.phase/1", "delta.angle/1"}:
                out["angle"] = (w.angle, ok)
            if "delta.rel_prev/1" in ids:
                out["delta_rel_prev"] = (w.diff / w.norm[:-1], ok)
            if "delta.rel_next/1" in ids:
                out["delta_rel_next"] = (w.diff / w.norm[1:], ok)
            if "delta.rms/1" in ids:
                out["delta_rms"] = (w.diff / np.sqrt(max(w.dim, 1)), ok)
        if "curv.depth/1" in ids:
            empty = np.full((0, *w.norm.shape[1:]), np.nan)
            out["curv_depth"] = (empty, None) if w.turn is None else (w.turn, turn_defined(w))
        return out

    def token_rows(self, ids: frozenset[str]) -> dict[str, Array]:
        """Columns of the token table."""
        out: dict[str, Array] = {}
        if "kappa.phase/1" in ids and self.phase.per_unit is not None:
            out["kappa_phase"] = self.phase.per_unit
        keep = self.w.keep[-1] if len(self.w.keep) else self.span
        if "limen.ct/1" in ids:
            out["limen_ct"] = np.where(self.ct.ok & past(keep), self.ct.ct, np.nan)
        if "limen.ct2/1" in ids:
            out["limen_ct2"] = np.where(self.ct.ok2 & around(keep), self.ct.ct2, np.nan)
        return out


def _phase(c: Context, params: dict[str, Any]) -> Scores:
    check_centre(params["centre"])
    return c.phase


def _delta_angle(c: Context, params: dict[str, Any]) -> Scores:
    from dataclasses import replace

    return replace(c.phase, extras={k: v for k, v in c.phase.extras.items() if k != "kappa_path"})


def _ratio(c: Context, params: dict[str, Any]) -> Scores:
    if params["ref"] != "self":
        raise MetricError("measure computes limen.ratio with ref=self; for ref=calib call compute with reference=.")
    return c.ratio if params["norm"] == "raw" else ratio(c.values, params["norm"])


def _geom(c: Context, params: dict[str, Any]) -> Scores:
    w = c.w
    return kappa_geom(c.states, w.norm, w.valid, c.deep_span, eps=w.eps, W=params["W"], dtype=c.dtype)


def _angular(c: Context, params: dict[str, Any]) -> Scores:
    return angular_distance(c.states, c.w.norm, c.w.valid, c.w.keep, dtype=c.dtype, **params)


def _rank(metric: str) -> Scorer:
    def score(c: Context, params: dict[str, Any]) -> Scores:
        found = c.spectra(params["centre"], RANKS[metric][1])
        return rank_scores(metric, *c.of_span, eps=c.w.eps, params=params, found=found)

    return score


def _rqa(metric: str) -> Scorer:
    def score(c: Context, params: dict[str, Any]) -> Scores:
        found = c.recurrences(params["q"], params["eps"])
        return rqa(metric, found, c.w.valid[-1] & c.span, c.span, params)

    return score


SCORERS: dict[str, Scorer] = {
    "kappa.phase/1": _phase,
    "kappa.geom/1": _geom,
    "kappa.sync/1": lambda c, p: kappa_sync(c.w),
    "kappa.xcorr/1": lambda c, p: kappa_xcorr(c.w, c.deep_span),
    "delta.rel_prev/1": lambda c, p: delta_rel_prev(c.w, p["agg"]),
    "delta.rel_next/1": lambda c, p: delta_rel_next(c.w, p["agg"]),
    "delta.rms/1": lambda c, p: delta_rms(c.w),
    "delta.angle/1": _delta_angle,
    "resid.norm/1": lambda c, p: resid_norm(c.w),
    "line.shape/1": lambda c, p: line_shape(c.states, c.w.norm, c.w.keep, eps=c.w.eps, dtype=c.dtype),
    "influence.block/1": lambda c, p: block_influence(c.w),
    "influence.angular/1": _angular,
    "order.vector/1": lambda c, p: order_parameter(*c.of_span),
    "order.pairwise/1": lambda c, p: order_parameter(*c.of_span, debiased=True),
    "cka.linear/1": lambda c, p: cka(*c.of_span, eps=c.w.eps, **p),
    "rsa.dist/1": lambda c, p: rsa(*c.of_span, eps=c.w.eps, params=p),
    **{metric: _rank(metric) for metric in RANKS},
    "id.twonn/1": lambda c, p: twonn(*c.of_span, eps=c.w.eps, **p),
    **{metric: _rqa(metric) for metric in READINGS},
    "deq.residual/1": lambda c, p: deq_residual(c.w, p["eps"]),
    "converge.accel/1": lambda c, p: acceleration(c.states, c.w, p["norm"], c.dtype),
    "converge.rho/1": lambda c, p: contraction(c.w),
    "converge.iterations/1": lambda c, p: iterations_to_tolerance(c.states, c.w, **p, dtype=c.dtype),
    "curv.depth/1": lambda c, p: curv_depth(c.w),
    "curv.token/1": lambda c, p: curv_token(c.w, c.deep_span),
    "limen.ct/1": lambda c, p: c.ct_scores(second=False),
    "limen.ct2/1": lambda c, p: c.ct_scores(second=True),
    "limen.ratio/1": _ratio,
    "limen.qratio/1": lambda c, p: qratio(c.values),
    "limen.gini/1": lambda c, p: gini(c.values),
    "limen.regime/1": lambda c, p: regimes(c.ratio),
    "debt.cusum/1": lambda c, p: debt_cusum(c.values, c.theta),
    "debt.excess/1": lambda c, p: debt_excess(c.values, c.theta),
    "collapse.late_ct/1": lambda c, p: collapse_late(c.values),
}
