"""CEM's two energies: the update is minus their gradient, and they fall where the theory says so."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dynprobe.models._cem_attention import InteractionField, InteractionStep
from dynprobe.models._cem_config import CemConfig
from dynprobe.models._cem_frame import Frame
from dynprobe.models._cem_mlp import SILU_SLOPE_MAX, SILU_SLOPE_MIN, ElementwiseField, ElementwiseStep
from dynprobe.models._cem_norm import CemRMSNorm
from dynprobe.models._cem_preconditioner import Preconditioner

B, S, D, K, M = 2, 7, 24, 3, 40
DOUBLE = torch.float64


def config(**fields: object) -> CemConfig:
    sizes = {"hidden_size": D, "num_attention_heads": K, "intermediate_size": M, "num_hidden_layers": 1}
    return CemConfig(**{**sizes, "vocab_size": 11, **fields})


def frame(n: int = S) -> Frame:
    return Frame(n, n, None, torch.arange(n)[None], DOUBLE, torch.device("cpu"))


def random_parameters(step: torch.nn.Module, seed: int, std: float = 0.4) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in step.named_parameters():
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            p.copy_(offset + std * torch.randn(p.shape, generator=generator, dtype=DOUBLE))


def attention(seed: int = 0, **fields: object) -> InteractionStep:
    step = InteractionStep(config(**fields), 0).double()
    random_parameters(step, seed)
    return step


def mlp(seed: int = 0, std: float = 0.4, **fields: object) -> ElementwiseStep:
    step = ElementwiseStep(config(**fields)).double()
    random_parameters(step, seed, std)
    return step


def states(seed: int = 0, n: int = S) -> Tensor:
    return torch.randn(B, n, D, generator=torch.Generator().manual_seed(100 + seed), dtype=DOUBLE)


def minus_gradient(step: torch.nn.Module, u: Tensor, field: object) -> Tensor:
    u = u.detach().requires_grad_()
    return -torch.autograd.grad(step.energy(u, field).sum(), u)[0]


def slow_energy(step: InteractionStep, h: Tensor, u: Tensor, position: str) -> Tensor:
    """ε token by token and head by head, as it is written."""
    n = step.norm(h)
    dh = D // K
    result = torch.zeros(B, S, dtype=DOUBLE)
    for b in range(B):
        for i in range(S):
            for k in range(K):
                WQ, WK = (w.weight[k * dh : (k + 1) * dh] for w in (step.q_proj, step.k_proj))
                A = WQ.T @ WK
                if step.diagonal is not None:
                    A = A + torch.diag(step.diagonal[k if len(step.diagonal) > 1 else 0])
                s = []
                for j in range(i + 1):
                    bias = -(2.0 ** -(k + 1)) * (i - j) if position == "alibi" else 0.0
                    if step.biases is not None:
                        bias = bias + step.biases[0 if i == j else 1, k]
                    s.append((A @ n[b, j]) @ u[b, i] / step.tau + bias)
                result[b, i] -= step.tau * torch.logsumexp(torch.stack(s), 0)
    return result


@pytest.mark.parametrize("diagonal", ["none", "shared", "per_head"])
@pytest.mark.parametrize("position", ["alibi", "none"])
def test_the_interaction_energy_is_the_written_one(diagonal, position):
    step = attention(diagonal=diagonal, position=position)
    h, u = states(0), states(1)
    field = step.field(step.norm(h), frame())
    torch.testing.assert_close(
        step.energy(u, field), slow_energy(step, h, u, position), atol=1e-12, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("diagonal", ["none", "shared", "per_head"])
@pytest.mark.parametrize("position", ["alibi", "rope", "none"])
def test_t1_update_is_minus_the_gradient(diagonal, position):
    step = attention(diagonal=diagonal, position=position, preconditioner="none", norm_in_recursion=False)
    x, field = step.prepare(states(), frame())
    expected = minus_gradient(step, x, field)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(step(x, field) - x, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(step.force(x, field), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("energy", ["gated", "convex_sign"])
def test_t1_holds_for_the_mlp(energy):
    step = mlp(preconditioner="none", norm_in_recursion=False, mlp_energy=energy)
    x, field = step.prepare(states(), frame())
    torch.testing.assert_close(step(x, field) - x, minus_gradient(step, x, field), atol=1e-12, rtol=0)


@pytest.mark.parametrize("preconditioner", ["none", "diag", "diag_low_rank"])
@pytest.mark.parametrize("diagonal", ["none", "shared", "per_head"])
def test_t2_with_norm_the_update_is_p_times_the_gradient_at_u(preconditioner, diagonal):
    for step in (
        attention(preconditioner=preconditioner, diagonal=diagonal),
        mlp(preconditioner=preconditioner),
    ):
        x, field = step.prepare(states(), frame())
        u = step.argument(x)
        torch.testing.assert_close(u, step.norm(x))
        if isinstance(step, ElementwiseStep):
            s = minus_gradient(step, u, field)
            P = torch.eye(D, dtype=DOUBLE) if step.preconditioner is None else step.preconditioner.matrix()
            expected = s @ P
        else:
            expected = torch.zeros_like(x)
            for k in range(K):  # P differs from head to head, so the gradient of each head's energy is taken apart
                v = u.detach().requires_grad_()
                energy = step.energy_per_head(v, field)[:, k].sum()
                s = -torch.autograd.grad(energy, v)[0]
                expected += s if step.preconditioner is None else s @ step.preconditioner.matrix()[k]
        torch.testing.assert_close(step(x, field) - x, expected.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("diagonal", ["shared", "per_head"])
def test_t3_literal_mode_is_algorithm_1_and_no_gradient(diagonal):
    step = attention(diagonal=diagonal, preconditioner="none", diag_in_update=False, norm_in_recursion=False)
    x, field = step.prepare(states(), frame())
    n, dh = step.norm(states()), D // K
    literal = torch.zeros_like(x)
    for k in range(K):
        WQ, WK = (w.weight[k * dh : (k + 1) * dh] for w in (step.q_proj, step.k_proj))
        d = step.diagonal[k if diagonal == "per_head" else 0]
        keys = n @ WK.T
        logits = ((x @ WQ.T) @ keys.mT + (x * d) @ n.mT) / math.sqrt(D)
        i, j = torch.arange(S)[:, None], torch.arange(S)
        logits = logits - 2.0 ** -(k + 1) * (i - j) + torch.where(i == j, *step.biases[:, k])
        alpha = torch.softmax(logits.masked_fill(j > i, -torch.inf), -1)
        literal = literal + (alpha @ keys) @ WQ
    torch.testing.assert_close(step(x, field) - x, literal, atol=1e-12, rtol=0)
    assert (literal - minus_gradient(step, x, field)).abs().max() > 0.1
    with torch.no_grad():
        step.diagonal.zero_()
    x, field = step.prepare(states(), frame())
    torch.testing.assert_close(step(x, field) - x, minus_gradient(step, x, field), atol=1e-12, rtol=0)


@pytest.mark.parametrize("eta", [0.1, 1.0, 10.0, 100.0])
def test_t5_d1_without_norm_every_step_size_descends_by_at_least_the_slope(eta):
    step = attention(norm_in_recursion=False, psd="clamp", diagonal="per_head")
    assert (step.psd_margin() > 0).all()
    step.eta = eta
    x, field = step.prepare(states(), frame())
    for _ in range(3):
        after = step(x, field)
        promised = step.energy(x, field) - (step.force(x, field) * (after - x)).sum(-1)
        assert (step.energy(after, field) <= promised + 1e-9 * promised.abs()).all()
        x = after.detach()


@pytest.mark.parametrize("eta", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("position", ["alibi", "rope"])
def test_t5_d2_on_the_sphere_every_step_size_descends(eta, position):
    exact = {"norm_gain": False, "rms_norm_eps": 1e-12, "preconditioner": "none", "diagonal": "per_head"}
    step = attention(position=position, **exact)
    step.eta = eta
    x, field = step.prepare(states(), frame())
    energies = [step.energy(step.argument(x), field)]
    for _ in range(6):
        x = step(x, field).detach()
        energies.append(step.energy(step.argument(x), field))
    table = torch.stack(energies)
    assert (table.diff(dim=0) <= 1e-12 * table[:-1].abs()).all()
    assert (table[-1] < table[0]).all()


def test_t5_d3_a_preconditioner_can_make_the_energy_rise():
    """x̂ = (1, 1), P = diag(4, 1), s = (1, 2): first-order change −(pa − b)(a − b) > 0."""
    norm = CemRMSNorm(2, 1e-12, gain=False)
    x, s = torch.ones(2, dtype=DOUBLE), torch.tensor([1.0, 2.0], dtype=DOUBLE)
    P = torch.tensor([4.0, 1.0], dtype=DOUBLE)
    for eta in (1e-4, 1e-2, 0.3):
        change = -(s * (norm(x + eta * P * s) - norm(x))).sum()  # the linear energy −s·u, which is concave
        assert change > 0
        assert -(s * (norm(x + eta * s) - norm(x))).sum() < 0
        chain = x + eta * P * norm.pull_back(x, s)
        assert -(s * (norm(chain) - norm(x))).sum() < 0
    assert torch.isclose(
        -(s * (norm(x + 1e-6 * P * s) - norm(x))).sum() / 1e-6, torch.tensor(1.0, dtype=DOUBLE), rtol=1e-4
    )


def test_t6_d5_below_the_bound_the_elementwise_energy_falls_and_far_above_it_rises():
    rises = 0
    for seed in range(5):
        step = mlp(seed, preconditioner="diag_low_rank", norm_in_recursion=False, psd="clamp")
        x, field = step.prepare(states(seed), frame())
        norm = torch.linalg.matrix_norm(step.up_proj.weight, 2)
        L = SILU_SLOPE_MAX * field.gate.abs().amax(-1, keepdim=True) * norm**2
        largest = torch.linalg.eigvalsh(step.preconditioner.matrix())[-1]
        for fraction in (0.1, 0.5, 0.99):
            y = x
            for _ in range(4):
                before = step.energy(y, field)
                y = (y + fraction * 2 / (L * largest) * step.move(y, field)).detach()
                assert (step.energy(y, field) <= before).all()
        far = x + 200 * 2 / (L * largest) * step.move(x, field)
        rises += int((step.energy(far, field) > step.energy(x, field)).sum())
    assert rises > 0


def test_silu_slope_bounds():
    z = torch.linspace(-30, 30, 600_001, dtype=DOUBLE).requires_grad_()
    slope = torch.autograd.grad(functional.silu(z).sum(), z)[0]
    assert float(slope.min()) == pytest.approx(SILU_SLOPE_MIN, abs=1e-5)
    assert float(slope.max()) == pytest.approx(SILU_SLOPE_MAX, abs=1e-5)
    assert abs(float(z.detach()[slope.argmin()])) == pytest.approx(2.39936, abs=1e-3)


@pytest.mark.parametrize("preconditioner", ["none", "diag_low_rank"])
def test_chain_is_the_gradient_through_the_norm(preconditioner):
    for step in (
        attention(update="chain", preconditioner=preconditioner, diagonal="per_head"),
        mlp(update="chain", preconditioner=preconditioner),
    ):
        x, field = step.prepare(states(), frame())
        heads = K if isinstance(step, InteractionStep) else 1
        expected = torch.zeros_like(x)
        for k in range(heads):
            y = x.detach().requires_grad_()
            u = step.argument(y)
            energy = step.energy_per_head(u, field)[:, k] if heads > 1 else step.energy(u, field)
            s = -torch.autograd.grad(energy.sum(), y)[0]
            P = None if step.preconditioner is None else step.preconditioner.matrix()
            expected += s if P is None else s @ (P[k] if heads > 1 else P)
        torch.testing.assert_close(step(x, field) - x, expected.detach(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("make", [attention, mlp])
@pytest.mark.parametrize("update", ["line_search", "cccp"])
def test_guarded_solvers_never_raise_the_energy(make, update):
    step = make(update=update, norm_in_recursion=True)
    step.eta = 50.0
    x, field = step.prepare(states(), frame())
    for _ in range(4):
        before = step.energy(step.argument(x), field)
        x = step(x, field).detach()
        after = step.energy(step.argument(x), field)
        assert (after <= before + 1e-10 * before.abs()).all()
    assert (after < step.energy(step.argument(states()), field)).any()


@pytest.mark.parametrize("make", [attention, mlp])
@pytest.mark.parametrize("psd", ["free", "clamp"])
@pytest.mark.parametrize("diagonal", ["none", "shared", "per_head"])
def test_t10_folding_changes_nothing(make, psd, diagonal):
    folded, unfolded = (make(psd=psd, diagonal=diagonal, fold_preconditioner=f) for f in (True, False))
    x, field = folded.prepare(states(), frame())
    y, other = unfolded.prepare(states(), frame())
    assert other.output is None
    torch.testing.assert_close(folded(x, field), unfolded(y, other), atol=1e-12, rtol=1e-12)


def test_t11_the_margin_has_the_sign_of_the_smallest_eigenvalue():
    signs = set()
    for seed, scale in enumerate((0.02, 0.1, 0.2, 0.3, 0.5, 0.8)):
        for heads in (None, 3):
            P = Preconditioner(D, 4, heads).double()
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for factor in (P.U, P.V):
                    factor.copy_(scale * torch.randn(factor.shape, generator=generator, dtype=DOUBLE))
            lowest = torch.linalg.eigvalsh(P.matrix()).amin(-1)
            torch.testing.assert_close(P.psd_margin(), lowest, atol=1e-12, rtol=0)
            signs.update(torch.sign(lowest).flatten().tolist())
            P.psd = "clamp"
            assert (torch.linalg.eigvalsh(P.matrix()).amin(-1) > 0).all()
            assert (P.psd_margin() > 0).all()
            with torch.no_grad():  # a diagonal that is not constant: the margin is a bound
                P.psd = "free"
                P.p.copy_(0.3 * torch.randn(P.p.shape, generator=generator, dtype=DOUBLE))
            assert (P.psd_margin() <= torch.linalg.eigvalsh(P.matrix()).amin(-1) + 1e-12).all()
    assert signs == {-1.0, 1.0}


def test_preconditioner_is_the_written_matrix_and_starts_where_it_is_said():
    P = Preconditioner(D, 4)
    torch.testing.assert_close(P.matrix(), 1.3132616875 * torch.eye(D))
    torch.testing.assert_close(Preconditioner(D, 4, 2, start="identity").matrix(), torch.eye(D).expand(2, D, D))
    with torch.no_grad():
        P.V.normal_()
    written = torch.diag(functional.softplus(math.sqrt(D) * P.p)) + P.U @ P.V.T + P.V @ P.U.T
    torch.testing.assert_close(P.matrix(), written, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("diagonal", ["none", "shared"])
def test_t14_the_first_token_attends_only_to_itself(diagonal):
    step = attention(diagonal=diagonal)
    h = states()
    x, field = step.prepare(h, frame())
    n, dh = step.norm(h), D // K
    expected = torch.zeros(B, dtype=DOUBLE)
    for k in range(K):
        WQ, WK = (w.weight[k * dh : (k + 1) * dh] for w in (step.q_proj, step.k_proj))
        beta = n[:, 0] @ WK.T @ WQ
        if step.diagonal is not None:
            beta = beta + step.diagonal[0] * n[:, 0]
        expected -= (beta * x[:, 0]).sum(-1) + step.tau * step.biases[0, k]
    torch.testing.assert_close(step.energy(x, field)[:, 0], expected.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [attention, mlp])
def test_gradients_of_a_step_with_respect_to_state_and_weights(make):
    torch.manual_seed(0)
    step = make(hidden_size=6, intermediate_size=5, num_attention_heads=2, rank_attention=2, rank_mlp=2)
    names = [name for name, _ in step.named_parameters()]
    h = torch.randn(1, 3, 6, dtype=DOUBLE, requires_grad=True)

    def run(h: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(_Twice(step), dict(zip([f"step.{n}" for n in names], values, strict=True)), h)

    assert torch.autograd.gradcheck(run, (h, *(p.detach().requires_grad_() for p in step.parameters())))


class _Twice(torch.nn.Module):
    def __init__(self, step: torch.nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, h: Tensor) -> Tensor:
        x, field = self.step.prepare(h, frame(h.shape[1]))
        return self.step(self.step(x, field), field)


def test_half_precision_energies_are_float32():
    for step in (InteractionStep(config(), 0).bfloat16(), ElementwiseStep(config()).bfloat16()):
        random_parameters(step, 0)
        precise = (InteractionStep(config(), 0) if step.kind == "attention" else ElementwiseStep(config())).float()
        precise.load_state_dict(step.state_dict())
        field = step.field(
            step.norm(states().bfloat16()),
            Frame(S, S, None, torch.arange(S)[None], torch.bfloat16, torch.device("cpu")),
        )
        u = states(1).bfloat16()
        energy = step.energy(u, field)
        assert energy.dtype == torch.float32
        if isinstance(field, InteractionField):
            same = InteractionField(
                field.keys.float(), field.inputs.float(), None, field.bias.float(), None, field.frame
            )
        else:
            same = ElementwiseField(field.gate.float(), None, None)
        torch.testing.assert_close(energy, precise.energy(u.float(), same), rtol=1e-6, atol=1e-4)
