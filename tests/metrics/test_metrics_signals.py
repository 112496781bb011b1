"""Streaming signals equal the metrics of whole trajectories, token by token, on every kind of input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, norm_step, phase_lag, step_z, step_zmax


def case(seed, depth=6, units=9, dim=7):
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.normal(size=(depth, units, dim)), axis=0)
    lag = rng.uniform(0.1, 0.5, depth - 1)
    return rng, x, lag, rng.uniform(0.01, 0.2, depth - 1)


@pytest.mark.parametrize("seed", range(12))
def test_equal_the_metrics(seed):
    _, x, mu, sigma = case(seed)
    if seed % 3 == 1:
        sigma[2] = 0.0
    if seed % 4 == 1:
        x[2, 3] = 0.0
        x[4, 5, 1] = np.nan
        x[0, 0] = np.inf
    lag = phase_lag(x)
    z, at = step_zmax(lag, mu, sigma)
    whole = compute("kappa.phase.zmax/1", x, mu=mu, sigma=sigma)
    np.testing.assert_allclose(z, whole.per_unit, rtol=1e-10, atol=1e-12)
    for unit in range(x.shape[1]):
        alone = compute("kappa.phase.z/1", x[:, unit : unit + 1], mu=mu, sigma=sigma)
        assert step_z(lag, mu, sigma)[unit] == pytest.approx(float(alone), rel=1e-10, abs=1e-12, nan_ok=True)
        if at[unit] >= 0:
            assert z[unit] == pytest.approx((lag[at[unit], unit] - mu[at[unit]]) / sigma[at[unit]], rel=1e-12)
    z, _ = step_zmax(norm_step(x), mu, sigma)
    whole = compute("norm.step.zmax/1", x, mu=mu, sigma=sigma)
    np.testing.assert_allclose(z, whole.per_unit, rtol=1e-9, atol=1e-11)
    # one token at a time is the same
    for unit in range(x.shape[1]):
        one = step_zmax(phase_lag(x[:, unit]), mu, sigma)[0]
        assert one == pytest.approx(step_zmax(lag, mu, sigma)[0][unit], nan_ok=True, rel=1e-12)


def test_lags_are_those_of_kappa():
    _, x, _, _ = case(3)
    assert phase_lag(x).mean(-1) == pytest.approx(compute("kappa.phase/1", x).profile, rel=1e-12)
    turns = np.arange(5) * np.pi / 6
    assert phase_lag(np.stack([np.cos(turns), np.sin(turns)], -1)) == pytest.approx([1 / 6] * 4, rel=1e-12)


def test_norm_step_against_a_loop():
    _, x, mu, sigma = case(5)
    found = norm_step(x)
    for step, unit in np.ndindex(found.shape):
        ratio = math.sqrt(sum(v**2 for v in x[step + 1, unit])) / math.sqrt(sum(v**2 for v in x[step, unit]))
        assert found[step, unit] == pytest.approx(abs(math.log(ratio)), rel=1e-11)
    e = math.e
    vector = compute("norm.step.zmax/1", np.array([1, e, e**3])[:, None, None], mu=[0, 1], sigma=[1, 2])
    assert float(vector) == pytest.approx(1.0, rel=1e-12)
    assert vector.extras["step"].tolist() == [0]
    assert compute("norm.step.zmax/1", x, mu=mu, sigma=0 * sigma).reason == "zero-denominator"
    assert compute("norm.step.zmax/1", x[:1], mu=[], sigma=[]).reason == "depth<2"
    x[1:, :6] = np.nan
    assert compute("norm.step.zmax/1", x, mu=mu, sigma=sigma).reason == "coverage"
    assert compute("norm.step.zmax/1", x, mu=mu, sigma=sigma, mask=np.zeros(9)).reason == "empty"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors(dtype):
    _, x, mu, sigma = case(1)
    states = [torch.from_numpy(layer).to(dtype) for layer in x]
    exact = step_zmax(phase_lag(torch.stack(states).double().numpy()), mu, sigma)[0]
    z, at = step_zmax(phase_lag(states), torch.from_numpy(mu), torch.from_numpy(sigma))
    assert isinstance(z, torch.Tensor)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert at.dtype == torch.int64
    assert z.numpy() == pytest.approx(exact, rel=1e-4 if dtype != torch.float64 else 1e-12)
    assert not phase_lag([s.requires_grad_() for s in states]).requires_grad


def test_sizes_beyond_the_squares_of_float32():
    x = torch.tensor([[[3e30, 0.0]], [[0.0, 4e-30]]])
    assert phase_lag(x).item() == pytest.approx(0.5, rel=1e-6)
    assert norm_step(x).item() == pytest.approx(math.log(3e30 / 4e-30), rel=1e-6)


def test_calibration_of_depths_without_a_step():
    """Rows of a calibration that no step leads into are NaN and are dropped."""
    lag = np.array([[0.9], [0.2], [0.4]])
    z, at = step_zmax(lag, [np.nan, 0.1, 0.1], [np.nan, 0.1, 0.1])
    assert (float(z[0]), int(at[0])) == (pytest.approx(3.0), 2)
    assert step_z(lag, [np.nan, 0.1, 0.1], [np.nan, 0.1, 0.1])[0] == pytest.approx(2.0)
    z, at = step_zmax(lag, [0, 0, 0], [0, 0, 0])
    assert np.isnan(z[0])
    assert int(at[0]) == -1
    assert np.isnan(step_z(lag, [0, 0, 0], [0, 0, 0])[0])
    assert np.isnan(step_z([[np.nan], [np.nan], [0.3]], [0, 0, 0], [1, 1, 1])[0])
    assert np.isnan(step_zmax(np.zeros((0, 2)), [], [])[0]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_invariances(seed):
    rng, x, mu, sigma = case(seed, depth=4, units=3, dim=5)
    q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    lag, step = phase_lag(x), norm_step(x)
    assert phase_lag(3.0 * x @ q) == pytest.approx(lag, rel=1e-9, abs=1e-12)
    assert phase_lag(x * np.exp(rng.normal(size=(4, 3, 1)))) == pytest.approx(lag, rel=1e-9, abs=1e-12)
    turned = np.stack([layer @ np.linalg.qr(rng.normal(size=(5, 5)))[0] for layer in x])
    assert norm_step(0.1 * turned) == pytest.approx(step, rel=1e-8, abs=1e-12)
    z = float(compute("norm.step.zmax/1", x, mu=mu, sigma=sigma))
    order = rng.permutation(3)
    assert float(compute("norm.step.zmax/1", 2 * turned[:, order], mu=mu, sigma=sigma)) == pytest.approx(z, rel=1e-8)


def test_refusals():
    with pytest.raises(MetricError, match="D − 1 steps"):
        step_zmax([[0.1], [0.2]], [0.1], [0.1])
    with pytest.raises(MetricError, match="depth"):
        phase_lag([1.0, 2.0])
    with pytest.raises(MetricError, match="real"):
        phase_lag(np.ones((2, 2)) * 1j)
    with pytest.raises(MetricError, match="mu="):
        compute("norm.step.zmax/1", np.ones((2, 1, 3)))
