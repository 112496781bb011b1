"""Readiness: the vector, bands of several signals, and what makes it undefined."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, readiness, readiness_gmean

finite = st.floats(-1e3, 1e3)


def test_ready_1():
    assert readiness([0.2, 0.3, 0.4, 5.0, -1.0], 0.2, 0.4) == pytest.approx([1, 0.5, 0, 0, 1], abs=1e-12)
    result = compute("readiness.band/1", [0.2, 0.3, 0.4], low=0.2, high=0.4)
    assert float(result) == pytest.approx(0.5, rel=1e-12)
    assert result.series == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert readiness_gmean([[0.0], [0.75]], [0, 0], [1, 1]) == pytest.approx([0.5], rel=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.5, 0.4), (math.nan, 1.0), (0.0, math.inf)])
def test_degenerate_band(low, high):
    assert np.isnan(readiness([0.1, 0.9], low, high)).all()
    result = compute("readiness.band/1", [0.1, 0.9], low=low, high=high)
    assert math.isnan(float(result))
    assert result.reason == "degenerate-band"
    several = compute("readiness.gmean/1", [[0.1, 0.9], [0.1, 0.2]], low=[0, low], high=[1, high])
    assert math.isnan(float(several))
    assert several.reason == "degenerate-band"


def test_unknown_signal():
    nan = math.nan
    assert np.isnan(readiness([nan, math.inf, 0.0], 0, 1)).tolist() == [True, True, False]
    assert np.isnan(readiness_gmean([[0.1, 0.1], [nan, 0.1]], [0, 0], [1, 1])).tolist() == [True, False]
    assert compute("readiness.band/1", [nan, nan, 0.1], low=0, high=1).reason == "coverage"
    assert compute("readiness.band/1", [], low=0, high=1).reason == "empty"
    half = compute("readiness.gmean/1", [[0.1, nan], [0.1, 0.1]], low=[0, 0], high=[1, 1])
    assert (half.reason, half.coverage, half.n_steps) == (None, 0.5, 1)
    masked = compute("readiness.band/1", [0.0, 9.0], mask=[True, False], low=0, high=1)
    assert float(masked) == 1.0


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(finite, min_size=1, max_size=8), low=finite, width=st.floats(0.01, 50), a=st.floats(0.1, 9),
    b=finite,
)  # fmt: skip
def test_range_order_and_units(values, low, width, a, b):
    x = np.array(values)
    r = readiness(x, low, low + width)
    assert ((r >= 0) & (r <= 1)).all()
    assert (np.diff(r[np.argsort(x)]) <= 0).all()
    scaled = readiness(a * x + b, a * low + b, a * (low + width) + b)
    assert scaled == pytest.approx(r, abs=1e-6)
    mean = [
        float(compute("readiness.band/1", v, low=low, high=low + width)) for v in (x, x[::-1].copy(), np.tile(x, 3))
    ]
    assert mean == pytest.approx([mean[0]] * 3, abs=1e-12)
    assert readiness_gmean(np.stack([x, x]), [low, low], [low + width] * 2) == pytest.approx(r, abs=1e-12)


def test_gmean_against_a_loop():
    rng = np.random.default_rng(0)
    x, low, high = rng.normal(size=(3, 40)), np.array([-2.0, -3.0, -1.5]), np.array([2.0, 3.0, 2.5])
    found = readiness_gmean(x, low, high)
    for t in range(40):
        product = 1.0
        for j in range(3):
            product *= 1 - min(max((x[j, t] - low[j]) / (high[j] - low[j]), 0), 1)
        assert found[t] == pytest.approx(product ** (1 / 3), rel=1e-12)


def test_kinds():
    x = torch.tensor([[0.0, 0.5]], dtype=torch.bfloat16)
    r = readiness(x, 0, 1)
    assert r.dtype == torch.float32
    assert r.shape == x.shape
    assert isinstance(readiness([0.1], 0, 1), np.ndarray)
    for args in (([0.1], None, None), ([[0.1]], 0, 1)):
        with pytest.raises(MetricError):
            compute("readiness.band/1", args[0], low=args[1], high=args[2])
    with pytest.raises(MetricError, match="one low and high per signal"):
        readiness_gmean([[0.1], [0.2]], [0], [1])
    with pytest.raises(MetricError, match="mask"):
        compute("readiness.band/1", [0.1, 0.2], mask=[True], low=0, high=1)
