"""gate.linear/1: closed forms, the noise floor, and what it refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import compute

A = np.geomspace(1e-3, 1, 13)  # four points a decade


def gate(a, r, **more):
    return compute("gate.linear/1", a, r, **more)


def test_linear_passes_over_its_whole_range():
    r = gate(A, 3 * A)
    assert float(r) == pytest.approx(1, rel=1e-12)
    assert r.extras["passes"]
    assert (r.extras["alpha_low"], r.extras["alpha_high"]) == (A[0], A[-1])
    assert r.extras["gain"] == pytest.approx(3, rel=1e-12)
    np.testing.assert_allclose(r.profile, 1, rtol=1e-12)


def test_even_part_cancels_and_is_told():
    r = gate(A, np.stack([2 * A + A**2, -2 * A + A**2], axis=1))
    assert float(r) == pytest.approx(1, rel=1e-12)
    assert r.extras["gain"] == pytest.approx(2, rel=1e-12)
    np.testing.assert_allclose(r.extras["even_share"], A / 2, rtol=1e-12)
    vectors = np.zeros((len(A), 2, 3))
    vectors[:, 0, 0], vectors[:, 1, 0], vectors[:, :, 2] = 2 * A, -2 * A, (A**2)[:, None]
    assert gate(A, vectors).extras["gain"] == pytest.approx(2, rel=1e-12)


def test_quadratic_fails_with_slope_two():
    r = gate(A, A**2)
    assert float(r) == pytest.approx(2, rel=1e-12)
    assert not r.extras["passes"]
    assert math.isnan(r.extras["alpha_low"])
    assert r.reason is None


@pytest.mark.parametrize(("slope", "passes"), [(0.9, True), (1.1, True), (0.89, False), (1.11, False)])
def test_power_laws_at_the_edge(slope, passes):
    r = gate(A, A**slope)
    assert float(r) == pytest.approx(slope, rel=1e-12)
    assert r.extras["passes"] is passes


def test_saturation_ends_the_range():
    """r = α/(1 + α): the local slope is 1/(1 + α), so a stretch up to α has a slope between 1/(1 + α) and 1."""
    r = gate(A, A / (1 + A))
    assert r.extras["passes"]
    assert r.extras["alpha_low"] == A[0]
    assert 0.1 < r.extras["alpha_high"] < 0.4
    assert not gate(A, np.minimum(A, 1e-3)).extras["passes"]


def test_noise_floor_is_excluded():
    r = np.where(A >= 0.0999, A, 0.1)
    assert not gate(A[:8], r[:8]).extras["passes"]
    found = gate(A, r, null=0.05)
    assert found.extras["n_below_floor"] == (r <= 0.15).sum()
    assert found.extras["alpha_low"] == A[r > 0.15][0]
    assert found.extras["passes"]
    assert float(found) == pytest.approx(1, rel=1e-12)
    assert gate(A, r, null=np.full(len(A), 0.05)).extras["alpha_low"] == found.extras["alpha_low"]
    nothing = gate(A, r, null=1.0)
    assert math.isnan(float(nothing))
    assert nothing.reason == "noise-floor"
    assert not gate(A, r, null=math.nan).extras["passes"]


def test_flatness_is_asked_beside_the_slope():
    """A dent in the middle of a stretch has slope 1 by symmetry and is not linear."""
    a = np.geomspace(0.1, 1, 5)
    assert not gate(a, a * np.array([1, 1, 0.5, 1, 1])).extras["passes"]


def test_reasons():
    assert gate([], []).reason == "empty"
    assert gate([0.1, 1], [0.1, 1]).reason == "steps<3"
    short = gate([0.1, 0.15, 0.2], [0.1, 0.15, 0.2])
    assert short.reason == "span<half-decade"
    assert float(short) == pytest.approx(1)
    assert not short.extras["passes"]
    broken = np.array([np.nan] * 7 + [1.0] * 6)
    assert gate(A, broken).reason == "coverage"
    hole = 3 * A
    hole[6] = np.inf
    assert gate(A, hole).extras["alpha_high"] in (A[5], A[-1])
    for a, r in (([0.0, 1], [0, 1]), ([1, 1, 2], [1, 1, 2]), ([1, 2], [1, 2, 3]), ([1, 2, 3], np.ones((3, 4)))):
        with pytest.raises(MetricError, match=r"gate\.linear"):
            gate(a, r)
    with pytest.raises(MetricError, match="null"):
        gate(A, A, null=[1.0, 2.0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), factor=st.floats(1e-6, 1e6))
def test_order_scale_and_rotation_do_not_matter(seed, factor):
    rng = np.random.default_rng(seed)
    r = A[:, None, None] * rng.normal(size=(1, 2, 4)) * (1 + 0.05 * rng.normal(size=(len(A), 1, 1)))
    base, order = gate(A, r), rng.permutation(len(A))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    for other in (gate(A[order], r[order]), gate(A, r * factor), gate(A, r @ turn)):
        assert float(other) == pytest.approx(float(base), rel=1e-8)
        assert other.extras["passes"] == base.extras["passes"]
