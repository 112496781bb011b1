"""Do 95 % intervals contain the truth in about 95 % of experiments? Fast with 100, slow with 500 simulated ones.

Truth: prompts have ln α50 normal around ln 0.45 with σ = 0.5. Estimands: the median of α* over prompts for continuous
responses found by the adaptive search, and the population median α50 for yes-or-no trials with lapses (the slope of the
pooled curve is attenuated and is not the prompts' slope; it is not what is covered here).
"""

import math

import numpy as np
import pytest

from dynprobe.metrics.statistics import (
    BracketSearch,
    fit_psychometric,
    mean_threshold,
    prompt_threshold,
    ratio_threshold,
)
from dynprobe.metrics.statistics._population import _order_interval

MEDIAN, SIGMA, PROMPTS = 0.45, 0.5, 24
MANY, FEW = (0.92, 0.98), (0.88, 1.0)
SIZES = [
    pytest.param(100, FEW, id="100"),
    pytest.param(500, MANY, id="500", marks=pytest.mark.slow),
]


def stars(rng, experiments, prompts=PROMPTS, sigma=SIGMA):
    return MEDIAN * np.exp(sigma * rng.normal(size=(experiments, prompts)))


@pytest.mark.parametrize(("experiments", "band"), SIZES)
def test_median_of_adaptively_found_crossings(experiments, band):
    """Saturating, KL-like responses with exponents between 1.5 and 2.5 and 1 % noise; 8 evaluations per prompt."""
    rng = np.random.default_rng(experiments)
    truth = stars(rng, experiments).ravel()
    power, top = rng.uniform(1.5, 2.5, truth.size), rng.uniform(4, 12, truth.size)
    search = BracketSearch(truth.size, 0.01, 10.0, 1.0, floor=1e-7)
    while not search.done:
        rows, a = search.propose()
        bend = np.log1p(-1 / top[rows]) * (a / truth[rows]) ** power[rows]
        search.observe(rows, a, -top[rows] * np.expm1(bend) * (1 + 0.01 * rng.normal(size=len(a))))
    found = search.result()
    assert search.n_evaluations.max() <= 8
    hits, boot = 0, 0
    for e in range(experiments):
        t = prompt_threshold(found[e * PROMPTS : (e + 1) * PROMPTS], n_boot=200 if experiments < 500 else 1000, seed=e)
        assert t.status == "resolved"
        hits += t.low <= MEDIAN <= t.high
        boot += t.boot_low <= MEDIAN <= t.boot_high
    assert band[0] <= hits / experiments <= band[1]
    assert band[0] <= boot / experiments <= 1.0


@pytest.mark.parametrize(("experiments", "band"), SIZES)
def test_psychometric_alpha50(experiments, band):
    """24 prompts × 7 strengths × 10 seeds, slope 4 of a prompt, lapse rate 3 %, prompts resampled."""
    rng = np.random.default_rng(experiments)
    doses = np.geomspace(0.1, 2, 7)
    names = np.repeat(np.arange(PROMPTS), 7).tolist()
    hits = 0
    for e, own in enumerate(stars(rng, experiments)):
        k = rng.binomial(10, 0.97 / (1 + (doses / own[:, None]) ** -4.0)).ravel()
        fit = fit_psychometric(
            np.tile(doses, PROMPTS),
            k,
            np.full(k.size, 10),
            clusters=names,
            n_boot=300 if experiments < 500 else 1000,
            seed=e,
        )
        assert fit.status == "resolved"
        hits += fit.low <= MEDIAN <= fit.high
    assert band[0] <= hits / experiments <= band[1]


@pytest.mark.parametrize("prompts", [6, 12, 24, 60])
def test_order_interval_keeps_its_promise_at_every_size(prompts):
    """1,000 experiments each, normal and right-skewed spread."""
    rng = np.random.default_rng(prompts)
    for x in (rng.normal(size=(1000, prompts)), rng.exponential(size=(1000, prompts)) - math.log(2)):
        ends = np.array([_order_interval(row, row, 0.95) for row in x])
        assert 0.925 <= np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0)) <= 0.975
    t = prompt_threshold(np.exp(x[-1]), n_boot=0)
    assert (t.low, t.high) == (pytest.approx(np.exp(ends[-1, 0])), pytest.approx(np.exp(ends[-1, 1])))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [12, 24, 60])
def test_mean_and_ratio(prompts):
    """500 experiments: mean of saturating responses (bootstrap-t), ratio of two medians on the same prompts."""
    rng = np.random.default_rng(prompts)
    a = np.geomspace(0.05, 5, 24)
    z = rng.normal(size=200_000) * SIGMA
    grid = np.linspace(-2, 1, 301)
    middle = [np.mean(-5 * np.expm1(-np.exp(2 * (g - z)) / 5)) for g in grid]
    truth = MEDIAN * math.exp(np.interp(1.0, middle, grid))
    means, ratios = 0, 0
    for e in range(500):
        own = stars(rng, 1, prompts)[0]
        t = mean_threshold(-5 * np.expm1(-((a / own[:, None]) ** 2) / 5), a, 1.0, n_boot=1000, seed=e)
        means += t.low <= truth <= t.high
        other = MEDIAN * (own / MEDIAN) ** 0.7 * np.exp(SIGMA * math.sqrt(0.51) * rng.normal(size=prompts))
        r = ratio_threshold(own, other, n_boot=1000, seed=e)
        ratios += r.low <= 1 <= r.high
    assert 0.90 <= means / 500 <= 0.98
    assert 0.93 <= ratios / 500 <= 1.0


def test_naive_intervals_are_the_mistake_they_are_said_to_be():
    """Treating trials as independent covers far less: why clusters are asked for."""
    rng = np.random.default_rng(0)
    doses, hits = np.geomspace(0.1, 2, 7), 0
    for e, own in enumerate(stars(rng, 40)):
        k = rng.binomial(10, 0.97 / (1 + (doses / own[:, None]) ** -4.0)).sum(axis=0)
        fit = fit_psychometric(doses, k, np.full(7, 10 * PROMPTS), n_boot=300, seed=e)
        hits += fit.low <= MEDIAN <= fit.high
    assert hits / 40 < 0.75
