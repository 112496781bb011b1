"""What is done to a state, in closed form."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import calibration_of

from dynprobe.controllers.recovery import ACTUATORS, Clamp, Shrink, Slerp, Subspace
from dynprobe.errors import CalibrationError
from dynprobe.testing import tiny_llama


def gain(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def angle(x: Tensor, y: Tensor) -> Tensor:
    x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))


def path(phi: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two states ``[1, 1, 3]`` that lie φ apart, in a plane that is no coordinate plane, of different length."""
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    below = 2.0 * basis[:, 0]
    state = scale * (math.cos(phi) * basis[:, 0] + math.sin(phi) * basis[:, 1])
    return below[None, None], state[None, None]


@pytest.mark.parametrize("phi", [1e-6, 0.1, math.pi / 3, math.pi / 2, 2.5, 3.1])
def test_half_a_gain_halves_the_controlled_step(phi: float) -> None:
    below, state = path(phi, 5.0)
    after = Slerp()(state, below, 1, gain(0.5))
    assert float(angle(after, below)) == pytest.approx(phi / 2, rel=1e-9)
    assert float(angle(after, state)) == pytest.approx(phi / 2, rel=1e-9)
    assert float(after.norm()) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize("g", [0.0, 0.1, 0.25, 0.9, 1.0])
def test_the_arc_is_cut_in_proportion(g: float) -> None:
    below, state = path(1.2, 0.3)
    after = Slerp()(state, below, 1, gain(g))
    assert float(angle(after, below)) == pytest.approx((1 - g) * 1.2, abs=1e-9)
    assert float(after.norm()) == pytest.approx(0.3, rel=1e-12)
    if g == 1:
        torch.testing.assert_close(after, 0.15 * below)


def test_a_whole_path_by_steps_of_phi() -> None:
    phi, n = 0.4, 6
    points = torch.stack([torch.tensor([math.cos(k * phi), math.sin(k * phi), 0.0]) for k in range(n)]).double()
    for k in range(1, n):
        after = Slerp()(points[None, k : k + 1], points[None, k - 1 : k], k, gain(0.5))
        expected = torch.tensor([math.cos((k - 0.5) * phi), math.sin((k - 0.5) * phi), 0.0], dtype=torch.float64)
        torch.testing.assert_close(after[0, 0], expected)


def test_where_no_arc_is_given_nothing_is_done() -> None:
    _, state = path(1.0)
    zero = torch.zeros_like(state)
    nan = torch.full_like(state, torch.nan)
    for b, h in ((-state, state), (-3 * state, state), (zero, state), (state, zero), (4 * state, state), (nan, state)):
        after = Slerp()(h, b, 1, gain(0.5))
        assert torch.equal(after, h)
    assert Slerp()(state, None, 0, gain(0.5)) is state
    inf = torch.full_like(state, torch.inf)
    assert torch.equal(Slerp()(state, inf, 1, gain(0.5)), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept_and_computed_in_float64(dtype: torch.dtype) -> None:
    below, state = (x.to(dtype) for x in path(1.0, 3.0))
    after = Slerp()(state, below, 1, gain(0.5))
    assert after.dtype == dtype
    exact = Slerp()(state.double(), below.double(), 1, gain(0.5))
    assert torch.equal(after, exact.to(dtype))


def test_rows_and_slots_have_gains_and_arcs_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    state, below = (torch.randn(2, 1, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    g = torch.tensor([0.5, 0.2], dtype=torch.float64)[:, None, None, None]
    after = Slerp()(state, below, 1, g)
    for row, slot in np.ndindex(2, 4):
        one = Slerp()(state[row, :, slot][None], below[row, :, slot][None], 1, gain(float(g[row])))
        torch.testing.assert_close(after[row, :, slot], one[0])


@pytest.fixture(scope="module")
def held() -> tuple[Any, Any]:
    subject = tiny_llama()
    return subject, calibration_of(subject)


def test_shrink_goes_to_the_mean_of_its_depth(held: Any) -> None:
    subject, calibration = held
    actuator = Shrink()
    actuator.bind(subject, calibration)
    h = torch.randn(2, 1, 32)
    for depth in (1, 3):
        mean = calibration.tensors["mean"][depth]
        after = actuator(h, None, depth, gain(0.25, 1.0))
        torch.testing.assert_close(after[0, 0], mean + 0.75 * (h[0, 0] - mean))
        torch.testing.assert_close(after[1, 0], mean)


def test_clamp_limits_the_norm_and_turns_nothing(held: Any) -> None:
    subject, calibration = held
    actuator = Clamp()
    actuator.bind(subject, calibration)
    h = torch.stack([torch.full((1, 32), 0.1), torch.full((1, 32), 9.0)])
    after = actuator(h, None, 2, gain(0.1, 0.5))
    assert torch.equal(after[0], h[0])
    assert float(after[1].norm()) == pytest.approx(2.0, rel=1e-6)
    assert float(angle(after[1].double(), h[1].double())) == pytest.approx(0, abs=1e-6)


def test_subspace_shrinks_what_lies_outside(held: Any) -> None:
    subject, calibration = held
    actuator = Subspace()
    actuator.bind(subject, calibration)
    mean, pcs = calibration.tensors["mean"][2].double(), calibration.tensors["pcs"][2].double()
    inside = mean + 3.0 * pcs[1] - 2.0 * pcs[3]
    outside = torch.linalg.svd(pcs)[2][-1]
    h = (inside + 4.0 * outside)[None, None].expand(2, 1, 32)
    after = actuator(h, None, 2, gain(0.25, 1.0))
    torch.testing.assert_close(after[0, 0], inside + 3.0 * outside, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1, 0], inside, atol=1e-5, rtol=1e-5)  # components are float32
    torch.testing.assert_close(actuator(inside[None, None], None, 2, gain(0.5))[0, 0], inside, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(set(ACTUATORS) - {"slerp"}))
def test_what_they_need_of_a_calibration(kind: str, held: Any) -> None:
    subject, calibration = held
    with pytest.raises(CalibrationError, match=f"actuator {kind} needs a calibration and there is none"):
        ACTUATORS[kind]().bind(subject, None)
    from dynprobe.probes import Calibration

    bare = Calibration({}, calibration.signals, calibration.header)
    with pytest.raises(CalibrationError, match=f"actuator {kind} needs '(mean|norm_q99)' and the calibration does not"):
        ACTUATORS[kind]().bind(subject, bare)
