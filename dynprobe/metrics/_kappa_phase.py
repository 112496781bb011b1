"""``kappa.phase``: mean adjacent phase lag, the default reading of "inter-layer desynchronisation".

Two neighbouring depths are in phase for a unit when its state points the same way at both; the lag is the angle between
them as a fraction of a half-turn. It needs one unit and two depths, so it exists for a single token. For a smooth flow
sampled at D points it falls as 1/D while ``kappa_path``, the total angle, stays: statements across architectures give
both. The absolute value is dominated by architecture and prompt; perturbations are read from paired differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import mean_of_profile, share
from dynprobe.metrics._registry import MetricSpec, register, register_column
from dynprobe.metrics._result import Array, Result, Scores
from dynprobe.metrics._walk import Walk, walk

if TYPE_CHECKING:
    from dynprobe.metrics._sample import Context

__all__ = ["check_centre", "kappa_phase"]


def kappa_phase(w: Walk) -> Scores:
    """Score every row of a walk; ``per_unit`` also covers units that exist but stay out of the aggregates."""
    lag = w.angle / np.pi
    per_unit = _per_unit(lag, w.step_ok, w.real[1:] & w.real[:-1])
    scores = mean_of_profile(w.step_terms.mean(lag), w.step_terms, short=len(w.norm) < 2, per_unit=per_unit)
    scores.extras = {
        "kappa_path": np.pi * max(len(w.norm) - 1, 0) * scores.value,
        "n_invalid": w.n_invalid,
        "n_nonfinite": w.n_nonfinite,
    }
    return scores


def _per_unit(lag: Array, ok: Any, keep: Any) -> Array:
    n_ok = ok.sum(0)
    mean = share(np.add.reduce(lag, axis=0, where=ok, initial=0.0), n_ok)
    return np.where(2 * n_ok >= keep.sum(0), mean, np.nan)


def check_centre(centre: str) -> None:
    """Refuse a centred form under this id."""
    if centre != "none":
        raise MetricError(
            "kappa.phase/1 knows centre=none only: centring by the calibration mean inverts the sign of the response "
            "to early injection, so it is not offered under this id."
        )


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    check_centre(params["centre"])
    (x,) = inputs
    t = as_trajectory(x, mask, metric_id)
    return kappa_phase(walk(t.states, t.keep, t.keep, eps=t.eps)).result(0, metric_id, dtype=t.dtype)


def _score(c: Context, params: dict[str, Any]) -> Scores:
    check_centre(params["centre"])
    return c.phase


register(
    MetricSpec(
        id="kappa.phase/1",
        sentence="Mean angle between a unit's states at neighbouring depths, as a fraction of a half-turn.",
        formula=(
            "x̂ = x/‖x‖; θ_{l,n} = 2·atan2(‖x̂_{l,n} − x̂_{l+1,n}‖, ‖x̂_{l,n} + x̂_{l+1,n}‖), l = 0..D−2; "
            "κ_l = (1/π)·mean_n θ_{l,n}; κ = mean_l κ_l over entries with coverage ≥ 1/2; κ_path = π(D−1)·κ"
        ),
        latex=(
            r"\begin{aligned} \hat x_{l,n} &= \frac{x_{l,n}}{\lVert x_{l,n}\rVert} \\"
            r"\theta_{l,n} &= 2\operatorname{atan2}\bigl(\lVert\hat x_{l,n}-\hat x_{l+1,n}\rVert,\ \lVert\hat "
            r"x_{l,n}+\hat x_{l+1,n}\rVert\bigr) \\"
            r"\kappa_l &= \frac{1}{\pi}\operatorname*{mean}_{n}\theta_{l,n}, \qquad l = 0,\dots,D-2 \\"
            r"\kappa &= \operatorname*{mean}_{l}\kappa_l, \qquad \kappa_{\mathrm{path}} = \pi(D-1)\,\kappa "
            r"\end{aligned}"
        ),
        input="trajectory[depth,unit,dim]",
        value_range="[0, 1]; 0 in phase, 0.5 quadrature, 1 anti-phase",
        unit="half-turns",
        invariances=frozenset({"R", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe; angular distance of Gromov et al. (arXiv 2403.17887) at n = 1, averaged",
        params={"centre": "none"},
        column="kappa_phase",
        levels={
            "token": "mean over steps of angle/π",
            "profile": "mean over units",
            "sample": "mean over units, then over steps",
        },
        vectors=(
            "kphase-1: rotation by π/6 per step, D = 5 → κ 1/6, κ_path 2π/3",
            "kphase-2: (1, ρ^k), k = 0..K → (π/4 − arctan ρ^K)/(Kπ); ρ = 1/2, K = 4 → 0.0575328689",
            "kphase-3: kept kick α = 1 at index 2, D = 5 → 0.0625",
            "kphase-4: removed kick α = 1, D = 5 → 0.125",
            "kphase-5: e₁, −e₁ → 1",
            "D = 1 → NaN depth<2",
            "x, 0, x → NaN coverage, n_invalid 1",
        ),
        groups=frozenset({"core", "default"}),
    ),
    _compute,
    score=_score,
)
register_column("kappa_path", "kappa.phase/1", "rad", {"sample": "π(D−1)·kappa_phase"})
