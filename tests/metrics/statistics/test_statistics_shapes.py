"""Formula-free thresholds, trends, proportions, multiplicity, kinks."""

import math

import numpy as np
import pytest
from scipy.stats import beta, norm
from statsmodels.stats.multitest import multipletests

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import (
    broken_stick,
    isotonic_threshold,
    mann_kendall,
    monotonicity_test,
    nonlinear,
    proportion_interval,
    spearman_karber,
)


def test_vector_sk_1():
    s = spearman_karber([0, 1, 2, 3], [0, 0.25, 0.75, 1])
    assert s.value == pytest.approx(1.5, rel=1e-12)
    assert math.isnan(s.se)
    assert spearman_karber([3, 1, 0, 2], [1, 0.25, 0, 0.75]).value == pytest.approx(1.5, rel=1e-12)


def test_spearman_karber_refuses_what_it_cannot_know():
    assert spearman_karber([0, 1, 2], [0.1, 0.5, 1]).reason == "p does not start at 0"
    assert spearman_karber([0, 1, 2], [0, 0.5, 0.9]).reason == "p does not reach 1"
    assert math.isnan(spearman_karber([0, 1, 2], [0, 0.5, 0.9]).value)
    falls = spearman_karber([0, 1, 2, 3], [0, 0.75, 0.25, 1])
    assert (falls.value, falls.fitted) == (pytest.approx(1.5), (0, 0.5, 0.5, 1))
    assert spearman_karber([], []).status == "missing"
    with pytest.raises(MetricError, match="proportion"):
        spearman_karber([0, 1], [0, 2])


def test_spearman_karber_error_is_that_of_repeated_experiments():
    rng = np.random.default_rng(0)
    x, n = np.linspace(-3, 3, 13), np.full(13, 40)
    p = np.where(np.abs(x) == 3, x > 0, norm.cdf(x))
    values = [spearman_karber(x, np.r_[0, rng.binomial(40, p[1:-1]) / 40, 1]).value for _ in range(400)]
    assert spearman_karber(x, p, n).se == pytest.approx(np.std(values), rel=0.15)


def test_isotonic_threshold():
    fit = isotonic_threshold([0.1, 0.2, 0.4, 0.8], [0.0, 0.5, 0.25, 1.0], level=0.5)
    assert fit.fitted == (0.0, 0.375, 0.375, 1.0)
    assert fit.value == pytest.approx(0.4 * 2 ** (0.125 / 0.625))
    assert (fit.low, fit.high) == (0.4, 0.8)
    weighted = isotonic_threshold([0.1, 0.2, 0.4, 0.8], [0.0, 0.5, 0.25, 1.0], [1, 3, 1, 1])
    assert weighted.fitted[1] == pytest.approx((3 * 0.5 + 0.25) / 4)
    assert isotonic_threshold([0.1, 0.2], [0.6, 0.7]).status == "left-censored"
    high = isotonic_threshold([0.1, 0.2], [0.1, 0.2])
    assert (high.status, high.low, high.high) == ("right-censored", 0.2, np.inf)
    assert isotonic_threshold([], []).status == "missing"
    with pytest.raises(MetricError, match="positive"):
        isotonic_threshold([0.0, 0.2], [0.1, 0.2])
    with pytest.raises(MetricError, match="once"):
        isotonic_threshold([0.2, 0.2], [0.1, 0.2])


def test_mann_kendall():
    up = mann_kendall([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert up.p_value == pytest.approx(1 / math.factorial(5))
    assert mann_kendall([5, 4, 3, 2, 1], [1, 2, 3, 4, 5]).p_value == pytest.approx(1.0)
    assert mann_kendall([1, 2], [1, 2]).reason == "strengths<3"
    assert mann_kendall([1, 2, 3], [1, 1, 1]).reason == "zero-denominator"
    assert mann_kendall([1, 2, 3, 4], [1, np.nan, 2, 3]).n == 3


def test_monotonicity_test_sees_falls_and_has_its_size():
    rng = np.random.default_rng(0)
    a = np.geomspace(0.1, 1, 6)
    rise, dip = np.linspace(0, 1, 6), np.array([0, 0.4, 0.8, 0.3, 0.6, 1.0])
    found, false = 0, 0
    for seed in range(40):
        own = 0.3 * rng.normal(size=(16, 1)) + 0.15 * rng.normal(size=(16, 6))
        found += monotonicity_test(a, dip + own, n_boot=200, seed=seed).p_value < 0.05
        flat = monotonicity_test(a, 0 * rise + own, n_boot=200, seed=seed)  # the hardest null: no slope at all
        false += flat.p_value < 0.05
        assert monotonicity_test(a, 5 * rise + own, n_boot=50, seed=seed).p_value == 1.0
    assert found == 40
    assert false <= 7
    order = rng.permutation(6)
    y = dip + 0.1 * rng.normal(size=(8, 6))
    assert monotonicity_test(a[order], y[:, order]) == monotonicity_test(a, y)
    assert monotonicity_test(a, y[:2]).reason == "prompts<3"
    assert monotonicity_test(a, np.tile([1.0, 0, 0, 0, 0, 0], (5, 1)), n_boot=99).p_value == pytest.approx(0.01)


def test_proportions_of_the_audit():
    """Reference §2.3: 8 of 8, and 536 of 638."""
    p = proportion_interval(8, 8)
    assert p.low == pytest.approx(0.025 ** (1 / 8), rel=1e-9)
    assert (p.high, p.method) == (1.0, "clopper-pearson")
    w = proportion_interval(536, 638)
    assert (round(w.low, 3), round(w.high, 3), w.method) == (0.810, 0.867, "wilson")
    z, n, q = norm.ppf(0.975), 20, 0.25
    half = z * math.sqrt(q * (1 - q) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    mid = (q + z**2 / (2 * n)) / (1 + z**2 / n)
    five = proportion_interval(5, 20)
    assert (five.low, five.high) == (pytest.approx(mid - half), pytest.approx(mid + half))
    assert proportion_interval(0, 9).high == pytest.approx(beta.ppf(0.975, 1, 9))
    assert proportion_interval(0, 0).reason == "empty"
    with pytest.raises(MetricError, match="k ≤ n"):
        proportion_interval(3, 2)


def test_multiplicity_vectors():
    """Reference §10.4, through statsmodels."""
    p = [0.01, 0.02, 0.03, 0.04]
    np.testing.assert_allclose(multipletests(p, method="holm")[1], [0.04, 0.06, 0.06, 0.06], rtol=1e-12)
    np.testing.assert_allclose(multipletests(p, method="fdr_bh")[1], [0.04] * 4, rtol=1e-12)


X = np.linspace(-5, 0, 11)


def prompts(rng, shape, n=16, noise=0.1):
    return np.exp(shape + rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, 11)))


def kinked(rng, n=16):
    return 0.5 * X + 2.0 * np.maximum(X + 2 + 0.2 * rng.normal(size=(n, 1)), 0)


def test_broken_stick_finds_the_kink():
    fit = broken_stick(np.exp(X), prompts(np.random.default_rng(0), kinked(np.random.default_rng(1))), n_boot=200)
    assert math.log(fit.alpha_break) == pytest.approx(-2, abs=0.25)
    assert fit.slope_below == pytest.approx(0.5, abs=0.15)
    assert fit.slope_above == pytest.approx(2.5, abs=0.3)
    assert fit.p_value < 0.01
    assert broken_stick(np.exp(X[:4]), np.ones((9, 4))).reason == "strengths<5"
    assert broken_stick(np.exp(X), np.exp(X)[None]).reason == "prompts<4"
    hidden = broken_stick(
        np.r_[0, np.exp(X)], np.c_[np.zeros(9), prompts(np.random.default_rng(0), 2 * X, 9)], n_boot=9
    )
    assert hidden.n_alphas == 11


def test_broken_stick_is_least_squares():
    """Against a plain search over τ with lstsq, intercepts as dummies."""
    rng = np.random.default_rng(3)
    y = np.log(prompts(rng, kinked(rng, 6), 6, 0.3))
    fit = broken_stick(np.exp(X), np.exp(y), n_boot=0)
    design = np.kron(np.eye(6), np.ones((11, 1)))
    x = np.tile(X, 6)

    def ssr(tau=None):
        columns = [design, x[:, None]] + ([] if tau is None else [np.maximum(x - tau, 0)[:, None]])
        m = np.concatenate(columns, axis=1)
        return ((y.ravel() - m @ np.linalg.lstsq(m, y.ravel(), rcond=None)[0]) ** 2).sum()

    best = min((ssr(tau), tau) for tau in np.unique(np.r_[np.linspace(X[1], X[-2], 101), X[1:-1]]))
    assert math.log(fit.alpha_break) == pytest.approx(best[1], abs=1e-9)
    assert fit.statistic == pytest.approx((ssr() - best[0]) / (best[0] / (66 - 6 - 3)), rel=1e-6)


def test_the_word_is_granted_only_out_of_sample():
    rng = np.random.default_rng(0)
    granted = {"kink": 0, "power": 0, "saturating": 0}
    for _ in range(20):
        granted["kink"] += nonlinear(np.exp(X), prompts(rng, kinked(rng))).granted
        granted["power"] += nonlinear(np.exp(X), prompts(rng, 2 * X)).granted
        bent = nonlinear(np.exp(X), prompts(rng, np.log(-np.expm1(-np.exp(2 * (X + 2))))))
        granted["saturating"] += bent.granted
    assert granted == {"kink": 20, "power": 0, "saturating": 0}
    assert bent.reason in ("no steepening kink", "not better than a power law out of sample")
    won = nonlinear(np.exp(X), prompts(rng, kinked(rng)))
    assert won.error_stick < won.error_power
    assert won.gain == pytest.approx(won.error_power - won.error_stick)
    assert 0 < won.gain_low < won.gain
    assert math.log(won.alpha_break) == pytest.approx(-2, abs=0.3)


def test_the_power_law_is_found_on_both_scales():
    rng = np.random.default_rng(1)
    y = prompts(rng, 2 * X, noise=0.02)
    assert nonlinear(np.exp(X), y).exponent == pytest.approx(2.0, abs=0.05)
    flat = np.exp(2 * X) + 0.01 * rng.normal(size=(16, 11))
    linear = nonlinear(np.exp(X), flat, scale="linear")
    assert linear.exponent == pytest.approx(2.0, abs=0.15)
    assert linear.granted is False
    hinge = 3 * np.maximum(X + 1.5, 0) + 0.02 * rng.normal(size=(16, 11))
    assert nonlinear(np.exp(X), hinge, scale="linear").granted


def test_leave_one_out_error_is_what_a_loop_gives():
    rng = np.random.default_rng(5)
    y = np.log(prompts(rng, 2 * X, 7, 0.3))
    errors = []
    for i in range(7):
        b, a = np.polyfit(X, np.delete(y, i, 0).mean(0), 1)
        miss = y[i] - (a + b * X)
        errors.append(((miss - miss.mean()) ** 2).mean())
    assert nonlinear(np.exp(X), np.exp(y)).error_power == pytest.approx(np.mean(errors), rel=1e-9)


def test_kink_edges():
    rng = np.random.default_rng(0)
    y = prompts(rng, 2 * X)
    assert nonlinear(np.exp(X), y[:3]).reason == "prompts<4"
    assert nonlinear(np.exp(X), y, ceiling=float(np.median(y[:, 3]))).reason == "strengths<5"
    order = rng.permutation(11)
    a, b = nonlinear(np.exp(X), y), nonlinear(np.exp(X[order]) * 7, y[:, order])
    assert b.gain == pytest.approx(a.gain)
    assert a.granted == b.granted
    holes = y.copy()
    holes[0, 2] = np.nan
    assert nonlinear(np.exp(X), holes).n == 15
    for call, text in (
        (lambda: nonlinear(np.exp(X), y, scale="loglog"), "linear"),
        (lambda: nonlinear(np.exp(X[:3]), y), "prompt, alpha"),
        (lambda: broken_stick([0.1, 0.1], [[1.0, 2.0]]), "different"),
    ):
        with pytest.raises(MetricError, match=text):
            call()
