"""``kappa.xcorr``: time-course desynchronisation, channels are depths and samples are tokens.

The literal neuroscience reading: how much the token-to-token movement at one depth correlates with that at another. It
depends on the order of units in time, so it has no meaning for slots, which have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.metrics._geometry import NEAR_ZERO
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores, first_reason
from dynprobe.metrics._walk import Walk, walk

__all__ = ["kappa_xcorr"]

MIN_SAMPLES = 3


def _mean_correlation(delta: Array, ok: Bools, floor: float) -> tuple[float, int, bool]:
    """Mean Pearson correlation over pairs of channels of [D, t], channels kept, and whether samples sufficed."""
    live = [row for row in range(len(delta)) if ok[row].any() and np.ptp(delta[row, ok[row]]) > floor]
    values, sampled = [], False
    for i, low in enumerate(live):
        for high in live[i + 1 :]:
            both = ok[low] & ok[high]
            if both.sum() < MIN_SAMPLES:
                continue
            sampled = True
            a, b = delta[low, both], delta[high, both]
            if np.ptp(a) <= floor or np.ptp(b) <= floor:
                continue
            a, b = a - a.mean(), b - b.mean()
            values.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return (float(np.mean(values)) if values else float("nan")), len(live), sampled


def _mean_correlation_dense(delta: Array, ok: Bools, floor: float) -> tuple[Array, Any, Bools]:
    """The same for rows whose channels share their valid samples: ``delta`` [D, B, t], ``ok`` [B, t]."""
    count = ok.sum(-1)
    high = np.where(ok, delta, -np.inf).max(-1, initial=-np.inf)
    low = np.where(ok, delta, np.inf).min(-1, initial=np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        live = high - low > floor
        centred = np.where(ok, delta - share(np.where(ok, delta, 0.0).sum(-1), count)[..., None], 0.0)
        z = np.where(live[..., None], centred / np.sqrt((centred**2).sum(-1))[..., None], 0.0)
    n = live.sum(0)
    total = ((z.sum(0) ** 2).sum(-1) - n) / 2.0
    sampled = count >= MIN_SAMPLES
    return np.where(sampled, share(total, n * (n - 1) / 2.0), np.nan), n, sampled


def kappa_xcorr(w: Walk, keep: Bools | None = None) -> Scores:
    """Score every row of a walk made with ``hop=True``; ``keep`` [D, B, T] narrows the tokens that count."""
    keep = w.keep if keep is None else keep
    n_depths, batch, n_tokens = keep.shape
    hop_keep = keep[..., 1:] & keep[..., :-1]
    hop_ok = w.valid[..., 1:] & w.valid[..., :-1] & hop_keep
    delta = np.zeros(hop_keep.shape) if w.hop is None else 2.0 * np.sin(w.hop / 2.0)
    floor = NEAR_ZERO * w.eps
    mean, live, sampled = np.full(batch, np.nan), np.zeros(batch, np.int64), np.zeros(batch, bool)
    if n_depths and n_tokens > 1:
        mean, live, sampled = _mean_correlation_dense(delta, hop_ok[0], floor)
        for row in np.flatnonzero((hop_ok != hop_ok[:1]).any((0, 2))):
            mean[row], live[row], sampled[row] = _mean_correlation(delta[:, row], hop_ok[:, row], floor)
    n_ok, n_keep = hop_ok.sum((0, 2)), hop_keep.sum((0, 2))
    tokens = keep.any(0).sum(-1) if n_depths else np.zeros(batch, np.int64)
    reason = first_reason(
        batch,
        (tokens == 0, "empty"),
        (n_depths < 2, "depth<2"),
        (tokens < 4, "tokens<4"),
        (n_keep == 0, "empty"),
        (2 * n_ok < n_keep, "coverage"),
        (live < 2, "depth<2"),
        (~sampled, "tokens<4"),
        (np.isnan(mean), "depth<2"),
    )
    undefined = np.fromiter((r is not None for r in reason), bool, batch)
    return Scores(
        value=np.where(undefined, np.nan, 1.0 - mean),
        reason=reason,
        coverage=share(n_ok, n_keep),
        n_units=tokens,
        n_steps=hop_keep.any(0).sum(-1) if n_depths else np.zeros(batch, np.int64),
        extras={"n_channels": live, "n_invalid": (keep & ~w.valid).sum((0, 2)),
                "n_nonfinite": (keep & np.isnan(w.norm)).sum((0, 2))},
    )  # fmt: skip


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    return kappa_xcorr(walk(t.states, t.keep, t.keep, eps=t.eps, steps=False, hop=True)).result(
        0, metric_id, dtype=t.dtype
    )


register(
    MetricSpec(
        id="kappa.xcorr/1",
        span=True,
        sentence="One minus the mean correlation, over tokens, of the movement at two depths.",
        formula=(
            "δ_l(t) = ‖x̂_{l,t} − x̂_{l,t−1}‖; κ_xcorr = 1 − mean_{l<m} corr_t(δ_l, δ_m), Pearson over the t with t−1 "
            "and t valid at both depths, at least 3; channels with max − min ≤ 16·eps dropped"
        ),
        latex=(
            r"\begin{aligned} \delta_l(t) &= \lVert \hat x_{l,t}-\hat x_{l,t-1}\rVert \\"
            r"\kappa_{\mathrm{xcorr}} &= 1-\operatorname*{mean}_{l<m}\ "
            r"\operatorname*{corr}_{t}\bigl(\delta_l(t),\,\delta_m(t)\bigr) \end{aligned}"
        ),
        input="trajectory[depth,unit,dim], units in order of time",
        value_range="[0, D/(D−1)], D = channels kept",
        unit="1",
        invariances=frozenset({"R", "R_l", "S", "S_l", "T", "scale-per-state"}),
        source="dynprobe",
        column="kappa_xcorr",
        levels={"sample": "mean over pairs of depths"},
        vectors=(
            "kxcorr-1: identical time-courses → 0; δ and const − δ → 2",
            "A, B with correlation −0.5 → 1.5",
        ),
        groups=frozenset({"default"}),
    ),
    _compute,
    score=lambda c, p: kappa_xcorr(c.w, c.deep_span),
    needs=("hop",),
)
