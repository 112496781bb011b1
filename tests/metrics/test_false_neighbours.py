"""False nearest neighbours against a version with loops, on known systems, and on noise that looks like one."""

import math

import numpy as np
import pytest
import slow_delay as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import _false_neighbours as room
from dynprobe.metrics import false_neighbours
from dynprobe.metrics._false_neighbours import points_needed


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(30, 75), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9),
    st.sampled_from(["white", "walk", "digits"]), st.sampled_from([(15.0, 2.0), (3.0, 0.7)]),
)  # fmt: skip
def test_equals_the_loops(seed, n, m, lag, theiler, kind, limits):
    rng = np.random.default_rng(seed)
    x = {
        "white": rng.standard_normal(n),
        "walk": rng.standard_normal(n).cumsum(),
        "digits": rng.integers(0, 3, n) * 1.0,
    }
    (found,) = false_neighbours(x[kind], (m,), lag, theiler, rtol=limits[0], atol=limits[1])
    if found.reason is not None:
        assert found.reason == f"points<{points_needed(m)}"
        assert n - m * lag < points_needed(m) + theiler
        return
    wanted = slow.false_neighbours(x[kind].tolist(), m, lag, theiler, *limits)
    assert found.share == pytest.approx(wanted[0], abs=1e-12)
    assert (found.by_distance, found.by_size) == pytest.approx(wanted[1:3], abs=1e-12)
    assert (found.n_points, found.n_equal) == wanted[3:]


def test_known_systems():
    henon = np.empty(1200)
    henon[:2] = 0.1
    for t in range(2, 1200):
        henon[t] = 1 - 1.4 * henon[t - 1] ** 2 + 0.3 * henon[t - 2]
    logistic = np.empty(600)
    logistic[0] = 0.4
    for t in range(1, 600):
        logistic[t] = 3.9 * logistic[t - 1] * (1 - logistic[t - 1])
    one, two = (f.share for f in false_neighbours(henon[200:], (1, 2)))
    assert one > 0.5
    assert two < 0.01
    assert false_neighbours(logistic, (1,))[0].share < 0.01


def test_noise_passes_for_two_or_three_dimensions():
    """At the settings of the follow-up (lag 1, 15, 2, below 5 %), 40 to 200 steps of noise without any dynamics."""
    rng = np.random.default_rng(1)
    for n in (40, 100, 200):
        reached = []
        for _ in range(40):
            shares = [f.share for f in false_neighbours(rng.standard_normal(n).cumsum(), (1, 2, 3, 4))]
            reached.append(next((m for m, s in enumerate(shares, 1) if s < 0.05), 9))
        assert np.mean([m in (2, 3) for m in reached]) > (0.5 if n == 40 else 0.85), n


def test_theiler_window_takes_neighbours_in_time_away():
    t = np.arange(200)
    x = t + 0.0  # on a ramp the only near points are those next in time
    for w in (1, 5, 20):
        (found,) = false_neighbours(x, (1,), theiler=w)
        assert found.by_distance == 0
        assert found.n_points == 199
    # every point further than half of the ramp has no neighbour left in the middle
    (far,) = false_neighbours(x, (1,), theiler=150)
    assert far.n_points == 2 * (199 - 150)
    assert false_neighbours(x, (1,), theiler=195)[0].reason == "points<20"


def test_rows_in_pieces_are_the_same(monkeypatch):
    x = np.random.default_rng(2).standard_normal(150)
    whole = false_neighbours(x, (1, 2, 3), theiler=4)
    monkeypatch.setattr(room, "_HELD", 1000)
    assert false_neighbours(x, (1, 2, 3), theiler=4) == whole


def test_short_and_empty_series_have_a_reason():
    for x, m, reason in (
        (np.random.default_rng(0).normal(size=40), 4, "points<100"), (np.arange(20.0), 1, "points<20"),
        (np.ones(500), 2, "constant"), ([*range(60), math.inf], 1, "nonfinite"), ([], 1, "constant"),
    ):  # fmt: skip
        (found,) = false_neighbours(x, (m,))
        assert found.reason == reason
        assert all(math.isnan(v) for v in (found.share, found.by_distance, found.by_size))


def test_refusals():
    x = np.arange(50.0)
    for kwargs in ({"dims": ()}, {"dims": (0,)}, {"lag": 0}, {"theiler": 0}, {"rtol": 0.0}, {"atol": -1.0}):
        with pytest.raises(MetricError):
            false_neighbours(x, **kwargs)
