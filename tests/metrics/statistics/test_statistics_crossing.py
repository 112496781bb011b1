"""First crossings: closed forms, censoring, holes, order, scale, and a slow independent version."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics.statistics import first_crossing
from dynprobe.metrics.statistics._crossing import crossings

GRID = np.array([0.1, 0.2, 0.4, 0.8, 1.6])


def slow(alphas, responses, level, floor=0.0):
    """Walk upwards, point by point, with math only."""
    points = sorted((a, r) for a, r in zip(alphas, responses, strict=True) if a > 0 and math.isfinite(r))
    if points[0][1] >= level:
        return -math.inf
    for (a, r), (b, s) in pairwise(points):
        if r < level <= s:
            straight = r > floor and r > 0 and level > 0
            f = math.log if straight else float
            part = (f(level) - f(r)) / (f(s) - f(r))
            return math.exp(math.log(a) + part * math.log(b / a))
    return math.inf


@pytest.mark.parametrize("power", [1.0, 2.0, 2.7])
def test_power_law_is_exact(power):
    c = first_crossing(GRID, (GRID / 0.3) ** power, 1.0)
    assert c.value == pytest.approx(0.3, rel=1e-12)
    assert (c.low, c.high, c.status, c.reason, c.n_crossings, c.monotone) == (0.2, 0.4, "resolved", None, 1, True)
    assert c.half_width == pytest.approx(math.log(2) / 2)


def test_level_met_exactly_is_the_strength_itself():
    assert first_crossing(GRID, GRID, 0.4).value == pytest.approx(0.4, rel=1e-15)


def test_no_logarithm_below_zero_or_floor():
    """0 → 1 at level 1/4 is a quarter of the way in ln α; the same when the lower response lies in the noise."""
    expected = 0.1 * 2**0.25
    assert first_crossing([0.1, 0.2], [0.0, 1.0], 0.25).value == pytest.approx(expected, rel=1e-14)
    assert first_crossing([0.1, 0.2], [-1.0, 1.0], 0.5).value == pytest.approx(0.1 * 2**0.75, rel=1e-14)
    noisy = first_crossing([0.1, 0.2], [1e-3, 1.0], 0.25, floor=1e-2)
    assert noisy.value == pytest.approx(0.1 * 2 ** ((0.25 - 1e-3) / (1 - 1e-3)), rel=1e-14)


def test_censoring_never_gives_the_end_of_the_range():
    left = first_crossing(GRID, [2, 3, 4, 5, 6], 1.0)
    assert (left.status, left.low, left.high) == ("left-censored", -np.inf, 0.1)
    assert math.isnan(left.value)
    right = first_crossing(GRID, [0.1, 0.2, 0.3, 0.4, 0.5], 1.0)
    assert (right.status, right.low, right.high) == ("right-censored", 1.6, np.inf)
    assert math.isnan(right.value)
    back = first_crossing(GRID, [2, 0.5, 0.5, 2, 3], 1.0)
    assert (back.status, back.n_crossings, back.monotone) == ("left-censored", 2, False)


def test_first_of_several_crossings():
    c = first_crossing(GRID, [0.5, 2.0, 0.5, 2.0, 3.0], 1.0)
    assert (c.low, c.high, c.n_crossings, c.monotone) == (0.1, 0.2, 3, False)
    assert c.value == pytest.approx(0.1 * math.sqrt(2))


def test_falls_below_the_level_are_seen_and_noise_is_not():
    assert first_crossing(GRID, [0.1, 0.5, 0.3, 2.0, 3.0], 1.0).monotone is False
    assert first_crossing(GRID, [2e-7, 1e-7, 0.3, 2.0, 3.0], 1.0, floor=1e-7).monotone is True
    assert first_crossing(GRID, [0.1, 0.5, 0.7, 3.0 * (1 + 1e-9), 3.0], 1.0).monotone is True


def test_holes_widen_the_bracket():
    c = first_crossing(GRID, [0.1, np.nan, np.inf, 2.0, 3.0], 1.0)
    assert (c.low, c.high, c.n_dropped, c.n_points) == (0.1, 0.8, 2, 3)
    none = first_crossing(GRID, np.full(5, np.nan), 1.0)
    assert (none.status, none.reason, none.n_dropped, none.monotone) == ("missing", "nonfinite", 5, None)
    assert first_crossing([], [], 1.0).reason == "empty"
    top = first_crossing(GRID, [0.1, 0.2, 0.3, np.nan, np.nan], 1.0)
    assert (top.status, top.low) == ("right-censored", 0.4)


def test_noise_floor():
    r = (GRID / 0.3) ** 2
    assert first_crossing(GRID, r, 1.0, floor=0.0999).status == "resolved"
    c = first_crossing(GRID, r, 1.0, floor=0.1001)
    assert (c.status, c.reason) == ("not-resolved", "level<10×floor")
    assert math.isnan(c.value)
    assert first_crossing(GRID, r, 1.0, floor=0.1001, factor=5).status == "resolved"


def test_sham_is_left_out_and_twins_must_agree():
    r = (GRID / 0.3) ** 2
    with_sham = first_crossing(np.r_[0.0, GRID], np.r_[0.0, r], 1.0)
    assert with_sham == first_crossing(GRID, r, 1.0)
    assert first_crossing(np.r_[GRID, 0.2], np.r_[r, r[1]], 1.0) == with_sham
    with pytest.raises(MetricError, match="twice"):
        first_crossing(np.r_[GRID, 0.2], np.r_[r, 2 * r[1]], 1.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (([0.1, 0.2], [1.0], 1.0), {}, "One response"),
        (([-0.1, 0.2], [1.0, 2.0], 1.0), {}, "sign flip"),
        (([np.nan, 0.2], [1.0, 2.0], 1.0), {}, "finite"),
        (([0.1, 0.2], [1.0, 2.0], np.nan), {}, "level"),
        (([0.1, 0.2], [1.0, 2.0], 1.0), {"floor": -1.0}, "floor"),
    ],
)
def test_refusals(args, kwargs, text):
    with pytest.raises(MetricError, match=text):
        first_crossing(*args, **kwargs)


curve = st.lists(
    st.tuples(st.integers(1, 10**6), st.floats(-0.5, 3.0)), min_size=1, max_size=12, unique_by=lambda p: p[0]
)


@settings(max_examples=100, deadline=None)
@given(points=curve, scale=st.floats(1e-3, 1e3), order=st.randoms())
def test_order_scale_and_the_slow_version(points, scale, order):
    a, r = np.array([p[0] for p in points]) / 1e3, np.array([p[1] for p in points])
    c = first_crossing(a, r, 1.0)
    expected = slow(a, r, 1.0)
    if c.status == "resolved":
        assert c.value == pytest.approx(expected, rel=1e-9)
        assert c.low <= c.value <= c.high
    else:
        assert expected == {"left-censored": -np.inf, "right-censored": np.inf}[c.status]
    mixed = list(range(len(a)))
    order.shuffle(mixed)
    assert repr(first_crossing(a[mixed], r[mixed], 1.0)) == repr(c)
    scaled = first_crossing(a * scale, r, 1.0)
    assert scaled.status == c.status
    if c.status == "resolved":
        assert scaled.value == pytest.approx(c.value * scale, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.floats(0.3, 3.0), factor=st.floats(0.01, 100.0))
def test_powers_and_factors_of_the_response_change_nothing(seed, power, factor):
    """Log–log interpolation is invariant under r → c·rᵖ with the level transformed too."""
    r = np.sort(np.exp(np.random.default_rng(seed).normal(size=5) * 2))
    a, b = first_crossing(GRID, r, 1.0), first_crossing(GRID, factor * r**power, factor)
    assert a.status == b.status
    if a.status == "resolved":
        assert b.value == pytest.approx(a.value, rel=1e-9)
    bent = first_crossing(GRID, np.expm1(r), np.expm1(1.0))
    assert (bent.status, bent.low, bent.high) == (a.status, a.low, a.high)


def test_many_curves_at_once_equal_one_by_one():
    rng = np.random.default_rng(0)
    r = np.exp(rng.normal(size=(200, 5)).cumsum(axis=1))
    many = crossings(np.log(GRID), r, 1.0)
    for row, x in zip(r, many, strict=True):
        c = first_crossing(GRID, row, 1.0)
        one = {"left-censored": -np.inf, "right-censored": np.inf}.get(
            c.status, math.log(c.value) if c.value > 0 else 0
        )
        assert x == pytest.approx(one, rel=1e-12)
