"""One interval for a mean over prompts, whoever asks for it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import cluster_mean, interval_words, mean_interval, profile_interval
from dynprobe.metrics.statistics._sign_flips import flip_p, least_flip_p
from dynprobe.protocols._responses import _interval
from dynprobe.protocols._summary import summarise

VALUES = np.array([0.3, 1.1, -0.4, 2.5, 0.9, 1.7])


def slow(values, weights):
    """Every replicate by itself, with the expanded percentiles written out."""
    rng = np.random.default_rng(0)
    n = len(values)
    values, weights = zip(*sorted(zip(values, weights, strict=True)), strict=True)
    means = []
    for pick in rng.integers(0, n, (2000, n)):
        means.append(sum(weights[i] * values[i] for i in pick) / sum(weights[i] for i in pick))
    tail = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))
    means.sort()
    return means[math.floor(tail * 1999)], means[math.ceil((1 - tail) * 1999)]


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]])
def test_the_interval_is_that_of_the_expanded_percentiles(weights):
    found = mean_interval(VALUES, weights)
    assert found == pytest.approx(slow(VALUES, weights or [1.0] * 6), rel=1e-12)
    means = np.random.default_rng(0).choice(VALUES, (2000, 6)).mean(1)
    if weights is None:  # wider than plain percentiles, which are too narrow for six prompts
        low, high = np.quantile(means, [0.025, 0.975])
        assert found[0] < low < high < found[1]


def test_every_command_has_the_same_interval():
    expected = mean_interval(VALUES)
    asked = cluster_mean(VALUES)
    assert (asked.low, asked.high) == pytest.approx(expected, rel=1e-12)
    _, low, high = profile_interval(VALUES[:, None])
    assert (low[0], high[0]) == pytest.approx(expected, rel=1e-12)
    samples = pd.DataFrame({
        "prompt_id": [f"p{i}" for i in range(6)], "condition_id": "clean", "status": "ok", "nll": VALUES,
    })  # fmt: skip
    entry = summarise(samples)["clean"]["nll"]
    assert (entry["low"], entry["high"]) == pytest.approx(expected, rel=1e-12)
    swept = _interval("x", VALUES)
    assert (swept["x_low"], swept["x_high"]) == pytest.approx(expected, rel=1e-12)


def test_too_few_prompts_have_none_and_gaps_take_no_part():
    assert all(math.isnan(end) for end in mean_interval(VALUES[:2]))
    assert all(math.isnan(end) for end in mean_interval([1.0, 2.0, math.nan], [1.0, 1.0, 1.0]))
    assert mean_interval([*VALUES, math.nan]) == mean_interval(VALUES)
    assert all(math.isnan(end) for end in mean_interval([]))
    assert all(math.isnan(end) for end in mean_interval(VALUES, n_boot=0))
    two_of_three = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, math.nan]])
    mean, low, high = profile_interval(two_of_three)
    assert mean.tolist() == [2.0, 1.5]
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [False, True]


def test_a_point_of_a_profile_has_the_interval_of_the_prompts_that_have_it():
    """Half of six prompts: some replicates of all six draw none of them, which is no reason to have no interval."""
    half = np.where(np.arange(6) < 3, VALUES, np.nan)
    few = np.where(np.arange(6) < 2, VALUES, np.nan)
    mean, low, high = profile_interval(np.stack([VALUES, half, few], axis=1))
    for i, values in enumerate((VALUES, half)):
        assert (low[i], high[i]) == pytest.approx(mean_interval(values), rel=1e-12)
        assert mean[i] == pytest.approx(np.nanmean(values), rel=1e-12)
    assert np.isnan([mean[2], low[2], high[2]]).all()


def test_weights_are_one_for_each_prompt():
    with pytest.raises(MetricError, match="found 6 values and 2 weights"):
        mean_interval(VALUES, [1.0, 2.0])


def test_the_name_says_the_kind():
    assert interval_words(0.9, "items") == "90 % expanded percentile bootstrap interval over items"


@pytest.mark.parametrize("n", [2, 4, 13, 20])
def test_no_data_go_below_the_least_p(n):
    clear = np.linspace(1.0, 1.1, n)[:, None]  # all of one sign, and none like another
    assert flip_p(clear)[0] == pytest.approx(least_flip_p(n), rel=1e-12)
    assert math.isnan(least_flip_p(1))


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]])
def test_the_order_of_the_prompts_does_not_matter(weights):
    order = [4, 0, 3, 5, 1, 2]
    shuffled = None if weights is None else [weights[i] for i in order]
    assert mean_interval([VALUES[i] for i in order], shuffled) == pytest.approx(
        mean_interval(VALUES, weights), rel=1e-12
    )
