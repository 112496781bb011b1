"""The CSM-style reference model: tests C1–C9 of its definition, in float64 where numbers are compared."""

import pytest
import torch
from csm_small import SMALL, small, tokens
from torch import nn

from dynprobe.errors import UsageError
from dynprobe.models import CsmConfig, CsmForCausalLM, DeltaHalt
from dynprobe.models._csm_scan import _doubling, _loop, linear_scan

PRESETS = {"66m": 66.10, "150m": 149.91, "331m": 330.83, "tiny": 0.84, "nano": 0.23}
SHARES = {"66m": (32.16, 10.49, 23.07), "150m": (45.03, 18.35, 85.85), "331m": (57.90, 37.75, 233.83)}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def inside(model, ids):
    """Memory, drive and gates of some tokens."""
    memory, context = model.model.writer(model.model.embed_tokens(ids))
    return memory, *model.model.landscape(memory, context)


def slow_force(model, unit, drive, gates):
    """F of one position by loops, from the formula."""
    step = model.model.refine
    V, J, q = step.memory, step.symmetric_coupling, step.coupling_gain
    N, M = gates.shape
    out = torch.empty_like(unit)
    for r in range(N):
        v = V[0] if len(V) == 1 else V[r]
        seen = v @ unit[r]
        recalled = v.T @ (gates[r] * seen * torch.sigmoid(seen))
        coupled = sum(J[r, c] * unit[c] for c in range(N))
        out[r] = drive[r] + 4 / M**0.5 * recalled + q * coupled
    return out


@pytest.mark.parametrize("memory", ["per_state", "shared"])
def test_c1_force_is_minus_gradient_of_energy(memory):
    model = small(memory=memory)
    with torch.no_grad():
        m, drive, gates = inside(model, tokens())
    step = model.model.refine
    state = torch.randn_like(m).requires_grad_()
    # E depends on the state only through ŝ: differentiate at a point of the sphere, then compare with QF.
    energy = step.energy(state, drive, gates)
    (gradient,) = torch.autograd.grad(energy.sum(), state)
    unit = step.unit(state)
    (pulled,) = torch.autograd.grad(unit, state, -step.force(unit.detach(), drive, gates))
    torch.testing.assert_close(gradient, pulled, atol=1e-11, rtol=0)
    torch.testing.assert_close(step.energy(3.7 * state, drive, gates), energy, atol=1e-10, rtol=0)


@pytest.mark.parametrize("memory", ["per_state", "shared"])
def test_c1_force_and_energy_against_the_formula(memory):
    model = small(memory=memory)
    step = model.model.refine
    with torch.no_grad():
        m, drive, gates = inside(model, tokens())
    b, t = 1, 4
    unit = step.unit(torch.randn_like(m))

    def energy(u):
        from dynprobe.models._cem_phi import silu_integral

        V, J, q = step.memory, step.symmetric_coupling, step.coupling_gain
        N, M = gates.shape[2:]
        total = -(u * drive[b, t]).sum()
        for r in range(N):
            v = V[0] if len(V) == 1 else V[r]
            total = total - 4 / M**0.5 * (gates[b, t, r] * silu_integral(v @ u[r])).sum()
            for c in range(N):
                total = total - 0.5 * J[r, c] * (u[r] * q * u[c]).sum()
        return total

    u = unit[b, t].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(u), u)
    with torch.no_grad():
        expected = slow_force(model, unit[b, t], drive[b, t], gates[b, t])
        torch.testing.assert_close(step.force(unit, drive, gates)[b, t], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(-gradient, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(step.energy(unit, drive, gates)[b, t], energy(unit[b, t]), atol=1e-11, rtol=0)
        state = torch.randn_like(m)
        alpha = torch.sigmoid(step.step)
        moved = (1 - alpha) * state + alpha * step.force(step.unit(state), drive, gates)
        torch.testing.assert_close(step(state, drive, gates), moved, atol=1e-12, rtol=0)
    assert torch.equal(step.symmetric_coupling, step.symmetric_coupling.T)
    assert not torch.diagonal(step.symmetric_coupling).any()


def test_writer_against_the_formula():
    """Norm, convolution over four tokens, gates and memories, token by token from the equations."""
    model, ids = small(), tokens(1, 7)
    body, w = model.model, model.model.writer

    def unit(x, eps):
        return x / torch.sqrt((x * x).mean() + eps)

    with torch.no_grad():
        w.norm_convolution.add_(torch.randn(20, dtype=torch.float64) * 0.3)
        memory, context = w(body.embed_tokens(ids))
        e = [unit(body.embed_tokens.weight[i], 1e-6) for i in ids[0]]
        m = torch.zeros(16, 12, dtype=torch.float64)
        for t in range(7):
            mixed = sum(w.convolution[:, 3 - j] * e[t - j] for j in range(4) if t >= j)
            h = unit(mixed, 1e-6) * w.norm_convolution
            a = 1 / (1 + torch.exp(-(w.decay @ h + w.decay_bias)))
            m = a[:, None] * m + (1 - a)[:, None] * (w.write @ h).view(16, 12)
            torch.testing.assert_close(memory[0, t], m, atol=1e-12, rtol=0)
            torch.testing.assert_close(context[0, t, 0], w.context @ h, atol=1e-12, rtol=0)


def test_readout_against_the_formula():
    model, ids = small(), tokens(1, 3)
    reader = model.model.reader
    with torch.no_grad():
        out = model(ids)
        state = out.final_state[0, 2]
        flat = (state / state.square().mean(-1, keepdim=True).sqrt()).flatten()
        y = reader.read @ flat
        y = y / torch.sqrt((y * y).mean() + 1e-6) * reader.norm / torch.exp(reader.log_temperature)
        torch.testing.assert_close(out.logits[0, 2], model.model.embed_tokens.weight @ y, atol=1e-11, rtol=0)


@pytest.mark.parametrize("memory", ["per_state", "shared"])
def test_landscape_against_the_formula(memory):
    model = small(memory=memory)
    land = model.model.landscape
    with torch.no_grad():
        m, c = model.model.writer(model.model.embed_tokens(tokens()))
        drive, gates = land(m, c)
        unit = m / m.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(drive, land.drive_gain * unit + c + land.drive_bias, atol=1e-6, rtol=1e-6)
        for r in range(16):
            G = land.gates[0] if memory == "shared" else land.gates[r]
            expected = (unit[:, :, r] + c[:, :, 0]) @ G.T + land.gate_bias[r]
            torch.testing.assert_close(gates[:, :, r], expected, atol=1e-5, rtol=1e-5)


def test_c2_causality_is_exact():
    for dtype in (torch.float32, torch.float64):
        model = small(dtype)
        ids = tokens(length=24)
        changed = ids.clone()
        changed[:, 13:] = (changed[:, 13:] + 5) % 32
        with torch.no_grad():
            a, b = model(ids).logits, model(changed).logits
        assert torch.equal(a[:, :13], b[:, :13])
        assert not torch.equal(a[:, 13:], b[:, 13:])


def test_c3_scan_is_the_recurrence():
    a = torch.rand(2, 150, 3, 1, dtype=torch.float64)
    u = torch.randn(2, 150, 3, 4, dtype=torch.float64)
    y, steps = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(150):
        y = a[:, t] * y + u[:, t]
        steps.append(y)
    for scan in (_loop, _doubling, linear_scan):
        torch.testing.assert_close(scan(a, u), torch.stack(steps, 1), atol=1e-12, rtol=0)
    short = [x[:1, :5].clone().requires_grad_() for x in (a, u)]
    assert torch.autograd.gradcheck(linear_scan, short, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear_scan, short)


def test_c3_streaming_is_the_full_forward():
    model = small()
    ids = tokens(length=11)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        for cuts in ([1] * 11, [4, 1, 1, 5], [2, 9]):
            cache, pieces, start = None, [], 0
            for n in cuts:
                out = model(ids[:, start : start + n], past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, start + n
                pieces.append(out.logits)
            torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-11, rtol=0)


def test_c4_a_short_run_is_a_prefix_of_a_long_one():
    model = small()
    ids = tokens()
    with torch.no_grad():
        long = model(ids, num_iterations=45, output_hidden_states=True).hidden_states
        for k in (0, 1, 3, 10, 30):
            out = model(ids, num_iterations=k)
            assert out.iterations == k
            assert torch.equal(out.final_state, long[k])
            assert torch.equal(out.logits, model.readout(long[k]))


def test_c5_sixteen_vectors():
    config = CsmConfig.preset("nano")
    assert config.num_states == 16
    torch.manual_seed(0)
    out = CsmForCausalLM(config).eval()(tokens(3, 7), num_iterations=4, output_hidden_states=True)
    assert torch.stack(out.hidden_states).shape == (5, 3, 7, 16, 32)


def test_c6_no_attention():
    model = small()
    for name, module in model.named_modules():
        assert "attention" not in type(module).__name__.lower()
        assert not isinstance(module, nn.MultiheadAttention)
        assert "attn" not in name
    # No tensor of a forward has a position × position part: lengths that occur nowhere else must not occur twice.
    ids, sizes = tokens(1, 29), []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert "softmax" not in str(func)
            sizes.extend(tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with torch.no_grad(), Shapes():
        model(ids, num_iterations=2, use_cache=False, output_energies=True)
    assert sizes
    assert all(shape.count(29) < 2 for shape in sizes)


def test_c6_positions_meet_only_in_the_writer():
    model = small()
    ids = tokens(1, 8)
    t = 6
    body = model.model
    embedded = body.embed_tokens(ids).detach().requires_grad_()
    memory, context = body.writer(embedded)
    m, c = memory.detach().requires_grad_(), context.detach().requires_grad_()

    def logits(m, c):
        drive, gates = body.landscape(m, c)
        state = body.start(m, torch.arange(8)[None])
        for _ in range(5):
            state = body.refine(state, drive, gates)
        return model.readout(state)[0, t]

    direction = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    to_m, to_c = torch.autograd.grad(logits(m, c) @ direction, (m, c))
    for grad in (to_m, to_c):
        assert grad[0, t].abs().max() > 1e-6
        assert not grad[0, torch.arange(8) != t].any()
    # With the memory held, only the tokens inside the convolution's window are left.
    (held,) = torch.autograd.grad(logits(m, context) @ direction, embedded, retain_graph=True)
    (free,) = torch.autograd.grad(logits(memory, context) @ direction, embedded)
    assert not held[0, : t - 3].any()
    assert not held[0, t + 1 :].any()
    assert (free[0, : t + 1].abs().amax(-1) > 0).all()
    assert not free[0, t + 1 :].any()


def test_c7_rows_are_independent():
    model = small()
    ids = tokens(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        a = model(ids, output_energies=True, output_deltas=True, num_iterations=6)
        b = model(ids[order], output_energies=True, output_deltas=True, num_iterations=6)
    torch.testing.assert_close(a.logits[order], b.logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(a.energies[:, order], b.energies, atol=1e-11, rtol=0)
    torch.testing.assert_close(a.deltas[:, order], b.deltas, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("preset", ["nano", "tiny"])
def test_c8_energy_does_not_rise(preset, alpha):
    rises = total = 0
    for seed in range(3):
        torch.manual_seed(seed)
        model = CsmForCausalLM(CsmConfig.preset(preset, step_size=alpha)).eval()
        with torch.no_grad():
            found = model(torch.randint(0, 256, (2, 12)), num_iterations=20, output_energies=True).energies
        assert found.dtype == torch.float32
        assert found.shape == (21, 2, 12)
        assert (found[-1] < found[0]).all()
        rises += int((found.diff(dim=0) > 1e-4 * found[1:].abs()).sum())
        total += found[1:].numel()
    assert rises <= 0.001 * total


@pytest.mark.parametrize("name", PRESETS)
def test_c9_parameter_counts(name):
    with torch.device("meta"):
        model = CsmForCausalLM(CsmConfig.preset(name))
    assert round(model.num_parameters() / 1e6, 2) == PRESETS[name]
    c = model.config
    V, D, N, d, M = c.vocab_size, c.hidden_size, c.num_states, c.state_size, c.memory_size
    counted = V * D + 4 * D + 2 * D * N * d + D * N + N + D * d + 2 * N * d + N * M + 2 * N * M * d + N * N + d
    assert model.num_parameters() == counted + 2 * D + 2  # two norms with a gain; α and the temperature
    if name in SHARES:
        shares = [V * D, 2 * D * N * d, 2 * N * M * d]
        assert [round(n / 1e6, 2) for n in shares] == list(SHARES[name])


def test_shared_memory_is_cheaper_to_store():
    a, b = (CsmForCausalLM(CsmConfig(**SMALL, memory=m)).num_parameters() for m in ("per_state", "shared"))
    assert a - b == 2 * 15 * 10 * 12


def test_half_lives_start_log_spaced():
    model = CsmForCausalLM(CsmConfig(**SMALL, num_states=10))
    keep = torch.sigmoid(model.model.writer.decay_bias.double())
    lives = torch.log(torch.tensor(0.5)) / torch.log(keep)
    expected = torch.tensor([2.0**k for k in range(10)], dtype=torch.float64)
    torch.testing.assert_close(lives, expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"memory": "each"}, "per_state"), ({"init": "nois"}, "Did you mean 'noise'"), ({"carry": "x"}, "refined"),
        ({"hidden_size": 0}, "hidden_size"), ({"step_size": 1.0}, "step_size"), ({"halt_tol": -1.0}, "halt_tol"),
        ({"half_life_min": 9.0, "half_life_max": 3.0}, "half_life"), ({"num_iterations": -1}, "num_iterations"),
    ],
)  # fmt: skip
def test_config_refuses(more, text):
    with pytest.raises(UsageError, match=text):
        CsmConfig(**{**SMALL, **more})


def test_presets_and_near_misses():
    assert CsmConfig.preset("CSM-66M").to_dict() == CsmConfig.preset("66m").to_dict()
    assert CsmConfig.preset("nano", num_iterations=33).num_iterations == 33
    with pytest.raises(UsageError, match="'66m'"):
        CsmConfig.preset("66")
    with pytest.raises(UsageError, match="tol"):
        DeltaHalt(-0.1)
