"""coupling.mk/1: closed forms, a slow twin, and frames that do not exist."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, spec


def mk(a, b, k=1):
    return compute("coupling.mk/1", a, b, K=k)


def test_mk_1():
    a, b = np.diag([2.0, 1.0]), np.diag([1.0, 2.0])
    assert float(mk(a, b, 1)) == pytest.approx(0.5, rel=1e-9)
    assert float(mk(a, b, 2)) == pytest.approx(math.sqrt(2) / math.sqrt(5), rel=1e-9)
    assert mk(a, b, 2).metric_id == "coupling.mk/1{K=2}"


def test_equal_and_opposite():
    j = np.random.default_rng(0).normal(size=(5, 5))
    for k in (1, 3, 5):
        assert float(mk(j, j, k)) == pytest.approx(0, abs=1e-12)
        assert float(mk(j, -j, k)) == pytest.approx(2, rel=1e-9)


def test_repeated_singular_values():
    eye, a = np.eye(2), np.diag([2.0, 1.0])
    for k in (1, 2):
        r = mk(a, eye, k)
        assert math.isnan(float(r))
        assert r.reason == "degenerate-frame"
        assert r.extras["gap"] == 0
        assert float(mk(eye, eye, k)) == 0  # the frame cancels
        assert float(mk(eye, a, k)) == pytest.approx(0, abs=1e-12)  # only J2's frame matters
    # σ_K = σ_{K+1}, and repetition inside the top K; beyond K + 1 it does not matter.
    three = np.diag([3.0, 2.0, 2.0])
    other = np.random.default_rng(1).normal(size=(3, 3))
    assert mk(other, three, 1).reason is None
    assert mk(other, three, 2).reason == "degenerate-frame"
    assert mk(other, three, 3).reason == "degenerate-frame"
    assert mk(other, np.diag([1.0, 0.0, 0.0]), 2).reason == "degenerate-frame"


def test_reasons_and_refusals():
    eye = np.diag([2.0, 1.0])
    assert mk(np.zeros((2, 2)), eye).reason == "zero-denominator"
    assert mk(eye, np.zeros((2, 2))).reason == "degenerate-frame"
    assert mk(np.full((2, 2), np.nan), eye).reason == "nonfinite"
    for a, b, k in ((eye, np.eye(3), 1), (eye[0], eye[0], 1), (eye, eye, 3), (eye, eye, 0)):
        with pytest.raises(MetricError):
            mk(a, b, k)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(2, 6))
def test_slow_twin_range_and_invariances(seed, d):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, d, d))
    k = int(rng.integers(1, d + 1))
    values, vectors = np.linalg.eigh(b.T @ b)  # another road to the frame
    v = vectors[:, ::-1][:, :k]
    u = b @ v / np.sqrt(values[::-1][:k])
    s = np.linalg.svd(a, compute_uv=False)[:k]
    want = math.sqrt(((u.T @ a @ v - np.diag(s)) ** 2).sum() / (s**2).sum())
    base = float(mk(a, b, k))
    if np.diff(values).min() > 1e-3 and values[0] > 1e-3:
        assert base == pytest.approx(want, rel=1e-7, abs=1e-9)
    assert -1e-12 <= base <= 2 + 1e-12
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert {"R", "S", "S_l"} == set(spec("coupling.mk/1").invariances)
    assert float(mk(q @ a @ q.T, q @ b @ q.T, k)) == pytest.approx(base, rel=1e-6, abs=1e-8)
    assert float(mk(3 * a, 0.2 * b, k)) == pytest.approx(base, rel=1e-8, abs=1e-10)
