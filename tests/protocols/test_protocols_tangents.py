"""Depth exponents, block coupling and the gate on models whose derivatives are known, or taken another way."""

import math

import numpy as np
import pytest
import torch
from models import build, subject
from torch import nn

import dynprobe as dp
from dynprobe.errors import ModelError, SiteError, UsageError
from dynprobe.metrics import compute
from dynprobe.probes import capture, discover, live_hooks
from dynprobe.probes._dispatch import attach
from dynprobe.protocols._lyapunov import start_frame
from dynprobe.testing import tiny_llama

ROW = [5, 6, 7, 8]
DIM = 6


class Linear(nn.Module):
    """h → h Aᵀ (+ a square, so that it is linear near 0 only)."""

    def __init__(self, matrix, bend):
        super().__init__()
        self.a, self.bend = nn.Parameter(matrix), bend

    def forward(self, x):
        y = x @ self.a.T
        return y + self.bend * y**3


class Chain(nn.Module):
    """An embedding, blocks that are matrices, a linear head."""

    def __init__(self, matrices, bend=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, DIM)
        self.blocks = nn.ModuleList([Linear(m, bend) for m in matrices])
        self.head = nn.Linear(DIM, 11)
        self.double()

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def chain(matrices, **more):
    return discover(Chain([torch.as_tensor(m) for m in matrices], **more), name="chain")


MATRICES = np.eye(DIM) + 0.3 * np.random.default_rng(0).normal(size=(5, DIM, DIM))


@pytest.fixture(scope="module")
def gpt2():
    """Float64 throughout (Llama's norm computes in float32), so that derivatives compare to many digits."""
    return discover(build("gpt2").double(), name="gpt2-double")


def jacobian(s, row, at, upto):
    """∂(states at upto)/∂(states at depth at) by reverse mode through the model's own forward, [T, d, T, d]."""
    start = capture(s, [row], logits=None).states[at].detach()

    def f(h):
        seen = []
        module, side = (s.blocks[0], "input") if at == 0 else (s.blocks[at - 1], "output")
        hooks = [attach(module, side=side, write=lambda _: h)]
        hooks.append(attach(s.blocks[upto - 1], side="output", read=seen.append))
        try:
            s.model(torch.tensor([row]))
        finally:
            for hook in hooks:
                hook.remove()
        return seen[0][0]

    return torch.autograd.functional.jacobian(f, start)[:, :, 0].detach().numpy()


def volumes(end, begin, frame):
    """(1/1)·increments of ln i-volume of two images of a frame [m, k]."""
    out = []
    for i in range(1, frame.shape[1] + 1):
        a, b = end @ frame[:, :i], begin @ frame[:, :i]
        out.append(0.5 * (np.linalg.slogdet(a.T @ a)[1] - np.linalg.slogdet(b.T @ b)[1]))
    return np.diff([0.0, *out])


def directions(states):
    """Derivative of the unit vectors of [T, d], as a [T·d, T·d] matrix."""
    T, d = states.shape
    out = np.zeros((T * d, T * d))
    for t, x in enumerate(states):
        u = x / np.linalg.norm(x)
        out[t * d : (t + 1) * d, t * d : (t + 1) * d] = (np.eye(d) - np.outer(u, u)) / np.linalg.norm(x)
    return out


def exponents(result, form="raw"):
    table = result.frame()
    return table[table["form"] == form]["lyapunov"].to_numpy()


# ---- exponents


@pytest.mark.parametrize("method", ["jvp", "fd"])
def test_matrices_give_the_exponents_of_their_product(method):
    s = chain(MATRICES)
    result = dp.protocols.lyapunov(s, [ROW], k=3, method=method, every=2, eps=[1e-4, 1e-3])
    states = np.stack([x[0, -1].detach().numpy() for x in capture(s, [ROW], logits=None).states])
    chosen = np.array([False, False, False, True])
    start = start_frame(ROW, chosen, DIM, 3, 0, 0)[:, -1]
    for form in ("raw", "direction"):
        want = compute("lyap.ftle/1", MATRICES, start=start, states=states, form=form).per_unit
        # Differences of directions are curved in ε also where the map is linear; tangents are not.
        np.testing.assert_allclose(exponents(result, form), want, rtol=1e-8, atol=1e-9)
    assert result.frame()["reason"].isna().all()
    assert (result.frame()["n_maps"] == 5).all()


def test_scaling_is_raw_growth_and_no_turning():
    result = dp.protocols.lyapunov(chain([2.5 * np.eye(DIM)] * 4), [ROW, ROW[:2]], k=2)
    np.testing.assert_allclose(exponents(result), math.log(2.5), rtol=1e-12)
    np.testing.assert_allclose(exponents(result, "direction"), 0, atol=1e-12)
    path = result.profile()
    raw = path[(path["form"] == "raw") & (path["index"] == 1) & (path["prompt"] == 0)]
    assert raw["depth"].tolist() == [4]
    assert raw["growth"].iloc[0] == pytest.approx(4 * math.log(2.5))


@pytest.mark.parametrize(("at", "upto", "positions"), [(0, 3, "-1"), (1, 3, "1:"), (1, 2, "1"), (0, 3, "all")])
def test_against_an_explicit_jacobian(gpt2, at, upto, positions):
    T, d = len(ROW), gpt2.dim
    states = [x[0].numpy() for x in capture(gpt2, [ROW], logits=None).states]
    chosen = {"-1": [3], "1:": [1, 2, 3], "1": [1], "all": [0, 1, 2, 3]}[positions]
    frame = start_frame(ROW, np.isin(np.arange(T), chosen), d, 3, at, 7).reshape(3, -1).T
    whole = jacobian(gpt2, ROW, at, upto).reshape(T * d, T * d)
    n = upto - at
    for every in (1, 2, 9):
        result = dp.protocols.lyapunov(gpt2, [ROW], k=3, at=at, upto=upto, every=every, positions=positions, seed=7)
        np.testing.assert_allclose(exponents(result), volumes(whole, np.eye(T * d), frame) / n, rtol=1e-7, atol=1e-8)
        want = volumes(directions(states[upto]) @ whole, directions(states[at]), frame) / n
        np.testing.assert_allclose(exponents(result, "direction"), want, rtol=1e-7, atol=1e-8)
    assert result.frame()["n_units"].iloc[0] == len(chosen)
    assert result.agreement < 1e-3


def test_differences_agree_with_derivatives_where_the_gate_passes():
    s = tiny_llama()
    exact = dp.protocols.lyapunov(s, [ROW], k=3, every=1)
    near = dp.protocols.lyapunov(s, [ROW], k=3, every=1, method="fd", eps=np.geomspace(3e-4, 3e-3, 5)).frame()
    assert near["gate_passes"].all()
    off = np.abs(near["lyapunov"].to_numpy() - exact.frame()["lyapunov"].to_numpy())
    assert (off <= near["spread"].to_numpy() + 2e-3).all()
    assert (near["spread"] > 0).all()
    assert set(near["metric_id"]) == {"lyap.fd/1", "lyap.fd/1{form=direction}"}


def test_gate_fails_where_the_response_is_curved():
    bent = chain(MATRICES[:2] * 3, bend=5.0)
    table = dp.protocols.lyapunov(bent, [ROW], k=1, method="fd", eps=np.geomspace(0.1, 10, 9)).frame()
    raw = table[table["form"] == "raw"].iloc[0]
    assert not raw["gate_passes"] or raw["gate_slope"] < 1.1
    assert raw["spread"] > 0.5


@pytest.mark.parametrize("name", ["bloom", "mixtral", "mamba", "gemma3", "rwkv"])
def test_other_architectures(name):
    """Operations without forward mode, recurrences and norms after the block, against finite differences."""
    s = subject(name)
    exact = dp.protocols.lyapunov(s, [ROW], k=2, every=1)
    assert exact.agreement < 0.03
    if name == "bloom":
        assert (exact.frame()["road"] == "jvp (reverse twice)").all()
        matrix = jacobian(s, ROW, 0, s.n_layers)[-1, :, -1, :]
        frame = start_frame(ROW, np.arange(4) == 3, s.dim, 2, 0, 0)[:, -1].T
        want = volumes(matrix, np.eye(s.dim), frame) / s.n_layers
        np.testing.assert_allclose(exponents(exact), want, rtol=1e-4, atol=1e-5)


def test_prompts_do_not_matter_to_each_other():
    s = tiny_llama()
    both = dp.protocols.lyapunov(s, [ROW, [9, 3]], k=2).frame()
    alone = dp.protocols.lyapunov(s, [[9, 3]], k=2).frame()
    np.testing.assert_array_equal(both[both["prompt"] == 1]["lyapunov"], alone["lyapunov"])
    assert not np.array_equal(alone["lyapunov"], dp.protocols.lyapunov(s, [[9, 3]], k=2, seed=1).frame()["lyapunov"])


def test_the_model_is_left_as_it_was():
    s = tiny_llama()
    s.model.train()
    before = capture(s, [ROW], logits="all").logits
    dp.protocols.lyapunov(s, [ROW], k=1)
    dp.protocols.coupling(s, [ROW], k=1)
    dp.protocols.linear_response(s, [ROW], alphas=[0.01, 0.1, 1])
    assert live_hooks(s.model) == 0
    assert not any("forward" in block.__dict__ for block in s.blocks)
    assert all(p.grad is None for p in s.model.parameters())
    assert s.model.training
    assert torch.equal(capture(s, [ROW], logits="all").logits, before)


def test_nothing_to_measure_is_nan_with_a_reason():
    table = dp.protocols.lyapunov(tiny_llama(), [[5], ROW], k=1, positions="1:").frame()
    assert table[table["prompt"] == 0]["reason"].tolist() == ["empty", "empty"]
    assert table[table["prompt"] == 0]["lyapunov"].isna().all()
    assert table[table["prompt"] == 1]["reason"].isna().all()
    flat = dp.protocols.lyapunov(chain([np.eye(DIM), np.diag([1.0, 1, 1, 0, 0, 0])]), [ROW], k=4).frame()
    raw = flat[flat["form"] == "raw"]
    assert raw["reason"].tolist()[3] == "singular"
    assert raw["lyapunov"].isna().tolist() == [False, False, False, True]


class LooksBack(Chain):
    """The last block adds what the first one gave out: depth 2 is not all it knows."""

    def forward(self, ids):
        first = self.blocks[0](self.embed(ids))
        h = self.blocks[1](first)
        self.blocks[2].kept = first
        return self.head(self.blocks[2](h))


class Keeps(Linear):
    def forward(self, x):
        return super().forward(x) + self.kept


class Detaches(Linear):
    def forward(self, x):
        return super().forward(x.detach())


def test_refusals():
    net = LooksBack([torch.as_tensor(m) for m in MATRICES[:3]])
    net.blocks[2] = Keeps(torch.as_tensor(MATRICES[2]), 0.0)
    with pytest.raises(ModelError, match="look back"):
        dp.protocols.lyapunov(discover(net, name="looks-back"), [ROW])
    net = Chain([torch.as_tensor(m) for m in MATRICES[:3]])
    net.blocks[1] = Detaches(torch.as_tensor(MATRICES[1]), 0.0)
    with pytest.raises(ModelError, match="detaches"):
        dp.protocols.lyapunov(discover(net, name="detaches"), [ROW])
    s = chain(MATRICES)
    for more, error in (
        ({"method": "jpv"}, UsageError), ({"k": 0}, UsageError), ({"k": 7}, UsageError), ({"every": 0}, UsageError),
        ({"at": 5}, SiteError), ({"at": 2, "upto": 2}, SiteError), ({"method": "fd", "eps": [0.0]}, UsageError),
    ):  # fmt: skip
        with pytest.raises(error):
            dp.protocols.lyapunov(s, [ROW], **more)


# ---- coupling


def test_jacobians_of_residual_parts(gpt2):
    result = dp.protocols.coupling(gpt2, [ROW], k=4, chunk=10, keep=True)
    for layer in range(gpt2.n_layers):
        want = jacobian(gpt2, ROW, layer, layer + 1)[-1, :, -1, :] - np.eye(gpt2.dim)
        np.testing.assert_allclose(result.jacobians[0, layer], want, atol=1e-11)
    j = result.jacobians[0]
    for a in range(3):
        for b in range(3):
            assert result.matrix[0, a, b] == pytest.approx(float(compute("coupling.mk/1", j[a], j[b], K=4)), abs=1e-9)
    table = result.frame()
    assert len(table) == 9
    assert set(table["metric_id"]) == {"coupling.mk/1{K=4}"}
    assert (table["gap"] > 0).all()


def test_jacobians_between_tokens_and_on_llama(gpt2):
    result = dp.protocols.coupling(gpt2, [ROW], k=2, position=-1, source=1, keep=True)
    want = np.stack([jacobian(gpt2, ROW, layer, layer + 1)[-1, :, 1, :] for layer in range(gpt2.n_layers)])
    np.testing.assert_allclose(result.jacobians[0], want, atol=1e-11)
    llama = discover(tiny_llama(dim=16).model.double(), name="llama-double")
    found = dp.protocols.coupling(llama, [ROW], k=2, keep=True).jacobians[0]
    want = np.stack([jacobian(llama, ROW, i, i + 1)[-1, :, -1, :] - np.eye(16) for i in range(3)])
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())  # its norms compute in float32


def test_coupling_of_matrices():
    a, b = np.diag([3.0, 2, 1, 1, 1, 1]), np.diag([2.0, 3, 1, 1, 1, 1])  # residual parts diag(2, 1, 0…), diag(1, 2, 0…)
    result = dp.protocols.coupling(chain([a, b, np.eye(DIM)]), [ROW], k=1)
    np.testing.assert_allclose(result.matrix[0, :2, :2], [[0, 0.5], [0.5, 0]], atol=1e-12)
    assert result.reasons[0, 0, 2] == "degenerate-frame"  # the third block adds nothing
    assert result.reasons[0, 2, 0] == "zero-denominator"
    two = dp.protocols.coupling(chain([a, b]), [ROW], k=2)
    assert two.matrix[0, 0, 1] == pytest.approx(math.sqrt(2) / math.sqrt(5), rel=1e-9)


def test_coupling_refuses():
    s = chain(MATRICES)
    for more, error, text in (
        ({"k": 7}, UsageError, "width 6"), ({"max_dim": 5, "k": 1}, UsageError, "max_dim=6"),
        ({"k": 1, "position": 4}, SiteError, "4 tokens"), ({"k": 1, "position": 0, "source": 1}, SiteError, "after"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            dp.protocols.coupling(s, [ROW], **more)


# ---- gate


def test_gate_of_a_linear_chain_and_of_a_bent_one():
    straight = dp.protocols.linear_response(chain(MATRICES), [ROW], layers="all", positions="all", read="state").frame()
    assert straight["passes"].all()
    np.testing.assert_allclose(straight["slope"], 1, atol=1e-9)
    np.testing.assert_allclose(straight["alpha_high"], 1)
    result = dp.protocols.linear_response(chain(MATRICES[:2] * 3, bend=5.0), [ROW], layers="0", positions="all")
    bent = result.frame().iloc[0]
    assert bent["alpha_high"] < 1
    points = result.responses()
    assert len(points) == 17
    assert points["usable"].all()


def test_gain_is_the_derivative(gpt2):
    """response/α in the linear range equals the directional derivative of the last state."""
    row = dp.protocols.linear_response(gpt2, [ROW], layers="0", positions="-1", read="state").frame().iloc[0]
    h = capture(gpt2, [ROW], logits=None).states[1][0, -1].numpy()
    key = dp.probes._noise.row_key_from_tokens(ROW)
    eps = dp.probes._noise.gaussian_rows(0, [key], "gate.depth.1", np.array([[-1, -1, -1, 3]]), gpt2.dim)[0, -1]
    v = np.linalg.norm(h) * eps.astype(float) / np.linalg.norm(eps.astype(float))
    want = np.linalg.norm(jacobian(gpt2, ROW, 1, gpt2.n_layers)[-1, :, -1, :] @ v)
    fine = dp.protocols.linear_response(
        gpt2, [ROW], layers="0", positions="-1", read="state", alphas=[1e-6, 2e-6, 4e-6]
    )
    assert fine.frame()["gain"].iloc[0] == pytest.approx(want, rel=1e-6)
    assert row["passes"]


def test_gate_nothing_written():
    row = dp.protocols.linear_response(tiny_llama(), [[5]], layers="1").frame().iloc[0]
    assert not row["passes"]
    assert row["reason"] == "empty"
    with pytest.raises(UsageError, match="read"):
        dp.protocols.linear_response(tiny_llama(), [ROW], read="x")
