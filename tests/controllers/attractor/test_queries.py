"""The site of the first version: mean queries are the model's own, and the rule runs on them."""

from __future__ import annotations

import pytest
import torch

from dynprobe.controllers import AttractorLayer
from dynprobe.controllers.attractor._queries import mean_query
from dynprobe.errors import UsageError
from dynprobe.probes import discover, identical
from dynprobe.probes._attention_calls import AttentionWatch
from dynprobe.testing import tiny_causal_lm


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_the_mean_query_is_the_models(kind):
    subject = discover(tiny_causal_lm(kind))
    weight, bias = mean_query(subject, 1)
    calls, taken = [], []
    module = subject.module_at("attn_in", 1).module
    handle = module.register_forward_pre_hook(
        lambda _m, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), AttentionWatch(calls.append):
        subject.model(torch.tensor([[11], [12]]))
    handle.remove()
    own = calls[1].q.mean(1)[:, 0]
    torch.testing.assert_close(taken[0][:, 0] @ weight.T + bias, own, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_duality_v1_runs_and_is_causal(kind):
    subject = discover(tiny_causal_lm(kind))
    ids = torch.randint(5, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    layer = AttractorLayer("duality_v1", burn_in=2.0, theta=0.5)
    with torch.no_grad():
        bare = subject.model(ids).logits
        with layer.attach(subject, layers=[1]) as handle:
            pushed = subject.model(ids).logits
            gain = handle.steerings[0].controller.passed.gain
        other = ids.clone()
        other[:, 10] = (other[:, 10] + 1) % 90
        with layer.attach(subject, layers=[1]):
            changed = subject.model(other).logits
    quiet = int((gain > 0).to(torch.uint8).argmax(1).min())
    assert quiet > 0
    assert identical(bare[:, :quiet], pushed[:, :quiet])
    assert not identical(bare, pushed)
    assert identical(pushed[:, :10], changed[:, :10])


def test_normed_queries_are_refused():
    subject = discover(tiny_causal_lm("qwen3"))
    with pytest.raises(UsageError, match="attn_out"):
        AttractorLayer("duality_v1").attach(subject, layers=[1])
