"""Surrogates keep what they claim to keep, and nothing decides a draw but seed, name, kind and number."""

import numpy as np
import pytest
import slow_delay as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import SURROGATES, end_mismatch, lag_autocorrelation, spectrum_error, surrogates
from dynprobe.metrics._surrogates import ar1_fit


def skewed(n, seed=0):
    return np.exp(np.convolve(np.random.default_rng(seed).standard_normal(n + 9), np.ones(10) / 3, "valid"))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(8, 61), st.sampled_from([1e-8, 1.0, 1e8]), st.floats(-5, 5))
def test_fourier_surrogates_keep_every_amplitude(seed, n, scale, offset):
    x = scale * (skewed(n, seed) + offset)
    made = surrogates(x, "ft", 3, seed=seed)
    own = np.array(slow.amplitudes(x.tolist()))
    for one in made:
        np.testing.assert_allclose(slow.amplitudes(one.tolist()), own, rtol=1e-6, atol=1e-9 * own.max())
    np.testing.assert_allclose(made.mean(1), x.mean(), atol=1e-9 * np.abs(x).max())
    np.testing.assert_allclose(made.var(1), x.var(), rtol=1e-6)
    assert spectrum_error(x, made).max() < 1e-6


@pytest.mark.parametrize("kind", ["aaft", "iaaft"])
@pytest.mark.parametrize("n", [50, 201])
def test_amplitude_adjusted_surrogates_keep_every_value_exactly(kind, n):
    x = skewed(n)
    made = surrogates(x, kind, 5)
    assert (np.sort(made, axis=1) == np.sort(x)).all()
    ties = np.round(x)
    assert (np.sort(surrogates(ties, kind, 3), axis=1) == np.sort(ties)).all()


def test_iterating_brings_the_spectrum_nearer():
    x = skewed(400)
    once, often = (spectrum_error(x, surrogates(x, kind, 20)).mean() for kind in ("aaft", "iaaft"))
    shuffled = spectrum_error(x, np.random.default_rng(0).permuted(np.tile(x, (20, 1)), axis=1)).mean()
    assert often < 0.5 * once
    assert often < 0.12
    assert once < shuffled


def test_iaaft_draws_are_different_orders():
    made = surrogates(skewed(120), "iaaft", 30)
    assert len(np.unique(made, axis=0)) == 30
    assert abs(np.corrcoef(made)[np.triu_indices(30, 1)]).mean() < 0.35


@pytest.mark.parametrize("phi", [-0.6, 0.0, 0.8])
def test_ar1_surrogates_have_the_fitted_correlation(phi):
    rng = np.random.default_rng(3)
    x = np.empty(4000)
    x[0] = 5.0
    for t in range(1, 4000):
        x[t] = 5.0 * (1 - phi) + phi * x[t - 1] + 2 * rng.standard_normal()
    c, slope, s = ar1_fit(x)
    wanted = np.polyfit(x[:-1], x[1:], 1)
    assert (slope, c) == pytest.approx(tuple(wanted), abs=1e-9)
    assert s == pytest.approx(2, rel=0.05)
    made = surrogates(x, "ar1", 19)
    assert np.mean([lag_autocorrelation(one) for one in made]) == pytest.approx(slope, abs=0.02)
    assert made.mean() == pytest.approx(5.0, abs=0.3)
    assert made.std() == pytest.approx(x.std(), rel=0.05)
    assert (made[:, 0] == x[0]).all()


def test_ar1_surrogates_of_a_walk_wander_and_of_a_ramp_repeat_it():
    walk = np.random.default_rng(0).standard_normal(300).cumsum()
    made = surrogates(walk, "ar1", 39)
    assert np.median([one.std() for one in made]) == pytest.approx(walk.std(), rel=0.8)
    assert min(lag_autocorrelation(one) for one in made) > 0.8
    ramp = np.arange(50.0)
    np.testing.assert_allclose(surrogates(ramp, "ar1", 2), [ramp, ramp], atol=1e-8)


@pytest.mark.parametrize("kind", SURROGATES)
def test_a_draw_depends_on_seed_name_kind_and_number_alone(kind):
    x = skewed(64)
    many = surrogates(x, kind, 25, seed=4, key="p1")
    np.testing.assert_array_equal(surrogates(x, kind, 7, seed=4, key="p1"), many[:7])
    assert len(np.unique(many.round(12), axis=0)) == 25
    for other in (surrogates(x, kind, 25, seed=5, key="p1"), surrogates(x, kind, 25, seed=4, key="p2")):
        assert not (other == many).all(1).any()


def test_draws_of_neighbouring_numbers_are_no_shifted_copies():
    made = surrogates(np.random.default_rng(0).standard_normal(256), "ar1", 19)
    for shift in range(-9, 10):
        moved = np.roll(made[1:], shift, axis=1)
        assert np.abs([np.corrcoef(a, b)[0, 1] for a, b in zip(made[:-1], moved, strict=True)]).max() < 0.35


def test_jump_between_the_ends():
    assert end_mismatch(np.sin(np.linspace(0, 2 * np.pi, 100))) < 1e-12
    noise = np.random.default_rng(0).standard_normal((2000, 100))
    assert np.mean([end_mismatch(x) for x in noise]) == pytest.approx(2 / 100, rel=0.1)
    assert np.isnan(end_mismatch(np.ones(5)))


def test_refusals():
    x = np.arange(30.0)
    for args, text in (
        ((x, "iaft"), "Did you mean 'iaaft'"), ((x[:7], "ft"), "at least 8"), ((np.ones(30), "ft"), "not all equal"),
        (([*x, np.nan], "ft"), "finite"), ((x, "ft", 0), "at least 1"), ((x[None], "ft"), "one series"),
    ):  # fmt: skip
        with pytest.raises(MetricError, match=text):
            surrogates(*args)
    with pytest.raises(MetricError, match="5 values"):
        ar1_fit([1.0, 2.0])
