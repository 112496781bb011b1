"""Plateau sweeps: linear models give d = t, arcs are the right ones, the baseline has the covariance it claims."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import dynprobe as dp
from dynprobe.errors import CalibrationError, SiteError, UsageError
from dynprobe.probes import Calibration, capture, discover
from dynprobe.probes._dispatch import attach
from dynprobe.protocols._plateau import _random_end, interpolate
from dynprobe.testing import tiny_gpt2, tiny_llama

A, B = [5, 6, 7, 8], [5, 6, 7, 9]


class Net(nn.Module):
    """Linear blocks; ``step`` makes the last one a jump along the first coordinate."""

    def __init__(self, step=False):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 9)
        self.blocks = nn.ModuleList([Block(i == 2 and step) for i in range(3)])

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Block(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.w, self.step = nn.Linear(6, 6), step

    def forward(self, x):
        y = x + self.w(x)
        return torch.tanh(1e4 * y) if self.step else y


def test_linear_model_gives_the_diagonal():
    s = discover(Net().double(), name="linear")
    result = dp.protocols.plateau(s, [(A, B), (A, [1, 2])], at=1, steps=11)
    assert result.d.shape == (4, 11)
    np.testing.assert_allclose(result.d, np.linspace(0, 1, 11)[None].repeat(4, 0), atol=1e-12)
    table = result.frame()
    np.testing.assert_allclose(table["plateau_width"], 0.8, rtol=1e-9)
    np.testing.assert_allclose(table["plateau_slope"], 1, rtol=1e-9)
    assert table["plateau_t50_reason"].isna().all()
    assert (table["n"] == 11).all()
    assert len(result.curves()) == 44


def test_a_jump_is_as_narrow_as_the_grid():
    s = discover(Net(step=True).double(), name="step")
    wide = dp.protocols.plateau(s, [(A, B)], steps=101, read=["state"]).frame().iloc[0]
    assert wide["plateau_share"] > 0.7
    assert wide["plateau_slope"] > 10


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_against_one_forward_at_a_time(make, at):
    """Each t run alone, with all blocks running, gives the same d; t = 1 is prompt B's own output."""
    s = make()
    result = dp.protocols.plateau(s, [(A, B)], at=at, steps=5)
    a, b = (capture(s, [row], logits=None).states[at][0, -1] for row in (A, B))
    module, side = (s.blocks[at - 1], "output") if at else (s.blocks[0], "input")
    outputs = {"state": [], "logits": []}
    for t in np.linspace(0, 1, 5):

        def put(state, t=t):
            out = state.clone()
            out[:, -1] = (a.double() + float(t) * (b.double() - a.double())).to(out)
            return out

        hook = attach(module, side=side, write=put)
        tape = capture(s, [A], logits="last")
        hook.remove()
        outputs["state"].append(tape.states[-1][0, -1].double().numpy())
        outputs["logits"].append(tape.logits[0].double().numpy())
    for i, read in enumerate(("state", "logits")):
        f = np.stack(outputs[read])
        to_a, to_b = np.linalg.norm(f - f[0], axis=1), np.linalg.norm(f - f[-1], axis=1)
        np.testing.assert_allclose(result.d[i], to_a / (to_a + to_b), atol=2e-5)
    # A and B differ in their last token only, so the end is prompt B itself.
    own = capture(s, [B], logits="last").logits[0].double().numpy()
    np.testing.assert_allclose(outputs["logits"][-1], own, atol=1e-4)


def test_arcs():
    t = torch.linspace(0, 1, 9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = torch.from_numpy(rng.normal(size=(2, 5)) * rng.uniform(0.1, 9, size=(2, 1)))
        x, reason = interpolate(a, b, t, "slerp")
        assert reason is None
        assert torch.equal(x[0], a.double())
        assert torch.equal(x[-1], b.double())
        norms = (1 - t.double()) * a.norm() + t.double() * b.norm()
        torch.testing.assert_close(x.norm(dim=-1), norms, rtol=1e-12, atol=0)
        u = x / x.norm(dim=-1, keepdim=True)
        whole = math.acos(float((u[0] * u[-1]).sum()))
        steps = torch.arccos((u[:-1] * u[1:]).sum(-1))
        torch.testing.assert_close(steps, torch.full_like(steps, whole / 8), rtol=1e-6, atol=1e-7)
    obtuse, _ = interpolate(torch.tensor([1.0, 0]), torch.tensor([-1.0, 0.2]), torch.tensor([0.5]), "slerp")
    assert obtuse[0, 1] > 0.9  # over the top, not towards −b
    assert interpolate(torch.tensor([1.0, 0]), torch.tensor([-2.0, 0]), t, "slerp")[1] == "antipodal"
    assert interpolate(torch.tensor([0.0, 0]), torch.tensor([-2.0, 0]), t, "slerp")[1] == "zero-denominator"
    same, _ = interpolate(torch.tensor([1.0, 0]), torch.tensor([3.0, 0]), torch.tensor([0.5]), "slerp")
    assert same[0].tolist() == [2.0, 0.0]


def test_same_prompt_twice_has_no_boundary():
    table = dp.protocols.plateau(tiny_llama(), [(A, A)], steps=5).frame()
    assert table["plateau_t50"].isna().all()
    assert set(table["reason"]) == {"zero-denominator"}
    assert set(table["plateau_width_reason"]) == {"zero-denominator"}


def calibration(dim, depths, at, root):
    q = torch.linalg.qr(torch.from_numpy(np.random.default_rng(3).normal(size=(dim, dim))))[0]
    tensors = {
        "mean": torch.full((depths, dim), 50.0), "std": torch.ones(depths, dim),
        f"cov_basis.{at}": q, f"cov_sqrt.{at}": torch.as_tensor(root, dtype=torch.double),
    }  # fmt: skip
    return Calibration(tensors, {}, {"hash": "abc"}), (q * torch.as_tensor(root)).numpy() @ q.numpy().T


def test_baseline_has_the_covariance_and_the_length():
    a, b = torch.zeros(4), torch.tensor([3.0, 4.0, 0.0, 0.0])
    held, half = calibration(4, 3, 1, [4.0, 2.0, 1.0, 0.0])
    u = np.stack([_random_end(a, b, A, 1, seed, held).numpy() for seed in range(4000)])
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 5, rtol=1e-12)
    eps = np.random.default_rng(9).normal(size=(40000, 4))
    want = eps @ half
    want = 5 * want / np.linalg.norm(want, axis=1, keepdims=True)  # the mean cancels in a difference of two draws
    np.testing.assert_allclose(u.T @ u / 4000, want.T @ want / 40000, atol=0.6)
    np.testing.assert_allclose(u.mean(0), 0, atol=0.25)


def test_baseline_rows():
    s = tiny_llama()
    held, _ = calibration(32, 4, 1, np.linspace(0.1, 1, 32))
    result = dp.protocols.plateau(s, [(A, B)], steps=7, baseline=2, calibration=held, path="slerp")
    table = result.frame()
    assert table["arm"].tolist() == ["pair"] * 2 + ["baseline"] * 4
    assert table["draw"].tolist() == [-1, -1, 0, 0, 1, 1]
    assert table["distance"].nunique() <= 3
    np.testing.assert_allclose(table["distance"], table["distance"].iloc[0], rtol=1e-6)
    assert table["calibration"].isna().tolist() == [True] * 2 + [False] * 4
    assert not np.allclose(result.d[2], result.d[4])


def test_refusals():
    s = tiny_llama()
    with pytest.raises(CalibrationError, match="cov_layers"):
        dp.protocols.plateau(s, [(A, B)], baseline=1)
    with pytest.raises(SiteError, match="depth 4"):
        dp.protocols.plateau(s, [(A, B)], at=4)
    for more in ({"steps": 2}, {"read": ["x"]}, {"path": "x"}, {"baseline": -1}):
        with pytest.raises(UsageError):
            dp.protocols.plateau(s, [(A, B)], **more)
    with pytest.raises(UsageError, match="pair 0"):
        dp.protocols.plateau(s, [(A, B, A)])
