"""Delay embedding, its principal axes, and what they are for series without any dynamics."""

import math

import numpy as np
import pytest
import slow_delay as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import (
    autocorrelation,
    axis_similarity,
    choose_lag,
    choose_theiler,
    compute,
    delay_embed,
    delay_pca,
    ids,
    lag_autocorrelation,
    mirror_symmetry,
    mutual_information,
    reference_axes,
    spec,
)
from dynprobe.metrics._delay import AXES


def ar1(phi, n, rng):
    x = np.empty(n + 300)
    x[0] = rng.standard_normal()
    for t, e in enumerate(rng.standard_normal(n + 299), 1):
        x[t] = phi * x[t - 1] + e
    return x[300:]


NOISES = {
    "white": lambda n, rng: rng.standard_normal(n),
    "uniform": lambda n, rng: rng.random(n),
    "ar1": lambda n, rng: ar1(0.9, n, rng),
    "near a walk": lambda n, rng: ar1(0.99, n, rng),
    "anti": lambda n, rng: ar1(-0.5, n, rng),
    "walk": lambda n, rng: rng.standard_normal(n).cumsum(),
    "heavy tails": lambda n, rng: rng.standard_t(3, n),
}


def median_of(read, make, n, times=9):
    rng = np.random.default_rng(7)
    return np.median([read(delay_pca(make(n, rng), 6).axes) for _ in range(times)], axis=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.integers(5, 60))
def test_windows_are_the_formula(seed, m, lag, n):
    x = np.random.default_rng(seed).normal(size=n)
    assert delay_embed(x, m, lag).tolist() == slow.windows(x.tolist(), m, lag)
    if n - lag > 2:
        assert lag_autocorrelation(x, lag) == pytest.approx(
            slow.pearson(x[:-lag].tolist(), x[lag:].tolist()), abs=1e-12
        )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(1, 3), st.sampled_from([1e-150, 1.0, 1e150]))
def test_components_diagonalise_the_correlation_matrix(seed, m, lag, scale):
    x = np.random.default_rng(seed).normal(size=90).cumsum()
    found, matrix = delay_pca(x * scale, m, lag), np.array(slow.correlation_matrix(x.tolist(), m, lag))
    assert found.reason is None
    assert found.shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(found.axes @ matrix @ found.axes.T, np.diag(found.eigenvalues), atol=1e-8)
    np.testing.assert_allclose(found.axes @ found.axes.T, np.eye(m), atol=1e-10)
    assert (np.diff(found.eigenvalues) <= 1e-12).all()


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("n", [40, 200])
def test_two_columns_have_the_same_axes_whatever_the_series(name, n):
    """The "universal fixed axes": at m = 2 an identity, noise included, and the share is the autocorrelation."""
    rng = np.random.default_rng(n)
    for _ in range(5):
        x = NOISES[name](n, rng)
        found, r = delay_pca(x, 2), lag_autocorrelation(x)
        np.testing.assert_allclose(np.abs(found.axes), math.sqrt(0.5), atol=1e-9)
        np.testing.assert_allclose(found.eigenvalues, [1 + abs(r), 1 - abs(r)], atol=1e-12)
        np.testing.assert_allclose(mirror_symmetry(found.axes), 1, atol=1e-9)
        for kind in AXES:
            np.testing.assert_allclose(axis_similarity(found.axes, kind)[0], 1, atol=1e-9)
    # windows that share nothing, and windows of many series pooled, give them as well
    apart = delay_pca(list(rng.standard_normal((n, 2))), 2)
    np.testing.assert_allclose(np.abs(apart.axes), math.sqrt(0.5), atol=1e-9)


@pytest.mark.parametrize("name", NOISES)
def test_axes_of_a_long_noise_are_even_and_odd(name):
    """Overlapping windows make the matrix Toeplitz, of white noise too; its axes are their own mirror images."""
    assert median_of(mirror_symmetry, NOISES[name], 20_000).min() > 0.98


def test_axes_of_windows_that_share_nothing_are_arbitrary():
    """The control: the same white noise, each value used once. Its axes are any directions."""
    rng = np.random.default_rng(3)
    found = np.mean([mirror_symmetry(delay_pca(list(rng.standard_normal((1000, 6))), 6).axes) for _ in range(15)])
    assert 0.3 < found < 0.65
    # and from white noise to white noise even the overlapping ones point anywhere among even and odd vectors
    first = [delay_pca(rng.standard_normal(5000), 6).axes[0] for _ in range(20)]
    agreement = np.abs(np.array(first) @ np.array(first).T)[np.triu_indices(20, 1)]
    assert agreement.min() < 0.2


def test_axes_of_correlated_noise_are_fixed_waves():
    for name, kind, least in (("walk", "cosine", 0.999), ("near a walk", "cosine", 0.998), ("ar1", "cosine", 0.99)):
        assert median_of(lambda a, kind=kind: axis_similarity(a, kind)[0], NOISES[name], 20_000).min() > least, name
    weak = median_of(lambda a: axis_similarity(a, "sine")[0], lambda n, rng: ar1(0.1, n, rng), 100_000, 3)
    assert weak.min() > 0.99
    rng = np.random.default_rng(0)
    for name in ("ar1", "near a walk", "walk"):
        signs = np.sign(delay_pca(NOISES[name](20_000, rng), 6).axes)
        assert (np.diff(signs, axis=1) != 0).sum(1).tolist() == [0, 1, 2, 3, 4, 5], name
    # anticorrelated noise: the same kind of waves, fastest first
    anti = np.sign(delay_pca(NOISES["anti"](20_000, rng), 6).axes)
    assert (np.diff(anti, axis=1) != 0).sum(1).tolist() == [5, 4, 3, 2, 1, 0]
    # two random walks that have nothing to do with each other have the same axes
    a, b = (delay_pca(rng.standard_normal(20_000).cumsum(), 6).axes for _ in range(2))
    assert np.abs((a * b).sum(1)).min() > 0.999


def test_a_walk_has_exactly_the_cosines_in_the_limit():
    """Covariance C − |i − j|/2 of a long walk: DCT-II vectors are its eigenvectors on what sums to zero."""
    m = 7
    i = np.arange(m)
    centring = np.eye(m) - 1 / m
    kernel = centring @ (-0.5 * np.abs(i[:, None] - i)) @ centring
    cosines = reference_axes(m, "cosine")
    turned = cosines @ kernel @ cosines.T
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-12)
    # C changes the common mode alone, up to 1/C
    values, vectors = np.linalg.eigh(1e9 - 0.5 * np.abs(i[:, None] - i))
    assert axis_similarity(vectors.T, "cosine")[0].min() > 1 - 1e-6
    assert (np.diff(values) > 0).all()


def test_smooth_series_have_legendre_axes():
    t = np.linspace(0, 2 * np.pi * 6, 6000)
    x = np.sin(t) + 0.4 * np.sin(2.7 * t + 1)
    found = delay_pca(x, 5, 8, standardise=False)
    assert axis_similarity(found.axes[:4], "legendre")[0].min() > 0.99


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("m", [1, 2, 3, 6, 12])
def test_reference_axes_are_orthonormal_and_even_or_odd(kind, m):
    axes = reference_axes(m, kind)
    np.testing.assert_allclose(axes @ axes.T, np.eye(m), atol=1e-9)
    np.testing.assert_allclose(axes[:, ::-1], axes * (-1.0) ** np.arange(m)[:, None], atol=1e-9)
    assert axis_similarity(axes, kind)[1].tolist() == list(range(m))


def test_axes_that_are_none_are_missing():
    found = delay_pca(np.arange(42.0) % 2, 3)
    assert found.degenerate.tolist() == [False, True, True]
    assert np.isnan(found.axes[1:]).all()
    assert np.isnan(axis_similarity(found.axes, "sine")[0]).tolist() == [False, True, True]
    assert axis_similarity(found.axes, "sine")[1].tolist()[1:] == [-1, -1]
    for x, reason in (
        (np.ones(50), "constant"), (np.arange(20.0), "windows<20"), ([1.0, np.nan] * 30, "nonfinite"),
        ([], "windows<20"),
    ):  # fmt: skip
        nothing = delay_pca(x, 2)
        assert nothing.reason == reason
        assert np.isnan(nothing.shares).all()
    assert delay_pca(1e8 + np.random.default_rng(0).normal(size=50) * 1e-9, 2).reason == "constant"


def test_lag_and_theiler_window():
    rng = np.random.default_rng(5)
    x = ar1(0.9, 4000, rng)
    assert choose_theiler(x).value == pytest.approx(9.5, abs=4)
    assert choose_theiler(np.arange(100.0)).value in range(20, 26)
    assert choose_theiler(np.ones(9)) == (1, "1: no variation to choose by")
    assert choose_lag(np.ones(9)).rule.startswith("1: no variation")
    assert "no minimum" in choose_lag(np.arange(60.0)).rule
    biased = autocorrelation(x, 3)
    centred = x - x.mean()
    assert biased[2] == pytest.approx((centred[:-2] @ centred[2:]) / (centred @ centred))
    # independent values: the plug-in bias; the value itself: the entropy of the bins
    white = mutual_information(rng.standard_normal(2000), 5)
    assert white[0] == pytest.approx(math.log(16), abs=0.01)
    assert white[1:].mean() == pytest.approx(15**2 / 4000, rel=0.3)
    np.testing.assert_allclose(mutual_information(np.exp(x), 4), mutual_information(x, 4))


def test_refusals():
    x = np.arange(50.0)
    for call, text in (
        (lambda: delay_embed(x[None], 2), "one series"), (lambda: delay_embed(x, 0), "dim is a whole"),
        (lambda: delay_embed(x, 2, 0), "lag is a whole"), (lambda: delay_embed(x, 1.5), "dim is a whole"),
        (lambda: reference_axes(3, "cosin"), "Did you mean 'cosine'"),
        (lambda: axis_similarity(x, "sine"), "takes axes"),
        (lambda: compute("delay.pc_share/1", x, k=3), "k is the number"),
    ):  # fmt: skip
        with pytest.raises(MetricError, match=text):
            call()


def test_catalogue_entries_and_their_vectors():
    assert ids(group="delay") == [
        "delay.autocorr/1", "delay.fnn/1", "delay.pc_share/1", "delay.pc_mirror/1", "delay.pc_cosine/1",
    ]  # fmt: skip
    assert not any(spec(metric).levels for metric in ids(group="delay"))
    flip, wave = np.arange(42.0) % 2, np.tile([0.0, 1.0, 0.0, -1.0], 25)
    for metric, x, params, value in (
        ("delay.autocorr/1", flip[:6], {}, -1.0), ("delay.autocorr/1", np.arange(9.0), {}, 1.0),
        ("delay.fnn/1", wave, {"m": 1}, 26 / 99), ("delay.fnn/1", wave, {"m": 2}, 0.0),
        ("delay.pc_share/1", flip[:30], {}, 1.0), ("delay.pc_mirror/1", np.arange(40.0) ** 2, {}, 1.0),
        ("delay.pc_cosine/1", np.arange(40.0) ** 2, {}, 1.0),
    ):  # fmt: skip
        assert float(compute(metric, x, **params)) == pytest.approx(value, abs=1e-9), metric
    walk = np.random.default_rng(0).standard_normal(20_000).cumsum()
    assert all(float(compute("delay.pc_cosine/1", walk, m=4, k=k)) > 0.999 for k in (1, 2, 3, 4))
    for metric, x, params, reason in (
        ("delay.autocorr/1", np.ones(9), {}, "constant"), ("delay.autocorr/1", flip[:2], {}, "steps<3"),
        ("delay.fnn/1", wave[:21], {}, "points<20"), ("delay.fnn/1", np.ones(99), {}, "constant"),
        ("delay.pc_share/1", wave[:20], {}, "windows<20"), ("delay.pc_mirror/1", flip, {"m": 3, "k": 2}, "degenerate"),
        ("delay.fnn/1", [*wave, np.nan], {}, "nonfinite"), ("delay.pc_share/1", [], {}, "empty"),
    ):  # fmt: skip
        found = compute(metric, x, **params)
        assert (found.reason, math.isnan(found.value)) == (reason, True), metric
    result = compute("delay.fnn/1{m=1}", wave)
    assert result.metric_id == "delay.fnn/1{m=1}"
    assert result.extras["r1"] == pytest.approx(lag_autocorrelation(wave))
    assert {"n_points", "n_equal", "by_distance", "by_size", "end_mismatch"} <= set(result.extras)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_scale_and_an_added_constant_do_not_matter(seed, factor, offset):
    x = np.random.default_rng(seed).normal(size=80).cumsum()
    for metric in ids(group="delay"):
        assert float(compute(metric, factor * x + offset)) == pytest.approx(float(compute(metric, x)), abs=1e-6), metric
