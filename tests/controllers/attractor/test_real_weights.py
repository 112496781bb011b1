"""Invariants of the attractor layer on SmolLM2-135M itself, with the calibration that a user gets."""

from __future__ import annotations

import pytest
import torch

from dynprobe.controllers import AttractorLayer, Steering
from dynprobe.controllers.attractor import Recorded, strengths
from dynprobe.probes import Instrument, identical, live_hooks
from dynprobe.probes._evaluating import evaluating

pytestmark = pytest.mark.slow

PUSH = {"strength": 1.0, "burn_in": 6, "slots": 8, "theta_read": 0.2, "s_ref": 1.0}
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TEXTS = (
    "The old man walked down the road to the sea, and the sea was as grey as the sky above the road.",
    "She put the bread on the table, sat down at the table, and looked at the bread for a long while.",
)


@pytest.fixture(scope="module")
def subject(smollm2):
    with evaluating(smollm2.model):
        yield smollm2


@pytest.fixture(autouse=True)
def _no_grad(_grad_mode_is_left_alone):
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def layer(subject):
    return AttractorLayer(**PUSH).calibrate(subject)


@pytest.fixture(scope="module")
def tokens(subject):
    return torch.tensor([subject.tokenizer(text)["input_ids"][:20] for text in TEXTS])


def like(layer, **changes):
    """The same layer, and what was measured for it, with other settings."""
    other = AttractorLayer(**{**layer.settings.as_dict(), **changes})
    other._centres = dict(layer._centres)
    return other


def read(subject, layer, tokens, mask=None):
    """Logits and the state of the one site."""
    inputs = {"input_ids": tokens}
    if mask is not None:
        inputs |= {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    with layer.attach(subject) as handle:
        logits = subject.model(**inputs).logits
    return logits, next(iter(handle.states.values()))


def test_nothing_where_nothing_is_asked_and_nothing_of_the_future(subject, layer, tokens):  # I1, I2, I5, I6, I12, I16
    bare = subject.model(tokens).logits
    for idle in ({"gate": 0.0}, {"strength": 0.0}, {"slots": 0}, {"burn_in": 1000}):
        assert identical(read(subject, like(layer, **idle), tokens)[0], bare), idle
    pushed, state = read(subject, layer, tokens)
    assert identical(pushed[:, :6], bare[:, :6])
    assert float((pushed[:, 7:] - bare[:, 7:]).abs().max()) > 0.1
    other = tokens.clone()
    other[:, 14] = 17
    assert identical(read(subject, layer, other)[0][:, :14], pushed[:, :14])
    assert int((strengths(state, state["n"], layer.settings.half_life) >= layer.settings.s_min).sum(1).max()) <= 8
    assert bool(((state["s"] >= 0) & (state["s"] <= layer.settings.s_max)).all())
    sizes = state["A"].norm(dim=-1)[state["s"] > 0]
    torch.testing.assert_close(sizes, torch.ones_like(sizes), atol=1e-6, rtol=0)
    assert live_hooks(subject.model) == 0
    assert identical(subject.model(tokens).logits, bare)


def test_half_lives_are_exact(subject, layer, tokens):  # I3, I4
    half_life = 5.0
    _, state = read(subject, like(layer, half_life=half_life), tokens)
    now = strengths(state, state["n"], half_life)
    for k in range(1, 5):
        later = strengths(state, state["n"] + int(k * half_life), half_life)
        torch.testing.assert_close(later, now * 2.0**-k, rtol=1e-14, atol=0)
    apart = strengths(state, state["n"] + 3, half_life) * 2.0 ** (-4 / half_life)
    torch.testing.assert_close(strengths(state, state["n"] + 7, half_life), apart, rtol=1e-12, atol=0)


@pytest.mark.parametrize("commit", [1, 8, 1024])
def test_prefill_equals_tokens_one_by_one(subject, layer, tokens, commit):  # I7, I8, I13
    chunked = like(layer, commit_every=commit)
    whole, state = read(subject, chunked, tokens)
    bare = subject.model(tokens).logits
    parts, plain, cache, other = [], [], None, None
    with chunked.attach(subject) as handle:
        for t in range(tokens.shape[1]):
            made = subject.model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            parts.append(made.logits)
    for t in range(tokens.shape[1]):
        made = subject.model(tokens[:, t : t + 1], past_key_values=other, use_cache=True)
        other = made.past_key_values
        plain.append(made.logits)
    noise = float((torch.cat(plain, 1) - bare).abs().max())  # what the model itself differs by
    assert float((torch.cat(parts, 1) - whole).abs().max()) <= 5 * noise + 1e-4
    after = next(iter(handle.states.values()))
    for name in ("n", "stamp", "hits", "born"):
        assert torch.equal(after[name], state[name]), name
    for name in ("A", "s"):
        torch.testing.assert_close(after[name], state[name], atol=1e-4, rtol=1e-4)
    if commit == 1:
        with chunked.attach(subject):
            cached = subject.model.generate(tokens, max_new_tokens=12, **GREEDY)
        with chunked.attach(subject):
            assert torch.equal(cached, subject.model.generate(tokens, max_new_tokens=12, use_cache=False, **GREEDY))


def test_padding_order_and_company_do_not_matter(subject, layer, tokens):  # I9, I10, I11
    whole, state = read(subject, layer, tokens)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[:, :3] = False
    padded, after = read(subject, layer, torch.cat([torch.full((2, 3), 7), tokens], 1), mask)
    torch.testing.assert_close(padded[:, 3:], whole, atol=1e-3, rtol=1e-4)
    assert torch.equal(after["n"], state["n"])
    alone, _ = read(subject, layer, tokens[1:])
    torch.testing.assert_close(alone, whole[1:], atol=1e-3, rtol=1e-4)
    swapped, moved = read(subject, layer, tokens.flip(0))
    torch.testing.assert_close(swapped, whole.flip(0), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(moved["A"], state["A"].flip(0), atol=1e-5, rtol=0)


def test_beams_take_their_slots_along(subject, layer, tokens):  # I14
    options = {**GREEDY, "max_new_tokens": 5, "num_beams": 2}
    plain = subject.model.generate(tokens, **options)
    with like(layer, gate=0.0).attach(subject) as handle:
        assert torch.equal(subject.model.generate(tokens, **options), plain)
    assert next(iter(handle.states.values()))["n"].tolist() == [24] * 4  # the last token is not fed
    with layer.attach(subject):
        cached = subject.model.generate(tokens, **options)
    with layer.attach(subject):
        assert torch.equal(cached, subject.model.generate(tokens, use_cache=False, **options))


def test_tokens_that_do_not_exist_change_nothing(subject, layer, tokens):  # I15, I16
    (site,) = layer.controllers(subject)

    class Break:
        sites = (site.site,)

        def write(self, state, at, step):
            broken = state.clone()
            broken[:, 9], broken[:, 12] = 0.0, torch.nan
            return broken

    note = Recorded(site)
    steering = Steering(note, subject)
    with Instrument(subject, (), [Break(), steering]):
        subject.model(tokens)
    assert steering.memory["n"].tolist() == [18, 18]
    assert bool(steering.memory["A"].isfinite().all())
    lines = note.tokens()
    assert not lines["pos"].isin([9, 12]).any()
    assert 0 < float(lines["written"].max()) <= layer.settings.strength * (1 + 1e-5)


def test_a_long_text_and_then_nothing_is_left(subject, layer, tokens, tmp_path):  # I12, I13
    before = subject.model(tokens).logits
    with layer.attach(subject) as handle:
        written = subject.model.generate(tokens, max_new_tokens=500, **GREEDY)
    assert written.shape == (2, 520)
    assert next(iter(handle.states.values()))["n"].tolist() == [519, 519]
    assert live_hooks(subject.model) == 0
    assert identical(subject.model(tokens).logits, before)
    # One session over two texts, against its state saved between them and read by another layer.
    one, two = written[:, :260], written[:, 260:]
    with layer.session():
        read(subject, layer, one)
        through, state = read(subject, layer, two)
    _, between = read(subject, layer, one)
    layer.restore({"attn_out.15": between})
    resumed = AttractorLayer.load(layer.save(tmp_path / "layer.safetensors"))
    layer.reset()
    taken = resumed.snapshot()
    again, after = read(subject, resumed, two)
    assert identical(again, through)
    assert all(torch.equal(after[name], state[name]) for name in state)
    resumed.reset()
    assert not identical(read(subject, resumed, two)[0], through)
    resumed.restore(taken)
    assert identical(read(subject, resumed, two)[0], through)
