"""φ = ∫SiLU: values, limits, derivatives (T4)."""

import math

import pytest
import torch
from scipy.integrate import quad

from dynprobe.models._cem_phi import silu_integral

DOUBLE = torch.float64


def phi(x: float) -> float:
    return float(silu_integral(torch.tensor(x, dtype=DOUBLE)))


def test_published_values():
    assert phi(1) == pytest.approx(0.32944265049756, abs=1e-14)
    assert phi(-1) == pytest.approx(0.17055734950244, abs=1e-14)
    assert phi(5) == pytest.approx(11.717836339899, abs=1e-12)
    assert phi(0) == 0.0


@pytest.mark.parametrize(
    "x", [-800, -40, -7.3, -2.4, -1, -0.3, -0.0501, -0.0499, -1e-3, 1e-4, 0.0499, 0.0501, 0.6, 3, 12, 90, 800]
)
def test_against_quadrature(x):
    expected, _ = quad(
        lambda t: t / (1 + math.exp(-t)) if t > -700 else 0.0, 0, x, epsabs=1e-13, epsrel=1e-12, limit=500
    )
    assert phi(x) == pytest.approx(expected, abs=3e-13, rel=1e-12)


def test_limits_and_symmetry():
    assert phi(-1e4) == pytest.approx(math.pi**2 / 12, abs=1e-15)
    assert phi(1e4) == pytest.approx(5e7 - math.pi**2 / 12, rel=1e-15)
    x = torch.linspace(-50, 50, 2001, dtype=DOUBLE)
    torch.testing.assert_close(silu_integral(x) + silu_integral(-x), x.square() / 2, atol=1e-12, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_breaks_far_out_or_near_zero(dtype):
    x = torch.tensor([-1e4, -100.0, -0.05, -1e-20, 0.0, 1e-20, 0.05, 100.0, 1e4], dtype=dtype, requires_grad=True)
    y = silu_integral(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, torch.nn.functional.silu(x))
    assert torch.isnan(silu_integral(torch.tensor(math.nan)))


def test_derivatives():
    x = torch.tensor([-3.0, -0.5, -0.01, 0.0, 0.02, 0.7, 4.0], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(silu_integral, (x,))
    assert torch.autograd.gradgradcheck(silu_integral, (x,))


def test_it_never_falls_below_zero_and_float32_is_good():
    x = torch.linspace(-30, 30, 10_001, dtype=DOUBLE)
    y = silu_integral(x)
    assert (y >= 0).all()
    rounded = x.float()
    exact = silu_integral(rounded.double())
    assert ((silu_integral(rounded).double() - exact).abs() <= 1e-6 * exact + 1e-7).all()


def test_pieces_make_up_the_whole():
    """Long tensors are worked on piece by piece, whatever their layout, and each piece is what it is alone."""
    x = torch.linspace(-9, 9, 210_003, dtype=torch.float32).view(3, -1)
    whole = silu_integral(x)
    assert torch.equal(whole, torch.cat([silu_integral(part) for part in x.split(1)]))
    assert torch.equal(silu_integral(x.mT), whole.mT)
    assert torch.equal(silu_integral(x[:, ::7]), whole[:, ::7])
    assert silu_integral(x[:0]).shape == (0, 70_001)
