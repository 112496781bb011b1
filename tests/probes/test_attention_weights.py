"""The four matrices of attention against the layouts that the models document, and refusals instead of wrong ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynprobe.errors import ModelError
from dynprobe.metrics._energy import interaction
from dynprobe.models import CemConfig, CemForCausalLM
from dynprobe.models._cem_frame import rotate_back
from dynprobe.probes import discover, live_hooks
from dynprobe.probes._attention_calls import AttentionWatch
from dynprobe.probes._attention_descent import Descent, energy_probe
from dynprobe.probes._attention_weights import AttentionWeights, Refusal, attention_weights
from dynprobe.probes._outputs import hidden_argument
from dynprobe.testing import tiny_causal_lm, tiny_llama

ROW = [5, 6, 7, 8, 9, 3, 17]


def per_head(weight, heads, of):
    """[heads·dh, dim] as one matrix per query head."""
    return weight.unflatten(0, (of, -1)).repeat_interleave(heads // of, 0)


def separate(attention, heads):
    q, k, v, o = (getattr(attention, n).weight for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
    dh = q.shape[0] // heads
    return (*(per_head(w, heads, w.shape[0] // dh) for w in (q, k, v)), per_head(o.T, heads, heads))


def gpt2(attention, heads):
    q, k, v = attention.c_attn.weight.T.chunk(3)
    return (*(per_head(w, heads, heads) for w in (q, k, v)), per_head(attention.c_proj.weight, heads, heads))


def neox(attention, heads):
    """Query, key and value of each head side by side."""
    q, k, v = attention.query_key_value.weight.unflatten(0, (heads, 3, -1)).unbind(1)
    return q, k, v, per_head(attention.dense.weight.T, heads, heads)


def phi3(attention, heads):
    weight, dh = attention.qkv_proj.weight, attention.head_dim
    few = (weight.shape[0] // dh - heads) // 2
    q, k, v = weight.split([heads * dh, few * dh, few * dh])
    out = per_head(attention.o_proj.weight.T, heads, heads)
    return per_head(q, heads, heads), per_head(k, heads, few), per_head(v, heads, few), out


def falcon(attention, heads):
    """All queries, then one key and one value."""
    weight = attention.query_key_value.weight
    dh = weight.shape[0] // (heads + 2)
    q, k, v = weight.split([heads * dh, dh, dh])
    out = per_head(attention.dense.weight.T, heads, heads)
    return per_head(q, heads, heads), per_head(k, heads, 1), per_head(v, heads, 1), out


def opt(attention, heads):
    q, k, v = (getattr(attention, f"{n}_proj").weight for n in "qkv")
    return (*(per_head(w, heads, heads) for w in (q, k, v)), per_head(attention.out_proj.weight.T, heads, heads))


LAYOUTS = {
    "llama": separate, "qwen2": separate, "qwen3": separate, "gemma": separate, "gemma3_text": separate,
    "olmo2": separate, "mistral": separate, "cohere": separate, "gpt2": gpt2, "gpt_neox": neox, "phi3": phi3,
    "falcon": falcon, "opt": opt,
}  # fmt: skip
NORMED = ("qwen3", "gemma3_text", "olmo2")
REFUSED = {
    "gemma2": "soft-capped", "gptj": "attn_implementation='sdpa'", "gpt_oss": "scaled_dot_product_attention",
    "deepseek_v3": "query coordinates", "diffllama": "2 times", "bert": "no module around attention",
    "mamba": "scaled_dot_product_attention",
}  # fmt: skip


@pytest.fixture(scope="module")
def subjects():
    made = {}

    def make(name):
        if name not in made:
            made[name] = discover(tiny_causal_lm(name), name=name)
        return made[name]

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrices_are_the_documented_ones(subjects, name):
    subject = subjects(name)
    found = attention_weights(subject)
    assert [w.layer for w in found] == list(range(subject.n_layers))
    for w in found:
        assert isinstance(w, AttentionWeights), w
        assert w.error < 1e-5
        assert w.normed == (name in NORMED)
        expected = LAYOUTS[name](w.module, w.heads)
        for ours, theirs in zip((w.w_q, w.w_k, w.w_v, w.w_o), expected, strict=True):
            assert torch.equal(ours, theirs.detach())
    assert live_hooks(subject.model) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(subjects, name):
    found = attention_weights(subjects(name))
    assert all(isinstance(w, Refusal) and REFUSED[name] in w.reason for w in found), found
    assert not any(isinstance(d, Descent) for d in energy_probe(subjects(name)).descend(ROW))


def test_another_input_for_the_queries_is_refused(subjects):
    """CTRL hands values, keys and queries over one by one: the first state is not what the queries are made of."""
    found = energy_probe(subjects("ctrl")).descend(ROW)
    assert all(isinstance(d, Refusal) and "queries do not depend" in d.reason for d in found)


def test_values_behind_a_norm_are_marked(subjects):
    found = attention_weights(subjects("gemma4_text"))
    assert any(isinstance(w, AttentionWeights) and w.normed for w in found)


class Adapted(nn.Module):
    """A projection with a low-rank adapter, which shows the weight that it does not multiply with."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.update = nn.Parameter(0.1 * torch.randn_like(inner.weight))

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x) + functional.linear(x, self.update)


class Gated(nn.Module):
    """An output projection behind a gate."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * torch.sigmoid(x))


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_an_adapter_is_not_read_over(part):
    subject = tiny_llama()
    attention = subject.blocks[1].self_attn
    setattr(attention, part, Adapted(getattr(attention, part)))
    found = attention_weights(subject)
    # The base matrix alone is not what the layer multiplies with: the other layers are read, this one is not.
    assert [isinstance(w, Refusal) for w in found] == [False, True, False]
    seen = energy_probe(subject).descend(ROW)
    assert [isinstance(d, Refusal) for d in seen] == [False, True, False]


def test_a_gate_before_the_output_is_refused():
    subject = tiny_llama()
    subject.blocks[0].self_attn.o_proj = Gated(subject.blocks[0].self_attn.o_proj)
    refused = attention_weights(subject)[0]
    assert isinstance(refused, Refusal)
    assert "gate" in refused.reason or "ends with one" in refused.reason


def test_queries_that_grow_with_position_are_refused():
    """At position 0 they are projections; at position 1 they are not."""

    subject = tiny_llama()
    original = subject.blocks[0].self_attn.forward

    def forward(hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        factor = 1 + 0.5 * torch.arange(cos.shape[1])[None, :, None]
        return original(hidden_states, position_embeddings=(cos * factor, sin * factor), **kwargs)

    subject.blocks[0].self_attn.forward = forward
    refused = attention_weights(subject)[0]
    assert isinstance(refused, Refusal)
    assert "position 1" in refused.reason


def test_equal_rows_are_one_and_equal_outputs_of_different_rows_are_none():
    subject = tiny_llama()
    attention = subject.blocks[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight[3] = attention.q_proj.weight[2]
        attention.v_proj.weight.copy_(attention.k_proj.weight)  # tied, as in a CEM
    w = attention_weights(subject)[0]
    assert isinstance(w, AttentionWeights)
    for ours, theirs in zip((w.w_q, w.w_k, w.w_v, w.w_o), separate(attention, 4), strict=True):
        assert torch.equal(ours, theirs.detach())
    # Inputs that never vary in one coordinate cannot tell weights apart that differ there only.
    with torch.no_grad():
        subject.blocks[0].input_layernorm.weight[0] = 0
        attention.q_proj.weight[3, 0] += 1
    assert isinstance(attention_weights(subject)[0], Refusal)


def test_no_vocabulary():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    with pytest.raises(ModelError, match="token ids"):
        attention_weights(discover(net, layers="*", trial_input=torch.zeros(1, 2, 4)))


def energy_and_input(subject, layer, row):
    """ε of one layer as a function of its input, through the model's own module, keys held constant."""
    w = attention_weights(subject)[layer]
    kept = {}

    def begin(_module, args, kwargs):
        x = hidden_argument(args, kwargs).detach().requires_grad_()
        kept["x"] = x
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": x}
        return (x, *args[1:]), kwargs

    def seen(call):
        if "x" in kept and "energy" not in kept:
            kept["call"] = call
            kept["energy"], _ = interaction(call.q / w.factor, call.k.detach(), scale=w.scale, bias=call.bias)

    with w.module.register_forward_pre_hook(begin, with_kwargs=True), AttentionWatch(seen):
        subject.model(input_ids=torch.tensor([row]), use_cache=False)
    return w, kept


@pytest.mark.parametrize("name", LAYOUTS)
def test_force_is_the_gradient_of_the_energy(subjects, name):
    subject = subjects(name)
    layer = 1
    _, kept = energy_and_input(subject, layer, ROW)
    (gradient,) = torch.autograd.grad(kept["energy"].sum(), kept["x"])
    d = energy_probe(subject).descend(ROW)[layer]
    assert isinstance(d, Descent)
    torch.testing.assert_close(torch.tensor(d.energy), kept["energy"][0].double().detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.tensor(d.force),
        -gradient.reshape(len(ROW), -1).double(),
        rtol=1e-4,
        atol=1e-5 * float(gradient.abs().max()),
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gpt2", "opt"])
def test_force_is_the_closed_form(subjects, name):
    """Σ_h W_Qᵀ R_iᵀ Σ_j α_ij k_j, with the rotation of the library's own angles; crossed: another head's W_Q."""
    subject = subjects(name)
    w, kept = energy_and_input(subject, 1, ROW)
    call = kept["call"]
    _, pull = interaction(call.q / w.factor, call.k, scale=w.scale, bias=call.bias)
    if name in ("llama", "qwen2", "mistral"):
        cos, sin = subject.model.model.rotary_emb(pull, torch.arange(len(ROW))[None])
        turned = rotate_back(pull, (cos[:, None], sin[:, None]))
    else:
        turned = pull
    d = energy_probe(subject).descend(ROW)[1]
    for heads, ours in ((turned, d.force), (turned.roll(w.heads // 2, 1), d.crossed)):
        expected = torch.einsum("bhtd,hde->te", heads, w.w_q)
        torch.testing.assert_close(torch.tensor(ours), expected.detach().double(), rtol=1e-4, atol=1e-4)


def test_update_is_what_the_module_returns(subjects):
    subject = subjects("llama")
    kept = []
    with subject.blocks[2].self_attn.register_forward_hook(lambda _m, _a, out: kept.append(out[0])), torch.no_grad():
        subject.model(input_ids=torch.tensor([ROW]), use_cache=False)
    torch.testing.assert_close(torch.tensor(energy_probe(subject).descend(ROW)[2].update), kept[0][0].double())


def test_the_lens_leaves_nothing_behind():
    subject = tiny_llama()
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    ids = torch.tensor([ROW])
    logits = subject.model(input_ids=ids).logits
    lens = energy_probe(subject)
    lens.descend(ROW)
    assert torch.is_grad_enabled()
    assert live_hooks(subject.model) == 0
    assert all(p.grad is None for p in subject.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert torch.equal(subject.model(input_ids=ids).logits, logits)
    handle = subject.blocks[1].self_attn.o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lens.descend(ROW)
    handle.remove()
    assert torch.is_grad_enabled()
    assert live_hooks(subject.model) == 0
    assert torch.equal(subject.model(input_ids=ids).logits, logits)


def test_rows_of_any_length_and_the_windowed_mask(subjects):
    lens = energy_probe(subjects("mistral"))
    long = lens.descend(ROW * 4)[1]
    short = lens.descend(ROW)[1]
    for of_long, of_short in ((long.energy[:, :7], short.energy), (long.force[:7], short.force)):
        torch.testing.assert_close(torch.tensor(of_long), torch.tensor(of_short), rtol=1e-4, atol=1e-4)
    assert lens.descend([5])[0].energy.shape == (4, 1)


def test_half_precision_is_read():
    subject = discover(tiny_causal_lm("llama").to(torch.bfloat16), name="half")
    assert all(isinstance(w, AttentionWeights) for w in attention_weights(subject))
    exact = energy_probe(discover(tiny_causal_lm("llama"), name="whole")).descend(ROW)[0]
    coarse = energy_probe(subject).descend(ROW)[0]
    assert isinstance(coarse, Descent)
    cos = torch.cosine_similarity(torch.tensor(exact.force), torch.tensor(coarse.force))
    assert bool((cos > 0.99).all())


def test_untied_layers_of_a_cem_are_refused():
    config = CemConfig.preset("nano", attention=["cem", "llama"])
    lens = energy_probe(discover(CemForCausalLM(config).eval()))
    assert [isinstance(w, Refusal) for w in lens.weights] == [False, True]
    found = lens.descend(ROW)
    assert {type(d) for d in found if d.layer == 1} == {Refusal}
