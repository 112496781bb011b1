"""Lock-in: closed forms, an independent slow version, noise far above the signal, and what has no number."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dynprobe.errors import MetricError
from dynprobe.metrics import compute, lockin
from dynprobe.metrics._lockin import COLUMNS, window

PERIOD, LENGTH, DIM = 8, 40, 12


def wave(n=LENGTH, period=PERIOD, delay=0):
    return np.sin(2 * np.pi * (np.arange(n) - delay) / period)


def unit(dim=DIM, seed=0):
    v = np.random.default_rng(seed).normal(size=dim)
    return v / np.linalg.norm(v)


def pair(*responses, n=LENGTH, dim=DIM, seed=1):
    """A clean trajectory and one that has moved by the responses, one depth each."""
    x = np.random.default_rng(seed).normal(size=(len(responses), n, dim))
    return x, x + np.stack([np.broadcast_to(r, (n, dim)) for r in responses])


def read(x, y, drive, period=PERIOD, **more):
    return {
        name: compute(f"lockin.{name}/1", x, y, drive=drive, period=period, **more)
        for name in ("gain", "phase", "total", "snr")
    }


# ---------------------------------------------------------------- closed forms


def test_a_linear_map_per_layer():
    """δ = A u: gain |v̂ᵀAv̂|, total ‖Av̂‖, phase 0 or π with the sign of v̂ᵀAv̂."""
    rng, v = np.random.default_rng(2), unit()
    u = 0.3 * wave()[:, None] * v
    maps = [np.eye(DIM), rng.normal(size=(DIM, DIM)), -np.eye(DIM) + 0.2 * rng.normal(size=(DIM, DIM))]
    x, y = pair(0.0, *(u @ a.T for a in maps))
    found = read(x, y, u)
    along = np.array([v @ a @ v for a in maps])
    np.testing.assert_allclose(found["gain"].profile, [0, *np.abs(along)], rtol=1e-10)
    np.testing.assert_allclose(found["total"].profile, [0, *(np.linalg.norm(a @ v) for a in maps)], rtol=1e-10)
    np.testing.assert_allclose(np.cos(found["phase"].profile[1:]), np.sign(along), atol=1e-12)
    assert math.isnan(found["phase"].profile[0])  # no response has no phase …
    assert found["gain"].profile[0] == 0.0  # … and a gain of exactly 0
    assert float(found["gain"]) == pytest.approx(abs(along[-1]), rel=1e-10)


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 5])
def test_a_pure_delay(delay):
    """δ_pos = u_{pos − m}, settled: gain 1, phase −2πm/period."""
    v = unit()
    u, late = wave()[:, None] * v, wave(delay=delay)[:, None] * v
    found = read(*pair(u, late), u, settle=7)
    expected = -2 * np.pi * delay / PERIOD
    assert float(found["gain"]) == pytest.approx(1, rel=1e-10)
    assert float(found["phase"]) == pytest.approx(math.remainder(expected, 2 * np.pi), abs=1e-10)


def test_a_delay_that_begins_with_the_drive_shows_its_transient():
    """A window of N tokens misses the first m of a response that starts m late."""
    v, delay = unit(), 2
    u, late = wave()[:, None] * v, wave(delay=delay)[:, None] * v
    late[:delay] = 0
    fresh, settled = read(*pair(late), u), read(*pair(late), u, settle=8)
    assert float(settled["phase"]) == pytest.approx(-np.pi / 2, abs=1e-10)
    assert abs(float(fresh["phase"]) + np.pi / 2) < 0.1
    assert 0.9 < float(fresh["gain"]) < 1.0
    assert fresh["gain"].metric_id == "lockin.gain/1"
    assert settled["gain"].metric_id == "lockin.gain/1{settle=8}"


def test_the_reference_is_the_drive_really_written():
    """An amplitude that follows ‖h‖, as under relnorm, is divided out where the response is proportional to it."""
    v, size = unit(), np.exp(np.random.default_rng(3).normal(size=LENGTH))
    u = 0.1 * (size * wave())[:, None] * v
    x, y = pair(u, -2.5 * u)
    found = read(x, y, u)
    assert float(found["gain"]) == pytest.approx(2.5, rel=1e-10)
    assert float(found["phase"]) == pytest.approx(np.pi, abs=1e-10)
    by_depth = compute("lockin.gain/1", x, y, inject=0, period=PERIOD)
    np.testing.assert_allclose(by_depth.profile, [1, 2.5], rtol=1e-10)


def test_what_does_not_swing_with_the_drive_is_not_seen():
    """The mean, the harmonics and a neighbouring frequency leave gain and phase alone."""
    v, n = unit(), 64
    u = wave(n)[:, None] * v
    other = (3.0 + 2 * wave(n, 4) + 5 * wave(n, 64 / 7))[:, None] * v
    found = compute("lockin.gain/1", *pair(0.5 * u + other, n=n), inject=None, drive=u, period=8, settle=0)
    # sin is 0 at token 0, so the window starts at 1 and holds 56 of the 63 driven tokens
    assert found.n_units == 56
    whole = lockin_of(0.5 * u + other, u, np.ones(n, bool), 8)
    assert whole["lockin_gain"] == pytest.approx(0.5, rel=1e-10)
    assert abs(whole["lockin_phase"]) < 1e-10
    assert whole["lockin_snr"] < 1  # the line at 7/64 is louder than the answer: it is the noise


def lockin_of(moved, drive, driven, period, dtype=torch.float64, **more):
    zero = torch.zeros(1, *drive.shape, dtype=dtype)
    arm = torch.as_tensor(np.asarray(moved))[None].to(dtype)
    found = lockin([zero], [arm], torch.as_tensor(drive)[None].to(dtype), driven[None], period=period, **more)
    return {name: float(values[0, 0]) for name, values in found.profile.items()} | {
        "n": int(found.n_tokens[0]), "why": {k: r[0, 0] for k, r in found.reason.items()},
    }  # fmt: skip


# ---------------------------------------------------------------- an independent slow version


def slow(moved, drive, period, bins=8):
    """Least squares on sine and cosine regressors, frequency by frequency; windows and bins by their definition."""
    n = next(n for n in range(len(moved), 0, -1) if abs(n / period - round(n / period)) < 1e-9)
    moved, drive, k0 = moved[:n], drive[:n], round(n / period)

    def line(y, k):
        t = 2 * np.pi * k * np.arange(n) / n
        basis = np.stack([np.ones(n), np.cos(t), np.sin(t)], 1)
        c, s = np.linalg.lstsq(basis, y, rcond=None)[0][1:]
        return c - 1j * s

    response, reference = line(moved, k0), line(drive, k0)
    size = np.sqrt(sum(abs(reference) ** 2))
    transfer = sum(np.conj(reference) * response) / size**2
    candidates = [k for k in range(1, n) if k < n / 2 and k % k0]
    near = sorted(candidates, key=lambda k: (abs(k - k0), k))[:bins]
    noise = [abs(sum(np.conj(reference) * line(moved, k))) ** 2 / size**2 for k in near]
    snr = (abs(transfer) * size) ** 2 / np.mean(noise)
    return {
        "lockin_gain": abs(transfer), "lockin_phase": np.angle(transfer),
        "lockin_total": np.sqrt(sum(abs(response) ** 2)) / size, "lockin_snr": snr,
        "lockin_p": stats.f.sf(snr, 2, 2 * len(near)),
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), period=st.sampled_from([3, 4, 5, 8, 2.5, 7.5, 12]), extra=st.integers(0, 30),
    dim=st.integers(1, 6), bins=st.integers(1, 9),
)  # fmt: skip
def test_the_slow_version_agrees(seed, period, extra, dim, bins):
    rng = np.random.default_rng(seed)
    n = 30 + extra
    drive = (np.exp(rng.normal(size=n)) * wave(n, period))[:, None] * unit(dim, seed)
    moved = rng.normal(size=(n, dim)) + drive @ rng.normal(size=(dim, dim))
    fast = lockin_of(moved, drive, np.ones(n, bool), period, bins=bins)
    for name, value in slow(moved, drive, period, bins).items():
        assert fast[name] == pytest.approx(value, rel=1e-7, abs=1e-9), name


@settings(max_examples=100, deadline=None)
@given(period=st.fractions(2, 40, max_denominator=9).filter(lambda p: p > 2), room=st.integers(0, 200))
def test_windows_hold_whole_periods(period, room):
    w = window(3, 3 + room, float(period))
    fits = [n for n in range(1, room + 1) if (n / period).denominator == 1 and n / period >= 2]
    assert w.length == (max(fits) if fits else 0)
    assert w.periods == (w.length / period if fits else 0)
    assert (w.reason is None) == bool(fits)
    if not fits:
        shortest = next(n for n in range(1, 10**5) if (n / period).denominator == 1 and n / period >= 2)
        assert w.reason == f"tokens<{shortest}"
        return
    bins = w.noise_bins()
    assert len(bins) >= 1
    assert all(0 < b < w.length / 2 and b % w.periods for b in bins)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("dim", [1, 64])
def test_a_response_30_db_below_the_noise_is_found(dim):
    """Noise of 1,000 times the signal's power at every token; gain and phase come out all the same."""
    n, period, v = 80_000 if dim == 1 else 8_000, 8, unit(dim)
    gain, delay = 0.7, 1
    u = wave(n, period)[:, None] * v
    signal = gain * wave(n, period, delay)[:, None] * v
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(n, dim)) * np.sqrt(1000 * (signal**2).sum(1).mean() / dim)
    assert 10 * np.log10((noise**2).sum() / (signal**2).sum()) == pytest.approx(30, abs=0.1)
    found = lockin_of(signal + noise, u, np.ones(n, bool), period)
    error = np.sqrt(4 * 1000 * gain**2 / 2 / dim / n)  # SD of the complex amplitude that this noise leaves
    assert found["lockin_p"] < 1e-4
    assert found["lockin_snr"] > 10
    assert found["lockin_gain"] == pytest.approx(gain, abs=3 * error)
    assert found["lockin_phase"] == pytest.approx(-2 * np.pi * delay / period, abs=3 * error / gain)
    single = np.linalg.norm(signal, axis=1).max() / np.linalg.norm(noise, axis=1).mean()
    assert single < 0.06  # no single token shows it
    alone = lockin_of(noise, u, np.ones(n, bool), period)
    assert alone["lockin_p"] > 0.01


def test_p_values_of_white_noise_are_uniform():
    rng, n = np.random.default_rng(0), 48
    u = wave(n)[:, None] * unit(3)
    p = [lockin_of(rng.normal(size=(n, 3)), u, np.ones(n, bool), 8)["lockin_p"] for _ in range(800)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_float32_states_hide_no_small_response():
    """A response of a fraction of the states' rounding, scattered by that rounding, is read to a few percent."""
    rng, n, v = np.random.default_rng(4), 4_000, unit(64)
    u = wave(n)[:, None] * v
    exact = torch.from_numpy(rng.normal(size=(1, n, 64)) + 4)  # rounds to ±2.4e-7: the arithmetic of a model dithers
    small = 3e-7 * u
    clean, arm = exact.float(), (exact + torch.from_numpy(0.5 * small)).float()
    drive = torch.from_numpy(small)[None].float()
    found = lockin([clean], [arm], drive, np.ones((1, n), bool), period=8)
    assert found.profile["lockin_gain"][0, 0] == pytest.approx(0.5, rel=0.1)
    assert found.profile["lockin_p"][0, 0] < 1e-6


# ---------------------------------------------------------------- what has no number


def test_no_drive_is_nothing_over_nothing():
    x, y = pair(0.0, 0.0)
    for name, result in read(x, y, np.zeros((LENGTH, DIM))).items():
        assert math.isnan(float(result)), name
        assert result.reason == "zero-denominator"
        assert np.isnan(result.profile).all()
    moved = lockin_of(np.ones((20, 3)), np.zeros((20, 3)), np.ones(20, bool), 8)
    assert set(moved["why"].values()) == {"zero-denominator"}


@pytest.mark.parametrize(
    ("n", "period", "reason"), [(15, 8, "tokens<16"), (4, 2.5, "tokens<5"), (140, 7.3, "tokens<73")]
)
def test_two_periods_are_the_least(n, period, reason):
    drive = np.ones((n, 2)) * wave(n, period)[:, None]
    short = lockin_of(drive, drive, np.arange(n) < min(n, 72), period)
    assert set(short["why"].values()) == {reason}
    assert all(math.isnan(short[c]) for c in COLUMNS)
    long = np.ones((160, 2)) * wave(160, period)[:, None]
    assert lockin_of(long, long, np.ones(160, bool), period)["lockin_gain"] == pytest.approx(1)


def test_a_missing_state_spoils_its_window_and_no_other():
    u = wave()[:, None] * unit()
    x, y = pair(u, 2 * u, 3 * u)
    y[1, 7, 3] = np.nan
    found = read(x, y, u)
    np.testing.assert_allclose(found["gain"].profile, [1, np.nan, 3])
    assert found["gain"].coverage == pytest.approx(2 / 3)
    y[2, LENGTH - 1] = np.inf  # beyond the last whole period
    assert float(read(x, y, u)["gain"]) == pytest.approx(3)


def test_a_noise_free_line_has_no_ratio_but_is_certain():
    n = 32
    u = wave(n)[:, None] * np.array([1.0, 0.0])
    found = lockin_of(u, u, np.ones(n, bool), 8)
    assert found["lockin_gain"] == pytest.approx(1, rel=1e-12)
    assert found["lockin_p"] < 1e-100 or found["why"]["lockin_snr"] == "zero-denominator"
    silent = lockin_of(np.zeros((n, 2)), u, np.ones(n, bool), 8)
    assert silent["lockin_gain"] == silent["lockin_total"] == 0.0
    assert silent["why"]["lockin_p"] == silent["why"]["lockin_phase"] == "zero-denominator"
    across = lockin_of(wave(n)[:, None] * np.array([0.0, 1.0]), u, np.ones(n, bool), 8)
    assert across["lockin_gain"] == 0.0
    assert across["lockin_total"] == pytest.approx(1)
    assert across["why"]["lockin_phase"] == "zero-denominator"


# ---------------------------------------------------------------- the batch


def test_rows_are_their_own_windows_wherever_their_padding_is():
    rng, lengths, period = np.random.default_rng(8), (40, 17, 15, 29), 4
    rows = [(rng.normal(size=(n, 5)), wave(n, period)[:, None] * unit(5, n)) for n in lengths]
    moved = [u @ rng.normal(size=(5, 5)) + 0.1 * rng.normal(size=u.shape) for _, u in rows]
    found = {}
    for side in ("left", "right"):
        shape = (len(lengths), max(lengths))
        clean, arm = (torch.full((*shape, 5), torch.nan, dtype=torch.float64) for _ in range(2))
        drive, driven = torch.zeros(*shape, 5, dtype=torch.float64), np.zeros(shape, bool)
        for i, n in enumerate(lengths):
            at = slice(shape[1] - n, None) if side == "left" else slice(n)
            clean[i, at], arm[i, at] = torch.from_numpy(rows[i][0]), torch.from_numpy(rows[i][0] + moved[i])
            drive[i, at], driven[i, at] = torch.from_numpy(rows[i][1]), True
        found[side] = lockin([clean, clean], [clean, arm], drive, driven, period=period)
    for name in COLUMNS:
        np.testing.assert_array_equal(found["left"].profile[name], found["right"].profile[name])
        for i, n in enumerate(lengths):
            own = lockin_of(moved[i], rows[i][1], np.ones(n, bool), period)[name]
            assert found["left"].profile[name][1, i] == pytest.approx(own, rel=1e-9, nan_ok=True)
    assert found["left"].n_tokens.tolist() == [40, 16, 12, 28]
    assert found["left"].n_periods.tolist() == [10, 4, 3, 7]


def test_the_window_begins_and_ends_with_the_drive():
    n = 60
    u = wave(n)[:, None] * unit(4)
    on = (np.arange(n) >= 10) & (np.arange(n) < 45)
    u[~on] = 0
    moved = np.where(on[:, None], 0.5 * u, 100.0)  # whatever happens outside
    found = lockin_of(moved, u, on, 8)
    assert found["n"] == 32
    assert found["lockin_gain"] == pytest.approx(0.5, rel=1e-12)


def test_masked_units_leave_the_window():
    u = wave()[:, None] * unit()
    x, y = pair(0.25 * u)
    mask = np.arange(LENGTH) < 30
    found = compute("lockin.gain/1", x, y, mask=mask, drive=u, period=8)
    assert (float(found), found.n_units) == (pytest.approx(0.25), 24)
    with pytest.raises(MetricError, match="no holes"):
        compute("lockin.gain/1", x, y, mask=np.arange(LENGTH) != 20, drive=u, period=8)


@pytest.mark.parametrize("kind", ["R", "S"])
def test_declared_invariances(kind):
    rng = np.random.default_rng(6)
    u = wave()[:, None] * unit()
    x, y = pair(u, u @ rng.normal(size=(DIM, DIM)) + 0.1 * rng.normal(size=u.shape))
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] if kind == "R" else 3.7 * np.eye(DIM)
    for name, before in read(x, y, u).items():
        after = compute(f"lockin.{name}/1", x @ turn, y @ turn, inject=0, period=PERIOD)
        assert float(after) == pytest.approx(float(before), rel=1e-8), name
    other = compute("lockin.gain/1", x, np.stack([y[0], x[1] + (y - x)[1] @ turn + 0.2 * u]), inject=0, period=PERIOD)
    assert float(other) != pytest.approx(float(read(x, y, u)["gain"]), rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "needs period"),
        ({"period": 8}, "drive"),
        ({"period": 8, "inject": 0, "drive": np.zeros((LENGTH, DIM))}, "or inject"),
        ({"period": 2, "inject": 0}, "more than 2"),
        ({"period": math.nan, "inject": 0}, "more than 2"),
        ({"period": 8, "inject": 5}, "inject=5"),
        ({"period": 8, "drive": np.zeros((3, DIM))}, "no .unit, dim."),
        ({"period": 8, "inject": 0, "settle": -1}, "settle at least 0"),
    ],
)
def test_refusals(more, message):
    u = wave()[:, None] * unit()
    with pytest.raises(MetricError, match=message):
        compute("lockin.gain/1", *pair(u), **more)
