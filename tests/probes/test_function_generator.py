"""The impulse and the sine: what is written, where, and that nothing around it can matter."""

from typing import Any

import numpy as np
import pytest
import torch
from models import ROWS, subject
from torch import Tensor

from dynprobe.errors import UsageError
from dynprobe.probes import Instrument, Perturb, PerturbWriter, capture, make_batch, perturb
from dynprobe.probes._draw import sine
from dynprobe.probes._kinds import Displacement, apply, displacement
from dynprobe.probes._noise import NoiseSource, gaussian, shared, uniform
from dynprobe.probes._outputs import identical
from dynprobe.probes._site_stats import SiteStats

SITE = "resid_post.15"
SINE_SCALES = ("relnorm", "coordstd", "mad", "abs")
WRITES: list[dict[str, Any]] = [
    *({"kind": "sine", "period": 5, "scale": s} for s in SINE_SCALES),
    {"kind": "sine", "period": 2.5, "direction": np.linspace(-1, 2, 16)},
    *({"kind": "impulse", "scale": s} for s in ("relnorm", "coordstd", "mad", "cov", "abs", "isokl")),
    {"kind": "impulse", "direction": np.linspace(-1, 2, 16)},
]
NAMES = [f"{w['kind']}-{w.get('scale', 'direction')}" for w in WRITES]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def stats_of(dim: int) -> SiteStats:
    basis, _ = torch.linalg.qr(normal(dim, dim, seed=1))
    return SiteStats(
        torch.zeros(dim), normal(dim, seed=1).abs() + 0.1, basis, torch.linspace(0.2, 2, dim).double(), site=SITE
    )


def write(
    p: Perturb, h: Tensor, positions: Any = None, rows: Any = None, mask: Any = None, **more: Any
) -> Displacement:
    batch, length = h.shape[:2]
    positions = np.tile(np.arange(length), (batch, 1)) if positions is None else positions
    keys = rows or [f"p{i}" for i in range(batch)]
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    if p.scale == "isokl":
        more = {"magnitude": torch.full((batch,), p.alpha)} | more
    source = NoiseSource(keys, SITE, positions)
    return displacement(p, h, mask=mask, noise_source=source, site_stats=stats_of(h.shape[-1]), **more)


# ---------------------------------------------------------------- the formula


def test_the_wave_is_exact_at_its_zeros_and_late_positions() -> None:
    pos = np.arange(40)
    np.testing.assert_allclose(sine(pos, 8), np.sin(2 * np.pi * pos / 8), atol=1e-14)
    assert (sine(pos, 8)[::4] == 0).all()
    assert (sine(np.arange(0, 100, 5), 2.5) == 0).all()
    np.testing.assert_array_equal(sine(pos + 8 * 10**9, 8), sine(pos, 8))


@pytest.mark.parametrize("scale", SINE_SCALES)
def test_a_sine_swings_along_one_direction(scale: str) -> None:
    h, period = normal(3, 20, 16), 6
    d = write(Perturb(0.3, kind="sine", period=period, scale=scale, seed=7), h)
    v = torch.from_numpy(shared(7, SITE, 16)).double()
    v = v / v.norm()
    wave = torch.from_numpy(np.sin(2 * np.pi * np.arange(20) / period))[None, :, None]
    ordered = h.sort(-1).values
    centre = (ordered[..., 7] + ordered[..., 8]) / 2
    spread = (h - centre[..., None]).abs().sort(-1).values
    mad = (spread[..., 7] + spread[..., 8]) / 2
    unit = {
        "relnorm": h.norm(dim=-1, keepdim=True) * v,
        "coordstd": stats_of(16).std.double() * 4 * v,
        "mad": 1.4826 * mad[..., None] * 4 * v,
        "abs": 4 * v,
    }[scale]  # √dim = 4 makes the fixed vector as long as noise is on average
    torch.testing.assert_close(d.u, (0.3 * wave * unit).expand(h.shape), rtol=1e-6, atol=1e-12)
    assert not d.u[:, ::3].any()  # exactly nothing at the zeros of the wave
    assert d.n_asked.tolist() == [20, 20, 20]
    assert not d.flagged


def test_the_drawn_direction_belongs_to_seed_and_site_alone() -> None:
    assert not np.allclose(shared(0, SITE, 16), shared(1, SITE, 16))
    assert not np.allclose(shared(0, SITE, 16), shared(0, "resid_post.14", 16))
    np.testing.assert_array_equal(shared(0, SITE, 16)[:8], shared(0, SITE, 8))
    for other in (gaussian(0, "", SITE, 0, 16), uniform(0, "", SITE, 0, 16)):
        assert not np.isclose(shared(0, SITE, 16), other).any()


def test_a_given_direction_stands_in_for_the_drawn_one() -> None:
    h, v = normal(1, 9, 16), np.linspace(-1, 2, 16)
    unit = torch.from_numpy(v / np.linalg.norm(v))
    u = write(Perturb(0.5, kind="sine", period=8, direction=10 * v), h).u
    wave = torch.from_numpy(np.sin(2 * np.pi * np.arange(9) / 8))[None, :, None]
    torch.testing.assert_close(u, 0.5 * wave * h.norm(dim=-1, keepdim=True) * unit, rtol=1e-12, atol=1e-12)
    minus = write(Perturb(0.5, kind="sine", period=8, direction=-v), h).u
    torch.testing.assert_close(minus, -u)
    pushed = write(Perturb(0.5, kind="impulse", direction=v), h).u
    torch.testing.assert_close(pushed, write(Perturb(0.5, kind="direction", direction=v), h).u, rtol=0, atol=0)


@pytest.mark.parametrize("scale", ["relnorm", "coordstd", "mad", "cov", "abs"])
def test_an_impulse_is_gaussian_noise_at_one_place(scale: str) -> None:
    h = normal(2, 5, 16)
    one, other = (write(Perturb(0.4, kind=k, scale=scale, seed=3), h).u for k in ("impulse", "gaussian"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_defaults() -> None:
    full = Perturb.parse("alpha=0.1,kind=impulse").defaults_filled()
    assert str(full.where) == "layers=50%,positions=1,phase=prefill,component=resid_post"
    named = Perturb.parse("alpha=0.1,kind=impulse,positions=20").defaults_filled()
    assert str(named.where) == "layers=50%,positions=20,phase=all,component=resid_post"
    swing = Perturb.parse("alpha=0.1,kind=sine,period=8").defaults_filled()
    assert str(swing.where) == "layers=50%,positions=1:,phase=all,component=resid_post"
    assert str(swing).endswith("kind=sine,seed=0,period=8")
    for p in (full, named, swing):
        assert Perturb.parse(str(p)) == p.defaults_filled() == p


# ---------------------------------------------------------------- what cannot matter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", WRITES, ids=NAMES)
def test_alpha_zero_is_bit_identical(spec: dict[str, Any], dtype: torch.dtype) -> None:
    h = normal(2, 6, 16).to(dtype)
    h[0, 1, 3], h[0, 2, 0], h[1, 0, 0] = -0.0, float("nan"), float("inf")
    d = write(Perturb(0.0, **spec), h)
    after = apply(h, d.u, d.written)
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[h.element_size()]
    assert torch.equal(after.view(width), h.view(width))
    zeros = write(Perturb(0.7, **spec), h, magnitude=torch.zeros(2))
    assert torch.equal(apply(h, zeros.u, zeros.written).view(width), h.view(width))


@pytest.mark.parametrize("spec", WRITES, ids=NAMES)
def test_batch_padding_and_decode_cannot_matter(spec: dict[str, Any]) -> None:
    """Rows alone, turned round, padded on the left, and one column at a time get the same bits.

    Under cov the noise is multiplied by a matrix, and some processors sum a product of another shape in another order.
    """
    room = 1e-13 if spec.get("scale") == "cov" else 0.0

    def same(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=room, atol=room)

    h, p, keys = normal(3, 8, 16), Perturb(0.6, **spec), ["a", "b", "c"]
    whole = write(p, h, rows=keys).u
    turned = write(p, h.flip(0), rows=keys[::-1]).u.flip(0)
    same(turned, whole)
    for i, key in enumerate(keys):
        same(write(p, h[i : i + 1], rows=[key]).u[0], whole[i])
    pad = torch.cat([torch.full((3, 2, 16), float("nan"), dtype=torch.float64), h], 1)
    positions = np.tile(np.arange(-2, 8), (3, 1)).clip(-1)
    mask = torch.from_numpy(positions >= 0)
    padded = write(p, pad, positions, keys, mask).u
    same(padded[:, 2:], whole)
    assert not padded[:, :2].any()
    for t in range(8):
        same(write(p, h[:, t : t + 1], np.full((3, 1), t), keys).u[:, 0], whole[:, t])


@pytest.mark.parametrize("spec", WRITES, ids=NAMES)
def test_strengths_per_row_equal_separate_calls(spec: dict[str, Any]) -> None:
    h, strengths = normal(3, 7, 16), [0.2, -0.5, 0.0]
    together = write(Perturb(0.9, **spec), h, magnitude=torch.tensor(strengths)).u
    for i, alpha in enumerate(strengths):
        one = Perturb(abs(alpha), **spec) if spec.get("scale") == "isokl" else Perturb(alpha, **spec)
        own = write(one, h[i : i + 1], rows=[f"p{i}"], magnitude=torch.tensor([alpha])).u[0]
        torch.testing.assert_close(together[i], own, rtol=1e-12, atol=0)
        if spec.get("scale") != "isokl":
            plain = write(one, h[i : i + 1], rows=[f"p{i}"]).u[0]
            torch.testing.assert_close(together[i], plain, rtol=1e-6, atol=1e-9)


def test_slots_share_position_and_direction() -> None:
    h = normal(2, 9, 4, 16)
    d = write(Perturb(0.5, kind="sine", period=8, scale="abs"), h)
    flat = write(Perturb(0.5, kind="sine", period=8, scale="abs"), h[:, :, 0])
    for slot in range(4):
        torch.testing.assert_close(d.u[:, :, slot], flat.u)


def test_what_cannot_be_displaced_is_left_alone() -> None:
    h = normal(1, 6, 16)
    h[0, 1], h[0, 3, 2] = 0.0, float("nan")
    d = write(Perturb(0.5, kind="sine", period=8), h)
    assert (d.n_zero.tolist(), d.n_nonfinite.tolist()) == ([1], [1])
    assert not d.u[0, [1, 3]].any()
    assert torch.isfinite(d.u).all()


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("spec", ["kind=impulse", "kind=sine,period=3", "kind=sine,period=3,scale=abs"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_alpha_zero_changes_no_bit_of_a_model(spec: str, name: str) -> None:
    found = subject(name)
    clean, held = (capture(found, ROWS, perturb=p, logits="all") for p in (None, f"alpha=0,positions=1,{spec}"))
    assert all(identical(a, b) for a, b in zip(clean.states, held.states, strict=True))
    assert identical(clean.logits, held.logits)
    with perturb(found, f"alpha=0,positions=1,{spec}") as instrument:
        found.model(torch.tensor([ROWS[0]]))
        assert instrument.fired


def test_an_impulse_touches_one_state_and_only_its_future() -> None:
    found = subject("llama")
    clean, pushed = (capture(found, ROWS, perturb=p) for p in (None, "alpha=0.5,kind=impulse,layers=1,positions=last"))
    for row, ids in enumerate(ROWS):
        moved = [(b - a)[row][clean.mask[row]].norm(dim=-1) for a, b in zip(clean.states, pushed.states, strict=True)]
        assert not moved[0].any()
        assert not moved[1].any()
        assert moved[2].nonzero().flatten().tolist() == [len(ids) - 1]
        assert moved[3].nonzero().flatten().tolist() == [len(ids) - 1]
        ratio = moved[2][-1] / clean.states[2][row][clean.mask[row]][-1].norm()
        assert float(ratio) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_drive_is_what_the_model_received(padding: str) -> None:
    found = subject("llama")
    batch = make_batch(found, ROWS, side=padding)
    writer = PerturbWriter(found, Perturb.parse("alpha=0.5,kind=sine,period=3,layers=1"))
    clean = capture(found, ROWS, padding=padding, row_keys=list(batch.rows["row_keys"] or ()) or None)
    instrument = Instrument(found, [("resid_post", 1)], [writer], **batch.rows)
    with instrument, torch.no_grad():
        found.model(**batch.model_inputs(found))
    after, drive = instrument.tape().at(layer=1), writer.drive()
    assert drive is not None
    assert torch.equal(drive[clean.mask], (after - clean.at(layer=1))[clean.mask])
    wave = np.sin(2 * np.pi * np.arange(7) / 3)
    wave[0] = 0  # position 0 is spared
    mine = drive[0][clean.mask[0]].norm(dim=-1) / clean.at(layer=1)[0][clean.mask[0]].norm(dim=-1)
    np.testing.assert_allclose(mine.numpy(), 0.5 * np.abs(wave), atol=1e-6)
    assert PerturbWriter(found, Perturb(0.1)).drive() is None


def test_a_drive_in_decoding_equals_one_in_prefill() -> None:
    """Generated tokens are driven at the phase of their position, as if they had been read at once."""
    found, spec = subject("llama"), Perturb.parse("alpha=0.5,kind=sine,period=5,layers=1,scale=abs")
    stepwise, at_once = PerturbWriter(found, spec), PerturbWriter(found, spec)
    with Instrument(found, (), [stepwise], row_keys=["a"]), torch.no_grad():
        ids = found.model.generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    with Instrument(found, (), [at_once], row_keys=["a"], n_prompt=[3]), torch.no_grad():
        found.model(ids[:, :-1])
    one, other = stepwise.drive(), at_once.drive()
    assert one is not None
    assert other is not None
    assert one.shape == other.shape == (1, 11, 32)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert not one[0, [0, 5, 10]].any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("alpha=0.1,kind=impulse,layers=0:2", "writes at one site; .* are 2 in llama. Write layers=0"),
        ("alpha=0.1,kind=sine,period=4,layers=1:", "writes at one site"),
    ],
)
def test_several_sites_are_refused_where_the_model_is_known(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(subject("llama"), ROWS, perturb=spec)


def test_what_is_missing_is_named() -> None:
    h, mask = normal(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(UsageError, match="give noise_source"):
        displacement(Perturb(0.1, kind="sine", period=4), h, mask=mask)
    with pytest.raises(UsageError, match="3 numbers, the states at this site have 16"):
        write(Perturb(0.1, kind="sine", period=4, direction=[1, 2, 3]), h)
    with pytest.raises(UsageError, match=r"is for \(1, 3\) states"):
        write(Perturb(0.1, kind="sine", period=4), h, np.arange(3)[None])
    with pytest.raises(UsageError, match="period"):
        Perturb(0.1, kind="sine")
