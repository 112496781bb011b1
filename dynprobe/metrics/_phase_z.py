"""``kappa.phase.z`` and ``kappa.phase.zmax``: one run against a calibration profile, no twin needed.

The profile (μ_l, σ_l) is κ_l of the same model when left alone, σ with ddof 1. Only deviations upwards count in ``z``,
so its mean under a Gaussian null is 1/√(2π) ≈ 0.399, not 0. ``zmax`` takes the worst depth of each unit instead of the
mean: it is the signal a controller watches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._kappa_phase import kappa_phase
from dynprobe.metrics._reduce import mean_over_units, share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result, Scores, first_reason
from dynprobe.metrics._walk import walk

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["phase_z"]

_PAIRED = frozenset({"paired"})


def phase_z(
    profile: Float[np.ndarray, "step batch"], mu: Any, sigma: Any, metric_id: str = "kappa.phase.z/1"
) -> Scores:
    """Mean positive deviation of κ profiles [S, B] from a calibration profile, in its standard deviations."""
    m, s = _calibration(mu, sigma, len(profile), metric_id)
    batch = profile.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.maximum(0.0, (profile - m[:, None]) / s[:, None])
    live = s > 0
    seen = ~np.isnan(profile) & live[:, None]
    z = np.where(seen, z, np.nan)
    n_live, n_seen = int(live.sum()), seen.sum(0)
    short = len(profile) < 1
    reason = first_reason(
        batch,
        (short, "depth<2"),
        (2 * np.isnan(profile).sum(0) > len(profile), "coverage"),
        (n_live == 0, "zero-denominator"),
        (n_seen == 0, "coverage"),
    )
    undefined = np.fromiter((r is not None for r in reason), bool, batch)
    value = share(np.add.reduce(z, axis=0, where=seen, initial=0.0), n_seen)
    coverage = share((~np.isnan(profile)).sum(0), np.full(batch, len(profile)))
    ones = np.ones(batch, np.int64)
    return Scores(np.where(undefined, np.nan, value), reason, coverage, ones, n_seen, profile=z)


def _calibration(mu: Any, sigma: Any, n_steps: int, metric_id: str) -> tuple[Array, Array]:
    m, s = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if m.shape != (n_steps,) or s.shape != (n_steps,):
        raise MetricError(
            f"{metric_id} needs mu and sigma of {n_steps} steps, found {list(m.shape)} and {list(s.shape)}. "
            "A trajectory of D depths has D − 1 steps."
        )
    return m, s


def _compute_z(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, mu: Any = None, sigma: Any = None
) -> Result:
    if mu is None or sigma is None:
        raise MetricError(
            f"{metric_id} needs the calibration profile: mu=…, sigma=… (one entry per step, SD with ddof 1)."
        )
    t = as_trajectory(inputs[0], mask, metric_id)
    w = walk(t.states, t.keep, t.keep, eps=t.eps)
    phase = kappa_phase(w)
    assert phase.profile is not None
    if metric_id.startswith("kappa.phase.zmax"):
        scores = _zmax(w.angle / np.pi, w.step_ok & w.step_keep, *_calibration(mu, sigma, len(w.angle), metric_id))
        scores.coverage = phase.coverage
        if phase.reason[0] is not None:
            scores.reason, scores.value = phase.reason, np.full(1, np.nan)
    else:
        scores = phase_z(phase.profile, mu, sigma, metric_id)
        scores.coverage, scores.n_units = phase.coverage, phase.n_units
        if phase.reason[0] is not None:
            scores.reason, scores.value = phase.reason, np.full(1, np.nan)
    return scores.result(0, metric_id, dtype=t.dtype)


def _zmax(lag: Array, ok: Bools, mu: Array, sigma: Array) -> Scores:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (lag - mu[:, None, None]) / sigma[:, None, None]
    seen = ok & (sigma > 0)[:, None, None]
    top = np.where(seen, z, -np.inf).max(0, initial=-np.inf)
    per_unit = np.where(np.isfinite(top), top, np.nan)
    value = mean_over_units(per_unit, np.isfinite(top))
    reason = first_reason(lag.shape[1], (np.isnan(value), "zero-denominator"))
    n_units = np.isfinite(top).sum(-1)
    return Scores(value, reason, np.ones(lag.shape[1]), n_units, seen.any(2).sum(0), per_unit=per_unit)


register(
    MetricSpec(
        id="kappa.phase.z/1",
        sentence="Mean positive deviation of the κ_phase profile from a calibration profile.",
        formula="mean_l max(0, (κ_l − μ_l)/σ_l); σ with ddof 1; steps with σ_l = 0 dropped; null mean 1/√(2π)",
        latex=r"\operatorname*{mean}_{l}\ \max\Bigl(0,\ \frac{\kappa_l-\mu_l}{\sigma_l}\Bigr)",
        input="trajectory[depth,unit,dim], mu[step], sigma[step]",
        value_range="[0, ∞)",
        unit="SD",
        invariances=frozenset({"R", "S", "S_l", "P", "T", "scale-per-state"}),
        source="dynprobe",
        column="kappa_phase_z",
        levels={"sample": "mean over steps"},
        vectors=("κ_l = μ_l + 2σ_l everywhere → 2", "κ_l below μ_l everywhere → 0"),
        groups=_PAIRED,
    ),
    _compute_z,
)
register(
    MetricSpec(
        id="kappa.phase.zmax/1",
        sentence="Largest deviation over depth of a unit's phase lag from a calibration profile.",
        formula="z_n = max_l (θ_{l,n}/π − μ_l)/σ_l; value = mean_n z_n; steps with σ_l = 0 dropped",
        latex=r"z_n = \max_l\frac{\theta_{l,n}/\pi-\mu_l}{\sigma_l}, \qquad \operatorname*{mean}_{n} z_n",
        input="trajectory[depth,unit,dim], mu[step], sigma[step]",
        value_range="(−∞, ∞)",
        unit="SD",
        invariances=frozenset({"R", "S", "S_l", "P", "scale-per-state"}),
        source="dynprobe, default signal of recovery.deadband/1",
        column="kappa_phase_zmax",
        levels={"token": "per unit", "sample": "mean over units"},
        vectors=("one unit, lag 1/6, μ = (0, 1/6), σ = (1/6, 1/6) → 1",),
        groups=_PAIRED,
    ),
    _compute_z,
)
