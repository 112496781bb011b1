"""CEM's presets, parameter counts (T13) and refusals."""

import math

import pytest
import torch

from dynprobe.errors import UsageError
from dynprobe.models import CemConfig, CemForCausalLM

#: Parameters in millions: Llama of the same size, CEM plain, CEM with preconditioners and a shared diagonal.
TABLE = {
    "86m": (86.37, 69.51, 70.08),
    "108m": (108.05, 82.76, 83.91),
    "134m": (134.11, 101.08, 102.38),
    "162m": (162.81, 121.01, 122.48),
}


def count(config: CemConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CemForCausalLM(config).parameters())


@pytest.mark.parametrize("name", TABLE)
def test_t13_parameter_counts_are_those_of_the_table(name):
    llama, plain, extras = TABLE[name]
    bare = {"preconditioner": "none", "diagonal": "none"}
    assert round(count(CemConfig.preset(name)) / 1e6, 2) == extras
    assert round(count(CemConfig.preset(name, self_bias=False)) / 1e6, 2) == extras
    assert round(count(CemConfig.preset(name, **bare)) / 1e6, 2) == plain
    assert round(count(CemConfig.preset(name, attention="llama", mlp="llama")) / 1e6, 2) == llama


@pytest.mark.parametrize("name", ["86m", "162m"])
def test_a_llama_of_transformers_has_the_same_size(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = CemConfig.preset(name, attention="llama", mlp="llama")
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**{f: getattr(ours, f) for f in fields}))
    assert sum(p.numel() for p in llama.parameters()) == count(ours)


def test_exact_counts_of_the_small_presets():
    per_layer = lambda D, K, M: 2 * D * D + 2 * D * M + 2 * D + D + 9 * D * K + 33 * D + 2 * K  # noqa: E731
    assert count(CemConfig.preset("nano")) == 2 * 256 * 64 + 64 + 2 * per_layer(64, 4, 128)
    assert count(CemConfig.preset("tiny")) == 2 * 256 * 128 + 128 + 4 * per_layer(128, 4, 256)
    assert count(CemConfig.preset("paper")) == count(CemConfig.preset("86m"))
    exact = CemConfig.preset("energy_exact")
    assert (exact.norm_gain, exact.rms_norm_eps, exact.preconditioner, exact.tau) == (False, 1e-12, "none", "model")


def test_initial_values():
    torch.manual_seed(0)
    model = CemForCausalLM(CemConfig.preset("tiny"))
    step = model.model.layers[0].self_attn.step
    P = step.preconditioner
    assert torch.equal(step.diagonal, torch.zeros(1, 128))
    assert torch.equal(step.biases, torch.zeros(2, 4))
    torch.testing.assert_close(P.diagonal(), torch.full((4, 128), 1.31326169))
    assert torch.equal(P.V, torch.zeros_like(P.V))
    assert float(P.U.detach().std()) == pytest.approx(0.02, rel=0.1)
    for weight in (step.q_proj.weight, model.model.layers[3].mlp.step.gate_proj.weight, model.lm_head.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(step.norm.weight, torch.ones(128))
    torch.testing.assert_close(step.psd_margin(), torch.full((4,), 1.31326169, dtype=torch.float64))


def test_derived_numbers():
    config = CemConfig.preset("86m")
    assert config.head_dim == 84
    assert config.tau_value == math.sqrt(672)
    assert CemConfig.preset("86m", tau="head").tau_value == math.sqrt(84)
    assert CemConfig.preset("86m", tau=3).tau_value == 3.0
    assert CemConfig.preset("nano", mlp=["cem", "llama"]).style("mlp", 1) == "llama"
    assert CemConfig(**CemConfig.preset("tiny", mlp="reuse").to_dict()).mlp == "reuse"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"diagonal": "per-head"}, "did you mean 'per_head'"),
        ({"preconditioner": "full"}, "none|diag|diag_low_rank"),
        ({"attention": "lama"}, "did you mean 'llama'"),
        ({"attention": ["cem"] * 3}, "names 3 layers"),
        ({"hidden_size": 65}, "not a multiple"),
        ({"tau": -1.0}, "above 0"),
        ({"tau": "sqrt"}, "model|head"),
        ({"steps_mlp": 0}, "at least 1"),
        ({"update": "cccp", "norm_in_recursion": False}, "sphere"),
        ({"position": "rope", "hidden_size": 60}, "even head rank"),
        ({"step_attention": 2}, "did you mean 'steps_attention'"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(UsageError) as error:
        CemConfig.preset("nano", **fields)
    assert message.lower() in str(error.value).lower()


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="Did you mean '86m'"):
        CemConfig.preset("86M")
