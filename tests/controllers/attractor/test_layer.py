"""The layer on models: invisible when idle, the same in every batch, gone when detached."""

from __future__ import annotations

import pytest
import torch

from dynprobe.controllers import AttractorLayer
from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import discover, identical, live_hooks
from dynprobe.testing import tiny_causal_lm

KINDS = ("gpt2", "gpt_neox", "llama", "gemma")
PUSH = {"centre": "none", "strength": 1.0, "burn_in": 4, "theta": 0.9, "theta_read": 0.0, "slots": 8, "s_ref": 1.0}


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    return discover(tiny_causal_lm(request.param))


def ids(subject, rows=2, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, min(90, subject.vocab_size), (rows, columns), generator=generator)


def logits(subject, tokens, layer=None, mask=None):
    inputs = {"input_ids": tokens}
    if mask is not None:
        inputs |= {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        if layer is None:
            return subject.model(**inputs).logits, None
        with layer.attach(subject, layers=[1]) as handle:
            return subject.model(**inputs).logits, next(iter(handle.states.values()))


@pytest.mark.parametrize("idle", [{"gate": 0.0}, {"strength": 0.0}, {"slots": 0}])
def test_idle_is_invisible(subject, idle):
    tokens = ids(subject)
    assert identical(logits(subject, tokens)[0], logits(subject, tokens, AttractorLayer(**{**PUSH, **idle}))[0])


def test_before_burn_in_nothing_and_after_it_something(subject):
    tokens = ids(subject)
    bare, pushed = logits(subject, tokens)[0], logits(subject, tokens, AttractorLayer(**PUSH))[0]
    assert identical(bare[:, :4], pushed[:, :4])
    assert not identical(bare[:, 5:], pushed[:, 5:])


def test_the_past_does_not_know_the_future(subject):
    tokens = ids(subject)
    other = tokens.clone()
    other[:, 8] = (other[:, 8] + 1) % 90
    one, two = (logits(subject, t, AttractorLayer(**PUSH))[0] for t in (tokens, other))
    assert identical(one[:, :8], two[:, :8])


def test_padding_rows_and_order(subject):
    tokens = ids(subject)
    layer = AttractorLayer(**PUSH)
    whole, state = logits(subject, tokens, layer)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[:, :3] = False
    padded, after = logits(subject, torch.cat([torch.full((2, 3), 7), tokens], 1), layer, mask)
    torch.testing.assert_close(padded[:, 3:], whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(after["n"], state["n"])
    alone, _ = logits(subject, tokens[1:], layer)
    torch.testing.assert_close(alone, whole[1:], atol=1e-5, rtol=1e-5)
    swapped, moved = logits(subject, tokens.flip(0), layer)
    torch.testing.assert_close(swapped, whole.flip(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moved["A"], state["A"].flip(0), atol=1e-6, rtol=0)


def test_generation_with_the_cache_equals_generation_without(subject):
    tokens = ids(subject)
    layer = AttractorLayer(**PUSH)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with layer.attach(subject, layers=[1]):
        cached = subject.model.generate(tokens, use_cache=True, **options)
    with layer.attach(subject, layers=[1]):
        plain = subject.model.generate(tokens, use_cache=False, **options)
    bare = subject.model.generate(tokens, **options)
    assert torch.equal(cached, plain)
    assert cached.shape == bare.shape


def test_the_cache_holds_no_more_than_the_tokens(subject):
    tokens = ids(subject)
    with torch.no_grad(), AttractorLayer(**PUSH).attach(subject, layers="all"):
        out = subject.model(tokens, use_cache=True)
        for _ in range(3):
            out = subject.model(tokens[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert out.past_key_values.get_seq_length() == 15


def test_detached_leaves_nothing(subject):
    tokens = ids(subject)
    before = logits(subject, tokens)[0]
    layer = AttractorLayer(**PUSH)
    handle = layer.attach(subject, layers=[0, 1])
    subject.model.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert live_hooks(subject.model) > 0
    handle.detach()
    handle.detach()
    assert live_hooks(subject.model) == 0
    assert identical(before, logits(subject, tokens)[0])


def test_a_saved_session_goes_on(subject, tmp_path):
    tokens = ids(subject, columns=16)
    layer = AttractorLayer(**PUSH)
    with layer.session(), torch.no_grad():
        for part in (tokens[:, :8], tokens[:, 8:]):
            with layer.attach(subject, layers=[1]) as handle:
                through = subject.model(part).logits
        last = {k: v.clone() for k, v in handle.states["attn_out.1"].items()}
    assert not layer.snapshot()  # a session ends forgotten
    with layer.attach(subject, layers=[1]) as handle, torch.no_grad():
        subject.model(tokens[:, :8])
        layer.restore(handle.states)
    again = AttractorLayer.load(layer.save(tmp_path / "layer.safetensors"))
    with again.attach(subject, layers=[1]) as handle, torch.no_grad():
        resumed = subject.model(tokens[:, 8:]).logits
    assert identical(resumed, through)
    for name, value in handle.states["attn_out.1"].items():
        assert torch.equal(value, last[name]), name
    layer.reset()
    assert not layer.snapshot()


def test_beams_take_their_slots_along(subject):
    tokens = ids(subject)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    plain = subject.model.generate(tokens, **options)
    with AttractorLayer(**{**PUSH, "gate": 0.0}).attach(subject, layers=[1]) as handle:
        idle = subject.model.generate(tokens, **options)
    assert torch.equal(plain, idle)
    assert handle.states["attn_out.1"]["n"].tolist() == [21] * 6  # the last token is not fed
    with AttractorLayer(**PUSH).attach(subject, layers=[1]):
        cached = subject.model.generate(tokens, **options)
    with AttractorLayer(**PUSH).attach(subject, layers=[1]):
        whole = subject.model.generate(tokens, use_cache=False, **options)
    assert torch.equal(cached, whole)


def test_what_it_cannot_do_is_said():
    llama = discover(tiny_causal_lm("llama"))
    with pytest.raises(CalibrationError, match="centre='running'"):
        AttractorLayer().attach(llama)
    with pytest.raises(UsageError, match="Did you mean"):
        AttractorLayer(slotz=3)
    with pytest.raises(UsageError, match="read="):
        AttractorLayer(read="matc")
    with pytest.raises(UsageError, match="preset"):
        AttractorLayer("duality")
    layer = AttractorLayer(**PUSH)
    with pytest.raises(UsageError, match="slots"):
        layer.restore({"attn_out.1": {"A": torch.zeros(1, 3, 4)}})
