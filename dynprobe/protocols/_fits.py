"""From trials to thresholds: one row per estimate, with its interval and what it leaves out.

``threshold.prompt/1`` (the median over prompts of each prompt's own first crossing) is the threshold. Beside it stand
estimates that answer another question or check the first one, each under its own name: ``threshold.mean/1`` (where the
mean response crosses), a logistic curve through the binary outcomes, isotonic regression and Spearman–Kärber. Those
that need the same strengths for every prompt exist only on a fixed grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.metrics.statistics import (
    PosteriorSearch,
    fit_psychometric,
    isotonic_threshold,
    mean_threshold,
    monotonicity_test,
    nonlinear,
    prompt_threshold,
    spearman_karber,
)
from dynprobe.protocols._criteria import criterion_named
from dynprobe.runs._crossings import Crossings, crossings_of

__all__ = ["fits_table"]

#: Units in which a threshold is also given, from the sizes that were really written.
_UNITS = ("alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs")


@dataclass(frozen=True)
class Curve:
    """All trials of one write under one criterion.

    Attributes:
        trials: Rows with α > 0.
        sham: Rows with α = 0.
        level: Level of the criterion.
        floor: Numerical noise floor of the response.
    """

    trials: pd.DataFrame
    sham: pd.DataFrame
    level: float
    floor: float

    def grid(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Strengths ``[alpha]`` and responses ``[prompt, seed, alpha]`` where every row has the same strengths."""
        table = self.trials.astype({"prompt_id": str}).pivot_table(
            index=["prompt_id", "seed"], columns="alpha", values="response", observed=True, dropna=False
        )
        n_seeds = table.index.get_level_values("seed").nunique()
        if self.trials["trial_round"].nunique() != 1 or len(table) % n_seeds:
            return None
        values = table.to_numpy(np.float64)
        return table.columns.to_numpy(np.float64), values.reshape(-1, n_seeds, values.shape[1])


def fits_table(trials: pd.DataFrame, config: Any) -> pd.DataFrame:
    """Fit every write under every criterion.

    Args:
        trials: The trials table of a run.
        config: Its settings.
    """
    rows = []
    keys = ["criterion", "scale", "kind", "layer", "write"]
    if config.each_position:  # a position is a place of one text: nothing is averaged over texts
        keys += ["prompt_id", "pos"]
    for key, group in trials.groupby(keys, observed=True, sort=True, dropna=False):
        named = dict(zip(keys, key, strict=True))
        level, floor = float(group["level"].iloc[0]), float(group["floor"].max())
        curve = Curve(group[group["alpha"] > 0], group[group["alpha"] == 0], level, floor)
        place = f"|{named['prompt_id']}|{named['pos']}" if config.each_position else ""
        uncertain = len(group[group["remark"].notna()].groupby(["prompt_id", "pos", "seed"], observed=True))
        for number, fit in enumerate(_fits(curve, str(named["criterion"]), config)):
            rows.append(
                {
                    "fit_id": f"{named['criterion']}|{named['write']}{place}|{fit['estimator']}", **named,
                    "level": level, "floor": floor, "headline": number == 0, **fit,
                    "n_uncertain": uncertain, **_other_units(curve, fit),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _fits(curve: Curve, criterion: str, config: Any) -> Iterator[dict[str, Any]]:
    """The estimates of one curve, the headline first."""
    if config.placement == "quest" and not config.alphas:
        boot = {"n_boot": config.n_boot, "confidence": config.confidence}
        yield _logistic(curve, criterion, boot)
        yield _posterior(curve, criterion, config)
        return
    crossings = crossings_of(pd.concat([curve.trials, curve.sham]), curve.level, curve.floor)
    boot = {"n_boot": 0 if config.each_position else config.n_boot, "confidence": config.confidence}
    grid = curve.grid() if config.alphas else None
    mean = None
    if grid is not None:
        alphas, responses = grid
        mean = _threshold_row(mean_threshold(responses, alphas, curve.level, floor=curve.floor, **boot))
    if criterion == "task":  # one item is right or wrong; only a population has an accuracy
        if mean is not None:
            yield mean
    else:
        own = _threshold_row(prompt_threshold(crossings.found, prompts=crossings.prompts, **boot))
        if not config.each_position and own["status"] == "resolved":
            own |= _widened(own, crossings, boot)
        if config.each_position and len(crossings.found) == 1:  # one text at one place: its own bracket, no population
            (one,) = crossings.found
            own |= {"reason": one.reason, "low": one.low, "high": one.high, "method": "bracket"}
        first, second = (own, mean) if config.estimand == "prompt" else (mean, own)
        yield from (row for row in (first, second) if row is not None)
    if not math.isfinite(curve.level) or curve.trials.empty or config.each_position:
        return
    if grid is None:  # a search puts its trials at each prompt's own threshold: they are no sample of the pooled curve
        return
    yield _logistic(curve, criterion, boot)
    if criterion != "task":
        alphas, responses = grid
        some = np.isfinite(responses).any(1)
        mean_over_seeds = np.full(some.shape, np.nan)
        mean_over_seeds[some] = np.nanmean(np.moveaxis(responses, 1, -1)[some], axis=-1)
        yield from _on_a_grid(alphas, mean_over_seeds, curve.level, curve.floor)


def _widened(own: dict[str, Any], crossings: Crossings, boot: dict[str, Any]) -> dict[str, float]:
    """The interval over prompts, widened by the brackets that the search left wide."""
    low, high = own["low"], own["high"]
    for end in ("low", "high") if crossings.n_wide else ():
        moved = prompt_threshold(crossings.at(end), prompts=crossings.prompts, **boot)
        low, high = float(np.fmin(low, moved.low)), float(np.fmax(high, moved.high))
    return {"low": low, "high": high}


def _threshold_row(t: Any) -> dict[str, Any]:
    low, high, status, value, reason = t.low, t.high, t.status, t.value, t.reason or t.reason_interval
    if status in ("left-censored", "right-censored"):  # what is known of the point bounds the interval too
        low, high = (-math.inf, t.bounds[1]) if status == "left-censored" else (t.bounds[0], math.inf)
        limit = f"α*<{high:.4g}" if status == "left-censored" else f"α*>{low:.4g}"
        reason = f"{limit}; {reason}" if reason and limit not in reason else limit
    elif status == "resolved" and math.isinf(low) and math.isinf(high):
        status, value, reason = "not-resolved", math.nan, "the interval is open at both ends"
    return {
        "estimator": t.metric_id, "alpha50": value, "low": low, "high": high, "status": status, "reason": reason,
        "n": t.n, "n_left": t.n_left, "n_right": t.n_right,
        "n_nonmonotone": t.n_nonmonotone, "n_recrossing": t.n_recrossing, "n_missing": t.n_missing + t.n_notresolved,
        "spread": t.spread, "method": t.method, "boot_low": t.boot_low, "boot_high": t.boot_high,
        "confidence": t.confidence, "n_boot": t.n_boot,
    }  # fmt: skip


def _logistic(curve: Curve, criterion: str, boot: dict[str, Any]) -> dict[str, Any]:
    """A logistic curve on ln α through "reached the level", sham rows included as its base rate."""
    rows = pd.concat([curve.trials, curve.sham])
    rows = rows[np.isfinite(rows["response"])]
    bar = 0.5 if criterion == "task" else curve.level
    hit = (rows["response"].to_numpy() >= bar).astype(float)
    fit = fit_psychometric(rows["alpha"].to_numpy(), hit, clusters=rows["prompt_id"].astype(str).tolist(), **boot)
    open_ended = fit.status == "resolved" and math.isinf(fit.low) and math.isinf(fit.high)
    return {
        "estimator": "psychometric.logistic/1", "alpha50": math.nan if open_ended else fit.value,
        "low": fit.low, "high": fit.high, "status": "not-resolved" if open_ended else fit.status,
        "reason": "the interval is open at both ends" if open_ended else fit.reason,
        "n": fit.n_clusters, "slope": fit.slope, "width": fit.width,
        "gamma": fit.gamma, "lapse": fit.lapse, "deviance": fit.deviance, "method": "bootstrap",
        "confidence": fit.confidence, "n_boot": fit.n_boot,
    }  # fmt: skip


def _posterior(curve: Curve, criterion: str, config: Any) -> dict[str, Any]:
    """The posterior that placed the trials; it takes them as independent, which prompts are not."""
    kind = str(curve.trials["kind"].iloc[0]) if len(curve.trials) else "gaussian"
    low, high = config.strengths(criterion_named(criterion), kind)
    rows = curve.trials[np.isfinite(curve.trials["response"])]
    answers = [(float(a), int(r >= curve.level)) for a, r in zip(rows["alpha"], rows["response"], strict=True)]
    found = PosteriorSearch.replay(
        answers, alpha_min=low, alpha_max=high, stop_sd=config.tolerance, max_trials=config.trials
    ).result(config.confidence)
    return {
        "estimator": "threshold.posterior/1", "alpha50": found.value, "low": found.low, "high": found.high,
        "status": found.status, "reason": found.reason, "n": rows["prompt_id"].nunique(), "slope": found.slope,
        "method": "posterior of the pooled curve", "confidence": found.confidence,
    }  # fmt: skip


def _on_a_grid(alphas: np.ndarray, responses: np.ndarray, level: float, floor: float) -> Iterator[dict[str, Any]]:
    """Estimates that need the same strengths for all prompts; ``responses`` is ``[prompt, alpha]``."""
    responses = responses[np.isfinite(responses).all(1)]  # a text without affected positions has no response
    n = len(responses)
    if not n:
        return
    reached = (responses >= level).mean(0)
    iso = isotonic_threshold(alphas, reached, np.full(len(alphas), n))
    yield {
        "estimator": "threshold.isotonic/1", "alpha50": iso.value, "low": iso.low, "high": iso.high,
        "status": iso.status, "reason": iso.reason, "n": n, "method": "bracket",
    }  # fmt: skip
    mean = spearman_karber(np.log(alphas), reached, np.full(len(alphas), n))
    between = bool(((reached > 0) & (reached < 1)).any())  # else all prompts cross between the same two strengths
    half = 1.959963984540054 * mean.se
    known = between and mean.status == "resolved"
    yield {
        "estimator": "threshold.spearman_karber/1", "alpha50": float(np.exp(mean.value)) if known else math.nan,
        "low": float(np.exp(mean.value - half)) if known else iso.low,
        "high": float(np.exp(mean.value + half)) if known else iso.high,
        "status": mean.status if between else "not-resolved", "reason": mean.reason if between else "separated", "n": n,
        "method": "normal" if known else "bracket",
    }  # fmt: skip
    verdict, falls = nonlinear(alphas, responses, floor=floor), monotonicity_test(alphas, responses)
    yield {
        "estimator": "breakpoint.broken_stick/1", "alpha50": verdict.alpha_break, "low": math.nan, "high": math.nan,
        "status": "resolved" if verdict.granted else "not-resolved", "reason": verdict.reason, "n": n,
        "nonlinear": bool(verdict.granted),
        "error_stick": verdict.error_stick, "error_power": verdict.error_power, "exponent": verdict.exponent,
        "monotone_p": falls.p_value,
    }  # fmt: skip


def _other_units(curve: Curve, fit: dict[str, Any]) -> dict[str, float]:
    """The threshold in the units of the other scales: α50 × the median size written per unit of α nearby."""
    value = fit["alpha50"]
    if not math.isfinite(value) or curve.trials.empty:
        return {f"written_{unit.removeprefix('alpha_')}": math.nan for unit in _UNITS}
    near = curve.trials[np.abs(np.log(curve.trials["alpha"] / value)) <= np.log(3)]
    near = near if len(near) else curve.trials
    return {
        f"written_{unit.removeprefix('alpha_')}": value * float((near[unit] / near["alpha"]).median())
        for unit in _UNITS if unit in near
    }  # fmt: skip
