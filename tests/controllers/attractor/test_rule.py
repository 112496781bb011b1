"""The vectorised rule equals the slow one, whatever the batching, and keeps its invariants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from slow_rule import SlowChunks, SlowSlots

from dynprobe.controllers.attractor import Settings, empty_state, pass_tokens, strengths
from dynprobe.controllers.attractor._chunks import pass_chunks
from dynprobe.probes import identical

DIM = 6


def series(rows=3, columns=40, seed=0, spread=0.35):
    """Tokens around a few directions, so that there are hits, misses and evictions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, DIM, generator=generator)
    which = torch.randint(0, 7, (rows, columns), generator=generator)
    return centres[which] + spread * torch.randn(rows, columns, DIM, generator=generator)


def lively(**changes):
    base = {
        "slots": 4,
        "burn_in": 3,
        "theta": 0.8,
        "theta_read": 0.2,
        "half_life": 7.0,
        "strength": 0.3,
        "centre": "none",
    }
    return Settings(**{**base, **changes})


def passed(y, settings, *, mean=None, cuts=None, real=None):
    """Pass columns in one forward, or cut into several."""
    state = empty_state(len(y), y.shape[-1], settings)
    real = torch.ones(y.shape[:2], dtype=torch.bool) if real is None else real
    edges = [0, *(cuts or ()), y.shape[1]]
    parts = [
        pass_tokens(state, y[:, a:b], real[:, a:b], settings, mean, settings.theta)
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat([p.out for p in parts], 1), torch.cat([p.gain for p in parts], 1), state


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"read": "field"}, {"read": "hopfield"}, {"inject": "absolute"}, {"evict": "oldest"}, {"evict": "none"},
        {"observe": "post"}, {"clocks": True}, {"burn": "strength", "burn_in": 2.0},
        {"half_life": 1000.0, "s_max": 3.0}, {"rate": 0.6}, {"s_min": 0.2}, {"gate": 0.4}, {"slots": 1},
        {"centre": "running"}, {"centre": "running", "observe": "post"},
    ],
)  # fmt: skip
def test_the_rule_equals_the_slow_one(changes):
    settings, y = lively(**changes), series()
    out, gain, state = passed(y, settings, mean=torch.full((DIM,), 0.1))
    for row in range(len(y)):
        slow = SlowSlots(settings, DIM)
        for t, token in enumerate(y[row].double().numpy()):
            expected, g = slow.token(token, np.full(DIM, np.float32(0.1)), settings.theta)
            assert float(gain[row, t]) == pytest.approx(g, abs=2e-6)
            np.testing.assert_allclose(out[row, t].numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(state["s"][row].numpy(), slow.s, rtol=1e-9)
        np.testing.assert_array_equal(state["stamp"][row].numpy(), slow.stamp)
        np.testing.assert_allclose(state["A"][row].numpy(), slow.A, atol=1e-5)
        np.testing.assert_allclose(state["z"][row].numpy(), slow.z, atol=1e-12)
        np.testing.assert_array_equal(state["born"][row].numpy(), slow.born)
        np.testing.assert_array_equal(state["hits"][row].numpy(), slow.hits)
        assert int(state["n"][row]) == slow.n
    assert gain.max() > 0


@pytest.mark.parametrize(
    ("commit", "changes"),
    [
        (3, {}), (7, {}), (16, {}), (7, {"read": "field"}), (3, {"read": "hopfield"}), (16, {"inject": "absolute"}),
        (7, {"evict": "oldest"}), (16, {"evict": "none", "s_min": 0.2, "half_life": 2.0}), (7, {"observe": "post"}),
        (7, {"clocks": True}), (3, {"clocks": True, "slots": 2, "evict": "oldest"}), (7, {"slots": 1}),
        (3, {"burn": "strength", "burn_in": 2.0}), (7, {"half_life": 1.5}), (16, {"half_life": 1000.0, "s_max": 3.0}),
        (7, {"rate": 0.6}), (16, {"slots": 12}), (3, {"centre": "running"}),
        (7, {"centre": "running", "observe": "post"}), (16, {"centre": "running", "clocks": True}),
    ],
)  # fmt: skip
def test_chunks_equal_the_slow_ones(commit, changes):
    """Prompts of 5, 13 and 30 tokens, padded on the left and with broken tokens, then decoded together.

    No length is a multiple of a chunk, and the rows are in different chunks at every step.
    """
    settings, y, lengths = lively(commit_every=commit, **changes), series(columns=45), (5, 13, 30)
    y[2, 8], y[1, 20] = 0.0, torch.nan
    padded, real = torch.full((3, 30, DIM), 5.0), torch.zeros(3, 30, dtype=torch.bool)
    for row, n in enumerate(lengths):
        padded[row, 30 - n :], real[row, 30 - n :] = y[row, :n], True
    state, mean = empty_state(3, DIM, settings), torch.full((DIM,), 0.1)
    found = [pass_tokens(state, padded, real, settings, mean, settings.theta)]
    for t in range(15):
        token = torch.stack([y[row, n + t] for row, n in enumerate(lengths)])[:, None]
        found.append(pass_tokens(state, token, torch.ones(3, 1, dtype=torch.bool), settings, mean, settings.theta))
    out, gain = (torch.cat([getattr(p, name) for p in found], 1) for name in ("out", "gain"))
    for row, n in enumerate(lengths):
        slow = SlowChunks(settings, DIM)
        for t, token in enumerate(y[row, : n + 15].double().numpy(), 30 - n):
            expected, g = slow.token(token, np.full(DIM, np.float32(0.1)), settings.theta)
            assert float(gain[row, t]) == pytest.approx(g, abs=5e-6)
            np.testing.assert_allclose(out[row, t].numpy(), expected, atol=5e-5)
        for name, atol in (("s", 1e-9), ("A", 2e-5), ("z", 1e-12)):
            np.testing.assert_allclose(state[name][row].numpy(), getattr(slow, name), atol=atol, err_msg=name)
        for name in ("stamp", "born", "hits"):
            np.testing.assert_array_equal(state[name][row].numpy(), getattr(slow, name), err_msg=name)
        assert int(state["n"][row]) == slow.n == n + 15 - (row > 0)
    assert gain.max() > 0
    assert state["hits"].max() > 0


@pytest.mark.parametrize("commit", [1, 4, 7, 64])
@pytest.mark.parametrize("centre", ["none", "running"])
@pytest.mark.parametrize("observe", ["pre", "post"])
def test_prefill_equals_tokens_one_by_one(commit, centre, observe):
    settings, y = lively(commit_every=commit, centre=centre, observe=observe), series()
    whole = passed(y, settings)
    for cuts in ([1, 2, 3, 4, 20, 21], list(range(1, 40)), [13]):
        parts = passed(y, settings, cuts=cuts)
        torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(parts[1], whole[1], atol=1e-6, rtol=0)
        for name in ("A", "s", "z", "mean"):
            torch.testing.assert_close(parts[2][name], whole[2][name], atol=1e-6, rtol=1e-6)
        for name in ("stamp", "n", "hits", "born"):
            assert torch.equal(parts[2][name], whole[2][name])


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"read": "hopfield"}, {"observe": "post"}, {"clocks": True, "centre": "running"}, {"evict": "oldest"},
        {"evict": "none", "s_min": 0.2}, {"half_life": 1000.0, "s_max": 3.0},
    ],
)  # fmt: skip
def test_chunks_of_one_token_equal_single_tokens(changes):
    """Two ways of writing the same rule, with rows that hold broken tokens."""
    settings, y = lively(**changes), series()
    y[1, 5], y[2, 9] = torch.nan, 0.0
    real = torch.ones(3, 40, dtype=torch.bool)
    out, gain, state = passed(y, settings, real=real)
    for row in range(3):
        keep = [t for t in range(40) if bool(y[row, t].isfinite().all()) and float(y[row, t].norm()) > 0]
        x = y[row : row + 1, keep]
        other = empty_state(1, DIM, settings)
        field, g, _ = pass_chunks(other, x, x.norm(dim=-1), torch.tensor([len(keep)]), settings, None, settings.theta)
        torch.testing.assert_close(g[0], gain[row, keep], atol=1e-6, rtol=0)
        pushed = x[0] + (g * settings.strength * x.norm(dim=-1))[0, :, None].float() * field[0]
        torch.testing.assert_close(pushed, out[row, keep], atol=1e-5, rtol=0)
        for name in ("A", "s", "z", "mean"):
            torch.testing.assert_close(other[name][0], state[name][row], atol=1e-5, rtol=1e-5)
        for name in ("stamp", "n", "hits", "born"):
            assert torch.equal(other[name][0], state[name][row]), name


@pytest.mark.parametrize("commit", [1, 4, 8, 32])
@pytest.mark.parametrize("observe", ["pre", "post"])
def test_rows_in_different_chunks_do_not_meet(commit, observe):
    """A batch of prompts of 3, 13 and 30 tokens, padded on the left, then decoded together."""
    settings, y, lengths = lively(commit_every=commit, observe=observe), series(columns=45), (3, 13, 30)
    padded, real = torch.full((3, 30, DIM), 5.0), torch.zeros(3, 30, dtype=torch.bool)
    for row, n in enumerate(lengths):
        padded[row, 30 - n :], real[row, 30 - n :] = y[row, :n], True
    state = empty_state(3, DIM, settings)
    pass_tokens(state, padded, real, settings, None, settings.theta)
    outs = []
    for t in range(15):
        token = torch.stack([y[row, n + t] for row, n in enumerate(lengths)])[:, None]
        outs.append(pass_tokens(state, token, torch.ones(3, 1, dtype=torch.bool), settings, None, settings.theta).out)
    for row, n in enumerate(lengths):
        alone, _, other = passed(y[row : row + 1, : n + 15], settings)
        torch.testing.assert_close(torch.cat(outs, 1)[row], alone[0, n:], atol=1e-5, rtol=0)
        for name in ("A", "s"):
            torch.testing.assert_close(state[name][row], other[name][0], atol=1e-5, rtol=1e-6)
        for name in ("stamp", "n", "hits", "born"):
            assert torch.equal(state[name][row], other[name][0]), name


@pytest.mark.parametrize("commit", [1, 7, 512])
def test_one_token_of_a_large_chunk_leaves_older_states_alone(commit):
    """What was kept of a state is not changed by later tokens, whatever is written in place."""
    settings, y = lively(commit_every=commit), series(columns=20)
    state, real = empty_state(3, DIM, settings), torch.ones(3, 1, dtype=torch.bool)
    with torch.inference_mode():  # a prefill under inference mode, decoded without it
        pass_tokens(state, y[:, :10], real.expand(3, 10), settings, None, 0.8)
    for t in range(10, 20):
        kept = {k: v for k, v in state.items() if not k.startswith("pending")}
        copies = {k: v.clone() for k, v in kept.items()}
        pass_tokens(state, y[:, t : t + 1], real, settings, None, 0.8)
        assert all(torch.equal(kept[k], copies[k]) for k in kept)
    assert state["n"].tolist() == [20] * 3


@pytest.mark.parametrize(("every", "half_life"), [(2, 4.0), (3, 4.0), (9, 6.0)])
def test_a_slot_that_is_driven_settles_where_the_formula_says(every, half_life):
    """One hit at every k-th token: s* = 1/(1 − 2^{−(k−1)/H}) right after it."""
    y = torch.eye(DIM)[1].repeat(1, 240, 1)
    y[:, every - 1 :: every] = torch.eye(DIM)[0]
    settings = lively(half_life=half_life, s_max=1e6)
    _, _, state = passed(y[:, : 240 // every * every], settings)
    slot = int(state["A"][0, :, 0].argmax())
    assert int(state["stamp"][0, slot]) == int(state["n"][0])
    expected = 1 / (1 - 2 ** (-(every - 1) / half_life))
    assert float(state["s"][0, slot]) == pytest.approx(expected, rel=1e-6)
    for chunk in (5, 240):
        _, _, chunked = passed(y[:, : 240 // every * every], lively(half_life=half_life, s_max=1e6, commit_every=chunk))
        if 240 // every * every % chunk == 0:
            assert float(chunked["s"][0].max()) == pytest.approx(float(state["s"][0].max()), rel=1e-6)


def test_hits_at_every_token_have_no_fixed_point():
    settings = lively(half_life=2.0, s_max=20.0)
    _, _, state = passed(torch.eye(DIM)[:1].repeat(1, 12, 1), settings)
    assert float(state["s"].max()) == settings.s_new + 11
    _, _, state = passed(torch.eye(DIM)[:1].repeat(1, 40, 1), settings)
    assert float(state["s"].max()) == 20.0


def test_hits_at_random_settle_at_the_mean_that_the_formula_says():
    half_life, share = 5.0, 0.3
    hit = torch.rand(48, 300, generator=torch.Generator().manual_seed(0)) < share
    y = torch.where(hit[..., None], torch.eye(DIM)[0], torch.eye(DIM)[1])
    settings = lively(half_life=half_life, s_max=1e6, slots=2)
    state, after = empty_state(48, DIM, settings), []
    for t in range(300):
        pass_tokens(state, y[:, t : t + 1], torch.ones(48, 1, dtype=torch.bool), settings, None, 0.8)
        if t >= 60:
            ours = state["A"][..., 0] > 0.5
            after.append(state["s"][ours & hit[:, t, None]])
    q = 2 ** (-1 / half_life)
    expected = (1 - (1 - share) * q) / ((1 - share) * (1 - q))
    assert float(torch.cat(after).mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("commit", [1, 5])
def test_padding_and_company_do_not_matter(commit):
    settings, y = lively(commit_every=commit), series()
    whole = passed(y, settings)
    padded = torch.cat([torch.full((3, 9, DIM), 1e3), y], 1)
    real = torch.cat([torch.zeros(3, 9), torch.ones(3, 40)], 1).bool()
    out, gain, state = passed(padded, settings, real=real)
    assert identical(out[:, :9], padded[:, :9])
    assert float(gain[:, :9].abs().max()) == 0
    torch.testing.assert_close(out[:, 9:], whole[0], atol=1e-5, rtol=0)
    assert torch.equal(state["n"], whole[2]["n"])
    alone = passed(y[1:2], settings)
    torch.testing.assert_close(alone[0], whole[0][1:2], atol=1e-6, rtol=0)
    swapped = passed(y[[2, 0, 1]], settings)
    torch.testing.assert_close(swapped[0], whole[0][[2, 0, 1]], atol=1e-6, rtol=0)
    torch.testing.assert_close(swapped[2]["A"], whole[2]["A"][[2, 0, 1]], atol=1e-6, rtol=0)


def test_tokens_that_do_not_exist_change_nothing():
    settings, y = lively(), series(rows=1)
    broken = y.clone()
    broken[0, 11] = torch.nan
    broken[0, 17] = 0.0
    broken[0, 23, 2] = torch.inf
    keep = [t for t in range(40) if t not in (11, 17, 23)]
    out, _, state = passed(broken, settings)
    expected = passed(y[:, keep], settings)
    for t in (11, 17, 23):
        assert identical(out[:, t], broken[:, t])
    torch.testing.assert_close(out[:, keep], expected[0], atol=1e-6, rtol=0)
    assert int(state["n"]) == 37


@pytest.mark.parametrize("idle", [{"gate": 0.0}, {"strength": 0.0}, {"slots": 0}, {"burn_in": 1000}])
def test_an_idle_layer_returns_the_very_states(idle):
    y = series()
    y[0, 0] = -0.0
    settings = lively(**idle)
    state = empty_state(3, DIM, settings)
    assert pass_tokens(state, y, torch.ones(3, 40, dtype=torch.bool), settings, None, 0.8).out is y


def test_tokens_in_burn_in_keep_their_bits():
    y = series()
    out, gain, _ = passed(y, lively(burn_in=15))
    assert identical(out[:, :15], y[:, :15])
    assert bool((gain[:, 15:] > 0).any())


def test_half_life_is_exact():
    settings = lively(half_life=5.0, theta=0.999)
    y = torch.eye(DIM)[:1].repeat(1, 1)[None].repeat(1, 3, 1)
    _, _, state = passed(y, settings)
    s = strengths(state, state["n"], 5.0)[0, 0]
    for k in range(1, 6):
        assert float(strengths(state, state["n"] + 5 * k, 5.0)[0, 0]) == float(s) * 2.0**-k
    a = strengths(state, state["n"] + 3, 5.0)[0, 0] * 2.0 ** (-4 / 5)
    assert float(strengths(state, state["n"] + 7, 5.0)[0, 0]) == pytest.approx(float(a), rel=1e-12)


def test_the_future_plays_no_part():
    settings, y = lively(commit_every=4), series()
    changed = y.clone()
    changed[:, 25:] = series(seed=9)[:, 25:]
    assert identical(passed(y, settings)[0][:, :25], passed(changed, settings)[0][:, :25])


@pytest.mark.parametrize("commit", [1, 8])
def test_bounds(commit):
    settings, y = lively(commit_every=commit, s_max=2.0, strength=0.5), series(columns=200)
    out, _, state = passed(y, settings)
    assert bool((state["s"] >= 0).all())
    assert bool((state["s"] <= 2.0).all())
    size = state["A"].norm(dim=-1)
    assert bool(((size - 1).abs() < 1e-6).all())
    assert bool(((out - y).norm(dim=-1) <= 0.5 * y.norm(dim=-1) * (1 + 1e-5)).all())


def test_a_chunk_of_alike_tokens_opens_one_slot():
    settings = lively(commit_every=16, half_life=1e9)
    y = torch.ones(1, 16, DIM) + 0.01 * series(rows=1, columns=16)
    _, _, state = passed(y, settings)
    assert int((state["s"] > 0).sum()) == 1
    assert float(state["s"].max()) == pytest.approx(0.5 + 15, rel=1e-6)
    assert int(state["hits"].max()) == 15
