"""Subjects of many architectures, found by structure."""

from typing import Any

import pytest
import torch
from models import LAYERS, NAMES, ROWS, SEQUENTIAL, TWO_UPDATES, VOCAB, Looped, Net, build, seeded, subject
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from dynprobe.errors import ModelError, SiteError
from dynprobe.probes import as_subject, capture, discover, live_hooks
from dynprobe.probes._evaluating import evaluating

PATHS = {
    "gpt2": ("transformer.h.*", "transformer.ln_f", "transformer.wte", "lm_head"),
    "opt": ("model.decoder.layers.*", "model.decoder.final_layer_norm", "model.decoder.embed_tokens", "lm_head"),
    "neox": ("gpt_neox.layers.*", "gpt_neox.final_layer_norm", "gpt_neox.embed_in", None),
    "mamba": ("backbone.layers.*", "backbone.norm_f", "backbone.embeddings", "lm_head"),
    "bloom": ("transformer.h.*", "transformer.ln_f", "transformer.word_embeddings", "lm_head"),
    "falcon": ("transformer.h.*", "transformer.ln_f", "transformer.word_embeddings", "lm_head"),
    "gptj": ("transformer.h.*", "transformer.ln_f", "transformer.wte", "lm_head"),
    "phi": ("model.layers.*", "model.final_layernorm", "model.embed_tokens", "lm_head"),
    "rwkv": ("rwkv.blocks.*", "rwkv.ln_out", "rwkv.embeddings", "head"),
}
LIKE_LLAMA = ("model.layers.*", "model.norm", "model.embed_tokens", "lm_head")


@pytest.mark.parametrize("name", NAMES)
def test_architectures_are_found_by_structure(name: str) -> None:
    found = subject(name)
    blocks, norm, embedding, head = PATHS.get(name, LIKE_LLAMA)
    assert found.block_path == blocks
    assert found.blocks == tuple(found.model.get_submodule(blocks.removesuffix(".*")))
    assert found.n_layers == LAYERS
    assert found.final_norm == norm
    assert found.embedding == embedding
    assert head is None or found.head == head
    assert found.model.get_submodule(found.head) is found.model.get_output_embeddings()  # type: ignore[arg-type, operator]
    assert found.vocab_size == VOCAB
    assert found.chained
    assert set(found.updates) == (
        {"attn_out", "mlp_out"} if name in TWO_UPDATES else {"attn_out"} if name == "mamba" else set()
    )
    assert found.sequential is (name in SEQUENTIAL)
    assert found.dtype == torch.float32
    assert live_hooks(found.model) == 0
    assert found.describe()["n_layers"] == LAYERS
    assert name in repr(found)


def test_sites() -> None:
    llama = subject("llama")
    assert llama.module_at("resid_post", 2)[:2] == (llama.blocks[2], "output")
    assert llama.module_at("resid_pre", 0)[:2] == (llama.blocks[0], "input")
    assert llama.module_at("resid_pre", 2) == llama.module_at("resid_post", 1)  # one state, one place
    assert llama.module_at("mlp_out", 1)[:2] == (llama.blocks[1].mlp, "output")


@pytest.mark.parametrize(
    ("name", "component", "layer", "message"),
    [
        ("llama", "resid_post", 3, "layer 3 was asked for; llama has layers 0…2"),
        ("llama", "resid_post", -1, "layer -1 was asked for"),
        ("llama", "resid_pots", 0, "unknown component 'resid_pots'.*Did you mean 'resid_post'"),
        ("llama", "resid_mid", 0, "cannot be written; write attn_out"),
        ("phi", "resid_mid", 0, "side by side"),
        ("mamba", "mlp_out", 0, "no module of mamba's blocks adds exactly that update"),
        ("rwkv", "attn_out", 0, "no module of rwkv's blocks adds exactly that update"),
    ],
)
def test_sites_that_do_not_exist(name: str, component: str, layer: int, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        subject(name).module_at(component, layer)


@pytest.mark.parametrize("pattern", ["stack.*", "stack.stage?"])
def test_a_users_module_by_pattern(pattern: str) -> None:
    net = seeded(Net)
    found = discover(net, layers=pattern, name="mine")
    assert found.blocks == tuple(net.stack.values())
    assert found.block_path == pattern
    assert found.final_norm == "norm"
    assert found.embedding is None
    assert found.vocab_size is None
    assert found.sequential
    assert len(capture(found, ROWS[:1]).states) == 4


def test_without_a_pattern_the_user_is_told_to_give_one() -> None:
    with pytest.raises(ModelError, match=r"no chain of blocks was found in Net.*layers='path\.to\.blocks\.\*'"):
        discover(seeded(Net))


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(
        SiteError, match=r"layers='model\.layer\.\*' matches no module.*Did you mean 'model\.layers\.\*'"
    ):
        discover(build("llama"), layers="model.layer.*")


def test_a_pattern_over_a_loop_is_refused() -> None:
    with pytest.raises(ModelError, match="ran 4 times"):
        discover(seeded(Looped), layers="groups.*")


def test_a_module_of_unknown_input_is_believed_but_not_resumed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Any, y: Any) -> Any:
            return self.blocks[1](self.blocks[0](x)) + y

    odd = discover(seeded(Odd), layers="blocks.*")
    assert odd.n_layers == 2
    assert odd.dim is None
    assert odd.updates == {}
    from dynprobe.probes import readout, record

    with record(odd) as tape:
        odd.model(torch.ones(1, 3, 4), 1.0)
    assert len(tape.states) == 3
    with pytest.raises(ModelError, match="trial_input="):
        readout(odd, torch.ones(3, 4))


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ModelError, match="encoder–decoder"):
        discover(T5ForConditionalGeneration(config))


def test_rescaled_models_have_no_state_between_blocks_but_the_output() -> None:
    """RWKV halves the state every six blocks: what leaves block 5 is not what enters block 6."""
    rwkv = discover(build("rwkv", num_hidden_layers=8), name="rwkv8")
    assert rwkv.n_layers == 8
    assert not rwkv.chained
    assert rwkv.module_at("resid_pre", 0)[:2] == (rwkv.blocks[0], "input")
    with pytest.raises(SiteError, match=r"changes the state between its blocks.*resid_post of layer 5"):
        rwkv.module_at("resid_pre", 6)


def test_models_cut_short_by_their_owner_are_looked_at_again() -> None:
    model = build("llama")
    assert as_subject(model).n_layers == 3
    model.model.layers = model.model.layers[:2]
    assert as_subject(model).n_layers == 2
    assert len(capture(model, ROWS).states) == 3


def test_modes_are_put_back_module_by_module() -> None:
    model = build("llama")
    model.train()
    model.model.layers[1].eval()
    before = {name: m.training for name, m in model.named_modules()}
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert {name: m.training for name, m in model.named_modules()} == before
    as_subject(model)
    assert {name: m.training for name, m in model.named_modules()} == before
    discover(model)  # a subject of one's own is in evaluation mode, as documented
    assert not model.training


def test_parameters_are_not_touched() -> None:
    model = build("gpt2").to(torch.bfloat16)
    before = {n: (p.dtype, p.device, p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()}
    capture(model, ROWS, logits="all")
    after = {n: (p.dtype, p.device, p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()}
    assert after == before
    assert list(model.state_dict()) == list(build("gpt2").state_dict())
    assert "_dynprobe_subject" not in model.__dict__
