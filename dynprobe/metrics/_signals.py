"""Signals that can be watched while a model generates: one number per token, from the depths of that token alone.

A controller cannot wait for the end of a run. These functions take the states of any number of tokens, one as well as a
thousand, on any device, and give what the metric of the same name gives when it is computed afterwards:

- :func:`phase_lag` and :func:`norm_step`: what one step along depth does to the direction and to the length;
- :func:`step_zmax`: the worst depth of a token against a calibration profile. Of phase lags it is
  ``kappa.phase.zmax/1``, of norm steps ``norm.step.zmax/1``;
- :func:`step_z`: the mean excess over depth, of phase lags ``kappa.phase.z/1`` of that token.

No signal works everywhere: how well one tells perturbed runs from clean ones is measured first
(:func:`dynprobe.metrics.statistics.detector_power`). Depths whose calibration has no spread are dropped. A state that
is zero or not finite has no direction and no length to compare, and its two steps are NaN. The metrics of whole runs
also leave out states below 1e-12 of the median norm of their depth; one token has no median to compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._either import Floats, lengths, opened, stacked
from dynprobe.metrics._inputs import as_trajectory
from dynprobe.metrics._reduce import mean_over_units, share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result, first_reason
from dynprobe.metrics._walk import walk

__all__ = ["norm_step", "phase_lag", "step_z", "step_zmax"]


def phase_lag(states: Any) -> Any:
    """Angle between a unit's states at neighbouring depths in half-turns, θ/π, by the chord form.

    Args:
        states: [depth, …, dim], or one tensor [..., dim] per depth.

    Returns:
        [depth − 1, …] in [0, 1]; NaN where a state is zero or not finite.

    Source:
        The terms of ``kappa.phase/1``.

    Example:
        >>> phase_lag(np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])).tolist()
        [0.25, 1.0]
    """
    x, back = stacked(states, "phase_lag")
    unit = x * (1.0 / lengths(x)).to(x.dtype)[..., None]
    a, b = unit[:-1], unit[1:]
    chord, antichord = torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1)
    return back(2.0 * torch.atan2(chord, antichord) / torch.pi)


def norm_step(states: Any) -> Any:
    """Size of the change of length over one step, |ln(‖x_{l+1}‖/‖x_l‖)|.

    Args:
        states: [depth, …, dim], or one tensor [..., dim] per depth.

    Returns:
        [depth − 1, …] ≥ 0; NaN where a state is zero or not finite.

    Example:
        >>> norm_step(np.array([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]])).round(6).tolist()
        [0.693147, 1.386294]
    """
    x, back = stacked(states, "norm_step")
    size = lengths(x).log()
    return back((size[1:] - size[:-1]).abs().to(x.dtype))


def step_zmax(steps: Floats, mu: Any, sigma: Any) -> tuple[Any, Any]:
    """Largest deviation over depth from a calibration profile, z = max_l (s_l − μ_l)/σ_l, and where it is.

    Args:
        steps: [step, …], from :func:`phase_lag` or :func:`norm_step`.
        mu: Means [step] of the same steps over calibration tokens.
        sigma: Their standard deviations [step], ddof 1. Steps with σ of 0 or NaN are dropped.

    Returns:
        z […] in standard deviations, and the index l of the step it belongs to […]; step l leads from depth l to
        depth l + 1. NaN and −1 where no step is left.

    Raises:
        MetricError: There is not one mu and sigma per step.

    Source:
        ``kappa.phase.zmax/1``, ``norm.step.zmax/1``.

    Example:
        >>> z, at = step_zmax([[1 / 6], [1 / 6]], mu=[0, 1 / 6], sigma=[1 / 6, 1 / 6])
        >>> float(z[0]), int(at[0])
        (1.0, 0)
    """
    z, seen, back = _deviations(steps, mu, sigma)
    if not len(z):
        shape = z.shape[1:]
        return back(z.new_full(shape, torch.nan)), back(torch.full(shape, -1, device=z.device))
    top, at = torch.where(seen, z, -torch.inf).max(0)
    some = seen.any(0)
    return back(torch.where(some, top, torch.nan)), back(torch.where(some, at, -1))


def step_z(steps: Floats, mu: Any, sigma: Any) -> Any:
    """Mean positive deviation over depth from a calibration profile, mean_l max(0, (s_l − μ_l)/σ_l).

    Args:
        steps: [step, …].
        mu: Means [step] over calibration tokens.
        sigma: Standard deviations [step], ddof 1. Steps with σ of 0 or NaN are dropped.

    Returns:
        […]; NaN where fewer than half of the steps are known or none has a spread to compare with. Its mean under a
        Gaussian null is 1/√(2π) ≈ 0.399.

    Raises:
        MetricError: There is not one mu and sigma per step.

    Source:
        ``kappa.phase.z/1`` of each token by itself.

    Example:
        >>> step_z([[0.3], [0.1]], mu=[0.1, 0.2], sigma=[0.1, 0.1]).round(12).tolist()
        [1.0]
    """
    z, seen, back = _deviations(steps, mu, sigma)
    count = seen.sum(0)
    total = torch.where(seen, z.clamp(min=0), 0.0).sum(0)
    enough = (2 * torch.isfinite(z).sum(0) >= len(z)) & (count > 0)
    return back(torch.where(enough, total / count.clamp(min=1), torch.nan))


def _deviations(steps: Floats, mu: Any, sigma: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    x, back = opened(steps, "a signal against a calibration profile")
    m, s = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in (mu, sigma))
    if x.ndim < 1 or m.shape != (len(x),) or s.shape != (len(x),):
        raise MetricError(
            f"mu and sigma have one entry per step, found {list(m.shape)} and {list(s.shape)} for steps of shape "
            f"{list(x.shape)}. A trajectory of D depths has D − 1 steps."
        )
    shape = (len(x), *[1] * (x.ndim - 1))
    live = ((s > 0) & torch.isfinite(s) & torch.isfinite(m)).reshape(shape)
    # Where there is nothing to compare with, z keeps only whether the step itself is known.
    z = (x - torch.where(live, m.reshape(shape), 0.0)) / torch.where(live, s.reshape(shape), 1.0)
    return z, live & torch.isfinite(x), back


def _compute(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, mu: Any = None, sigma: Any = None
) -> Result:
    if mu is None or sigma is None:
        raise MetricError(f"{metric_id} needs the calibration profile: mu=…, sigma=… (one entry per step, ddof 1).")
    t = as_trajectory(inputs[0], mask, metric_id)
    w = walk(t.states, t.keep, t.keep, eps=t.eps, steps=False)
    ok, keep = w.valid[1:] & w.valid[:-1] & w.step_keep, w.step_keep
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(ok, np.abs(np.diff(np.log(w.norm), axis=0)), np.nan)[:, 0]
    z, at = step_zmax(steps, mu, sigma)
    n_ok, n_keep, short = ok.sum(), keep.sum(), len(t.states) < 2
    reason = first_reason(
        1,
        (bool(t.keep.sum() == 0 or (n_keep == 0 and not short)), "empty"),
        (short, "depth<2"),
        (bool(2 * n_ok < n_keep), "coverage"),
        (bool(np.isnan(z).all()), "zero-denominator"),
    )[0]
    value = float("nan") if reason else float(mean_over_units(z, ~np.isnan(z)))
    return Result(
        value, reason, float(share(n_ok, n_keep)), int((~np.isnan(z)).sum()), len(steps), metric_id, dtype=t.dtype,
        per_unit=np.asarray(z), extras={"step": np.asarray(at), "n_invalid": int(w.n_invalid[0])},
    )  # fmt: skip


register(
    MetricSpec(
        id="norm.step.zmax/1",
        span=True,
        sentence="Largest deviation over depth of a unit's change of length from a calibration profile.",
        formula=(
            "s_{l,n} = |ln(‖x_{l+1,n}‖/‖x_{l,n}‖)|; z_n = max_l (s_{l,n} − μ_l)/σ_l; value = mean_n z_n; σ with "
            "ddof 1; steps with σ_l = 0 dropped"
        ),
        latex=(
            r"s_{l,n} = \Bigl|\ln\frac{\lVert x_{l+1,n}\rVert}{\lVert x_{l,n}\rVert}\Bigr|, \qquad "
            r"z_n = \max_l\frac{s_{l,n}-\mu_l}{\sigma_l}, \qquad \operatorname*{mean}_{n} z_n"
        ),
        input="trajectory[depth,unit,dim], mu[step], sigma[step]",
        value_range="(−∞, ∞)",
        unit="SD",
        invariances=frozenset({"R", "R_l", "S", "P"}),
        source="dynprobe, a signal of recovery.deadband/1",
        column="norm_step_zmax",
        levels={"token": "per unit", "sample": "mean over units"},
        vectors=("norms 1, e, e³; μ = (0, 1), σ = (1, 2) → max(1, 0.5) = 1", "σ = 0 everywhere → NaN"),
        groups=frozenset({"paired", "recovery"}),
    ),
    _compute,
)
