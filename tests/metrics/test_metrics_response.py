"""Relative response and relaxation rates: closed forms, exact zeros, and what has no rate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, relaxation, response


def batch(depths=3, rows=2, tokens=5, dim=6, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(size=(rows, tokens, dim))).to(dtype) for _ in range(depths)]


def test_it_is_the_size_of_the_displacement():
    clean = batch()
    alpha = np.array([0.0, 0.1, 2.5])
    arm = [h + a * h.norm(dim=-1, keepdim=True) * torch.eye(6)[2] for h, a in zip(clean, alpha, strict=True)]
    found = response(clean, arm, np.ones((2, 5), bool))
    np.testing.assert_allclose(found, np.broadcast_to(alpha[:, None, None], found.shape), rtol=1e-12)
    assert (found[0] == 0).all()
    slow = [[[np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(p, q, strict=True)]
             for p, q in zip(x.numpy(), y.numpy(), strict=True)] for x, y in zip(clean, arm, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found, slow, rtol=1e-12)


def test_what_did_not_move_is_exactly_zero_and_the_smallest_move_is_not():
    clean = batch(dtype=torch.float32)
    arm = [h.clone() for h in clean]
    arm[2][1, 3, 0] = torch.nextafter(arm[2][1, 3, 0], torch.tensor(9.0))
    found = response(clean, arm, np.ones((2, 5), bool))
    assert found[2, 1, 3] > 0
    found[2, 1, 3] = 0
    assert not found.any()


def test_what_has_no_norm_or_is_not_finite_has_no_response():
    clean, mask = batch(), np.ones((2, 5), bool)
    mask[0, 4] = False
    arm = [h + 1 for h in clean]
    clean[1][0, 0] = 0
    arm[1][1, 1, 2] = torch.nan
    clean[2][1, 2, 2] = torch.inf
    found = response(clean, arm, mask)
    missing = {tuple(map(int, i)) for i in np.argwhere(np.isnan(found))}
    assert missing == {(0, 0, 4), (1, 0, 4), (2, 0, 4), (1, 0, 0), (1, 1, 1), (2, 1, 2)}
    one = compute("response.rel/1", np.stack([c[1].numpy() for c in clean]), np.stack([a[1].numpy() for a in arm]))
    assert one.coverage == pytest.approx(13 / 15)
    np.testing.assert_allclose(one.extras["grid"], found[:, 1], equal_nan=True)
    assert float(one) == pytest.approx(np.mean([np.nanmean(row) for row in found[:, 1]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_widened_before_the_difference(dtype):
    clean = [h.to(dtype) for h in batch()]
    arm = [(h.double() * 1.25).to(dtype) for h in clean]
    expected = [
        (b.double() - a.double()).norm(dim=-1) / a.double().norm(dim=-1) for a, b in zip(clean, arm, strict=True)
    ]
    np.testing.assert_allclose(response(clean, arm, np.ones((2, 5), bool)), np.stack(expected), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_invariances(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 4, 5, 6))
    before = float(compute("response.rel/1", x, y))
    turns = [np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(4)]
    factor = np.exp(rng.normal(size=(4, 5, 1)))
    order = rng.permutation(5)
    for f in (
        lambda z: np.stack([p @ t for p, t in zip(z, turns, strict=True)]), lambda z: z * factor, lambda z: z[:, order],
    ):  # fmt: skip
        assert float(compute("response.rel/1", f(x), f(y))) == pytest.approx(before, rel=1e-10)
    assert float(compute("response.rel/1", x + 1, y + 1)) != pytest.approx(before, rel=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    clean = batch()
    with pytest.raises(MetricError, match="3 depths against 2"):
        response(clean, clean[:2], np.ones((2, 5), bool))
    with pytest.raises(MetricError, match="mask"):
        response(clean, clean, np.ones((2, 4), bool))
    with pytest.raises(MetricError, match="cannot be paired"):
        response(clean, [h[:, :4] for h in clean], np.ones((2, 5), bool))


# ---------------------------------------------------------------- relaxation


def grid(rate_depth=0.3, rate_token=0.2, depths=9, tokens=12, at=(2, 3), size=0.1):
    d, t = np.arange(depths)[:, None] - at[0], np.arange(tokens)[None] - at[1]
    out = size * np.exp(-rate_depth * d) * np.exp(-rate_token * t)
    out[(d < 0) | (t < 0) | np.broadcast_to((d == 0) & (t > 0), out.shape)] = 0
    return out


@pytest.mark.parametrize("fit", ["ls", "theil"])
@pytest.mark.parametrize("rates", [(0.3, 0.2), (-0.4, -0.1), (0.0, 1.0)])
def test_an_exponential_has_its_rate(fit, rates):
    found = relaxation(grid(*rates), depth=2, pos=3, fit=fit, eps=2e-16)
    for name, rate, n in (("relax_depth", rates[0], 7), ("relax_token", rates[1], 8)):
        result = found[name]
        assert float(result) == pytest.approx(rate, abs=1e-12)  # growth is a negative rate
        assert result.extras["n"] == n
        if rate:
            assert result.extras["r2"] == pytest.approx(1)
        else:  # a constant has no variance to explain
            assert math.isnan(result.extras["r2"])
    assert found["relax_depth"].metric_id == "relax.depth/1" + ("{fit=theil}" if fit == "theil" else "")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(3, 15))
def test_fits_agree_with_scipy(seed, n):
    series = np.exp(np.random.default_rng(seed).normal(size=n))
    ls, theil = (relaxation(series[:, None], depth=0, pos=0, fit=f)["relax_depth"] for f in ("ls", "theil"))
    line = stats.linregress(np.arange(n), np.log(series))
    assert float(ls) == pytest.approx(-line.slope, rel=1e-8, abs=1e-12)
    assert ls.extras["r2"] == pytest.approx(line.rvalue**2, rel=1e-8, abs=1e-12)
    robust = stats.theilslopes(np.log(series), np.arange(n), method="joint")
    assert float(theil) == pytest.approx(-robust[0], rel=1e-8, abs=1e-12)
    assert theil.extras["intercept"] == pytest.approx(robust[1], rel=1e-8, abs=1e-12)


def test_a_robust_fit_shrugs_off_one_outlier():
    series = 0.1 * np.exp(-0.2 * np.arange(12.0))[:, None]
    series[7] *= 1e4
    ls, theil = (float(relaxation(series, depth=0, pos=0, fit=f)["relax_depth"]) for f in ("ls", "theil"))
    assert theil == pytest.approx(0.2, abs=0.01)
    assert abs(ls - 0.2) > 0.05


def test_points_below_rounding_are_dropped():
    eps = float(np.finfo(np.float32).eps)
    series = np.array([1e-1, 1e-2, 1e-3, 16 * eps, 1e-7, 0.0])[:, None]
    found = relaxation(series, depth=0, pos=0, eps=eps)["relax_depth"]
    assert found.extras["n"] == 3
    assert float(found) == pytest.approx(np.log(10))


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ([0.1, 0.2], "points<3"), ([0.1, 0.0, 0.0, 0.2], "points<3"), ([0.0, 0.0, 0.0], "no-response"),
        ([0.1, np.nan, np.nan, np.nan, 0.2], "coverage"), ([0.0] * 3 + [1e-9], "no-response"),
    ],
)  # fmt: skip
def test_what_has_no_rate_says_why(series, reason):
    found = relaxation(np.array(series)[:, None], depth=0, pos=0)
    assert math.isnan(float(found["relax_depth"]))
    assert found["relax_depth"].reason == reason
    assert math.isnan(found["relax_depth"].extras["r2"])
    assert found["relax_token"].reason == "empty"  # there is no later position


def test_compute_takes_two_trajectories():
    rng, depths, tokens = np.random.default_rng(1), 6, 9
    x = rng.normal(size=(depths, tokens, 8))
    map_ = grid(0.25, 0.5, depths, tokens, at=(1, 2))
    push = rng.normal(size=x.shape)
    push *= (map_ * np.linalg.norm(x, axis=-1) / np.linalg.norm(push, axis=-1))[..., None]
    depth, token = (compute(f"relax.{a}/1", x, x + push, inject=1, pos=2) for a in ("depth", "token"))
    assert float(depth) == pytest.approx(0.25, rel=1e-9)
    assert float(token) == pytest.approx(0.5, rel=1e-9)
    assert (depth.extras["n"], token.extras["n"]) == (5, 6)
    mask = np.arange(tokens) < 7
    assert compute("relax.token/1", x, x + push, mask=mask, inject=1, pos=2).extras["n"] == 4
    with pytest.raises(MetricError, match="no unmasked unit"):
        compute("relax.token/1", x, x + push, mask=mask, inject=1, pos=8)
    with pytest.raises(MetricError, match="no place"):
        compute("relax.depth/1", x, x + push, inject=6, pos=0)
    with pytest.raises(MetricError, match="fit is one of"):
        compute("relax.depth/1{fit=cubic}", x, x + push, inject=0, pos=0)
