"""``crit.*`` and ``threshold.*``: what "destabilised at α" means, as definitions with ids.

A threshold is a strength **and** a criterion, a response, a way to interpolate and an estimand over prompts. Each
criterion takes the response of one prompt at several strengths and gives its α*, the first crossing from below; each
threshold takes a population. Intervals and everything else live in :mod:`dynprobe.metrics.statistics`; here is what
makes two numbers comparable: the definition and its digest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Result
from dynprobe.metrics.statistics._crossing import Crossing, first_crossing
from dynprobe.metrics.statistics._mean import mean_threshold
from dynprobe.metrics.statistics._population import Threshold, prompt_threshold

__all__: list[str] = []


def _crossing_result(c: Crossing, n: int, metric_id: str) -> Result:
    extras = {
        "low": c.low, "high": c.high, "status": c.status, "n_crossings": c.n_crossings, "monotone": c.monotone,
        "n_nonfinite": c.n_dropped,
    }  # fmt: skip
    coverage = c.n_points / n if n else float("nan")
    return Result(c.value, c.reason, coverage, 1, c.n_points, metric_id, extras=extras)


def _threshold_result(t: Threshold, n_steps: int, metric_id: str) -> Result:
    extras = {
        "low": t.low, "high": t.high, "status": t.status, "n_left": t.n_left, "n_right": t.n_right,
        "n_nonmonotone": t.n_nonmonotone, "spread": t.spread, "confidence": t.confidence, "method": t.method,
    }  # fmt: skip
    total = t.n + t.n_missing + t.n_notresolved
    coverage = t.n / total if total else float("nan")
    return Result(t.value, t.reason, coverage, t.n, n_steps, metric_id, extras=extras)


def _criterion(level_of: Callable[[dict[str, Any]], float]) -> Callable[..., Result]:
    def compute(
        inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, floor: float = 0.0
    ) -> Result:
        alphas, responses = _masked(inputs, mask, metric_id)
        return _crossing_result(
            first_crossing(alphas, responses, level_of(params), floor=floor), len(alphas), metric_id
        )

    return compute


def _kappa(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, null: Any = None, floor: float = 0.0
) -> Result:
    values = np.asarray([] if null is None else null, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if len(values) < 1 / (1 - params["q"]):
        raise MetricError(
            f"{metric_id} needs null=, at least {1 / (1 - params['q']):.0f} values of Δκ from pairs of runs that "
            f"differ by nothing that matters; found {len(values)}."
        )
    level = float(np.quantile(values, params["q"]))
    alphas, responses = _masked(inputs, mask, metric_id)
    return _crossing_result(first_crossing(alphas, responses, level, floor=floor), len(alphas), metric_id)


def _prompt(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    x = as_array(inputs[0], metric_id)[0]
    x = x if mask is None else np.where(np.asarray(mask, dtype=bool), x, np.nan)
    return _threshold_result(prompt_threshold(x, n_boot=0), x.size, metric_id)


def _mean(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, floor: float = 0.0) -> Result:
    alphas, responses = _masked(inputs, mask, metric_id)
    t = mean_threshold(responses, alphas, params["level"], floor=floor)
    return _threshold_result(t, len(alphas), metric_id)


def _masked(inputs: tuple[Any, ...], mask: Any, metric_id: str) -> tuple[Any, Any]:
    alphas, responses = (as_array(x, metric_id)[0] for x in inputs)
    return alphas, responses if mask is None else np.where(np.asarray(mask, dtype=bool), responses, np.nan)


_CROSS = (
    "α* = first crossing of the level from below on ascending α; with a < level ≤ b at α_a < α_b: "
    "ln α* = ln α_a + (ln level − ln a)/(ln b − ln a)·ln(α_b/α_a) if a > max(floor, 0), else "
    "ln α_a + (level − a)/(b − a)·ln(α_b/α_a); NaN if the lowest dose is at the level (α* < α_min), none is "
    "(α* > α_max), or |level| < 10·floor"
)
_SQUARE = "r = (α/0.3)² on 0.1, 0.2, 0.4, 0.8: level 1 → 0.3"
_CRITERIA: tuple[tuple[str, str, str, str, dict[str, Any], str, Callable[..., Result]], ...] = (
    ("kl", "Strength at which the output distribution has moved by a given KL.",
     "response: mean KL(clean ‖ perturbed) in nats over real positions ≥ max(1, first perturbed one), teacher-forced",
     r"\operatorname{mean}\,\mathrm{KL}(\text{clean}\,\Vert\,\text{perturbed at }\alpha^*) = \mathrm{level}",
     {"level": 1.0}, _SQUARE, _criterion(lambda p: float(p["level"]))),
    ("flip", "Strength at which a given share of top-1 tokens has changed.",
     "response: share of the affected positions whose top-1 token differs from the clean run's",
     r"\operatorname{mean}\,\mathbb{1}\bigl[\arg\max p_{\mathrm{clean}}\ne\arg\max p_{\alpha^*}\bigr] = \mathrm{level}",
     {"level": 0.5}, "r = α² on 0.1, 0.2, 0.4, 0.8: level 1/2 → √(1/2)", _criterion(lambda p: float(p["level"]))),
    ("kappa", "Strength at which Δκ leaves its null distribution.",
     "response: paired Δκ; level: type-7 quantile q of Δκ between clean runs, or of writes of numerical size",
     r"\Delta\kappa(\alpha^*) = q\text{-quantile of } \Delta\kappa \text{ under the null}",
     {"q": 0.99}, "null 0, 1/1000, …, 1: level 0.99; r = α² on 0.1, 0.5, 2 → √0.99", _kappa),
    ("task", "Strength at which accuracy has fallen by a given amount.",
     "response: accuracy clean − accuracy perturbed; level δ",
     r"\mathrm{acc}_{\mathrm{clean}}-\mathrm{acc}(\alpha^*) = \delta",
     {"delta": 0.2}, "r = 0, 0.1, 0.4 on 0.1, 0.2, 0.4: δ = 0.2 → 0.2·√2", _criterion(lambda p: float(p["delta"]))),
)  # fmt: skip
for _name, _sentence, _response, _latex, _params, _vector, _function in _CRITERIA:
    register(
        MetricSpec(
            id=f"crit.{_name}/1",
            sentence=_sentence,
            formula=f"{_response}; {_CROSS}",
            latex=_latex,
            input="table: alpha[alpha], response[alpha]",
            value_range="(0, ∞)",
            unit="α of its noise scale",
            invariances=frozenset(),
            source="dynprobe, reference §7.4",
            params=_params,
            vectors=(_vector,),
            groups=frozenset({"optional"}),
        ),
        _function,
        arity=2,
    )
register(
    MetricSpec(
        id="threshold.prompt/1",
        sentence="Median over prompts of the strength that destabilises each.",
        formula="exp(med_p med_s ln α*_{p,s}), replicates inside a prompt first; censored α* are ranks −∞, +∞; NaN "
        "when half of the prompts are censored on one side or fewer than half are valid",
        latex=r"\alpha^* = \exp\bigl(\operatorname*{med}_{p}\ \operatorname*{med}_{s}\ \ln\alpha^*_{p,s}\bigr)",
        input="table: alpha_star[prompt] or [prompt, seed]; 0 = below the range, inf = above it, NaN = missing",
        value_range="(0, ∞)",
        unit="α of its noise scale",
        invariances=frozenset({"P"}),
        source="dynprobe, reference §7.4",
        vectors=("0.1, 0.4, 0.9, ∞ → 0.6", "0, 0.3, ∞ → 0.3", "0.1, ∞ → NaN"),
        groups=frozenset({"optional"}),
    ),
    _prompt,
)
register(
    MetricSpec(
        id="threshold.mean/1",
        sentence="Strength at which the mean response over prompts reaches the level.",
        formula=f"response: mean over prompts, over seeds inside a prompt first, prompts with a gap left out; {_CROSS}",
        latex=r"\operatorname*{mean}_{p}\ \operatorname*{mean}_{s}\ r_{p,s}(\alpha^*) = \mathrm{level}",
        input="table: alpha[alpha], response[prompt, alpha] or [prompt, seed, alpha]",
        value_range="(0, ∞)",
        unit="α of its noise scale",
        invariances=frozenset({"P"}),
        source="dynprobe, reference §7.4 and §11",
        params={"level": 1.0},
        vectors=("r_p = (α/s_p)², s = 0.1, 0.2, any grid around: level 1 → 1/√((1/0.01 + 1/0.04)/2)",),
        groups=frozenset({"optional"}),
    ),
    _mean,
    arity=2,
)
