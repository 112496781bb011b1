"""The published layer's cache defect, shown and repaired."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from dynprobe.controllers.attractor import Phase2Memory, duality_phase2
from dynprobe.errors import ModelError
from dynprobe.probes import discover, identical
from dynprobe.testing import tiny_causal_lm


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def subject(request):
    return discover(tiny_causal_lm(request.param))


def steps(subject, leak, n=6, prompt=7):
    ids = torch.randint(5, 90, (1, prompt + n), generator=torch.Generator().manual_seed(0))
    cache, sizes, logits = DynamicCache(config=subject.model.config), [], []
    with torch.no_grad(), duality_phase2(subject, leak=leak) as mode:
        fed = ids[:, :prompt]
        for t in range(n + 1):
            out = subject.model(fed, past_key_values=cache, use_cache=True)
            sizes.append(cache.get_seq_length())
            logits.append(out.logits[:, -1])
            fed = ids[:, prompt + t : prompt + t + 1]
    return sizes, torch.cat(logits), mode


def test_the_leak_stores_one_entry_per_forward(subject):
    sizes, _, mode = steps(subject, leak=True)
    assert sizes == [7 + t + t + 1 for t in range(7)]
    assert mode.offered == 7 * subject.n_layers


def test_repaired_the_cache_holds_the_tokens(subject):
    sizes, logits, _ = steps(subject, leak=False)
    assert sizes == [7 + t for t in range(7)]
    assert not torch.allclose(logits, steps(subject, leak=True)[1])


def test_the_first_forward_is_the_same_with_and_without_the_leak(subject):
    torch.testing.assert_close(steps(subject, False)[1][0], steps(subject, True)[1][0], atol=1e-6, rtol=1e-6)


def test_nothing_is_left(subject):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = subject.model(ids).logits
        with duality_phase2(subject, leak=False):
            inside = subject.model(ids).logits
        assert identical(before, subject.model(ids).logits)
    assert not identical(before, inside)


def test_an_offered_pair_is_what_attention_with_one_more_key_gives():
    subject = discover(tiny_causal_lm("llama"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is sdpa:
                calls.append((kwargs, out))
            return out

    with torch.no_grad(), Watch(), duality_phase2(subject, leak=False) as mode:
        subject.model(ids)
    call, out = calls[0]
    q, k, v = call["query"], call["key"], call["value"]
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    score = call["scale"] * q @ k.transpose(2, 3)
    allowed = torch.ones(5, 6, dtype=torch.bool).tril()
    allowed[:, 5] = True
    expected = torch.softmax(score.masked_fill(~allowed, -torch.inf), -1) @ v
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    mu, sigma = mode.memories[0].strongest()
    torch.testing.assert_close(k[0, 0, -1], mu, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(v[0, 0, -1], sigma * mu, atol=1e-6, rtol=1e-6)


def test_the_published_decay_is_far_faster_than_documented():
    memory, e = Phase2Memory(threshold=0.9), torch.eye(8)
    memory.see(e[0])
    memory.sigma[0] = 1.0
    unused = 0
    while any(float(d @ e[0]) > 0.99 for d in memory.directions):
        memory.see(e[1])
        unused += 1
    assert unused == next(n for n in range(1, 400) if math.exp(-0.01 * n * (n + 1) / 2) < 0.05) == 24


def test_another_attention_is_refused():
    model = tiny_causal_lm("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"), duality_phase2(discover(model), leak=True):
        pass
