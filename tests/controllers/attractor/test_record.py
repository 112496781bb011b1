"""A record changes nothing and says what happened; strengths go where the leaky integrator says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynprobe.controllers import AttractorLayer, attached
from dynprobe.controllers.attractor import AttractorSite, Recorded, Settings, empty_state, make_baseline, pass_tokens
from dynprobe.controllers.attractor import strengths as strengths_of
from dynprobe.probes import discover, identical
from dynprobe.testing import tiny_causal_lm

PUSH = {"centre": "none", "strength": 1.0, "burn_in": 4, "theta": 0.75, "theta_read": 0.0, "slots": 4, "s_ref": 1.0}
SITE = ("attn_out", 1)


@pytest.fixture(scope="module")
def subject():
    return discover(tiny_causal_lm("llama"))


def ids(rows=2, columns=14):
    return torch.randint(5, 90, (rows, columns), generator=torch.Generator().manual_seed(3))


def written(subject, controller, tokens, new=6):
    with attached([controller], subject) as (steering,):
        out = subject.model.generate(tokens, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out, steering.memory


def site(name="layer", **changes):
    made = make_baseline(name, settings=Settings(**{**PUSH, **changes}), site=SITE, mean=None, theta=PUSH["theta"])
    assert isinstance(made, AttractorSite)
    return made


@pytest.mark.parametrize("arm", ["layer", "random", "constant", "frozen", "leaky", "fast_weights", "none"])
def test_recording_changes_nothing(subject, arm):
    plain, memory = written(subject, site(arm), ids())
    noted, after = written(subject, Recorded(site(arm)), ids())
    assert torch.equal(plain, noted)
    torch.testing.assert_close(after["A"], memory["A"], atol=1e-6, rtol=0)
    assert torch.equal(after["n"], memory["n"])
    assert torch.equal(after["hits"], memory["hits"])


def test_the_lines_add_up_to_the_state(subject):
    note = Recorded(site())
    _, memory = written(subject, note, ids())
    tokens, slots, lives = note.tokens(), note.slots(), note.lives()
    assert len(tokens) == 2 * (14 + 5)
    assert ((tokens["reinforced"] >= 0) ^ (tokens["opened"] >= 0)).all()  # every token does one of the two
    last = slots[slots["pos"] == slots["pos"].max()]
    for row in range(2):
        mine = last[last["row"] == row].sort_values("slot")
        now = strengths_of(memory, memory["n"], PUSH.get("half_life", 46.0))[row].numpy()
        live = mine["slot"].to_numpy(int)
        np.testing.assert_allclose(mine["strength"], now[live], rtol=1e-12)
        assert mine["hits"].tolist() == memory["hits"][row][live.tolist()].tolist()
        alive = {life.slot: life for life in lives if life.row == row and life.ended < 0}
        assert sorted(alive) == live.tolist()
        for m, life in alive.items():
            assert len(life.hits) == int(memory["hits"][row, m])
            assert life.born == int(memory["born"][row, m])
            np.testing.assert_allclose(life.direction, memory["A"][row, m].numpy())
            mine_tokens = tokens[(tokens["row"] == row) & (tokens["reinforced"] == m) & (tokens["pos"] > life.born)]
            assert life.hits == mine_tokens["pos"].tolist()


def test_the_size_of_what_is_written_is_the_gain_times_the_strength(subject):
    note = Recorded(site())
    written(subject, note, ids())
    tokens = note.tokens()
    np.testing.assert_allclose(tokens["written"], tokens["gain"] * PUSH["strength"], atol=1e-5)
    assert (tokens.loc[tokens["pos"] < 4, "written"] == 0).all()
    assert (tokens["written"] > 0).any()


def test_padding_has_no_line(subject):
    note, tokens = Recorded(site()), ids()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with attached([note], subject), torch.no_grad():
        subject.model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert note.tokens().groupby("row").size().tolist() == [14, 9]
    assert note.tokens().groupby("row")["pos"].min().tolist() == [0, 0]


def test_a_new_text_begins_empty(subject):
    note = Recorded(site())
    first, _ = written(subject, note, ids())
    lines = note.tokens()
    again, _ = written(subject, note, ids())
    assert torch.equal(first, again)
    assert note.tokens().equals(lines)


def test_with_chunked_commits_a_hit_is_what_the_rule_calls_one(subject):
    note = Recorded(site(commit_every=3))
    written(subject, note, ids())
    tokens, slots = note.tokens().set_index(["row", "pos"]), note.slots()
    best = slots.groupby(["row", "pos"])["cos"].max()
    hits = tokens["reinforced"] >= 0
    assert hits.any()
    assert (~hits).any()
    alike = best.reindex(hits.index).fillna(-1.0) >= PUSH["theta"]
    assert (alike == hits).all()


def test_in_a_session_a_baseline_keeps_what_it_remembers_beside_the_slots(subject):
    leaky = site("leaky")
    _, memory = written(subject, leaky, ids())
    kept = {name: value.clone() for name, value in memory.items()}
    later = site("leaky")
    later.base = kept
    state = torch.zeros(2, 1, subject.dim)
    fresh = later._fresh(state)
    fresh.update({k: v for k, v in later.extra(state).items() if k not in fresh})
    assert identical(fresh["ema"], kept["ema"])
    assert bool((kept["ema"] != 0).any())


def _driven(every, H, n=4000, s_max=1e9):
    """Strength right after each hit where one token in ``every`` hits the one slot and the others hit nothing."""
    settings = Settings(centre="none", slots=1, theta=0.9, half_life=H, evict="none", s_max=s_max, burn_in=0)
    state = empty_state(1, 4, settings)
    hit, miss = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    y = torch.stack([hit if t % every == 0 else miss for t in range(n)])[None]
    pass_tokens(state, y, torch.ones(1, n, dtype=torch.bool), settings, None, 0.9)
    return float(state["s"][0, 0])


@pytest.mark.parametrize(("every", "H"), [(2, 8.0), (3, 8.0), (5, 16.0)])
def test_the_fixed_point_of_regular_hits(every, H):
    """One hit in k tokens leaves k − 1 idle ones between: s* = 1/(1 − 2^{−(k−1)/H}), and 1/(1 − 2^{−1/H}) for k = 2."""
    assert _driven(every, H, n=400) == pytest.approx(1 / (1 - 2 ** (-(every - 1) / H)), rel=1e-4)


def test_hits_at_every_token_have_no_fixed_point_but_the_ceiling():
    assert _driven(1, 8.0, n=100) == pytest.approx(0.5 + 99)
    assert _driven(1, 8.0, n=200, s_max=64.0) == 64.0


def test_random_hits_settle_at_the_mean_that_is_documented():
    """E s* = (1 − (1−r)q)/((1−r)(1−q)) right after a hit, q = 2^{−1/H}, where hits come with probability r."""
    r, H, n = 0.2, 8.0, 60000
    q = 2 ** (-1 / H)
    gaps = np.random.default_rng(0).geometric(r, n) - 1
    s, seen = 0.0, []
    for gap in gaps:
        s = s * q**gap + 1
        seen.append(s)
    assert np.mean(seen[100:]) == pytest.approx((1 - (1 - r) * q) / ((1 - r) * (1 - q)), rel=0.01)


def test_controllers_of_a_layer_are_what_attaching_puts_to_work(subject):
    layer = AttractorLayer(**PUSH)
    (one,) = layer.controllers(subject, 1)
    plain, _ = written(subject, one, ids())
    with layer.attach(subject, 1):
        same = subject.model.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(plain, same)
