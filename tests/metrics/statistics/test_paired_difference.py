"""Paired differences over prompts: hand-checked numbers, slow independent versions, and what a flip cannot change."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import (
    adjusted,
    cluster_mean,
    cluster_means,
    paired_difference,
    paired_differences,
    profile_difference,
    profile_interval,
)
from dynprobe.metrics.statistics._bootstrap import interval, multiplicity, resample


def test_difference_effect_and_p_by_hand():
    found = paired_difference([1.0, 2.0, 4.0], [0.0, 0.0, 1.0])
    assert (found.value, found.effect, found.n) == (2.0, 2.0, 3)  # differences 1, 2, 3: mean 2, SD 1
    assert found.p == 2 / 8  # only the pattern itself and its mirror have |mean| of 2 or more
    mixed = paired_difference([1.0, 2.0, 0.0], [0.0, 0.0, 3.0])  # 1, 2, −3: mean 0
    assert (mixed.value, mixed.p) == (0.0, 1.0)


def test_rows_of_one_prompt_are_averaged_first():
    a, b = [1.0, 3.0, 10.0, 5.0], [0.0, 0.0, 0.0, 0.0]
    found = paired_difference(a, b, ["x", "x", "y", "z"])
    assert found.value == pytest.approx((2.0 + 10.0 + 5.0) / 3)
    assert found.n == 3
    assert cluster_mean(a, ["x", "x", "y", "z"]).value == pytest.approx(17 / 3)


def test_missing_sides_and_coverage():
    nan = float("nan")
    found = paired_difference([1.0, nan, 3.0, 4.0], [0.0, 1.0, nan, 0.0])
    assert (found.value, found.n, found.n_asked, found.reason_interval) == (2.5, 2, 4, "prompts<3")
    few = paired_difference([1.0, nan, nan, nan], [0.0, 1.0, 1.0, 0.0])
    assert np.isnan(few.value)
    assert few.reason == "coverage"
    assert np.isnan(few.p)
    assert cluster_mean([nan, nan]).reason == "empty"
    assert paired_difference([nan], [nan]).reason == "empty"


def test_sign_flips_equal_the_slow_way():
    delta = np.random.default_rng(5).normal(0.4, 1, 7)
    patterns = np.array(list(itertools.product([1, -1], repeat=7)))
    slow = np.mean(np.abs((patterns * delta).mean(1)) >= abs(delta.mean()) - 1e-12)
    assert paired_difference(delta, np.zeros(7)).p == slow


def test_drawn_flips_are_near_the_exact_ones():
    delta = np.random.default_rng(1).normal(0.45, 1, 16)
    patterns = 1 - 2 * ((np.arange(2**16)[:, None] >> np.arange(16)) & 1)
    exact = np.mean(np.abs(patterns @ delta / 16) >= abs(delta.mean()) - 1e-12)
    assert paired_difference(delta, np.zeros(16)).p == pytest.approx(exact, abs=0.012)


def test_interval_is_the_expanded_percentile_of_resampled_means():
    values = np.random.default_rng(2).normal(size=9)
    weights = multiplicity(resample(9, 2000, 0), 9)
    draws = weights @ np.sort(values) / 9
    found = cluster_mean(values)
    assert (found.low, found.high) == pytest.approx(interval(draws, draws, 0.95, 9), rel=1e-12)
    same = paired_difference(values, np.zeros(9))
    assert (same.low, same.high) == pytest.approx((found.low, found.high))


def test_effect_interval_equals_the_slow_way():
    delta = np.random.default_rng(3).normal(1, 1, 12)
    draws = []
    for row in resample(12, 2000, 0):
        some = delta[row]
        draws.append(some.mean() / some.std(ddof=0) / np.sqrt(12 / 11) if np.ptp(some) else np.inf)
    found = paired_difference(delta, np.zeros(12))
    assert found.effect == pytest.approx(delta.mean() / delta.std(ddof=1))
    assert (found.effect_low, found.effect_high) == pytest.approx(
        interval(np.array(draws), np.array(draws), 0.95, 12), rel=1e-9
    )


def test_a_constant_difference_has_no_effect_size():
    found = paired_difference([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert np.isnan(found.effect)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_equivalence_is_the_ninety_percent_interval_inside_the_margin():
    rng = np.random.default_rng(4)
    delta = rng.normal(0, 0.01, 30)
    inner = paired_difference(delta, np.zeros(30), confidence=0.9)
    just = max(abs(inner.low), abs(inner.high))
    assert paired_difference(delta, np.zeros(30), margin=just * 1.01).equivalent is True
    assert paired_difference(delta, np.zeros(30), margin=just * 0.99).equivalent is False
    assert paired_difference(delta, np.zeros(30)).equivalent is None
    assert paired_difference(delta[:2], np.zeros(2), margin=1.0).equivalent is None
    with pytest.raises(MetricError, match="margin"):
        paired_difference(delta, np.zeros(30), margin=0.0)


def test_columns_at_once_are_the_columns_one_by_one():
    x = np.random.default_rng(6).normal(size=(8, 5))
    x[2, 1] = x[5, 3] = x[2, 3] = np.nan
    for found, column in zip(paired_differences(x), x.T, strict=True):
        assert numbers(found) == pytest.approx(numbers(paired_difference(column, np.zeros(8))), rel=1e-12)
    for found, column in zip(cluster_means(x), x.T, strict=True):
        assert numbers(found) == pytest.approx(numbers(cluster_mean(column)), rel=1e-12)


def numbers(record):
    return {k: v for k, v in asdict(record).items() if isinstance(v, int | float)}


def test_profiles_are_pointwise_means_and_leave_thin_points_out():
    x = np.random.default_rng(7).normal(size=(10, 4))
    x[:6, 3] = np.nan
    x[0, 1] = np.nan
    mean, low, high = profile_interval(x)
    assert mean[:3] == pytest.approx(np.nanmean(x, axis=0)[:3])
    assert np.isnan([mean[3], low[3], high[3]]).all()
    whole = cluster_mean(x[:, 0])
    assert (low[0], high[0]) == pytest.approx((whole.low, whole.high))
    assert low[1] < mean[1] < high[1]


def test_maximum_statistic_by_the_slow_way():
    delta = np.random.default_rng(8).normal([0.0, 2.0, 0.5], 1, (6, 3))

    def t(x):
        return np.abs(x.mean(0)) / (x.std(0, ddof=1) / np.sqrt(len(x)))

    patterns = np.array(list(itertools.product([1, -1], repeat=6)))
    most = np.array([t(delta * p[:, None]).max() for p in patterns])
    slow = [(most >= one * (1 - 1e-9)).mean() for one in t(delta)]
    found = profile_difference(delta, np.zeros((6, 3)))
    assert found.p_max == pytest.approx(slow)
    assert found.value == pytest.approx(delta.mean(0))
    alone = [paired_difference(column, np.zeros(6)).p for column in delta.T]
    assert (found.p_max >= np.array(alone) - 1e-12).all()


def test_equal_profiles_have_p_one():
    assert profile_difference(np.ones((4, 3)), np.ones((4, 3))).p_max.tolist() == [1.0] * 3


def test_holm_and_bh_are_those_of_the_reference_and_of_statsmodels():
    p = [0.01, 0.02, 0.03, 0.04]
    assert adjusted(p, "holm") == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert adjusted(p, "fdr_bh") == pytest.approx([0.04] * 4)
    many = np.random.default_rng(9).random(37) ** 3
    many[4] = many[7]
    for method in ("holm", "fdr_bh"):
        assert adjusted(many, method) == pytest.approx(multipletests(many, method=method)[1], rel=1e-12)
    gap = adjusted([0.01, float("nan"), 0.04], "holm")
    assert gap[[0, 2]] == pytest.approx([0.02, 0.04])
    assert np.isnan(gap[1])


def test_sides_must_be_of_the_same_rows():
    with pytest.raises(MetricError, match="two sides"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(MetricError, match="same prompts"):
        profile_difference(np.ones((2, 3)), np.ones((3, 3)))
