"""STR: how similar the last few states of a generation are to each other, through a Gaussian kernel.

The measure is that of Dynamic Operator Mixing. Over a window of the last four states at the last depth it averages a
kernel of their distances, with weights that grow with the time between them. 1 means the states are the same, 0 that
all lie much farther apart than the bandwidth σ.

σ is **given**: the median heuristic on clean runs, computed once and then fixed (:func:`str_sigma`). Refitted on each
run it would follow what it is to detect. A reading of recovery time cannot be shorter than the window: a push leaves it
only after four tokens, whatever the model does.

A window needs two states; the first ones of a run are shorter than four. A state that is not finite takes its pairs out
of both sums, and with fewer than half of the pairs left there is no value. A zero state is a point like any other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._either import Floats, opened
from dynprobe.metrics._inputs import as_tokens
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result, first_reason

__all__ = ["str_kernel", "str_sigma"]


def str_kernel(states: Floats, sigma: float, *, window: int = 4, tau: float = 3.0) -> Any:
    """STR after each state, over the last ``window`` of them.

    STR_t = Σ_{i,j} W_ij·K_ij / Σ_{i,j} W_ij, K_ij = exp(−‖h_i − h_j‖²/2σ²), W_ij = 1 − exp(−|i − j|/τ).

    Args:
        states: States [..., pos, dim] in order of time; for a loop, the last few are enough.
        sigma: Bandwidth, fixed beforehand, in the units of the states.
        window: States that take part.
        tau: Time constant of the weights, in tokens.

    Returns:
        [..., pos] in [0, 1]; NaN for the first state of all, for σ = 0, and where fewer than half of the pairs are
        known.

    Raises:
        MetricError: Window below 2, τ not positive, σ negative or not a number, or no states.

    Source:
        ``str.kernel/1``; Dynamic Operator Mixing (Haelio), notes RN-003 and RN-004.

    Example:
        >>> str_kernel([[0.0, 0.0], [3.0, 4.0]], sigma=5.0).round(10).tolist()
        [nan, 0.6065306597]
    """
    x, back = opened(states, "str.kernel/1")
    if x.ndim < 2:
        raise MetricError(f"str.kernel/1 takes states [..., pos, dim], found shape {list(x.shape)}.")
    if window < 2 or not tau > 0 or not (sigma >= 0 and math.isfinite(sigma)):
        raise MetricError(
            "str.kernel/1 needs window ≥ 2, τ > 0 and σ ≥ 0 (str_sigma on clean states gives one); found "
            f"{window}, {tau}, {sigma}."
        )
    value, _, _ = _score(x, float(sigma), window, tau)
    return back(value)


def _score(x: torch.Tensor, sigma: float, window: int, tau: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, and known and all pairs of each window, [..., pos]."""
    n = x.shape[-2]
    finite = torch.isfinite(x.sum(-1))  # one entry that is not finite leaves no finite sum
    top, weight, n_ok, n_all = (x.new_zeros(x.shape[:-1]) for _ in range(4))
    for lag in range(1, min(window, n)):
        ok = finite[..., lag:] & finite[..., :-lag]
        gap = torch.linalg.vector_norm(x[..., lag:, :] - x[..., :-lag, :], dim=-1)
        kernel = torch.where(ok, torch.exp(-0.5 * (gap / sigma) ** 2) if sigma > 0 else torch.nan, 0.0)
        known = ok.to(x.dtype)
        share = -math.expm1(-lag / tau)
        # The pair (i − lag, i) lies in the windows that end at i, …, i + window − 1 − lag.
        for later in range(window - lag):
            start = lag + later
            if start >= n:
                break
            here, pairs = slice(start, n), slice(0, n - start)
            top[..., here] += share * kernel[..., pairs]
            weight[..., here] += share * known[..., pairs]
            n_ok[..., here] += known[..., pairs]
            n_all[..., here] += 1
    enough = (n_ok > 0) & (2 * n_ok >= n_all)
    return torch.where(enough, top / torch.where(weight > 0, weight, 1.0), torch.nan), n_ok, n_all


def str_sigma(runs: Any) -> float:
    """Bandwidth by the median heuristic: the median distance of two states of one clean run.

    Args:
        runs: States [pos, dim] of one run, or a list of such.

    Returns:
        Median of ‖h_i − h_j‖ over i < j inside runs, all runs together; NaN when there is no pair.

    Example:
        >>> str_sigma([np.array([[0.0], [1.0], [3.0]])])
        2.0
    """
    pieces = list(runs) if isinstance(runs, (list, tuple)) else [runs]
    gaps = []
    for piece in pieces:
        x = opened(piece, "str_sigma")[0].double().cpu()
        if x.ndim != 2:
            raise MetricError(f"str_sigma takes states [pos, dim] per run, found shape {list(x.shape)}.")
        gaps.append(torch.pdist(x[torch.isfinite(x).all(-1)]).numpy())
    joined = np.concatenate(gaps) if gaps else np.zeros(0)
    return float(np.median(joined)) if len(joined) else float("nan")


def _compute(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, sigma: float | None = None
) -> Result:
    if sigma is None:
        raise MetricError(f"{metric_id} needs sigma=…, fixed beforehand: str_sigma(clean states).")
    t = as_tokens(inputs[0], mask, metric_id)
    x, keep = t.states[0][0], t.keep[0, 0]
    kept = x[torch.from_numpy(keep)]
    series = np.full(len(x), np.nan)
    series[keep] = str_kernel(kept, sigma, window=params["K"], tau=params["tau"]).numpy()
    _, n_ok, n_all = _score(kept, float(sigma) or 1.0, params["K"], params["tau"])
    good, total = float(n_ok.sum()), float(n_all.sum())
    reason = first_reason(
        1,
        (len(kept) == 0, "empty"),
        (len(kept) < 2, "units<2"),
        (2 * good < total, "coverage"),
        (sigma == 0 or bool(np.isnan(series).all()), "zero-denominator"),
    )[0]
    value = float("nan") if reason else float(np.nanmean(series))
    coverage = good / total if total else float("nan")
    n_steps = int(np.isfinite(series).sum())
    return Result(value, reason, coverage, len(kept), n_steps, metric_id, dtype=t.dtype, series=series)


register(
    MetricSpec(
        id="str.kernel/1",
        sentence="Mean Gaussian kernel of the distances between the last few states of a generation.",
        formula=(
            "STR_t = Σ_{ij} W_ij K_ij/Σ_{ij} W_ij over the last K states at the last depth (fewer at the start, at "
            "least 2), K_ij = exp(−‖h_i − h_j‖²/2σ²), W_ij = 1 − exp(−|i − j|/τ_w); σ given, fixed; σ = 0 → NaN; "
            "pairs with a state that is not finite leave both sums; value = mean_t STR_t"
        ),
        latex=(
            r"\begin{aligned} \mathrm{STR}_t &= \frac{\sum_{i,j} W_{ij}K_{ij}}{\sum_{i,j} W_{ij}}, \qquad "
            r"\max(0,\,t-K+1)\le i,j\le t, \quad t\ge 1 \\"
            r"K_{ij} &= \exp\Bigl(-\frac{\lVert h_i-h_j\rVert^2}{2\sigma^2}\Bigr), \qquad "
            r"W_{ij} = 1-e^{-|i-j|/\tau_w}, \qquad \mathrm{value} = \operatorname*{mean}_{t}\mathrm{STR}_t "
            r"\end{aligned}"
        ),
        input="tokens[pos,dim], sigma",
        value_range="[0, 1]",
        unit="1",
        invariances=frozenset({"R", "shift"}),
        source="Dynamic Operator Mixing (Haelio, controlled-inference, notes RN-003 and RN-004)",
        params={"K": 4, "tau": 3.0},
        column="str_kernel",
        levels={"token": "after each token", "sample": "mean over tokens"},
        vectors=(
            "str-1: two states at distance σ → exp(−1/2)",
            "identical states → 1",
            "pairwise far → 0",
            "one state → NaN units<2",
        ),
        groups=frozenset({"optional", "recovery"}),
    ),
    _compute,
)
