"""The psychometric function: vectors, scipy as the independent version, censoring, separation, dispersion."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import betabinom

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import fit_psychometric
from dynprobe.metrics.statistics._betabinomial import beta_binomial_fit, draw_beta_binomial
from dynprobe.metrics.statistics._likelihood import _derivatives, box, fit_many, log_likelihood

DOSES = np.array([0.05, 0.1, 0.2, 0.4, 0.8, 1.6])


def psi(a, a50, beta, gamma=0.0, lapse=0.0):
    return gamma + (1 - gamma - lapse) / (1 + (np.asarray(a) / a50) ** -beta)


def test_vector_psy_1():
    fit = fit_psychometric([0.1, 0.3], [1, 3], [4, 4], lapse=0.0, n_boot=0)
    assert fit.value == pytest.approx(math.sqrt(0.03), rel=1e-9)
    assert fit.slope == pytest.approx(2.0, rel=1e-9)
    assert fit.width == pytest.approx(2 * math.log(19) / 2.0, rel=1e-9)
    assert fit.deviance == pytest.approx(0.0, abs=1e-9)


def test_alpha50_is_where_f_is_a_half():
    """With γ = 0.1, λ = 0.05, ψ(α50) = 0.525, and ψ = 0.5 is F = 0.4706."""
    n = 10**6
    k = np.round(n * psi(DOSES, 0.3, 3.0, 0.1, 0.05))
    fit = fit_psychometric(DOSES, k, np.full(6, n), gamma=0.1, lapse=0.05, n_boot=0)
    assert fit.value == pytest.approx(0.3, rel=1e-5)
    assert fit.predict([0.3])[0] == pytest.approx(0.525, rel=1e-5)
    free = fit_psychometric(
        np.r_[0, DOSES], np.r_[n // 10, k], np.full(7, n), lapse=(0, 0.2), n_boot=0
    )  # sham trials give γ
    assert (free.gamma, free.lapse) == (pytest.approx(0.1, abs=1e-4), pytest.approx(0.05, abs=2e-3))
    assert free.value == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_maximum_is_scipys(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(5, 30, 7).astype(float)
    a = np.r_[0.0, DOSES]
    k = rng.binomial(n.astype(int), psi(np.maximum(a, 1e-12), 0.3, rng.uniform(1, 5), 0.05, 0.05)).astype(float)
    with np.errstate(divide="ignore"):
        x = np.log(a)
    limits = box(x, (0.0, 0.5), (0.0, 0.1))
    starts = [[m, s, 0.02, 0.02] for m in np.log(DOSES) for s in (0.0, 1.0, 2.0)]

    def loss(v):
        return -log_likelihood(v[None], x, k[None], n[None])[0]

    best = min(
        (minimize(loss, s, method="L-BFGS-B", bounds=list(zip(*limits, strict=True))) for s in starts),
        key=lambda o: o.fun,
    )
    fit = fit_psychometric(a, k, n, n_boot=0)
    assert fit.loglik >= -best.fun - 1e-6
    if fit.status == "resolved":
        assert fit.loglik == pytest.approx(-best.fun, abs=1e-4)
        assert math.log(fit.value) == pytest.approx(best.x[0], abs=0.02)


def test_derivatives_are_those_of_the_likelihood():
    rng = np.random.default_rng(0)
    x = np.r_[-np.inf, np.log(DOSES)]
    theta, n = np.array([[-1.2, 0.9, 0.07, 0.04]]), np.full((1, 7), 12.0)
    k = rng.binomial(12, 0.4, (1, 7)).astype(float)
    score, _ = _derivatives(theta, x, k, n)
    for i in range(4):
        up, down = theta.copy(), theta.copy()
        up[0, i] += 1e-6
        down[0, i] -= 1e-6
        slope = (log_likelihood(up, x, k, n) - log_likelihood(down, x, k, n)) / 2e-6
        assert score[0, i] == pytest.approx(slope[0], rel=1e-5, abs=1e-5)


def test_many_fits_equal_one_by_one():
    rng = np.random.default_rng(2)
    x = np.log(DOSES)
    n = np.full((40, 6), 20.0)
    k = rng.binomial(20, psi(DOSES, 0.3, 3.0, 0.0, 0.05), (40, 6)).astype(float)
    limits = box(x, (0.0, 0.0), (0.0, 0.1))
    start = np.array([-1.0, 1.0, 0.0, 0.02])
    many = fit_many(x, k, n, limits, start)
    assert many.converged.all()
    for i in range(40):
        one = fit_many(x, k[i : i + 1], n[i : i + 1], limits, start, rest=1e-12)
        assert many.loglik[i] == pytest.approx(one.loglik[0], abs=1e-5)
        assert many.theta[i, 0] == pytest.approx(one.theta[0, 0], abs=0.05)
    assert (
        np.median(
            np.abs(
                many.theta[:, 0]
                - [fit_many(x, k[i : i + 1], n[i : i + 1], limits, start, rest=1e-12).theta[0, 0] for i in range(40)]
            )
        )
        < 1e-4
    )


def test_separation_gives_a_bracket_and_no_point():
    fit = fit_psychometric(DOSES, [0, 0, 0, 9, 9, 9], np.full(6, 9))
    assert (fit.status, fit.reason) == ("not-resolved", "separated")
    assert fit.bounds == (pytest.approx(0.2), pytest.approx(0.4))
    assert math.isnan(fit.value)
    assert math.isnan(fit.slope)
    assert np.isnan(fit.predict([0.3])).all()
    one_between = fit_psychometric(DOSES, [0, 0, 0, 4, 9, 9], np.full(6, 9), n_boot=0)
    assert (one_between.reason, one_between.bounds) == ("separated", (pytest.approx(0.2), pytest.approx(0.8)))


def test_censored_at_both_ends_and_flat():
    none = fit_psychometric(DOSES, np.zeros(6), np.full(6, 9))
    assert (none.status, none.low, none.high) == ("right-censored", pytest.approx(1.6), np.inf)
    assert math.isnan(none.value)
    all_ = fit_psychometric(DOSES, np.full(6, 9), np.full(6, 9))
    assert (all_.status, all_.low, all_.high) == ("left-censored", -np.inf, pytest.approx(0.05))
    beyond = fit_psychometric(DOSES, [0, 0, 1, 1, 2, 3], np.full(6, 9), n_boot=0)
    assert beyond.status == "right-censored"
    falling = fit_psychometric(DOSES, [9, 8, 6, 4, 2, 0], np.full(6, 9), n_boot=0)
    assert (falling.status, falling.reason) == ("not-resolved", "no increase with dose")
    assert fit_psychometric([], [], []).reason == "empty"
    assert fit_psychometric([0.0], [1], [9]).reason == "sham only"


def simulate(rng, prompts=24, sigma=0.5, beta=4.0, lapse=0.03, seeds=10, a50=0.45):
    doses = np.geomspace(0.1, 2, 7)
    own = np.log(a50) + sigma * rng.normal(size=(prompts, 1))
    p = (1 - lapse) / (1 + np.exp(-beta * (np.log(doses) - own)))
    k = rng.binomial(seeds, p)
    return np.tile(doses, prompts), k.ravel(), np.full(k.size, seeds), np.repeat(np.arange(prompts), 7)


def test_order_of_rows_and_scale_of_alpha():
    rng = np.random.default_rng(0)
    a, k, n, c = simulate(rng)
    fit = fit_psychometric(a, k, n, clusters=c.tolist(), n_boot=200)
    scaled = fit_psychometric(a * 100, k, n, clusters=c.tolist(), n_boot=200)
    for name in ("value", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(100 * getattr(fit, name), rel=1e-4)
    assert scaled.slope == pytest.approx(fit.slope, rel=1e-4)
    order = rng.permutation(len(a))
    mixed = fit_psychometric(a[order], k[order], n[order], clusters=c[order].tolist(), n_boot=200)
    assert mixed.value == pytest.approx(fit.value, rel=1e-9)
    split = fit_psychometric(
        np.repeat(a, n), np.concatenate([np.arange(m) < j for j, m in zip(k, n, strict=True)]), n_boot=0
    )
    assert split.value == pytest.approx(fit.value, rel=1e-9)


def test_clusters_widen_the_interval_and_flatten_the_slope():
    a, k, n, c = simulate(np.random.default_rng(1), prompts=40)
    clustered = fit_psychometric(a, k, n, clusters=c.tolist(), n_boot=500)
    naive = fit_psychometric(a, k, n, n_boot=500)
    assert clustered.value == naive.value
    wide, narrow = (math.log(f.high / f.low) for f in (clustered, naive))
    assert wide > 1.5 * narrow
    attenuated = 4.0 / math.sqrt(1 + (0.588 * 4.0 * 0.5) ** 2)
    assert clustered.slope == pytest.approx(attenuated, rel=0.15)
    assert clustered.n_clusters == 40
    over = fit_psychometric(a, k, n, overdispersion=True, n_boot=500)
    assert over.overdispersion > 0.1
    assert math.log(over.high / over.low) > 1.2 * narrow


def test_beta_binomial_likelihood_is_scipys_and_finds_rho():
    rng = np.random.default_rng(0)
    x = np.tile(np.log(DOSES), 60)
    n = np.full(len(x), 12.0)
    rate = psi(np.exp(x), 0.3, 3.0)
    k = draw_beta_binomial(rng, rate, 0.2, n, 1)[0].astype(float)
    limits = box(x, (0.0, 0.0), (0.0, 0.0))
    theta, rho = beta_binomial_fit(x, k, n, limits, np.array([-1.0, 1.0, 0.0, 0.0]))
    assert rho == pytest.approx(0.2, abs=0.05)
    assert theta[0] == pytest.approx(math.log(0.3), abs=0.12)

    def loss(v):
        p, s = psi(np.exp(x), np.exp(v[0]), np.exp(v[1])), 1 / v[2] - 1
        return -betabinom.logpmf(k, n, p * s, (1 - p) * s).sum()

    here = loss([theta[0], theta[1], rho])
    for step in ([0.05, 0, 0], [-0.05, 0, 0], [0, 0.05, 0], [0, -0.05, 0], [0, 0, 0.02], [0, 0, -0.02]):
        assert loss(np.array([theta[0], theta[1], rho]) + step) > here
    plain = rng.binomial(12, rate).astype(float)
    assert beta_binomial_fit(x, plain, n, limits, np.array([-1.0, 1.0, 0.0, 0.0]))[1] < 0.03


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (([0.1], [1, 2]), {}, "per row"),
        (([0.1, 0.2], [1, 2], [2, 2]), {"clusters": ["a"]}, "per row"),
        (([0.1, -0.2], [1, 2], [2, 2]), {}, "sham"),
        (([0.1, 0.2], [1, 3], [2, 2]), {}, "counts"),
        (([0.1, 0.2], [1, np.nan], [2, 2]), {}, "counts"),
        (([0.1, 0.2], [1, 2], [2, 2]), {"gamma": 1.5}, "rate"),
        (([0.1, 0.2], [1, 2], [2, 2]), {"gamma": 0.6, "lapse": 0.5}, "below 1"),
    ],
)
def test_refusals(args, kwargs, text):
    with pytest.raises(MetricError, match=text):
        fit_psychometric(*args, **kwargs)
