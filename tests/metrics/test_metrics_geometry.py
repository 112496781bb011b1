"""Angles near 0 and π, norms at the edge of float32, validity."""

import math

import mpmath
import numpy as np
import pytest
import torch

from dynprobe.metrics import compute, measure
from dynprobe.metrics._geometry import norms, pair_angle, validity


def exact_angle(a, b):
    """In 50 digits, from the float32 numbers as they are."""
    with mpmath.workdps(50):
        a, b = ([mpmath.mpf(float(v)) for v in x] for x in (a, b))
        na, nb = (mpmath.sqrt(sum(v * v for v in x)) for x in (a, b))
        minus = mpmath.sqrt(sum((x / na - y / nb) ** 2 for x, y in zip(a, b, strict=True)))
        plus = mpmath.sqrt(sum((x / na + y / nb) ** 2 for x, y in zip(a, b, strict=True)))
        return 2 * mpmath.atan2(minus, plus)


@pytest.mark.parametrize("theta", [1e-5, 1e-4, 1e-3, 0.1, 1.0, 2.4, 2.49, 2.51, 3.0, math.pi - 1e-3, math.pi - 1e-5])
@pytest.mark.parametrize("scale", [1.0, 37.0, 1e-3])
def test_float32_angles(theta, scale):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(576, 2)))[0].T
    a = (100 * q[0]).astype(np.float32)
    b = (scale * 100 * (math.cos(theta) * q[0] + math.sin(theta) * q[1])).astype(np.float32)
    ta, tb = torch.from_numpy(a)[None], torch.from_numpy(b)[None]
    got = pair_angle(ta, tb, norms(ta), norms(tb))[0]
    exact = exact_angle(a, b)
    near = min(float(exact), float(mpmath.pi - exact))
    error = abs(float(mpmath.mpf(float(got)) - exact))
    # relative in the distance to 0 or π, down to the rounding of a float32 state
    assert error <= max(1e-6 * near, 1e-8 if theta < 1 else 1e-12)


def test_equal_and_opposite_are_exact():
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    n = norms(x)
    assert (pair_angle(x, x, n, n) == 0).all()
    np.testing.assert_allclose(pair_angle(x, -x, n, n), math.pi, rtol=0, atol=1e-15)


def test_norms_beyond_float32_squares():
    x = torch.tensor([[3e-30, 4e-30], [3e25, 4e25], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [3.0, 4.0]])
    out = norms(x)
    np.testing.assert_allclose(out[[0, 1, 5]], [5e-30, 5e25, 5.0], rtol=1e-6)
    assert out[2] == 0
    assert np.isnan(out[3:5]).all()
    big = measure(
        [torch.tensor([[[3e25, 0.0]] * 3]), torch.tensor([[[3e25, 3e25]] * 3])],
        torch.ones(1, 3, dtype=torch.bool),
        metrics=["kappa.phase/1"],
        embed=1,
    )
    assert float(big.sample[0]["kappa_phase"]) == pytest.approx(0.25, rel=1e-6)


def test_validity_uses_the_median_of_kept_units():
    norm = np.array([[[1.0, 1e-13, 2.0, 3.0, np.nan, 0.0]]])
    full = np.ones(norm.shape, bool)
    assert validity(norm, full, full)[0, 0].tolist() == [True, False, True, True, False, False]
    only_small = np.array([[[False, True, False, False, False, False]]])
    assert validity(norm, full, only_small)[0, 0].tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_upcast_and_marked(dtype):
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    for metric in ("kappa.phase/1", "kappa.geom/1", "delta.rms/1"):
        r = compute(metric, x)
        assert float(r) == pytest.approx(float(compute(metric, x.double())), rel=1e-12)
        assert r.dtype == str(dtype).removeprefix("torch.")
        assert r.low_precision == (dtype != torch.float32)
        assert ("low precision" in repr(r)) == r.low_precision
    m = measure(list(x[:, None]), torch.ones(1, 6, dtype=torch.bool))
    assert m.low_precision == (dtype != torch.float32)
    assert m.depth["angle"].dtype == np.float32


def test_near_zero_follows_the_dtype_handed_in():
    """A float32 capture stalls where float64 numbers of the same size would not."""
    rng = np.random.default_rng(0)
    base = np.array([1.0, 2.0, 3.0])
    h = base + 1e-7 * rng.normal(size=(8, 3))
    assert compute("limen.ct/1", h).extras["n_stall"] == 0
    assert compute("limen.ct/1", h.astype(np.float32)).extras["n_stall"] == 6
    assert compute("limen.ct/1", torch.from_numpy(h).to(torch.bfloat16)).extras["n_stall"] == 6


def test_chunks_do_not_matter(monkeypatch):
    from dynprobe.metrics import DEFAULT, _geometry

    g = torch.Generator().manual_seed(3)
    states = list(torch.cumsum(torch.randn(9, 3, 7, 16, generator=g, dtype=torch.float64), 0))
    states[4][1, 3] = float("nan")
    states[6][2, 5] = 0
    mask = torch.ones(3, 7, dtype=torch.bool)
    whole = measure(states, mask, metrics=DEFAULT, debt_theta=0.5)
    for budget in (1, 16 * 7 * 8, 16 * 7 * 8 * 3 * 2, 16 * 7 * 8 * 3 * 4):
        monkeypatch.setattr(_geometry, "CHUNK_BYTES", budget)
        monkeypatch.setattr(_geometry, "_local", type(_geometry._local)())
        small = measure(states, mask, metrics=DEFAULT, debt_theta=0.5)
        for a, b in zip(whole.sample, small.sample, strict=True):
            assert a.keys() == b.keys()
            for column in a:
                if isinstance(a[column].value, str):
                    assert a[column].value == b[column].value
                else:
                    assert float(b[column]) == pytest.approx(float(a[column]), rel=1e-12, nan_ok=True), column
        for column, grid in whole.depth.items():
            np.testing.assert_allclose(small.depth[column], grid, rtol=1e-12, atol=1e-14)


def test_inference_tensors_and_gradients_pass():
    x = torch.randn(3, 1, 5, 4, requires_grad=True)
    mask = torch.ones(1, 5, dtype=torch.bool)
    a = measure(list(x), mask)
    with torch.inference_mode():
        b = measure([s.clone() for s in x], mask)
    c = measure(list(x), mask)
    for m in (b, c):
        assert float(m.sample[0]["kappa_phase"]) == float(a.sample[0]["kappa_phase"])
