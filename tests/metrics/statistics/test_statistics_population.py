"""Population thresholds: medians with censored ranks, intervals, means, ratios."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import (
    Crossing,
    first_crossing,
    mean_threshold,
    prompt_threshold,
    ratio_threshold,
)
from dynprobe.metrics.statistics._bootstrap import expanded_level
from dynprobe.metrics.statistics._prompts import medians

INF, NAN = float("inf"), float("nan")
STARS = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def left(limit=0.1):
    return Crossing(NAN, -INF, limit, "left-censored")


def right(limit=2.0):
    return Crossing(NAN, limit, INF, "right-censored")


def at(value):
    return Crossing(value, value, value, "resolved", n_crossings=1, monotone=True)


def test_median_is_in_ln_alpha():
    t = prompt_threshold([0.1, 0.2, 0.4, 0.9, 1.6, 3.2])
    assert t.value == pytest.approx(math.sqrt(0.4 * 0.9), rel=1e-12)
    assert (t.metric_id, t.status, t.n, t.method, t.n_boot) == ("threshold.prompt/1", "resolved", 6, "order", 2000)
    assert t.spread == pytest.approx(np.std(np.log([0.1, 0.2, 0.4, 0.9, 1.6, 3.2]), ddof=1))
    assert t.bounds == (t.value, t.value)


@pytest.mark.parametrize("n", [6, 9, 12, 24, 60])
def test_order_interval_is_between_the_binomial_ones(n):
    """Coverage of (X_k, X_{n+1−k}) is 1 − 2·P(Bin(n, ½) < k); the ends lie between the two k around 95 %."""
    x = np.sort(np.exp(np.random.default_rng(n).normal(size=n)))
    t = prompt_threshold(x, n_boot=0)
    wide = max(k for k in range(1, n // 2 + 1) if 1 - 2 * binom.cdf(k - 1, n, 0.5) >= 0.95)
    assert x[wide - 1] <= t.low <= x[wide]
    assert x[n - wide - 1] <= t.high <= x[n - wide]
    assert math.isnan(t.boot_low)


def test_few_prompts_have_no_interval():
    t = prompt_threshold(STARS[:5])
    assert t.value == pytest.approx(0.4)
    assert math.isnan(t.low)
    assert t.reason_interval == "prompts<6"
    assert np.isfinite(t.boot_low)
    one = prompt_threshold([0.3], method="bootstrap")
    assert (one.value, one.reason_interval) == (pytest.approx(0.3), "prompts<2")
    assert math.isnan(one.spread)


def test_censored_values_are_ranks():
    t = prompt_threshold([left(), at(0.3), at(0.4), at(0.5), right(), right(), right()])
    assert t.value == pytest.approx(0.5)
    assert (t.n_left, t.n_right, t.low, t.high) == (1, 3, -INF, INF)
    assert t.low_censored
    assert t.high_censored
    assert math.isnan(t.spread)
    same = prompt_threshold([0.0, 0.3, 0.4, 0.5, INF, INF, INF])
    assert (same.value, same.n_left, same.n_right) == (t.value, 1, 3)
    words = prompt_threshold(
        [0.1, 0.3, 0.4, 0.5, 2, 2, 2], status=["left-censored", *["resolved"] * 3, *["right-censored"] * 3]
    )
    assert (words.value, words.low, words.high) == (t.value, t.low, t.high)


def test_half_censored_is_a_bound_not_a_number():
    t = prompt_threshold([at(0.3), at(0.4), right(2.0), right(2.0)])
    assert (t.status, t.bounds[1]) == ("right-censored", INF)
    assert math.isnan(t.value)
    assert t.bounds[0] == pytest.approx(math.sqrt(0.4 * 2.0))
    assert prompt_threshold([at(0.3), *[right()] * 3]).bounds == (pytest.approx(2.0), INF)
    low = prompt_threshold([left(), left(), left(), at(0.3)])
    assert (low.status, low.bounds) == ("left-censored", (-INF, pytest.approx(0.1)))
    assert prompt_threshold([left(), left(), right(), right()]).status == "not-resolved"


def test_a_limit_below_the_median_is_no_rank_above_it():
    """A prompt known only to lie above 0.05 may lie on either side of the others' median."""
    t = prompt_threshold([at(0.3), at(0.4), right(0.05)])
    assert t.status != "resolved"
    assert t.bounds == (pytest.approx(0.3), pytest.approx(0.4))


def test_replicates_are_reduced_inside_their_prompt():
    nested = [[at(0.1), at(0.2), at(0.9)], [at(0.5)], [at(0.3), right()], [left(), at(0.4), right()]]
    t = prompt_threshold(nested)
    assert (t.n, t.n_replicates, t.n_right) == (4, 9, 1)
    assert t.value == pytest.approx(math.sqrt(0.4 * 0.5))
    flat = [c for row in nested for c in row]
    names = [f"p{i}" for i, row in enumerate(nested) for _ in row]
    assert repr(prompt_threshold(flat, prompts=names)) == repr(t)
    array = prompt_threshold([[0.1, 0.2, 0.9], [0.5, NAN, NAN]])
    assert (array.value, array.n_replicates) == (pytest.approx(math.sqrt(0.2 * 0.5)), 4)


def test_what_takes_no_part_is_counted():
    noise = Crossing(NAN, NAN, NAN, "not-resolved", "level<10×floor", monotone=False)
    t = prompt_threshold([at(0.3), at(0.4), at(0.5), noise, Crossing(NAN, NAN, NAN, "missing")])
    assert (t.n, t.n_notresolved, t.n_missing, t.n_nonmonotone, t.status) == (3, 1, 1, 1, "resolved")
    gone = prompt_threshold([noise, noise, at(0.3)])
    assert (gone.status, gone.reason) == ("not-resolved", "level in the noise floor")
    assert prompt_threshold([[], [at(0.3)], []]).reason == "coverage"
    assert prompt_threshold([]).reason == "empty"
    twice = Crossing(0.3, 0.2, 0.4, "resolved", n_crossings=3, monotone=False)
    assert prompt_threshold([twice, at(0.3)]).n_recrossing == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 20), scale=st.floats(1e-3, 1e3))
def test_scale_and_order(seed, n, scale):
    rng = np.random.default_rng(seed)
    x = np.exp(rng.normal(size=n))
    t, s = prompt_threshold(x, n_boot=50), prompt_threshold(x * scale, n_boot=50)
    for name in ("value", "low", "high", "boot_low", "boot_high"):
        assert getattr(s, name) == pytest.approx(getattr(t, name) * scale, rel=1e-9, nan_ok=True)
    mixed = prompt_threshold(rng.permutation(x), n_boot=50)
    assert (mixed.value, mixed.n) == (pytest.approx(t.value), t.n)
    assert (mixed.low, mixed.high) == (pytest.approx(t.low, nan_ok=True), pytest.approx(t.high, nan_ok=True))


def test_same_seed_same_interval_and_more_confidence_is_wider():
    x = np.exp(np.random.default_rng(3).normal(size=15))
    assert prompt_threshold(x, seed=4) == prompt_threshold(x, seed=4)
    a, b = prompt_threshold(x, confidence=0.9), prompt_threshold(x, confidence=0.99)
    assert b.low < a.low < a.high < b.high
    assert b.boot_low <= a.boot_low < a.boot_high <= b.boot_high
    boot = prompt_threshold(x, method="bootstrap")
    assert (boot.low, boot.high) == (boot.boot_low, boot.boot_high)


def test_medians_of_infinities():
    x = np.array([[-INF, INF, NAN], [-INF, -INF, 1.0], [2.0, INF, NAN], [1.0, 3.0, NAN], [NAN] * 3])
    np.testing.assert_array_equal(medians(x, 7.0), [7.0, -INF, INF, 2.0, NAN])


def test_expanded_level():
    """n → ∞ is the plain percentile; 3 clusters need far more."""
    assert expanded_level(0.95, 10**6) == pytest.approx(0.025, rel=1e-4)
    assert expanded_level(0.95, 3) < 1e-6


def test_mean_is_another_estimand():
    a = np.geomspace(0.02, 5, 30)
    stars = np.array([0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    r = (a / stars[:, None]) ** 2
    mean, median = mean_threshold(r, a, 1.0), prompt_threshold([first_crossing(a, row, 1.0) for row in r])
    assert mean.value == pytest.approx(1 / math.sqrt(np.mean(stars**-2.0)), rel=1e-9)
    assert median.value == pytest.approx(0.5)
    assert mean.value < 0.6 * median.value
    assert (mean.metric_id, mean.method) == ("threshold.mean/1", "bootstrap-t")
    assert mean.low < mean.value < mean.high


def test_mean_threshold_counts_and_censors():
    a = np.array([0.1, 0.2, 0.4])
    r = np.array([[0.1, 0.2, 0.4], [0.1, 0.3, 0.5], [0.2, 0.3, 2.0], [NAN, 1.0, 2.0]])
    t = mean_threshold(r, a, 5.0)
    assert (t.status, t.bounds, t.n, t.n_missing, t.n_right) == ("right-censored", (pytest.approx(0.4), INF), 3, 1, 3)
    assert mean_threshold(r, a, 0.05).status == "left-censored"
    assert mean_threshold(r, a, 1.0, floor=0.5).status == "not-resolved"
    assert mean_threshold(r[2:], a, 0.5).status == "resolved"
    assert mean_threshold(np.full((3, 3), NAN), a, 0.5).reason == "coverage"
    assert mean_threshold(np.empty((0, 3)), a, 0.5).reason == "empty"
    falls = mean_threshold(np.array([[0.1, 2.0, 0.5]] * 3), a, 1.0, n_boot=0)
    assert (falls.status, falls.reason, falls.reason_interval) == (
        "resolved", "the mean response falls somewhere", "n_boot=0",
    )  # fmt: skip
    seeds = mean_threshold(np.stack([r[:3], r[:3]], axis=1), a, 0.5, n_boot=0)
    assert seeds.value == mean_threshold(r[:3], a, 0.5, n_boot=0).value
    assert seeds.n_replicates == 6


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_mean_threshold_scale_and_order(scale):
    rng = np.random.default_rng(0)
    a = np.geomspace(0.05, 5, 9)
    r = 4 * -np.expm1(-((a / np.exp(0.5 * rng.normal(size=(10, 1)))) ** 2) / 4)
    order = rng.permutation(9)
    t, s = mean_threshold(r, a, 1.0), mean_threshold(r[:, order], a[order] * scale, 1.0)
    for name in ("value", "low", "high", "boot_low"):
        assert getattr(s, name) == pytest.approx(getattr(t, name) * scale, rel=1e-9)


def test_delta_method_error_agrees_with_the_jackknife():
    rng = np.random.default_rng(1)
    from dynprobe.metrics.statistics._crossing import crossings
    from dynprobe.metrics.statistics._mean import _standard_error

    x = np.log(np.geomspace(0.05, 5, 15))
    y = 4 * -np.expm1(-np.exp(2 * (x - 0.4 * rng.normal(size=(200, 1)))) / 4)
    se = _standard_error(crossings(x, y.mean(0)[None], 1.0), x, y, np.full((1, 200), 1 / 200), 1.0, 0.0)[0]
    without = np.array([crossings(x, np.delete(y, i, 0).mean(0)[None], 1.0)[0] for i in range(200)])
    jack = math.sqrt(199 / 200 * ((without - without.mean()) ** 2).sum())
    assert se == pytest.approx(jack, rel=0.01)


def test_ratio():
    rng = np.random.default_rng(0)
    b = np.exp(rng.normal(size=24))
    r = ratio_threshold(7.5 * b, b)
    assert (r.value, r.low, r.high) == (pytest.approx(7.5), pytest.approx(7.5), pytest.approx(7.5))
    assert r.paired
    loose = ratio_threshold(7.5 * b, b, paired=False)
    assert loose.value == pytest.approx(7.5)
    assert loose.low < 5
    assert loose.high > 10
    names = [f"p{i}" for i in range(24)]
    mixed = rng.permutation(24)
    again = ratio_threshold(
        7.5 * b[mixed], b, prompts_a=[names[i] for i in mixed], prompts_b=names
    )  # paired by name, not by place
    assert (again.low, again.high, again.n_common) == (pytest.approx(7.5), pytest.approx(7.5), 24)
    part = ratio_threshold(b[:20], b, prompts_a=names[:20], prompts_b=names)
    assert (part.paired, part.n_common) == (False, 20)
    assert ratio_threshold(b[:20], b, prompts_a=names[:20], prompts_b=names, paired=True).value == pytest.approx(1.0)


def test_ratio_with_a_censored_side_is_a_bound():
    a, b = [at(0.3), *[right(2.0)] * 5], [at(v) for v in STARS[:6]]
    r = ratio_threshold(a, b)
    assert r.status == "right-censored"
    assert r.bounds == (pytest.approx(2.0 / math.sqrt(0.4 * 0.5)), INF)
    assert math.isnan(r.value)
    assert ratio_threshold(b, a).status == "left-censored"
    assert ratio_threshold(a, a).status == "not-resolved"
    assert ratio_threshold([NAN, NAN], [0.3, 0.4]).status == "missing"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: prompt_threshold(STARS, confidence=95), "0.95"),
        (lambda: prompt_threshold(STARS, n_boot=-1), "n_boot"),
        (lambda: prompt_threshold(STARS, method="bca"), "order"),
        (lambda: prompt_threshold(STARS, prompts=["a"]), "names"),
        (lambda: prompt_threshold([[0.1, 0.2]] * 2, prompts=["a", "a"]), "different"),
        (lambda: prompt_threshold(STARS, status=["resolved"]), "shape"),
        (lambda: prompt_threshold([0.1], status=["right-censord"]), "right-censored"),
        (lambda: prompt_threshold([-0.1], status=["resolved"]), "positive"),
        (lambda: prompt_threshold(np.ones((2, 2, 2))), "shape"),
        (lambda: mean_threshold(np.ones((2, 3)), [0.1, 0.2], 1.0), "column"),
        (lambda: mean_threshold(np.ones((2, 2)), [0.1, 0.1], 1.0), "different"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(MetricError, match=text):
        call()
