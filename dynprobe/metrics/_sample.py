"""What the metrics of a batch are scored from: one walk over its states, and what several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._curvature import turn_defined
from dynprobe.metrics._kappa_phase import kappa_phase
from dynprobe.metrics._limen import ratio
from dynprobe.metrics._limen_ct import CtSeries, around, ct_scores, past
from dynprobe.metrics._result import Array, Bools, Scores
from dynprobe.metrics._rqa import Recurrence, recurrences
from dynprobe.metrics._series import Values
from dynprobe.metrics._spectrum import Spectra, spectra
from dynprobe.metrics._walk import Walk

__all__ = ["Context"]


class Context:
    """What the scorers share: the walk, the span, the ct series of the last depth, and phase lags made once."""

    w: Walk
    states: Sequence[torch.Tensor]
    span: Bools
    deep_span: Bools

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
