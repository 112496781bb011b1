"""lyap.ftle/1 and lyap.fd/1: closed forms, and volumes computed from explicit products."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, spec

REL = 1e-9
STRETCH = np.diag([2.0, 0.5])


def turn(phi):
    return np.array([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])


@pytest.mark.parametrize(("n", "every"), [(1, 1), (5, 1), (5, 2), (7, 7)])
def test_ftle_1(n, every):
    r = compute("lyap.ftle/1", np.stack([STRETCH] * n), every=every)
    np.testing.assert_allclose(r.per_unit, [math.log(2), -math.log(2)], rtol=REL)
    assert float(r) == pytest.approx(math.log(2), rel=REL)
    assert r.n_steps == n
    np.testing.assert_allclose(r.profile, math.log(2), rtol=REL)


def test_rotation_and_scaling():
    maps = np.stack([turn(0.3 * i) for i in range(6)])
    np.testing.assert_allclose(compute("lyap.ftle/1", maps).per_unit, 0, atol=1e-14)
    h = [np.array([0.3, -2.0])]
    for _ in range(6):
        h.append(2.5 * h[-1])
    scaled = np.stack([2.5 * np.eye(2)] * 6)
    np.testing.assert_allclose(compute("lyap.ftle/1", scaled).per_unit, math.log(2.5), rtol=REL)
    direction = compute("lyap.ftle/1{form=direction}", scaled, states=np.stack(h))
    np.testing.assert_allclose(direction.per_unit, 0, atol=1e-14)
    assert direction.metric_id == "lyap.ftle/1{form=direction}"


def test_direction_only():
    """diag(2, ½), h = e₁, tangent e₂ → −2 ln 2 per step."""
    h = np.stack([[2.0**i, 0.0] for i in range(5)])
    for every in (1, 3):
        for more in ({}, {"start": [0.0, 1.0]}, {"start": [1.0, 1.0]}):
            r = compute("lyap.ftle/1", np.stack([STRETCH] * 4), form="direction", states=h, every=every, **more)
            assert float(r) == pytest.approx(-2 * math.log(2), rel=REL)
    radial = compute("lyap.ftle/1", np.stack([STRETCH] * 4), form="direction", states=h, start=[1.0, 0.0])
    assert math.isnan(float(radial))
    assert radial.reason == "degenerate-frame"


def _log_volumes(end, begin, frame):
    """ln of the i-volumes of a frame's image under ``end``, relative to that under ``begin``, from singular values."""
    out = []
    for i in range(1, frame.shape[1] + 1):
        a, b = (np.linalg.svd(m @ frame[:, :i], compute_uv=False) for m in (end, begin))
        assume(min(a[-1] / a[0], b[-1] / b[0]) > 1e-6)
        out.append(np.log(a).sum() - np.log(b).sum())
    return np.array(out)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 6), d=st.integers(2, 5), every=st.integers(1, 4))
def test_against_volumes_of_the_whole_product(seed, n, d, every):
    rng = np.random.default_rng(seed)
    maps = np.eye(d) + 0.4 * rng.normal(size=(n, d, d))
    h = [rng.normal(size=d)]
    for m in maps:
        h.append(m @ h[-1])
    product = np.linalg.multi_dot([*maps[::-1], np.eye(d)]) if n > 1 else maps[0]
    start = rng.normal(size=(d, d - 1))
    raw = compute("lyap.ftle/1", maps, start=start.T, every=every)
    np.testing.assert_allclose(
        np.cumsum(raw.per_unit) * n, _log_volumes(product, np.eye(d), start), rtol=1e-6, atol=1e-7
    )
    assert raw.profile.sum() / n == pytest.approx(float(raw), rel=1e-9, abs=1e-12)

    def tangent(x):
        u = x / np.linalg.norm(x)
        return (np.eye(d) - np.outer(u, u)) / np.linalg.norm(x)

    there, back = tangent(h[-1]) @ product, tangent(h[0])
    want = _log_volumes(there, back, start)
    direction = compute("lyap.ftle/1", maps, start=start.T, every=every, form="direction", states=np.stack(h))
    np.testing.assert_allclose(np.cumsum(direction.per_unit) * n, want, rtol=1e-5, atol=1e-6)


def test_declared_invariances():
    rng = np.random.default_rng(3)
    maps, start = rng.normal(size=(4, 3, 3)), rng.normal(size=(2, 3))
    base = compute("lyap.ftle/1", maps, start=start).per_unit
    q = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(5)]
    turned = np.stack([q[i + 1] @ m @ q[i].T for i, m in enumerate(maps)])
    assert "R_l" in spec("lyap.ftle/1").invariances
    np.testing.assert_allclose(compute("lyap.ftle/1", turned, start=start @ q[0].T).per_unit, base, rtol=1e-9)


def test_ftle_reasons_and_refusals():
    assert compute("lyap.ftle/1", np.zeros((0, 2, 2))).reason == "steps<1"
    assert compute("lyap.ftle/1", np.full((1, 2, 2), np.nan)).reason == "nonfinite"
    flat = compute("lyap.ftle/1", np.diag([1.0, 0.0])[None])
    assert float(flat) == 0
    assert math.isnan(flat.per_unit[1])
    assert flat.extras["n_singular"] == 1
    assert compute("lyap.ftle/1", np.zeros((1, 2, 2))).reason == "singular"
    for args, more, text in (
        ((np.ones((2, 2)),), {}, "maps"),
        ((np.ones((1, 2, 3)),), {}, "maps"),
        ((np.eye(2)[None],), {"form": "direction"}, "states"),
        ((np.eye(2)[None],), {"form": "x"}, "form"),
        ((np.eye(2)[None],), {"states": np.ones((1, 2)), "form": "direction"}, "connect"),
        ((np.eye(2)[None],), {"start": np.ones((3, 2))}, "start"),
        ((np.eye(2)[None],), {"start": np.ones((2, 2))}, "independent"),
        ((np.eye(2)[None],), {"mask": [True]}, "mask"),
    ):
        with pytest.raises(MetricError, match=text):
            compute("lyap.ftle/1", *args, **more)


def _sides(f, h, v, eps):
    start = np.stack([[h + e * v, h - e * v] for e in eps])
    return start, np.stack([[f(a), f(b)] for a, b in start])


def test_fd_closed_forms():
    eps = np.geomspace(1e-3, 1e-2, 5)
    h, v = np.array([1.0, 2.0]), np.array([0.6, -0.8])
    r = compute("lyap.fd/1", *_sides(lambda x: 3 * x, h, v, eps))
    assert float(r) == pytest.approx(math.log(3), rel=REL)
    assert r.extras["spread"] < 1e-12
    cubic = compute("lyap.fd/1", *_sides(lambda x: x**3, np.array([1.0]), np.array([1.0]), [0.1, 0.2, 0.3]))
    np.testing.assert_allclose(cubic.series, np.log(3 + np.array([0.1, 0.2, 0.3]) ** 2), rtol=REL)
    assert float(cubic) == pytest.approx(math.log(3.04), rel=REL)
    assert cubic.extras["spread"] == pytest.approx(math.log(3.09 / 3.01), rel=1e-8)
    assert float(compute("lyap.fd/1", *_sides(lambda x: 9 * x, h, v, eps), n=2)) == pytest.approx(math.log(3), rel=REL)
    scaled = compute("lyap.fd/1{form=direction}", *_sides(lambda x: 9 * x, h, v, eps))
    assert float(scaled) == pytest.approx(0, abs=1e-12)
    stretch = compute("lyap.fd/1{form=direction}", *_sides(lambda x: STRETCH @ x, np.eye(2)[0], np.eye(2)[1], [1e-6]))
    assert float(stretch) == pytest.approx(-2 * math.log(2), rel=1e-9)


def test_fd_reasons():
    start = np.ones((3, 2, 4))
    assert compute("lyap.fd/1", start * [[[1.0], [2.0]]], start).reason == "singular"
    assert compute("lyap.fd/1", start, start).reason == "coverage"
    assert compute("lyap.fd/1", start[:0], start[:0]).reason == "empty"
    assert compute("lyap.fd/1", start, start, n=0).reason == "steps<1"
    with pytest.raises(MetricError, match="sign"):
        compute("lyap.fd/1", start, start[:2])
