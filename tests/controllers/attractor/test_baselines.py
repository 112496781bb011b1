"""Baselines inject the layer's dose, in another direction, from earlier tokens only."""

from __future__ import annotations

import pytest
import torch

from dynprobe.controllers import Steering
from dynprobe.controllers.attractor import Settings, make_baseline
from dynprobe.errors import UsageError
from dynprobe.probes import Instrument, identical
from dynprobe.testing import tiny_llama

SITE = ("attn_out", 1)
SETTINGS = Settings(slots=4, burn_in=3, theta=0.9, theta_read=0.0, strength=0.5, centre="none", s_ref=1.0)
DIRECTED = ("constant", "random", "leaky", "fast_weights", "frozen", "hopfield")


@pytest.fixture(scope="module")
def subject():
    return tiny_llama()


def tokens(columns=14):
    return torch.randint(5, 90, (2, columns), generator=torch.Generator().manual_seed(1))


def through(subject, name, ids, mask=None, settings=SETTINGS):
    controller = make_baseline(name, settings=settings, site=SITE, theta=0.9)
    steering = Steering(controller, subject)
    inputs = {"input_ids": ids}
    if mask is not None:
        inputs |= {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad(), Instrument(subject, (SITE,), [steering]) as instrument:
        logits = subject.model(**inputs).logits
    return logits, controller, instrument.tape().updates[SITE], steering


@pytest.mark.parametrize("name", [*DIRECTED, "layer"])
def test_the_dose_is_the_layers(subject, name):
    ids = tokens()
    with torch.no_grad(), Instrument(subject, (SITE,)) as bare:
        clean = subject.model(ids).logits
    y = bare.tape().updates[SITE]
    _, _, pushed, _ = through(subject, name, ids)
    own = through(subject, "layer", ids)[1].passed.gain
    if name not in ("hopfield", "frozen"):  # these have a gain of their own, since they read otherwise
        size = (pushed - y).norm(dim=-1) / y.norm(dim=-1)
        written = size > 0
        torch.testing.assert_close(size[written].double(), 0.5 * own[written], atol=1e-6, rtol=1e-4)
    assert identical(pushed[:, :3], y[:, :3])
    assert not identical(pushed, y)
    assert clean.shape == (2, 14, 96)


@pytest.mark.parametrize("name", [*DIRECTED, "cache", "none"])
def test_earlier_tokens_only_and_no_padding(subject, name):
    ids = tokens()
    settings = SETTINGS.replace(commit_every=1)
    whole = through(subject, name, ids, settings=settings)[0]
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % 90
    assert identical(whole[:, :9], through(subject, name, other, settings=settings)[0][:, :9])
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[:, :4] = False
    padded = through(subject, name, torch.cat([torch.full((2, 4), 3), ids], 1), mask, settings)[0]
    torch.testing.assert_close(padded[:, 4:], whole, atol=2e-5, rtol=1e-4)
    alone = through(subject, name, ids[1:], settings=settings)[0]
    torch.testing.assert_close(alone, whole[1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*DIRECTED, "layer", "cache"])
def test_prefill_equals_decoding(subject, name):
    ids = tokens()
    whole = through(subject, name, ids)[0]
    steering = Steering(make_baseline(name, settings=SETTINGS, site=SITE, theta=0.9), subject)
    parts, cache = [], None
    with torch.no_grad(), Instrument(subject, (), [steering]):
        for t in range(ids.shape[1]):
            out = subject.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
            cache = out.past_key_values
    joined = torch.cat(parts, 1)
    columns = slice(-1, None) if name == "cache" else slice(None)  # a mixture is made for the token to come only
    torch.testing.assert_close(joined[:, columns], whole[:, columns], atol=2e-5, rtol=1e-4)


def test_none_is_the_bare_model(subject):
    ids = tokens()
    with torch.no_grad():
        assert identical(subject.model(ids).logits, through(subject, "none", ids)[0])


def test_frozen_slots_stay_as_they_were(subject):
    _, _, _, steering = through(subject, "frozen", tokens())
    early = through(subject, "layer", tokens()[:, :3])[3]
    torch.testing.assert_close(steering.memory["A"], early.memory["A"], atol=1e-6, rtol=0)
    torch.testing.assert_close(steering.memory["s"], early.memory["s"])
    assert steering.memory["n"].tolist() == [14, 14]


def test_the_cache_makes_seen_words_more_likely(subject):
    ids = torch.tensor([[7, 8, 9, 10] * 4])
    settings = SETTINGS.replace(burn_in=4)
    with torch.no_grad():
        bare = subject.model(ids).logits[0, -1].softmax(-1)
    mixed = through(subject, "cache", ids, settings=settings)[0][0, -1].softmax(-1)
    assert float(mixed[7]) > float(bare[7])
    assert float(mixed.sum()) == pytest.approx(1.0, abs=1e-5)
    outside = [w for w in range(96) if w not in (7, 8, 9, 10)]
    torch.testing.assert_close(mixed[outside], 0.8 * bare[outside], atol=1e-7, rtol=1e-4)


def test_an_unknown_baseline_is_refused():
    with pytest.raises(UsageError, match="Did you mean 'leaky'"):
        make_baseline("leeky", settings=SETTINGS, site=SITE)
