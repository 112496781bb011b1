"""plateau.*/1: closed forms on lines, steps and logistic boundaries."""

import math

import numpy as np
import pytest

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, ids

T = np.linspace(0, 1, 41)
NAMES = ("t10", "t50", "t90", "width", "slope", "share")


def all_of(t, d, **more):
    return {name: compute(f"plateau.{name}/1", t, d, **more) for name in NAMES}


def test_names():
    assert ids(group="plateau") == ["plateau.d/1", *(f"plateau.{name}/1" for name in NAMES)]


def test_linear():
    d = compute("plateau.d/1", T[:, None] * np.array([3.0, -4.0]), [0.0, 0.0], [3.0, -4.0])
    np.testing.assert_allclose(d.series, T, rtol=1e-9, atol=1e-15)
    assert d.series[10] == pytest.approx(0.25, rel=1e-9)
    found = all_of(T, d.series)
    for name, value in {"t10": 0.1, "t50": 0.5, "t90": 0.9, "width": 0.8, "slope": 1.0, "share": 0.2}.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9), name
        assert found[name].reason is None


def test_step():
    """A step has the width of 0.8 grid steps, 0 in the limit."""
    for n in (10, 1000):
        t = np.linspace(0, 1, n + 1)
        found = all_of(t, (t > 0.5).astype(float))
        assert float(found["width"]) == pytest.approx(0.8 / n, rel=1e-9)
        assert float(found["slope"]) == pytest.approx(n, rel=1e-9)
        assert float(found["share"]) == pytest.approx(1 - 0.8 / n, rel=1e-9)
        assert float(found["t50"]) == pytest.approx(0.5 + 0.5 / n, rel=1e-9)


def test_logistic():
    t, b = np.linspace(0, 1, 20001), 20.0
    found = all_of(t, 1 / (1 + np.exp(-b * (t - 0.4))))
    assert float(found["t50"]) == pytest.approx(0.4, abs=1e-8)
    assert float(found["width"]) == pytest.approx(2 * math.log(9) / b, rel=1e-6)
    assert float(found["slope"]) == pytest.approx(b / 4, rel=1e-4)
    assert float(found["share"]) == pytest.approx(1 - 2 * math.log(9) / b, rel=1e-6)


def test_first_upward_crossing():
    d = np.array([0.0, 0.6, 0.2, 1.0])
    t = np.array([0.0, 0.1, 0.2, 1.0])
    assert float(compute("plateau.t50/1", t, d)) == pytest.approx(0.5 / 0.6 * 0.1, rel=1e-12)
    falling = compute("plateau.t50/1", t, [0.9, 0.3, 0.7, 1.0])
    assert float(falling) == pytest.approx(0.15, rel=1e-12)
    assert float(compute("plateau.t50/1", t, [0.5, 0.6, 0.7, 1.0])) == 0


def test_reasons():
    assert compute("plateau.t90/1", T, 0.5 * T).reason == "no-crossing"
    width = compute("plateau.width/1", T, 0.5 * T)
    assert math.isnan(float(width))
    assert width.reason == "no-crossing"
    hole = T.copy()
    hole[20] = np.nan
    assert compute("plateau.t50/1", T, hole).reason == "coverage"
    assert float(compute("plateau.t10/1", T, hole)) == pytest.approx(0.1)
    assert float(compute("plateau.slope/1", T, hole)) == pytest.approx(1)
    assert compute("plateau.slope/1", T, np.full(41, np.nan)).reason == "coverage"
    assert compute("plateau.slope/1", [], []).reason == compute("plateau.t50/1", [], []).reason == "empty"
    assert compute("plateau.share/1", [0.0], [0.0]).reason == "steps<1"
    same = compute("plateau.d/1", np.ones((3, 2)), np.ones(2), np.ones(2))
    assert same.reason == "zero-denominator"
    assert np.isnan(same.series).all()
    with pytest.raises(MetricError, match="ascending"):
        compute("plateau.t50/1", T[::-1], T)
    with pytest.raises(MetricError, match="F_A"):
        compute("plateau.d/1", np.ones((3, 2)), np.ones(3), np.ones(2))


def test_d_is_invariant():
    rng = np.random.default_rng(0)
    f, a, b = rng.normal(size=(9, 5)), rng.normal(size=5), rng.normal(size=5)
    base = compute("plateau.d/1", f, a, b).series
    assert ((base >= 0) & (base <= 1)).all()
    q, shift = np.linalg.qr(rng.normal(size=(5, 5)))[0], rng.normal(size=5)
    for move in (lambda x: x @ q, lambda x: 7 * x, lambda x: x + shift):
        np.testing.assert_allclose(compute("plateau.d/1", move(f), move(a), move(b)).series, base, rtol=1e-9)
