"""``lyap.ftle`` and ``lyap.fd``: Lyapunov exponents of maps, and of finite differences, that are handed in.

The scheme and both forms, raw and direction-only, are in :mod:`dynprobe.metrics._benettin`; the exponents of a real
model are measured by :func:`dynprobe.protocols.lyapunov`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._benettin import Benettin, complement, finite_difference
from dynprobe.metrics._inputs import as_array, eps_of
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result

__all__: list[str] = []

_FORMS = ("raw", "direction")


def _form(params: dict[str, Any], metric_id: str) -> str:
    if params["form"] not in _FORMS:
        raise MetricError(f"{metric_id}: form is 'raw' or 'direction', found {params['form']!r}.")
    return str(params["form"])


def _undefined(reason: str, metric_id: str, n: int, dtype: str) -> Result:
    return Result(math.nan, reason, math.nan, 1, n, metric_id, dtype=dtype)


def _ftle(
    inputs: tuple[Any, ...],
    mask: Any,
    params: dict[str, Any],
    metric_id: str,
    start: Any = None,
    states: Any = None,
    every: int = 1,
) -> Result:
    form = _form(params, metric_id)
    maps, given = as_array(inputs[0], metric_id)
    dtype = str(given).removeprefix("torch.")
    if maps.ndim != 3 or maps.shape[1] != maps.shape[2]:
        raise MetricError(f"{metric_id} takes maps[n, dim, dim], found {list(maps.shape)}; J[l] maps step l to l + 1.")
    if mask is not None:
        raise MetricError(f"{metric_id} takes no mask: a product with a map left out is another product.")
    n, d = len(maps), maps.shape[1]
    if n < 1:
        return _undefined("steps<1", metric_id, n, dtype)
    if states is None and form == "direction":
        raise MetricError(f"{metric_id} needs states=[n + 1, dim], the states the maps lead from and to.")
    h = np.ones((n + 1, d)) if states is None else np.asarray(states, dtype=np.float64)
    if h.shape != (n + 1, d):
        raise MetricError(f"{metric_id}: {n} maps of dim {d} connect states [{n + 1}, {d}], found {list(h.shape)}.")
    if not (np.isfinite(maps).all() and np.isfinite(h).all()):
        return _undefined("nonfinite", metric_id, n, dtype)
    if start is not None:
        frame = np.atleast_2d(np.asarray(start, dtype=np.float64))[:, None, :]
    else:
        frame = np.eye(d)[:, None, :] if form == "raw" else complement(h[0])
    if frame.shape[-1] != d or not 1 <= len(frame) <= d:
        raise MetricError(f"{metric_id}: start is k ≤ {d} tangents [k, {d}], found {list(np.shape(start))}.")
    growth = Benettin()
    q = growth.start(h[:1], frame)
    growth.placed(q)
    local = np.full(n, np.nan)
    for step in range(n):
        q = q @ maps[step].T
        if (step + 1) % max(int(every), 1) == 0 or step == n - 1:
            before = growth.path[-1] if growth.path else (0, {form: np.zeros(len(q))})
            q = growth.meet(h[step + 1][None], q, step + 1 - growth.n_maps)
            with np.errstate(invalid="ignore"):  # an annihilated tangent has ln 0 at both ends
                grown = growth.path[-1][1][form][0] - before[1][form][0]
            local[before[0] : step + 1] = grown / (step + 1 - before[0])
    spectrum = growth.exponents(form)
    reason = growth.reasons(form)[0]
    value = float(spectrum[0]) if reason is None else math.nan
    kept = np.where(np.isfinite(spectrum), spectrum, np.nan)
    extras = {"spectrum": kept, "n_singular": int((~np.isfinite(spectrum)).sum()), "k": len(frame)}
    return Result(value, reason, 1.0, 1, n, metric_id, dtype=dtype, profile=local, per_unit=kept, extras=extras)


def _fd(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, n: int = 1) -> Result:
    form = _form(params, metric_id)
    (start, one), (end, other) = (as_array(x, metric_id) for x in inputs)
    dtype = str(max(one, other, key=eps_of)).removeprefix("torch.")
    shapes = f"{list(start.shape)} and {list(end.shape)}"
    start, end = (x[:, :, None, :] if x.ndim == 3 else x for x in (start, end))
    if start.ndim != 4 or start.shape != end.shape or start.shape[1] != 2 or mask is not None:
        raise MetricError(
            f"{metric_id} takes start[eps, sign, dim] and end of the same shape (or [eps, sign, unit, dim]) without "
            f"mask, found {shapes}."
        )
    if int(n) < 1 or not len(start):
        return _undefined("steps<1" if int(n) < 1 else "empty", metric_id, max(int(n), 0), dtype)
    each = finite_difference(start, end, int(n), form)
    ok = np.isfinite(each)
    coverage = float(ok.mean())
    reason = (
        "singular" if not ok.any() and (each == -np.inf).any() else ("coverage" if 2 * ok.sum() < len(ok) else None)
    )
    kept = each[ok]
    low, high = (float(kept.min()), float(kept.max())) if len(kept) else (math.nan, math.nan)
    extras = {"spread": high - low, "low": low, "high": high, "n_eps": int(ok.sum())}
    value = float(np.median(kept)) if reason is None else math.nan
    series = np.where(ok, each, np.nan)
    return Result(value, reason, coverage, start.shape[2], int(n), metric_id, dtype=dtype, series=series, extras=extras)


_FORM_TEXT = "direction: tangent projected orthogonal to each unit's state and divided by its length, at both ends"
register(
    MetricSpec(
        id="lyap.ftle/1",
        sentence="Finite-depth Lyapunov exponents of a chain of maps, by Benettin's QR scheme.",
        formula="V_0 = start frame orthonormalised; J_{l+1} Q_l = Q_{l+1} R_{l+1}; λ_i = (1/n) Σ ln|R_ii|, n = maps, "
        f"in the order of the start frame; value = λ_1; {_FORM_TEXT}; an annihilated tangent is NaN, 'singular'",
        latex=r"J_{l+1}Q_l = Q_{l+1}R_{l+1}, \qquad \lambda_i = \frac{1}{n}\sum_{l=1}^{n}\ln\bigl|(R_l)_{ii}\bigr|",
        input="maps[n,dim,dim]; start[k,dim] (default: coordinate axes; direction: a basis orthogonal to the first "
        "state); states[n+1,dim] for form=direction",
        value_range="(−∞, ∞)",
        unit="nats per map",
        invariances=frozenset({"R", "R_l", "S", "T"}),
        source="Benettin et al. 1980; depth form after the sohailmo.ai note",
        params={"form": "raw"},
        vectors=(
            "ftle-1: diag(2, ½), start frame = coordinate axes → ±ln 2",
            "rotation → 0",
            "scaling by c → ln c raw, 0 direction",
            "diag(2, ½), h = e₁, tangent e₂, direction → −2 ln 2",
        ),
        groups=frozenset({"optional"}),
    ),
    _ftle,
)
register(
    MetricSpec(
        id="lyap.fd/1",
        sentence="Lyapunov exponent of a chain of maps from two-sided finite differences, with its spread over ε.",
        formula="λ̂(ε) = (1/n) ln(‖δ_n‖/‖δ_0‖), δ = (x₊ − x₋)/2, ‖δ_0‖ = ε‖h‖; value = median over ε (a decade), "
        f"spread = max − min over ε; {_FORM_TEXT} (differences of unit vectors)",
        latex=(
            r"\delta = \frac{x_+-x_-}{2}, \qquad \hat\lambda(\varepsilon) = "
            r"\frac{1}{n}\ln\frac{\lVert\delta_n\rVert}{\lVert\delta_0\rVert}, \qquad "
            r"\lVert\delta_0\rVert = \varepsilon\lVert h\rVert, \qquad "
            r"\operatorname*{median}_{\varepsilon}\hat\lambda(\varepsilon)"
        ),
        input="start[eps,sign,dim], end[eps,sign,dim] (or with a unit axis before dim), n maps",
        value_range="(−∞, ∞)",
        unit="nats per map",
        invariances=frozenset({"R", "R_l", "S", "P", "T"}),
        source="dynprobe",
        params={"form": "raw"},
        vectors=(
            "x → 3x, n = 1 → ln 3, spread 0",
            "x → x³ at x = 1, ε = 0.1: ln(3 + ε²)",
            "scaling by c → 0 direction",
        ),
        groups=frozenset({"optional"}),
    ),
    _fd,
    arity=2,
)
