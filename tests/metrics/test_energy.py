"""energy.*/1: closed forms, autograd, a slow twin, and what the distances forget."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.errors import MetricError
from dynprobe.metrics import columns, compute, ids, spec
from dynprobe.metrics._energy import alignment, interaction
from dynprobe.metrics._energy_tying import circuit_cosine, tying

ENERGY, ALIGN, TYING, CIRCUIT = "energy.interaction/1", "energy.align/1", "energy.tying/1", "energy.circuit/1"
SUBSPACE = "energy.tying/1{kind=subspace}"


def slow_energy(q, k, scale, bias):
    """Loops and math.exp."""
    out = np.full(q.shape[:2], np.nan)
    for h in range(len(q)):
        for i in range(q.shape[1]):
            terms = [
                math.exp(scale * float(q[h, i] @ k[h, j]) + bias[h][i][j])
                for j in range(k.shape[1])
                if bias[h][i][j] > -math.inf
            ]
            if terms:
                out[h, i] = -math.log(sum(terms)) / scale
    return out


def test_vectors():
    q, k = np.array([[[2.0, 1.0]]]), np.array([[[3.0, -1.0]]])
    assert float(compute(ENERGY, q, k)) == pytest.approx(-5)
    assert float(compute(ENERGY, q, k, scale=0.01)) == pytest.approx(-5)
    n = 5
    flat = compute(ENERGY, np.zeros((2, n, 4)), np.random.default_rng(0).normal(size=(2, n, 4)))
    np.testing.assert_allclose(flat.per_unit, [2 * -2.0 * math.log(i + 1) for i in range(n)], atol=1e-12)
    both = compute(ENERGY, np.ones((1, 1, 1)), np.array([[[0.0], [math.log(3)]]]), bias=np.zeros((1, 1, 2)), scale=1.0)
    assert float(both) == pytest.approx(-math.log(4))


def test_energy_against_loops_and_bias_broadcast():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 6, 3))
    bias = np.where(rng.random((2, 4, 6)) < 0.4, -np.inf, rng.normal(size=(2, 4, 6)))
    bias[:, :, 0] = 0.0
    r = compute(ENERGY, q, k, bias=bias, scale=0.7)
    slow = slow_energy(q, k, 0.7, bias)
    np.testing.assert_allclose(r.extras["grid"], slow, rtol=1e-12)
    assert float(r) == pytest.approx(slow.sum(0).mean())
    np.testing.assert_allclose(r.extras["per_head"], slow.mean(1))
    assert (r.n_units, r.coverage) == (4, 1.0)
    one = compute(ENERGY, q, k, bias=bias[:1], scale=0.7)
    np.testing.assert_allclose(one.extras["grid"], slow_energy(q, k, 0.7, bias[[0, 0]]), rtol=1e-12)
    causal = np.where(np.tril(np.ones((4, 4))) > 0, 0.0, -np.inf)
    assert float(compute(ENERGY, q, k[:, :4])) == float(compute(ENERGY, q, k[:, :4], bias=causal[None]))


def test_pull_is_the_gradient():
    torch.manual_seed(0)
    q = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    bias = torch.randn(3, 5, 5, dtype=torch.float64).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    energy, pull = interaction(q, k, scale=0.3, bias=bias)
    (gradient,) = torch.autograd.grad(energy.sum(), q)
    torch.testing.assert_close(-gradient, pull.detach(), atol=1e-13, rtol=0)


def test_energy_falls_along_the_pull_and_is_concave():
    torch.manual_seed(1)
    q, k = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(1, 6, 4, dtype=torch.float64)
    before, pull = interaction(q, k)
    for eta in (0.01, 1.0, 100.0):
        after, _ = interaction(q + eta * pull, k)
        assert bool((after <= before - eta * (pull**2).sum(-1) + 1e-9).all())


def test_energy_is_cems_own():
    """The formula of the reference model, on its own queries and keys."""
    from dynprobe.models import CemConfig
    from dynprobe.models._cem_attention import InteractionStep
    from dynprobe.models._cem_frame import Frame, rotate

    torch.manual_seed(2)
    for position in ("none", "rope", "alibi"):
        config = CemConfig.preset("nano", diagonal="none", preconditioner="none", position=position)
        step = InteractionStep(config, 0).double()
        n, u = torch.randn(2, 1, 5, config.hidden_size, dtype=torch.float64)
        frame = Frame(5, 5, None, torch.arange(5)[None], torch.float64, torch.device("cpu"), None)
        field = step.field(n, frame)
        q = step._split(step.q_proj(u))
        q = q if field.angles is None else rotate(q, field.angles)
        energy, _ = interaction(
            q, field.keys, scale=1 / step.tau, bias=frame.bias(None) if field.bias is None else field.bias
        )
        torch.testing.assert_close(energy, step.energy_per_head(u, field))


def test_missing_is_nan_with_reason():
    q, k = np.ones((1, 3, 2)), np.ones((1, 3, 2))
    blind = np.zeros((1, 3, 3))
    blind[:, :1] = -np.inf
    r = compute(ENERGY, q, k, bias=blind)
    assert math.isnan(r.per_unit[0])
    assert math.isfinite(float(r))
    assert r.coverage == pytest.approx(2 / 3)
    gone = compute(ENERGY, q, k, bias=np.full((1, 3, 3), -np.inf))
    assert (math.isnan(float(gone)), gone.reason) == (True, "coverage")
    assert compute(ENERGY, q * np.nan, k).reason == "coverage"
    assert compute(ENERGY, np.ones((1, 0, 2)), np.ones((1, 0, 2))).reason == "empty"
    zero = compute(ALIGN, np.ones((3, 2)), np.zeros((3, 2)))
    assert (math.isnan(float(zero)), zero.reason) == (True, "zero-denominator")
    assert compute(ALIGN, np.full((3, 2), np.nan), np.ones((3, 2))).reason == "nonfinite"
    assert compute(ALIGN, np.ones((3, 2)), np.ones((3, 2)), mask=[False] * 3).reason == "empty"
    assert compute(TYING, np.zeros((1, 2, 4)), np.ones((1, 2, 4))).reason == "zero-denominator"
    assert compute(SUBSPACE, np.zeros((1, 2, 4)), np.ones((1, 2, 4))).reason == "zero-denominator"
    assert compute(TYING, np.full((1, 2, 4), np.nan), np.ones((1, 2, 4))).reason == "nonfinite"
    w = np.ones((1, 2, 4))
    assert compute(CIRCUIT, w, w, 0 * w, w).reason == "zero-denominator"
    assert compute(CIRCUIT, w, w, np.nan * w, w).reason == "nonfinite"


@pytest.mark.parametrize(
    ("metric", "inputs", "more"),
    [
        (ENERGY, (np.ones((3, 2)), np.ones((3, 2))), {}),
        (ENERGY, (np.ones((4, 3, 2)), np.ones((2, 3, 2))), {}),
        (ENERGY, (np.ones((1, 3, 2)), np.ones((1, 4, 2))), {}),
        (ENERGY, (np.ones((1, 3, 2)), np.ones((1, 3, 2))), {"scale": 0.0}),
        (ENERGY, (np.ones((1, 3, 2)), np.ones((1, 3, 2))), {"bias": np.zeros((2, 3, 3))}),
        (ENERGY, (np.ones((1, 3, 2)), np.ones((1, 3, 2))), {"mask": [True] * 3}),
        (ALIGN, (np.ones((3, 2)), np.ones((2, 2))), {}),
        (ALIGN, (np.ones(3), np.ones(3)), {}),
        (TYING, (np.ones((1, 2, 4)), np.ones((1, 3, 4))), {}),
        (TYING, (np.ones((2, 4)), np.ones((2, 4))), {}),
        ("energy.tying/1{kind=angle}", (np.ones((1, 2, 4)), np.ones((1, 2, 4))), {}),
        (CIRCUIT, (np.ones((1, 2, 4)),) * 3, {}),
    ],
)
def test_refusals(metric, inputs, more):
    with pytest.raises(MetricError):
        compute(metric, *inputs, **more)


def test_align():
    f = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    assert float(compute(ALIGN, f, 7 * f)) == pytest.approx(1)
    assert float(compute(ALIGN, f, -f)) == pytest.approx(-1)
    r = compute(ALIGN, f[:1], np.array([[1.0, 1.0]]))
    assert (float(r), r.extras["slope"]) == (pytest.approx(1 / math.sqrt(2)), 1.0)
    some = compute(ALIGN, f, np.array([[1.0, 1.0], [0.0, 0.0], [3.0, 4.0]]), mask=[True, True, False])
    assert float(some) == pytest.approx(1 / math.sqrt(2))
    np.testing.assert_allclose(some.per_unit, [1 / math.sqrt(2), np.nan, np.nan])
    assert some.coverage == 0.5
    # The slope is the first-order decrease of ε.
    torch.manual_seed(3)
    q, k = torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)
    energy, pull = interaction(q, k)
    step = 1e-6 * torch.randn_like(q)
    after, _ = interaction(q + step, k)
    _, slope = alignment(pull[0].numpy(), step[0].numpy())
    np.testing.assert_allclose(-(after - energy)[0].numpy(), slope, rtol=1e-4, atol=1e-14)


def test_tying_vectors():
    w = np.eye(2, 4)[None]
    for other in (w, -3 * w):
        assert float(compute(TYING, w, other)) == pytest.approx(0, abs=1e-15)
        assert float(compute(SUBSPACE, w, other)) == pytest.approx(0, abs=1e-7)
    assert float(compute(TYING, w, w[:, ::-1])) == pytest.approx(1)
    assert float(compute(SUBSPACE, w, w[:, ::-1])) == pytest.approx(0, abs=1e-7)
    apart = np.eye(4)[None, 2:]
    assert float(compute(TYING, w, apart)) == float(compute(SUBSPACE, w, apart)) == 1
    a, b = np.array([[[1.0, 0.0]]]), np.array([[[1.0, 1.0]]])
    assert float(compute(TYING, a, b)) == pytest.approx(1 - 1 / math.sqrt(2))
    assert float(compute(SUBSPACE, a, b)) == pytest.approx(1 / math.sqrt(2))
    np.testing.assert_allclose(compute(TYING, a, -b).extras["cosine"], [-1 / math.sqrt(2)])


def test_chance_is_what_random_matrices_have():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 60, 3, 12))
    for kind in ("vector", "subspace"):
        found = tying(a, b, kind)
        assert found.distance.mean() == pytest.approx(found.chance, abs=0.03)
        assert found.other_heads == pytest.approx(found.chance, abs=0.01)
    assert tying(a, b, "subspace").chance == pytest.approx(math.sqrt(1 - 3 / 12))
    assert math.isnan(tying(a[:1], b[:1]).other_heads)
    assert tying(np.ones((1, 3, 12)), b[:1], "subspace").chance == pytest.approx(math.sqrt(1 - 3 / 12))  # ranks 1 and 3


def test_circuit_is_that_of_the_whole_matrices():
    rng = np.random.default_rng(5)
    q, k, v, o = rng.normal(size=(4, 3, 2, 7))
    table = circuit_cosine(q, k, v, o)
    for g in range(3):
        for h in range(3):
            writes, looks = o[g].T @ v[g], q[h].T @ k[h]
            expected = (writes * looks).sum() / np.linalg.norm(writes) / np.linalg.norm(looks)
            assert table[g, h] == pytest.approx(expected, rel=1e-12)
    r = compute(CIRCUIT, q, k, v, o)
    np.testing.assert_allclose(r.per_unit, np.diagonal(table))
    assert float(compute(CIRCUIT, q, k, k, q)) == pytest.approx(1)
    assert float(compute(CIRCUIT, q, k, k, -q)) == pytest.approx(-1)


def test_only_the_circuit_ignores_the_basis_of_a_head():
    rng = np.random.default_rng(6)
    q, k = rng.normal(size=(2, 3, 2, 7))
    turn = rng.normal(size=(3, 2, 2))
    v, o = turn @ k, np.linalg.inv(turn).transpose(0, 2, 1) @ q
    np.testing.assert_allclose(np.einsum("hid,hie->hde", o, v), np.einsum("hid,hie->hde", q, k))  # the same function
    assert float(compute(CIRCUIT, q, k, v, o)) == pytest.approx(1)
    assert float(compute(SUBSPACE, k, v)) == pytest.approx(0, abs=1e-7)
    assert float(compute(TYING, k, v)) > 0.01


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), dim=st.integers(2, 6), n=st.integers(2, 5))
def test_declared_invariances(seed, dim, n):
    rng = np.random.default_rng(seed)
    turn, c, d = rotation(rng, dim), *np.exp(rng.normal(size=2))
    close = {"rel": 1e-8, "abs": 1e-6}
    q, k = rng.normal(size=(2, 2, n, dim))
    assert float(compute(ENERGY, q @ turn, k @ turn)) == pytest.approx(float(compute(ENERGY, q, k)), **close)
    shift = rng.normal(size=dim)
    moved = compute(ENERGY, q, k + shift).per_unit
    np.testing.assert_allclose(moved, compute(ENERGY, q, k).per_unit - (q @ shift).sum(0))
    order = rng.permutation(n)
    f, u = rng.normal(size=(2, n, dim))
    before = float(compute(ALIGN, f, u))
    each = np.exp(rng.normal(size=(n, 1)))
    for g, v in ((f @ turn, u @ turn), (c * f, c * u), (c * f, d * u), (f[order], u[order]), (each * f, u)):
        assert float(compute(ALIGN, g, v)) == pytest.approx(before, **close)
    assert float(compute(ALIGN, np.tile(f, (2, 1)), np.tile(u, (2, 1)))) == pytest.approx(before, **close)
    heads = rng.permutation(2)
    a, b = rng.normal(size=(2, 2, 2, dim + 1))
    turn = rotation(rng, dim + 1)
    for metric in (TYING, SUBSPACE):
        before = float(compute(metric, a, b))
        for x, y in ((a @ turn, b @ turn), (c * a, c * b), (c * a, d * b), (a[heads], b[heads])):
            assert float(compute(metric, x, y)) == pytest.approx(before, **close)
    four = rng.normal(size=(4, 2, 2, dim + 1))
    before = float(compute(CIRCUIT, *four))
    for x in (four @ turn, c * four, four * np.exp(rng.normal(size=(4, 1, 1, 1))), four[:, heads]):
        assert float(compute(CIRCUIT, *x)) == pytest.approx(before, **close)


def test_catalogue():
    assert {ENERGY, ALIGN, TYING, CIRCUIT} == set(ids(group="energy"))
    assert spec(ENERGY).column == "energy"
    assert "energy" not in columns()  # no table of a run holds it yet
    assert {"R"} == set(spec(ENERGY).invariances)
