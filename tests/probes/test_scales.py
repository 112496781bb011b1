"""Scales, kinds and the passport: conformance vectors, exact identities, laws, invariances, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes._kinds import Displacement, apply, displacement, realised
from dynprobe.probes._mad import mad
from dynprobe.probes._noise import NoiseSource, gaussian, uniform
from dynprobe.probes._passport import Passport, passport
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._site_stats import SiteStats

SITE = "resid_post.15"
WRITES = [
    *({"scale": s} for s in ("relnorm", "coordstd", "mad", "cov", "abs", "interp", "neftune", "isokl")),
    *({"kind": "direction", "scale": s} for s in ("relnorm", "coordstd", "mad", "cov", "abs", "isokl")),
    *({"kind": k} for k in ("scale", "rotate", "dropout")),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def stats_of(dim: int, seed: int = 1) -> SiteStats:
    basis, _ = torch.linalg.qr(normal(dim, dim, seed=seed))
    root = torch.linspace(0.2, 2.0, dim, dtype=torch.float64)
    return SiteStats(torch.zeros(dim), normal(dim, seed=seed).abs() + 0.1, basis, root, site=SITE)


def write(
    perturb: Perturb, h: Tensor, mask: Tensor | None = None, rows: list[str] | None = None, **more: Any
) -> Displacement:
    batch, length = h.shape[:2]
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    keys = rows or [f"p{i}" for i in range(batch)]
    defaults: dict[str, Any] = {
        "noise_source": NoiseSource(keys, SITE, np.tile(np.arange(length), (batch, 1))),
        "site_stats": stats_of(h.shape[-1]),
        "donor": (h.flip(-1) * 1.3).nan_to_num(1.0, 1.0, 1.0),
        "lengths": torch.full((batch,), length),
    }
    if perturb.scale == "isokl":
        defaults["magnitude"] = torch.full((batch,), perturb.alpha)
    return displacement(perturb, h, mask=mask, **(defaults | more))


def make(alpha: float, spec: dict[str, str], dim: int) -> Perturb:
    direction = np.linspace(-1, 2, dim) if spec.get("kind") == "direction" else None
    return Perturb(alpha, direction=direction, **spec)  # type: ignore[arg-type]


def bits(x: Tensor) -> np.ndarray:
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return x.contiguous().view(width).numpy()


# ---------------------------------------------------------------- conformance vectors


def test_alpha_1() -> None:
    """relnorm 0.75 with n̂ ⟂ h: norm ratio 1.25, cosine 0.8 (conformance vector alpha-1)."""
    h = torch.tensor([[[3.0, 4.0, 0.0]]], dtype=torch.float64)
    d = write(Perturb(0.75, kind="direction", direction=[0, 0, 7.0]), h)
    after = apply(h, d.u, d.written)
    assert float(after.norm() / h.norm()) == pytest.approx(1.25, rel=1e-12)
    assert float(torch.cosine_similarity(after, h, dim=-1)) == pytest.approx(0.8, rel=1e-12)
    rows = passport(h, d.u, d.written, stats_of(3)).rows()
    assert rows["alpha_relnorm"][0] == pytest.approx(0.75, rel=1e-12)
    assert rows["alpha_cos"][0] == pytest.approx(0.8, rel=1e-12)
    assert rows["alpha_abs"][0] == pytest.approx(3.75 / np.sqrt(3), rel=1e-12)


def test_mad_by_hand() -> None:
    """(1, 2, 3, 4, 100): median 3, distances 2 1 0 1 97, MAD 1; (0, 1, 3, 7): median 2, distances 2 1 1 5, MAD 1.5."""
    assert float(mad(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))) == 1.0
    assert float(mad(torch.tensor([0.0, 1.0, 3.0, 7.0]))) == 1.5
    h = torch.tensor([[[0.0, 1.0, 3.0, 7.0]]], dtype=torch.float64)
    u = write(Perturb(0.5, scale="mad"), h).u[0, 0]
    eps = torch.from_numpy(gaussian(0, "p0", SITE, 0, 4)).double()
    torch.testing.assert_close(u, 0.5 * 1.4826 * 1.5 * eps, rtol=1e-14, atol=0)
    x = normal(7, 33)
    reference = np.median(np.abs(x.numpy() - np.median(x.numpy(), axis=-1, keepdims=True)), axis=-1)
    np.testing.assert_array_equal(mad(x).numpy(), reference)


def test_mad_is_the_same_with_gradients() -> None:
    x = normal(5, 32)
    torch.testing.assert_close(mad(x.clone().requires_grad_()).detach(), mad(x), rtol=0, atol=0)


def test_formulas() -> None:
    h = normal(2, 3, 16)
    eps = torch.from_numpy(np.stack([[gaussian(4, f"p{i}", SITE, t, 16) for t in range(3)] for i in range(2)])).double()
    stats = stats_of(16)
    half = stats.cov_basis.double() @ torch.diag(stats.cov_sqrt) @ stats.cov_basis.double().T
    ones = torch.from_numpy(np.stack([[uniform(4, f"p{i}", SITE, t, 16) for t in range(3)] for i in range(2)])).double()
    expected = {
        "relnorm": 0.3 * h.norm(dim=-1, keepdim=True) * eps / eps.norm(dim=-1, keepdim=True),
        "coordstd": 0.3 * stats.std * eps,
        "abs": 0.3 * eps,
        "cov": 0.3 * eps @ half.T,
        "interp": 0.3 * (h.flip(-1) * 1.3 - h),
        "neftune": 0.3 / np.sqrt(3 * 16) * (2 * ones - 1),
    }
    for scale, u in expected.items():
        torch.testing.assert_close(write(Perturb(0.3, scale=scale, seed=4), h).u, u, rtol=1e-12, atol=1e-14)


def test_a_thin_covariance_equals_the_thick_one() -> None:
    basis, _ = torch.linalg.qr(normal(16, 16))
    root = torch.cat([torch.linspace(0.5, 2, 4, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)])
    thick, thin = SiteStats(cov_basis=basis, cov_sqrt=root), SiteStats(cov_basis=basis[:, :4], cov_sqrt=root[:4])
    h = normal(1, 5, 16)
    assert len(thin.half_covariance(h)) == 2
    assert len(thick.half_covariance(h)) == 1
    a = write(Perturb(0.3, scale="cov"), h, site_stats=thick).u
    torch.testing.assert_close(a, write(Perturb(0.3, scale="cov"), h, site_stats=thin).u, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- exact identities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", WRITES, ids=str)
def test_alpha_zero_is_bit_identical(spec: dict[str, str], dtype: torch.dtype) -> None:
    h = normal(2, 4, 8).to(dtype)
    h[0, 0, 0], h[0, 0, 1] = -0.0, 0.0
    h[0, 1, 0], h[0, 2, 3], h[1, 0, 0] = torch.nan, torch.inf, -torch.inf
    h[1, 2] = 0.0
    h[1, 3] = -0.0
    before = bits(h).copy()
    d = write(make(0.0, spec, 8), h)
    after = apply(h, d.u, torch.ones(2, 4, dtype=torch.bool))
    assert after.dtype == dtype
    np.testing.assert_array_equal(bits(after), before)
    np.testing.assert_array_equal(bits(h), before)
    assert d.n_nonfinite.tolist() == [2, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", WRITES, ids=str)
def test_what_is_not_selected_is_bit_identical(spec: dict[str, str], dtype: torch.dtype) -> None:
    h = normal(2, 4, 8).to(dtype)
    h[0, 0, 0], h[0, 1, 0], h[1, 3, 1] = -0.0, torch.nan, torch.inf
    mask = torch.tensor([[False, False, True, False], [True, False, True, False]])
    before = bits(h).copy()
    d = write(make(0.3, spec, 8), h, mask)
    after = apply(h, d.u, mask)
    np.testing.assert_array_equal(bits(h), before)
    np.testing.assert_array_equal(bits(after[~mask]), bits(h[~mask]))
    assert not bool(d.u[~mask].any())
    assert bool((after[mask] != h[mask]).any(-1).all())
    assert d.n_asked.tolist() == [1, 2]
    assert not d.flagged
    # The sparse road and the full road are one formula.
    torch.testing.assert_close(write(make(0.3, spec, 8), h).u[mask], d.u[mask], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 0.75, 3.0, -0.5])
@pytest.mark.parametrize("kind", ["gaussian", "direction"])
def test_the_realised_relative_norm_is_alpha(alpha: float, kind: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        h = (normal(3, 5, 64) * 10.0 ** normal(3, 5, 1)).to(dtype)
        u = write(make(alpha, {"kind": kind}, 64), h).u
        ratio = u.double().norm(dim=-1) / h.double().norm(dim=-1)
        torch.testing.assert_close(ratio, torch.full_like(ratio, abs(alpha)), rtol=tolerance, atol=0)


@pytest.mark.parametrize("spec", [w for w in WRITES if w.get("kind") not in ("rotate", "dropout")], ids=str)
def test_common_random_numbers_along_alpha(spec: dict[str, str]) -> None:
    h = normal(2, 3, 16).float()
    one, two, minus = (
        write(make(a, spec, 16), h).u if a > 0 or spec.get("scale") != "isokl" else None for a in (0.2, 0.4, -0.2)
    )
    assert one is not None
    assert two is not None
    torch.testing.assert_close(two, 2 * one, rtol=0, atol=0)
    if minus is not None:
        torch.testing.assert_close(minus, -one, rtol=0, atol=0)


@pytest.mark.parametrize("spec", WRITES, ids=str)
def test_batch_size_and_order_cannot_matter(spec: dict[str, str]) -> None:
    # A matrix product may round differently for other batch sizes; everything else is bit for bit.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if spec.get("scale") == "cov" else {"rtol": 0, "atol": 0}
    h, p = normal(5, 6, 96).float(), make(0.3, spec, 96)
    keys = [f"p{i}" for i in range(5)]
    whole = write(p, h).u
    order = [3, 0, 4, 2, 1]
    turned = write(p, h[order], rows=[keys[i] for i in order]).u
    torch.testing.assert_close(turned, whole[order], **tolerance)
    for i in range(5):
        torch.testing.assert_close(write(p, h[i : i + 1], rows=[keys[i]]).u, whole[i : i + 1], **tolerance)
    # Token by token, as decoding sees them.
    for t in range(6):
        source = NoiseSource(keys, SITE, torch.full((5, 1), t))
        step = write(p, h[:, t : t + 1], noise_source=source, lengths=torch.full((5,), 6))
        torch.testing.assert_close(step.u, whole[:, t : t + 1], **tolerance)


@pytest.mark.parametrize("spec", [w for w in WRITES if w.get("scale") != "isokl"], ids=str)
def test_strengths_per_row_equal_separate_calls(spec: dict[str, str]) -> None:
    h = normal(1, 4, 32).float().expand(3, -1, -1)
    strengths = [0.0, 0.1, 0.7]
    together = write(make(0.5, spec, 32), h, rows=["p0"] * 3, magnitude=torch.tensor(strengths)).u
    for i, alpha in enumerate(strengths):
        alone = write(make(alpha, spec, 32), h[:1], rows=["p0"]).u
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if spec.get("scale") == "cov" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(together[i : i + 1], alone, **tolerance)


def test_half_precision_is_rounded_once() -> None:
    h = normal(2, 8, 64).to(torch.bfloat16)
    d = write(Perturb(0.1), h)
    after = apply(h, d.u, d.written)
    torch.testing.assert_close(after, (h.float() + d.u).to(torch.bfloat16), rtol=0, atol=0)
    got = passport(h, realised(h, after), d.written).rows()["alpha_relnorm"]
    assert np.abs(got - 0.1).max() < 0.01
    tiny = write(Perturb(1e-5), h)
    received = passport(h, realised(h, apply(h, tiny.u, tiny.written)), tiny.written).rows()["alpha_relnorm"]
    assert (received < 5e-6).all()  # bf16 swallows most of such a kick, and the passport says so


# ---------------------------------------------------------------- kinds with a unit of their own


@pytest.mark.parametrize("alpha", [1e-4, 0.3, np.pi / 2, 3.0, -0.3])
def test_rotate_keeps_the_norm_and_gives_the_angle(alpha: float) -> None:
    h = normal(2, 5, 12)
    after = apply(h, (d := write(Perturb(alpha, kind="rotate"), h)).u, d.written)
    torch.testing.assert_close(after.norm(dim=-1), h.norm(dim=-1), rtol=1e-13, atol=0)
    a, b = after / after.norm(dim=-1, keepdim=True), h / h.norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    torch.testing.assert_close(angle, torch.full_like(angle, abs(alpha)), rtol=1e-9, atol=0)


def test_rotate_in_the_plane_is_well_conditioned() -> None:
    """In two dimensions ε often lies near h; float32 must keep the norm all the same."""
    h = normal(1, 4000, 2).float()
    after = apply(h, (d := write(Perturb(0.7, kind="rotate"), h)).u, d.written)
    torch.testing.assert_close(after.norm(dim=-1), h.norm(dim=-1), rtol=2e-6, atol=1e-7)


def test_scale_is_a_factor() -> None:
    h = normal(1, 3, 8)
    torch.testing.assert_close(apply(h, (d := write(Perturb(-0.25, kind="scale"), h)).u, d.written), 0.75 * h)
    gone = apply(h, (d := write(Perturb(-1.0, kind="scale"), h)).u, d.written)
    assert not bool(gone.any())


def test_dropout_keeps_the_mean() -> None:
    h = torch.full((1, 400, 256), 2.0)
    after = apply(h, (d := write(Perturb(0.25, kind="dropout"), h)).u, d.written)
    assert after.unique().tolist() == [0.0, pytest.approx(2 / 0.75, rel=1e-6)]
    assert float(after.mean()) == pytest.approx(2.0, abs=6 * 2 * np.sqrt(0.25 / 0.75 / after.numel()))
    kept = torch.from_numpy(uniform(0, "p0", SITE, 7, 256)) >= 0.25
    torch.testing.assert_close(after[0, 7] != 0, kept)


def test_a_direction_stands_in_for_the_noise() -> None:
    h, v = normal(1, 3, 9), np.arange(1.0, 10.0)
    unit = torch.from_numpy(v / np.linalg.norm(v))
    absolute = write(Perturb(0.2, scale="abs", kind="direction", direction=5 * v), h).u
    torch.testing.assert_close(absolute, (0.2 * 3 * unit).expand(1, 3, 9), rtol=1e-14, atol=0)
    relative = write(Perturb(0.2, kind="direction", direction=v), h).u
    torch.testing.assert_close(relative, 0.2 * h.norm(dim=-1, keepdim=True) * unit, rtol=1e-14, atol=0)


# ---------------------------------------------------------------- laws and invariances


def draws(spec: dict[str, Any], h: Tensor, n: int = 20000, **more: Any) -> Tensor:
    """Many updates of one state: positions are repetitions."""
    return write(Perturb(1.0, **spec), h.reshape(1, 1, -1).expand(1, n, -1), **more).u[0]


def test_law_of_coordstd() -> None:
    stats = stats_of(6)
    u = draws({"scale": "coordstd"}, normal(6), site_stats=stats)
    torch.testing.assert_close(torch.cov(u.T), torch.diag(stats.std**2), rtol=0.05, atol=0.05)
    torch.testing.assert_close(u.std(0), stats.std, rtol=0.03, atol=0)


def test_law_of_cov() -> None:
    stats = stats_of(6)
    sigma = stats.cov_basis @ torch.diag(stats.cov_sqrt**2) @ stats.cov_basis.T
    u = draws({"scale": "cov"}, normal(6), site_stats=stats)
    torch.testing.assert_close(torch.cov(u.T), sigma, rtol=0.05, atol=0.08)


def test_law_of_relnorm_is_isotropic() -> None:
    h = normal(6)
    u = draws({"scale": "relnorm"}, h)
    torch.testing.assert_close(torch.cov(u.T), torch.eye(6).double() * h.norm() ** 2 / 6, rtol=0.05, atol=0.05)


def test_neftune_has_its_frobenius_norm() -> None:
    h = normal(3, 200, 64)
    u = write(Perturb(5.0, scale="neftune"), h).u
    torch.testing.assert_close(u.flatten(1).norm(dim=1), torch.full((3,), 5 / np.sqrt(3)).double(), rtol=0.02, atol=0)
    half = write(Perturb(5.0, scale="neftune"), h, lengths=torch.tensor([200, 800, 50])).u
    torch.testing.assert_close(half, u * torch.tensor([1.0, 0.5, 2.0]).double()[:, None, None], rtol=1e-12, atol=0)


def turned(stats: SiteStats, q: Tensor) -> SiteStats:
    """Calibration of the states h Qᵀ: the covariance turns; per-coordinate SDs are those of the turned coordinates."""
    sigma = stats.cov_basis @ torch.diag(stats.cov_sqrt**2) @ stats.cov_basis.T
    return SiteStats(
        std=(q @ torch.diag(stats.std**2) @ q.T).diagonal().sqrt(),
        cov_basis=q @ stats.cov_basis,
        cov_sqrt=stats.cov_sqrt,
        site=str(sigma.shape),
    )


SCALED = {"relnorm": True, "coordstd": True, "mad": True, "cov": True, "interp": True, "abs": False, "neftune": False}


@pytest.mark.parametrize(("scale", "equivariant"), SCALED.items())
def test_scale_invariance(scale: str, equivariant: bool) -> None:
    """S of the table: h → c·h (calibration too) makes u → c·u, here even draw by draw."""
    h, c, stats = normal(2, 3, 16), 8.0, stats_of(16)
    larger = SiteStats(std=c * stats.std, cov_basis=stats.cov_basis, cov_sqrt=c * stats.cov_sqrt)
    p = Perturb(0.3, scale=scale)
    small, large = write(p, h, site_stats=stats).u, write(p, c * h, site_stats=larger).u
    assert torch.allclose(large, c * small, rtol=1e-12) is equivariant


ROTATED = {"relnorm": True, "cov": True, "abs": True, "coordstd": False, "mad": False, "neftune": False}


@pytest.mark.parametrize(("scale", "equivariant"), ROTATED.items())
def test_rotation_invariance_in_law(scale: str, equivariant: bool) -> None:
    """R of the table: the covariance of u turns with the states (a spike makes the basis-bound scales fail)."""
    dim = 6
    q, _ = torch.linalg.qr(normal(dim, dim, seed=5))
    h = torch.zeros(dim).double()
    h[0], h[1:] = 10.0, 0.1 * torch.arange(1, dim).double()
    stats = stats_of(dim)
    more = {"lengths": torch.tensor([1])}
    plain = draws({"scale": scale}, h, site_stats=stats, **more)
    after = draws({"scale": scale}, q @ h, site_stats=turned(stats, q), **more)

    def moments(x: Tensor) -> Tensor:
        fourth = (x**4).mean(0) / (x**2).mean(0) ** 2  # a cube and a ball share their covariance, not their kurtosis
        return torch.cat([torch.cov(x.T).flatten() / torch.cov(plain.T).trace(), 0.1 * fourth])

    distance = (moments(plain @ q.T) - moments(after)).abs().max()
    assert bool(distance < 0.025) is equivariant


def test_interp_is_equivariant_under_rotation() -> None:
    q, _ = torch.linalg.qr(normal(8, 8, seed=5))
    h, donor, p = normal(1, 3, 8), normal(1, 3, 8, seed=9), Perturb(0.3, scale="interp")
    torch.testing.assert_close(
        write(p, h @ q.T, donor=donor @ q.T).u, write(p, h, donor=donor).u @ q.T, rtol=1e-12, atol=1e-13
    )
    whole = apply(h, (d := write(Perturb(1.0, scale="interp"), h, donor=donor)).u, d.written)
    torch.testing.assert_close(whole, donor, rtol=1e-14, atol=1e-14)


# ---------------------------------------------------------------- flags, slots, refusals


def test_states_without_a_unit_are_left_alone_and_counted() -> None:
    h = normal(2, 3, 8)
    h[0, 0] = 0.0
    h[1, 1, 2] = torch.nan
    h[1, 2, 2] = torch.inf
    d = write(Perturb(0.1), h)
    assert (d.n_asked.tolist(), d.n_zero.tolist(), d.n_nonfinite.tolist()) == ([3, 3], [1, 0], [0, 2])
    assert d.flagged
    assert d.written.tolist() == [[False, True, True], [True, False, False]]
    after = apply(h, d.u, torch.ones(2, 3, dtype=torch.bool))
    np.testing.assert_array_equal(bits(after[~d.written]), bits(h[~d.written]))
    h = torch.tensor([[[5.0, 5.0, 5.0, 1.0]]])
    assert write(Perturb(0.1, scale="mad"), h).n_zero.tolist() == [1]
    assert write(Perturb(0.1, kind="rotate"), torch.zeros(1, 1, 4)).n_zero.tolist() == [1]
    assert write(Perturb(0.1, scale="abs"), torch.zeros(1, 1, 4)).n_zero.tolist() == [0]
    assert write(Perturb(0.1), torch.full((1, 1, 4), 1e30)).n_nonfinite.tolist() == [1]  # its norm is beyond float32


def test_slots() -> None:
    """A unit with slots: norms per slot, one address per position, slots of one position draw different noise."""
    h = normal(2, 3, 4, 8)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1] = False
    d = write(Perturb(0.1), h, mask)
    ratio = d.u.norm(dim=-1) / h.norm(dim=-1)
    torch.testing.assert_close(ratio, 0.1 * mask.double(), rtol=1e-13, atol=0)
    assert d.n_asked.tolist() == [11, 0]
    unit = d.u[0, 0] / d.u[0, 0].norm(dim=-1, keepdim=True)
    assert float((unit @ unit.T - torch.eye(4)).abs().max()) < 0.95
    whole = write(Perturb(0.1), h, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(whole.u[mask], d.u[mask], rtol=0, atol=0)
    per_slot = SiteStats(std=normal(4, 8).abs())
    u = write(Perturb(1.0, scale="coordstd"), h, mask, site_stats=per_slot).u
    eps = torch.from_numpy(gaussian(0, "p0", SITE, 2, 32)).reshape(4, 8).double()
    torch.testing.assert_close(u[0, 2], per_slot.std * eps, rtol=1e-14, atol=0)
    note = passport(h, d.u, mask, per_slot)
    assert note.rows()["alpha_relnorm"][0] == pytest.approx(0.1, rel=1e-12)
    assert note.counts["alpha_coordstd"].tolist() == [11, 0]


@pytest.mark.parametrize("alpha", [0.1])
def test_gradients_flow_through_the_unit(alpha: float) -> None:
    h = normal(1, 1, 5).requires_grad_()

    def norm_after(x: Tensor) -> Tensor:
        d = write(Perturb(alpha), x)
        return apply(x, d.u, d.written).square().sum()

    assert torch.autograd.gradcheck(norm_after, (h,))


def test_inference_mode_leaves_nothing_behind() -> None:
    """Cached calibration tensors made in inference mode must serve a later call that needs gradients."""
    stats, mask = stats_of(6), torch.ones(1, 2, dtype=torch.bool)
    with torch.inference_mode():
        h = normal(1, 2, 6)
        for scale in ("coordstd", "cov", "mad"):
            d = write(Perturb(0.1, scale=scale), h, site_stats=stats)
            passport(h, d.u, mask, stats)
    g = normal(1, 2, 6).requires_grad_()
    for scale in ("coordstd", "cov", "mad"):
        d = write(Perturb(0.1, scale=scale), g, site_stats=stats)
        apply(g, d.u, mask).sum().backward()
        assert np.isfinite(passport(g, d.u, mask, stats).rows()["alpha_coordstd"]).all()
    assert g.grad is not None


def test_what_is_missing_is_named() -> None:
    h, mask = normal(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    for scale in ("coordstd", "cov"):
        with pytest.raises(CalibrationError, match="dynprobe calibrate"):
            write(Perturb(0.1, scale=scale), h, site_stats=None)
        with pytest.raises(CalibrationError, match=f"scale={scale} .* at {SITE}.*dynprobe calibrate"):
            write(Perturb(0.1, scale=scale), h, site_stats=SiteStats(site=SITE))
        with pytest.raises(CalibrationError, match="another model"):
            write(Perturb(0.1, scale=scale), h, site_stats=stats_of(5))
    with pytest.raises(UsageError, match="donor"):
        write(Perturb(0.1, scale="interp"), h, donor=normal(1, 1, 4))
    with pytest.raises(UsageError, match="lengths"):
        write(Perturb(0.1, scale="neftune"), h, lengths=None)
    with pytest.raises(UsageError, match="magnitude"):
        write(Perturb(0.1, scale="isokl"), h, magnitude=None)
    with pytest.raises(UsageError, match="noise_source"):
        write(Perturb(0.1), h, noise_source=None)
    with pytest.raises(UsageError, match="--direction"):
        write(Perturb(0.1, kind="direction"), h)
    with pytest.raises(UsageError, match="3 numbers, the states at this site have 4"):
        write(Perturb(0.1, kind="direction", direction=[1, 2, 3]), h)
    for wrong in ([0.0, 0, 0, 0], [np.nan, 1, 1, 1]):
        with pytest.raises(UsageError, match="other than zero"):
            write(Perturb(0.1, kind="direction", direction=wrong), h)
    with pytest.raises(UsageError, match="two dimensions"):
        write(Perturb(0.1, kind="rotate"), normal(1, 2, 1))
    with pytest.raises(UsageError, match="mask"):
        write(Perturb(0.1), h, mask.float())
    with pytest.raises(UsageError, match="mask"):
        write(Perturb(0.1), h, mask[:, :1])
    with pytest.raises(UsageError, match="states are"):
        displacement(Perturb(0.1), h[0], mask=mask)
    with pytest.raises(UsageError, match="probabilities"):
        write(Perturb(0.1, kind="dropout"), h, magnitude=torch.tensor([1.0]))
    with pytest.raises(UsageError, match="finite numbers"):
        write(Perturb(0.1), h, magnitude=torch.tensor([torch.nan]))


def test_damaged_calibrations_are_refused() -> None:
    for wrong in (
        {"std": [1.0, -1.0]},
        {"std": [1.0, np.nan]},
        {"cov_basis": np.eye(2)},
        {"cov_basis": np.eye(2), "cov_sqrt": [1.0]},
    ):
        with pytest.raises(CalibrationError):
            SiteStats(**wrong)


# ---------------------------------------------------------------- the passport


def test_passport_by_hand() -> None:
    h = torch.tensor([[[0.0, 1.0, 3.0, 7.0], [2.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    u = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]], dtype=torch.float64)
    note = passport(h, u, torch.ones(1, 2, dtype=torch.bool), SiteStats(std=[0.5, 1.0, 2.0, 0.0]))
    rows = {key: float(value[0]) for key, value in note.rows().items()}
    assert rows["alpha_relnorm"] == pytest.approx((1 / np.sqrt(59) + 1.5) / 2, rel=1e-12)
    assert rows["alpha_coordstd"] == pytest.approx(
        (2 / np.sqrt(3) + 1.5 / np.sqrt(3)) / 2, rel=1e-12
    )  # s = 0 has no unit
    assert rows["alpha_mad"] == pytest.approx(0.5 / (1.4826 * 1.5), rel=1e-12)  # the second state's MAD is 0
    assert rows["alpha_abs"] == pytest.approx((0.5 + 1.5) / 2, rel=1e-12)
    assert rows["alpha_cos"] == pytest.approx((59 / np.sqrt(59 * 60) + 2 / np.sqrt(13)) / 2, rel=1e-12)
    assert note.counts["alpha_mad"].tolist() == [1]


def test_passport_recovers_each_scale() -> None:
    h = normal(2, 200, 64) * 3 + 1
    stats = stats_of(64)
    for scale, unit, tolerance in (
        ("relnorm", "relnorm", 1e-12),
        ("coordstd", "coordstd", 0.01),
        ("mad", "mad", 0.01),
        ("abs", "abs", 0.01),
    ):
        d = write(Perturb(0.3, scale=scale), h, site_stats=stats)
        np.testing.assert_allclose(passport(h, d.u, d.written, stats).rows()[f"alpha_{unit}"], 0.3, rtol=tolerance)
    d = write(Perturb(0.3, kind="rotate"), h)
    np.testing.assert_allclose(passport(h, d.u, d.written).rows()["alpha_cos"], np.cos(0.3), rtol=1e-12)


def test_passport_resolves_small_angles_and_near_cancellation() -> None:
    h = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    u = torch.tensor([[[0.0, 1e-5]], [[-1.0, 1e-5]], [[-1.0, 0.0]], [[-2.0, 0.0]]])
    cos = passport(h, u, torch.ones(4, 1, dtype=torch.bool)).rows()["alpha_cos"]
    assert 1 - cos[0] == pytest.approx(5e-11, rel=1e-4)  # float32 cosines stop at 6e-8
    assert cos[1] == pytest.approx(0, abs=1e-9)
    assert np.isnan(cos[2])  # h + u = 0 has no direction
    assert cos[3] == -1


def test_passport_combines_exactly() -> None:
    h, u, stats = normal(3, 10, 16), 0.1 * normal(3, 10, 16, seed=2), stats_of(16)
    mask = normal(3, 10, seed=3) > 0
    mask[2] = False
    whole = passport(h, u, mask, stats)
    parts = Passport.zeros(3)
    for t in range(10):
        parts = parts.add(passport(h[:, t : t + 1], u[:, t : t + 1], mask[:, t : t + 1], stats))
    for unit, values in whole.rows().items():
        np.testing.assert_allclose(parts.rows()[unit], values, rtol=1e-13)
        np.testing.assert_array_equal(parts.counts[unit], whole.counts[unit])
    assert parts.n_states.tolist() == mask.sum(1).tolist()


def test_passport_says_why_a_number_is_missing() -> None:
    h = torch.ones(4, 1, 4)
    h[1], h[3] = torch.nan, 0.0
    note = passport(h, torch.full_like(h, 0.5), torch.tensor([[True], [True], [False], [True]]))
    rows, why = note.rows(), note.reasons()
    assert why["alpha_relnorm"] == [None, "nonfinite", "empty", "zero-denominator"]
    assert why["alpha_coordstd"][0] == "no-calibration"
    assert why["alpha_mad"][0] == "zero-denominator"
    assert note.n_nonfinite.tolist() == [0, 1, 0, 0]
    for unit, reasons in why.items():
        assert np.isnan(rows[unit]).tolist() == [reason is not None for reason in reasons]


def test_passport_of_nothing_written() -> None:
    h = normal(1, 2, 4)
    rows = passport(h, torch.zeros_like(h), torch.ones(1, 2, dtype=torch.bool)).rows()
    assert (rows["alpha_relnorm"][0], rows["alpha_cos"][0], rows["alpha_abs"][0]) == (0, 1, 0)
    empty = passport(h, torch.zeros_like(h), torch.zeros(1, 2, dtype=torch.bool))
    assert np.isnan(empty.rows()["alpha_abs"][0])
