"""Declared invariances hold on random inputs; the ones the text denies are violated on an example."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.metrics import compute, ids, spec

TRAJECTORY = [
    "kappa.phase/1", "kappa.geom/1", "kappa.sync/1", "kappa.xcorr/1", "delta.rel_prev/1", "delta.rel_next/1",
    "delta.rms/1", "delta.angle/1", "resid.norm/1", "curv.depth/1", "curv.token/1",
]  # fmt: skip
TOKENS = ["limen.ct/1", "limen.ct2/1"]
KINDS = ["R", "R_l", "S", "S_l", "P", "scale-per-state", "shift"]


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def transformed(kind, x, rng):
    D, N, d = x.shape
    if kind == "R":
        return x @ rotation(rng, d)
    if kind == "R_l":
        return np.stack([layer @ rotation(rng, d) for layer in x])
    if kind == "S":
        return x * np.exp(rng.normal())
    if kind == "S_l":
        return x * np.exp(rng.normal(size=(D, 1, 1)))
    if kind == "P":
        return x[:, rng.permutation(N)]
    if kind == "scale-per-state":
        return x * np.exp(rng.normal(size=(D, N, 1)))
    return x + 3 * rng.normal(size=d)


def value(metric, x):
    return float(compute(metric, x[0] if metric in TOKENS else x))


@pytest.mark.parametrize("metric", TRAJECTORY + TOKENS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), depth=st.integers(3, 6), units=st.integers(4, 9), dim=st.integers(3, 8))
def test_declared_hold(metric, seed, depth, units, dim):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(depth, units, dim))
    before = value(metric, x)
    for kind in KINDS:
        if kind in spec(metric).invariances:
            assert value(metric, transformed(kind, x, rng)) == pytest.approx(before, rel=1e-8, abs=1e-10), kind


@pytest.mark.parametrize("metric", TRAJECTORY + TOKENS)
def test_undeclared_fail(metric):
    rng = np.random.default_rng(11)
    x = rng.normal(size=(5, 8, 6)) + 0.5
    before = value(metric, x)
    for kind in KINDS:
        if kind not in spec(metric).invariances:
            changes = [abs(value(metric, transformed(kind, x, rng)) - before) for _ in range(3)]
            assert max(changes) > 1e-4 * abs(before), (metric, kind)


def test_declarations_are_the_published_ones():
    """The lines of 5.2, 5.4, 14.1 and 4.1, letter by letter."""
    published = {
        "kappa.phase/1": ({"R", "S", "S_l", "P", "scale-per-state"}, {"R_l", "shift"}),
        "kappa.geom/1": ({"R", "R_l", "S", "S_l", "P", "scale-per-state"}, {"shift"}),
        "kappa.sync/1": ({"R", "S", "P", "shift"}, {"R_l", "S_l"}),
        "kappa.xcorr/1": ({"R", "R_l", "S", "S_l", "scale-per-state"}, {"P"}),
        "delta.rel_prev/1": ({"R", "S", "P"}, {"R_l", "S_l", "shift"}),
        "delta.rel_next/1": ({"R", "S", "P"}, {"R_l", "S_l", "shift"}),
        "delta.rms/1": ({"R", "P", "shift"}, {"S", "R_l"}),
        "curv.depth/1": ({"R", "S", "P", "shift"}, {"R_l", "S_l"}),
        "curv.token/1": ({"R", "R_l", "S", "S_l", "shift"}, {"P"}),
        "limen.ct/1": ({"R", "R_l", "S", "S_l", "scale-per-state"}, {"P"}),
    }
    for metric, (yes, no) in published.items():
        assert yes <= spec(metric).invariances, metric
        assert not no & spec(metric).invariances, metric


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=40), st.floats(0.01, 100), st.randoms())
def test_series_scale_and_order(values, factor, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    for metric in ("limen.ratio/1", "limen.qratio/1", "limen.gini/1", "limen.ratio/1{norm=winsor_mad}"):
        base = float(compute(metric, values))
        for other in ([v * factor for v in values], shuffled):
            assert float(compute(metric, other)) == pytest.approx(base, rel=1e-8, abs=1e-12)
    assert 1 - 1e-12 <= float(compute("limen.ratio/1", values)) <= len(values) + 1e-9
    assert -1e-15 <= float(compute("limen.gini/1", values)) <= 1 - 1 / len(values) + 1e-12


def test_ratio_is_not_intensive_and_companion_is():
    """Exponential noise: the expected ratio is the harmonic number, so it grows with T; the quantile ratio does not."""
    rng = np.random.default_rng(0)
    ratios = {}
    for n in (16, 256):
        x = rng.exponential(size=(400, n))
        ratios[n] = np.mean([float(compute("limen.ratio/1", row)) for row in x])
        assert ratios[n] == pytest.approx(sum(1 / k for k in range(1, n + 1)), rel=0.06)
    assert "T" not in spec("limen.ratio/1").invariances


def test_outputs_ignore_a_constant():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 3, 40))
    for metric in ids(group="output"):
        more = {"output.nll/1": ([1, 2, 3],), "output.kl/1": (y,), "output.flip/1": (y,)}.get(metric, ())
        shifted = float(compute(metric, x + 7.5, *more))
        assert shifted == pytest.approx(float(compute(metric, x, *more)), rel=1e-10)


def test_kappa_phase_range_and_kick():
    """An orthogonal kick moves an acute lag towards a quarter turn, strictly."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b, n = np.linalg.qr(rng.normal(size=(6, 3)))[0].T
        b = a + 0.5 * b
        lags = [
            float(compute("kappa.phase/1", np.stack([a, b + k * np.linalg.norm(b) * n])[:, None])) for k in (0, 1, 9)
        ]
        assert lags[0] < lags[1] < lags[2] < 0.5
