"""STR and Recync's detector: vectors, slow versions, what never fires, going back."""

import math

import numpy as np
import pytest
import slow_recovery as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import RecyncDetector, compute, recync_detect, str_kernel, str_sigma, token_cosine

BASE = [0.9, 1.0] * 10


def test_str_1():
    two = np.array([[0.0, 0.0], [3.0, 4.0]])
    assert str_kernel(two, 5.0)[1] == pytest.approx(math.exp(-0.5), rel=1e-12)
    assert float(compute("str.kernel/1", two, sigma=5.0)) == pytest.approx(0.6065306597, rel=1e-9)
    assert float(compute("str.kernel/1", np.ones((6, 3)), sigma=0.1)) == 1.0
    assert float(compute("str.kernel/1", 1e4 * np.eye(5), sigma=1.0)) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_str_against_the_double_sum(seed):
    rng = np.random.default_rng(seed)
    h = np.cumsum(rng.normal(size=(int(rng.integers(1, 12)), 3)), axis=0)
    if seed % 2:
        h[rng.random(len(h)) < 0.3] = np.nan
    window, tau = int(rng.integers(2, 6)), float(rng.uniform(0.5, 5))
    expected = slow.str_series(h, 2.0, window, tau)
    np.testing.assert_allclose(str_kernel(h, 2.0, window=window, tau=tau), expected, rtol=1e-10)
    result = compute("str.kernel/1", h, sigma=2.0, K=window, tau=tau)
    np.testing.assert_allclose(result.series, expected, rtol=1e-10)
    if result.reason is None:
        assert float(result) == pytest.approx(np.nanmean(expected), rel=1e-10)
    # the last value needs the last window only
    tail = str_kernel(h[-window:], 2.0, window=window, tau=tau)[-1]
    assert tail == pytest.approx(expected[-1], rel=1e-10, nan_ok=True)


def test_str_reasons_and_refusals():
    assert compute("str.kernel/1", np.ones((1, 3)), sigma=1.0).reason == "units<2"
    assert compute("str.kernel/1", np.ones((3, 3)), sigma=0.0).reason == "zero-denominator"
    assert compute("str.kernel/1", np.ones((3, 3)), sigma=1.0, mask=[False] * 3).reason == "empty"
    assert compute("str.kernel/1", np.full((4, 3), np.nan), sigma=1.0).reason == "coverage"
    for bad in ({"sigma": -1.0}, {"sigma": math.nan}, {}, {"sigma": 1.0, "K": 1}, {"sigma": 1.0, "tau": 0.0}):
        with pytest.raises(MetricError):
            compute("str.kernel/1", np.ones((3, 3)), **bad)
    with pytest.raises(MetricError, match="pos, dim"):
        str_kernel([1.0], 1.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 9))
def test_str_invariances(seed, n):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, 4))
    base = float(compute("str.kernel/1", h, sigma=1.5))
    q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert float(compute("str.kernel/1", h @ q + 5 * rng.normal(size=4), sigma=1.5)) == pytest.approx(base, rel=1e-9)
    assert float(compute("str.kernel/1", 3 * h, sigma=4.5)) == pytest.approx(base, rel=1e-9)
    assert float(compute("str.kernel/1", 3 * h, sigma=1.5)) < base
    batch = torch.from_numpy(np.stack([h, 3 * h]))
    assert str_kernel(batch, 1.5)[0, 1:].numpy() == pytest.approx(str_kernel(h, 1.5)[1:], rel=1e-12)


def test_str_sigma():
    rng = np.random.default_rng(1)
    runs = [rng.normal(size=(n, 3)) for n in (5, 1, 8)]
    runs[0][2] = np.nan
    gaps = []
    for run in runs:
        run = run[np.isfinite(run).all(1)]
        gaps += [math.dist(run[i], run[j]) for i in range(len(run)) for j in range(i)]
    assert str_sigma(runs) == pytest.approx(np.median(gaps), rel=1e-12)
    assert math.isnan(str_sigma([np.ones((1, 3))]))
    with pytest.raises(MetricError, match="pos, dim"):
        str_sigma([np.ones(3)])


@pytest.mark.parametrize("value", [0.91, 0.9195])
def test_recync_vectors(value):
    found = recync_detect(BASE + [value] * 3)
    assert found.at == (22,)
    assert found.restart == (19,)
    assert found.threshold[20] == pytest.approx(0.92, rel=1e-12)
    assert float(compute("recync.detect/1", BASE + [value] * 3)) == 1
    # a value just above the threshold is not low; two are no crisis
    assert recync_detect([*BASE, 0.9201, 0.91, 0.91]).at == ()
    assert recync_detect([*BASE, 0.91, 0.91]).at == ()


@settings(max_examples=100, deadline=None)
@given(value=st.floats(-1, 1), n=st.integers(0, 60))
def test_constant_never_fires(value, n):
    assert recync_detect([value] * n).at == ()


@pytest.mark.parametrize("seed", range(30))
def test_recync_against_the_text(seed):
    rng = np.random.default_rng(seed)
    c = np.clip(0.9 + 0.05 * rng.normal(size=200), -1, 1)
    for start in rng.integers(20, 190, 6):
        c[start : start + int(rng.integers(1, 7))] -= 0.1
    if seed % 3 == 0:
        c[rng.random(200) < 0.1] = np.nan
        c[rng.random(200) < 0.02] = -np.inf
    found = recync_detect(c)
    assert list(found.at) == slow.recync(c.tolist())
    stream = RecyncDetector()
    assert [t for t, v in enumerate(c) if stream.update(v)] == list(found.at)
    result = compute("recync.detect/1", c)
    assert float(result) == len(found.at)
    assert recync_detect(0.25 * c + 0.1).at == found.at


def test_a_run_of_low_values_is_one_crisis():
    found = recync_detect([*BASE, *[0.5] * 9, 1.0, *[0.5] * 3])
    assert found.at == (22, 32)
    assert found.low.sum() == 12


@pytest.mark.parametrize("back", [0, 5, 19, 21, 22, 23])
def test_rewind_forgets(back):
    rng = np.random.default_rng(back)
    c = [*BASE, 0.91, 0.91, 0.91]
    again = list(0.9 + 0.1 * rng.random(40))
    detector = RecyncDetector()
    for value in c:
        detector.update(value)
    detector.rewind(back)
    fresh = RecyncDetector()
    for value in c[:back]:
        fresh.update(value)
    assert detector.threshold == pytest.approx(fresh.threshold, nan_ok=True)
    assert [detector.update(v) for v in again] == [fresh.update(v) for v in again]
    with pytest.raises(MetricError, match="rewind"):
        detector.rewind(99)


def test_recync_reasons():
    assert compute("recync.detect/1", BASE).reason == "steps<21"
    assert compute("recync.detect/1", []).reason == "empty"
    assert compute("recync.detect/1", [*BASE, *[math.nan] * 21]).reason == "coverage"
    assert compute("recync.detect/1", [0.9] * 30).extras["n_tested"] == 10
    with pytest.raises(MetricError, match="window"):
        compute("recync.detect/1", BASE, window=0)
    with pytest.raises(MetricError, match="series"):
        recync_detect([[0.1]])


def test_token_cosine():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 6, 4))
    h[0, 2] = 0
    found = token_cosine(h)
    for row in range(2):
        for t in range(5):
            a, b = h[row, t], h[row, t + 1]
            expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b) if a.any() and b.any() else np.nan
            assert found[row, t] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert token_cosine(torch.tensor([[1e30, 0.0], [1e30, 0.0]])).tolist() == [1.0]
