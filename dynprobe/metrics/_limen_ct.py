"""``limen.ct``: how far and how sharply the state turns from token to token.

Published as ct_t = delta_t × curvature_t on L2-normalised hidden states, with the factors left open. ``limen.ct`` reads
delta as the chord between neighbouring unit states and curvature as the angle between successive chords: only past
states, so it streams. ``limen.ct2`` reads curvature as the norm of the second difference and needs one token of
look-ahead. A stalled trajectory has zero instability by construction: ct is 0 there, and counted, not undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynprobe.metrics._geometry import NEAR_ZERO, norms, pair_angle, validity
from dynprobe.metrics._inputs import as_tokens
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores, first_reason

__all__ = ["CtSeries", "ct_scores", "ct_series"]


class CtSeries:
    """ct and ct2 at every position of [B, T] token states.

    ``ct[:, t]`` uses t−2, t−1, t and ``ct2[:, t]`` uses t−1, t, t+1; undefined positions hold any value. ``ok`` and
    ``ok2`` tell where all three states are valid; ``stall`` and ``stall2`` where ct was set to 0.
    """

    def __init__(self, h: torch.Tensor, norm: Array, valid: Bools, eps: float, second: bool = False) -> None:
        shape = norm.shape
        self.ct, self.ct2 = np.full(shape, np.nan), np.full(shape, np.nan)
        self.stall, self.stall2 = np.zeros(shape, bool), np.zeros(shape, bool)
        self.ok, self.ok2 = past(valid), around(valid)
        if shape[-1] < 3:
            return
        with torch.no_grad(), np.errstate(invalid="ignore", divide="ignore"):
            scale = torch.from_numpy(np.where(valid, 1.0 / norm, 0.0)).to(h.device, h.dtype)
            unit = h.detach() * scale[..., None]
            if np.isnan(norm).any():
                unit = torch.where(torch.from_numpy(valid).to(h.device)[..., None], unit, 0.0)
            chord = unit[:, 1:] - unit[:, :-1]
            delta = norms(chord)
            curvature = pair_angle(chord[:, :-1], chord[:, 1:], delta[:, :-1], delta[:, 1:])
            still = self._fill(delta, curvature, eps)
            if second:
                bend = norms(chord[:, 1:] - chord[:, :-1])
                self.ct2[:, 1:-1] = np.where(still[:, :-1], 0.0, delta[:, :-1] * bend)
                self.stall2[:, 1:-1] = still[:, :-1]

    def _fill(self, delta: Array, curvature: Array, eps: float) -> Bools:
        still: Bools = delta <= NEAR_ZERO * eps
        stall = still[:, 1:] | still[:, :-1]
        self.ct[:, 2:] = np.where(stall, 0.0, delta[:, 1:] * curvature)
        self.stall[:, 2:] = stall
        return still

    @classmethod
    def of_chords(cls, delta: Array, curvature: Array, valid: Bools, eps: float) -> CtSeries:
        """Make the series of ct, without ct2, of what was measured elsewhere.

        Args:
            delta: Length of the chord between unit states of neighbouring positions, [B, T − 1].
            curvature: Angle between successive chords, [B, T − 2].
            valid: Valid states, [B, T].
            eps: Rounding unit of the states.
        """
        out = cls(torch.empty(0), np.zeros((len(valid), 0)), np.zeros((len(valid), 0), bool), eps)
        out.ct, out.stall = np.full(valid.shape, np.nan), np.zeros(valid.shape, bool)
        out.ct2, out.stall2 = np.full(valid.shape, np.nan), np.zeros(valid.shape, bool)
        out.ok, out.ok2 = past(valid), around(valid)
        if valid.shape[-1] >= 3:
            with np.errstate(invalid="ignore"):
                out._fill(delta, curvature, eps)
        return out


def past(units: Bools) -> Bools:
    """True at t where t−2, t−1 and t are all true."""
    out = np.zeros_like(units)
    out[..., 2:] = units[..., 2:] & units[..., 1:-1] & units[..., :-2]
    return out


def around(units: Bools) -> Bools:
    """True at t where t−1, t and t+1 are all true."""
    out = np.zeros_like(units)
    out[..., 1:-1] = units[..., 2:] & units[..., 1:-1] & units[..., :-2]
    return out


def ct_series(h: torch.Tensor, keep: Bools, eps: float, second: bool = False) -> tuple[CtSeries, Array, Bools]:
    """Make the series of [B, T, dim] states from scratch, with their norms and validity."""
    norm = norms(h)
    valid = validity(norm, keep, keep)
    return CtSeries(h, norm, valid, eps, second), norm, valid


def ct_scores(ct: Array, ok: Bools, unmasked: Bools, stall: Bools, tokens: Any, nonfinite: Any, invalid: Any) -> Scores:
    """Mean ct per row; ``ok`` and ``unmasked`` mark valid and unmasked triples."""
    ok = ok & unmasked
    n_ok, n_keep = ok.sum(-1), unmasked.sum(-1)
    reason = first_reason(
        len(ct),
        (tokens == 0, "empty"),
        (tokens < 3, "tokens<3"),
        (n_keep == 0, "empty"),
        (2 * n_ok < n_keep, "coverage"),
    )
    undefined = np.fromiter((r is not None for r in reason), bool, len(ct))
    mean = share(np.add.reduce(ct, axis=-1, where=ok, initial=0.0), n_ok)
    return Scores(
        value=np.where(undefined, np.nan, mean),
        reason=reason,
        coverage=share(n_ok, n_keep),
        n_units=tokens,
        n_steps=n_ok,
        series=np.where(ok, ct, np.nan),
        extras={"n_stall": (stall & ok).sum(-1), "n_invalid": invalid, "n_nonfinite": nonfinite},
    )


def _compute(inputs: tuple[Any, ...], mask: Any, metric_id: str, second: bool) -> Result:
    (x,) = inputs
    t = as_tokens(x, mask, metric_id)
    keep = t.keep[0]
    series, norm, valid = ct_series(t.states[0], keep, t.eps, second)
    counts = (keep.sum(-1), (keep & np.isnan(norm)).sum(-1), (keep & ~valid).sum(-1))
    if second:
        scores = ct_scores(series.ct2, series.ok2, around(keep), series.stall2, *counts)
        cut = slice(1, -1)
    else:
        scores = ct_scores(series.ct, series.ok, past(keep), series.stall, *counts)
        cut = slice(2, None)
    assert scores.series is not None
    scores.series = scores.series[:, cut] if keep.shape[-1] >= 3 else np.zeros((1, 0))
    if not keep.all():
        scores.extras["series_mask"] = (around(keep) if second else past(keep))[:, cut]
    return scores.result(0, metric_id, dtype=t.dtype)


register(
    MetricSpec(
        id="limen.ct/1",
        span=True,
        sentence="Chord between neighbouring unit states times the angle by which the chord turned.",
        formula=(
            "ĥ_t = h_t/‖h_t‖; v_t = ĥ_t − ĥ_{t−1}; delta_t = ‖v_t‖; curv_t = angle(v_{t−1}, v_t); "
            "ct_t = delta_t·curv_t for t ≥ 2; 0 and counted as stall if delta_t or delta_{t−1} ≤ 16·eps; "
            "value = mean over valid t"
        ),
        latex=(
            r"\begin{aligned} \hat h_t &= \frac{h_t}{\lVert h_t\rVert}, \qquad v_t = \hat h_t-\hat h_{t-1} \\"
            r"\mathrm{ct}_t &= \underbrace{\lVert v_t\rVert}_{\text{delta}}\cdot"
            r"\underbrace{\operatorname{angle}(v_{t-1},\,v_t)}_{\text{curv}}, \qquad t\ge 2, "
            r"\qquad \mathrm{value} = \operatorname*{mean}_{t}\mathrm{ct}_t \end{aligned}"
        ),
        input="tokens[pos,dim]",
        value_range="[0, 2π]",
        unit="rad",
        invariances=frozenset({"R", "R_l", "S", "S_l", "T", "scale-per-state"}),
        source="ct_t = delta_t × curvature_t: DOI 10.5281/zenodo.20348878; factors by dynprobe",
        column="limen_ct",
        levels={"token": "value at its last token", "sample": "mean over triples inside the span"},
        vectors=(
            "ct-1: unit circle, φ = π/3 → π/3 for every t",
            "ct-2: e₁,e₂,e₁,e₂ → √2·π",
            "circle: 2φ·sin(φ/2); φ = π/2 → √2·π/2",
            "constant sequence → 0, n_stall T − 2",
        ),
        groups=frozenset({"core", "default"}),
    ),
    lambda inputs, mask, params, metric_id: _compute(inputs, mask, metric_id, second=False),
    score=lambda c, p: c.ct_scores(second=False),
    needs=("ct",),
)
register(
    MetricSpec(
        id="limen.ct2/1",
        span=True,
        sentence="Chord between neighbouring unit states times the norm of the second difference.",
        formula=(
            "ct2_t = delta_t·‖ĥ_{t+1} − 2ĥ_t + ĥ_{t−1}‖, delta_t = ‖ĥ_t − ĥ_{t−1}‖, 1 ≤ t ≤ T−2; "
            "0 and counted as stall if delta_t ≤ 16·eps; value = mean over valid t"
        ),
        latex=(
            r"\mathrm{ct2}_t = \lVert\hat h_t-\hat h_{t-1}\rVert\cdot\lVert\hat h_{t+1}-2\hat h_t+\hat "
            r"h_{t-1}\rVert, \qquad 1\le t\le T-2, \qquad \operatorname*{mean}_{t}\mathrm{ct2}_t"
        ),
        input="tokens[pos,dim]",
        value_range="[0, 8]",
        unit="1",
        invariances=frozenset({"R", "R_l", "S", "S_l", "T", "scale-per-state"}),
        source="second reading of the same formula, by dynprobe",
        column="limen_ct2",
        levels={"token": "value at its middle token", "sample": "mean over triples inside the span"},
        vectors=("circle: 8·sin³(φ/2); φ = π/3 → 1",),
        groups=frozenset({"default"}),
    ),
    lambda inputs, mask, params, metric_id: _compute(inputs, mask, metric_id, second=True),
    score=lambda c, p: c.ct_scores(second=True),
    needs=("ct2",),
)
