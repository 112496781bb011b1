"""CEM as a language model: what any decoder of transformers does, and what only this one does."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.models import CemConfig, CemDynamics, CemForCausalLM, load_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "per-head": {"diagonal": "per_head", "share_norm": False, "alibi_slopes": "press"},
    "plain": {"diagonal": "none", "preconditioner": "none", "self_bias": False},
    "no-position": {"diagonal": "none", "self_bias": False, "position": "none"},
    "literal": {"diag_in_update": False, "norm_mode": "inplace"},
    "rope": {"position": "rope"},
    "convex": {"mlp_energy": "convex_sign", "update": "chain"},
    "mixed": {"attention": ["cem", "llama", "reuse"], "mlp": ["reuse", "cem", "llama"], "num_hidden_layers": 3},
    "llama-alibi": {"attention": "reuse", "mlp": "llama", "llama_position": "alibi"},
}


def tiny(dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> CemForCausalLM:
    """A small model whose every parameter is far from its start, so that nothing is switched off by a zero."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32, "num_hidden_layers": 2}
    fields = {"initializer_range": 0.3, "vocab_size": 37, **sizes, **fields}
    model = CemForCausalLM(CemConfig.preset("nano", **fields)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".diagonal", ".biases", ".V")):
                p.normal_(0, 0.3)
    return model.to(dtype)


def tokens(batch: int = 2, n: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(1, 37, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_t8_causality_is_exact(layout):
    model, ids = tiny(**LAYOUTS[layout]), tokens()
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 37
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_t9_cached_decoding_is_the_full_forward(layout):
    model, ids = tiny(**LAYOUTS[layout]), tokens()
    with torch.no_grad():
        full = model(ids).logits
        start = model(ids[:, :4], use_cache=True)
        pieces, cache = [start.logits], start.past_key_values
        for columns in (slice(4, 5), slice(5, 8), slice(8, 9)):
            step = model(ids[:, columns], past_key_values=cache, use_cache=True)
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-11, rtol=1e-11)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(layout, side):
    model, long = tiny(**LAYOUTS[layout]), tokens(1, 9)
    short = tokens(1, 5, seed=1)
    gap = torch.zeros(1, 4, dtype=torch.long)
    row, mask = (torch.cat([gap, t] if side == "left" else [t, gap], 1) for t in (short, torch.ones_like(short)))
    real = slice(4, 9) if side == "left" else slice(0, 5)
    with torch.no_grad():
        alone, together = (
            model(short).logits,
            model(torch.cat([long, row]), torch.cat([long.ne(-1).long(), mask])).logits,
        )
        torch.testing.assert_close(together[1:, real], alone, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(together[:1], model(long).logits, atol=1e-11, rtol=1e-11)
    assert torch.isfinite(together).all()


def test_padding_in_the_middle_does_not_stretch_distances():
    model, ids = tiny(), tokens(1, 8)
    hole = torch.cat([ids[:, :5], torch.zeros(1, 3, dtype=torch.long), ids[:, 5:]], 1)
    mask = torch.tensor([[1] * 5 + [0] * 3 + [1] * 3])
    with torch.no_grad():
        torch.testing.assert_close(model(hole, mask).logits[:, 8:], model(ids).logits[:, 5:], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("layout", ["paper", "plain", "rope", "mixed"])
def test_generate_with_and_without_cache_batched_and_alone(layout):
    model = tiny(**LAYOUTS[layout])
    long, short = tokens(1, 7), tokens(1, 4, seed=3)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    made = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(made, model.generate(batch, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(made[1, 7:], model.generate(short, **options)[0, 4:])
    assert torch.equal(made[:1, :13], model.generate(long, **options))
    beams = model.generate(batch, attention_mask=mask, num_beams=3, **options)
    assert torch.equal(beams, model.generate(batch, attention_mask=mask, num_beams=3, use_cache=False, **options))


def test_generate_takes_the_recursion_of_the_call():
    model, ids = tiny(), tokens(1, 5)
    made = model.generate(ids, max_new_tokens=8, do_sample=False, steps_attention=1, steps_mlp=1)
    model.set_steps(attention=1, mlp=1)
    assert torch.equal(made, model.generate(ids, max_new_tokens=8, do_sample=False))
    model.set_steps()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids, steps_attention=1, steps_mlp=1).logits)


def test_t7_one_plain_step_is_a_tied_llama():
    plain = {"diagonal": "none", "preconditioner": "none", "self_bias": False, "position": "none", "tau": "head"}
    model = tiny(steps_attention=1, steps_mlp=1, **plain)
    twin = tiny(attention="llama", mlp="llama", llama_position="none")
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, twin.model.layers, strict=True):
            a, b = ours.self_attn.step, theirs.self_attn.step
            for name, weight in (("q", a.q_proj.weight), ("k", a.k_proj.weight), ("v", a.k_proj.weight)):
                getattr(b, f"{name}_proj").weight.copy_(weight)
            b.o_proj.weight.copy_(a.q_proj.weight.T)
            c, d = ours.mlp.step, theirs.mlp.step
            d.gate_proj.weight.copy_(c.up_proj.weight)  # SiLU acts on V u, the gate γ = W n multiplies
            d.up_proj.weight.copy_(c.gate_proj.weight)
            d.down_proj.weight.copy_(c.up_proj.weight.T)
        twin.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
        twin.lm_head.load_state_dict(model.lm_head.state_dict())
        torch.testing.assert_close(model(tokens()).logits, twin(tokens()).logits, atol=1e-11, rtol=1e-11)
        # … and by hand, without any module of the package.
        block, h = model.model.layers[0], torch.randn(1, 6, 24, dtype=torch.float64)
        n = functional.rms_norm(h, (24,), eps=1e-6)
        step = block.self_attn.step
        q, k = (functional.linear(n, w.weight).view(1, 6, 3, 8).transpose(1, 2) for w in (step.q_proj, step.k_proj))
        alpha = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
        h1 = h + (alpha @ k).transpose(1, 2).flatten(2) @ step.q_proj.weight
        n2, step = functional.rms_norm(h1, (24,), eps=1e-6), block.mlp.step
        gated = functional.silu(n2 @ step.up_proj.weight.T) * (n2 @ step.gate_proj.weight.T)
        expected = h1 + gated @ step.up_proj.weight
        frame = model.model._frame(h, None, None, None)
        frame.steps = {"attention": 1, "mlp": 1}
        torch.testing.assert_close(block(h, frame), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("attention", ["llama", "reuse"])
def test_untied_blocks_are_those_of_transformers(attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tiny(attention=attention, mlp="llama", steps_attention=1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=512, rms_norm_eps=1e-6,
        )
    ).double()  # fmt: skip
    renamed = {
        name.replace("self_attn.step.norm", "input_layernorm").replace("mlp.step.norm", "post_attention_layernorm")
        .replace(".step.", "."): value
        for name, value in model.state_dict().items()
    }  # fmt: skip
    llama.load_state_dict(renamed)
    with torch.no_grad():
        # transformers normalises in float32 even where the states are float64
        torch.testing.assert_close(model(tokens()).logits, llama.eval()(tokens()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_t12_watching_changes_nothing(layout):
    model, ids = tiny(torch.float32, **LAYOUTS[layout]), tokens()
    with torch.no_grad():
        plain = model(ids).logits
        everything = CemDynamics(
            keep="cpu", what=["x", "u", "energy", "energy_head", "delta", "delta_rel", "slope", "psd_margin"]
        )
        traced = model(ids, output_energies=True, dynamics=everything)
    assert torch.equal(plain, traced.logits)
    for kind, traces in (("attention", traced.dynamics.attn), ("mlp", traced.dynamics.mlp)):
        for layer, trace in traces.items():
            steps = len(trace.delta)
            assert trace.x.shape == (steps + 1, 2, 9, 24)
            assert torch.equal(trace.delta, torch.linalg.vector_norm(trace.x.diff(dim=0), dim=-1))
            torch.testing.assert_close(trace.delta_rel, trace.delta / trace.x[:-1].norm(dim=-1))
            energy = traced.energies[kind][layer]
            if trace.kind == "none":
                assert energy is None
                assert trace.energy is None
                continue
            torch.testing.assert_close(trace.energy, energy, rtol=1e-5, atol=1e-5)
            assert energy.shape == (steps + 1, 2, 9)
            if kind == "attention":
                torch.testing.assert_close(trace.energy_head.sum(2), trace.energy)
            step = model.model.layers[layer].get_submodule("self_attn" if kind == "attention" else "mlp").step
            with torch.no_grad():
                assert torch.equal(trace.u[0], step.argument(trace.x[0]))


def test_t12_a_longer_recursion_begins_with_the_shorter_one():
    model, ids = tiny(num_hidden_layers=1), tokens()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [
            model(ids, steps_attention=t, steps_mlp=2, dynamics=CemDynamics(keep="cpu")).dynamics.attn[0]
            for t in (2, 4)
        ]
    assert torch.equal(runs[0].x, runs[1].x[:3])
    assert torch.equal(runs[0].energy, runs[1].energy[:3])


def test_slope_is_the_derivative_of_the_energy_along_the_move():
    model, ids = tiny(norm_in_recursion=False, preconditioner="none", step_size_attention=1e-5), tokens()
    with torch.no_grad():
        out = model(ids, dynamics=CemDynamics(keep="cpu", what=["energy", "slope"]))
    fall = -out.dynamics.attn[0].energy.diff(dim=0)
    torch.testing.assert_close(out.dynamics.attn[0].slope, fall, rtol=1e-3, atol=1e-9)


def test_dynamics_keep_what_was_asked_for():
    model, ids = tiny(), tokens()
    out = model(ids, dynamics=CemDynamics(layers=[1], steps="ends"), steps_attention=2)
    assert list(out.dynamics.attn) == [1]
    assert out.dynamics.attn[1].x is None
    assert out.dynamics.attn[1].energy.shape[0] == 2
    assert not out.dynamics.attn[1].energy.requires_grad
    live = model(ids, dynamics=CemDynamics(keep="device"))
    assert live.dynamics.mlp[0].x.requires_grad
    assert live.energies is None
    margin = model(ids, dynamics=CemDynamics(what=["psd_margin"])).dynamics.attn[0].psd_margin
    assert margin == float(model.model.layers[0].self_attn.step.psd_margin().min())
    for bad in ({"keep": "gpu"}, {"steps": "first"}, {"what": ["energie"]}):
        with pytest.raises(UsageError):
            CemDynamics(**bad)


def test_iterations_are_module_calls_that_hooks_read_and_write():
    model, ids = tiny(), tokens()
    step = model.model.layers[1].mlp.step
    seen: list[Tensor] = []
    handle = step.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    with torch.no_grad():
        out = model(ids, dynamics=CemDynamics(layers=[1], keep="cpu"))
    handle.remove()
    trajectory = out.dynamics.mlp[1].x
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, trajectory[[0, 1, 1, 2]], strict=True))

    calls = iter(range(2))
    handle = step.register_forward_hook(lambda module, args, output: output + 1.0 if next(calls) == 0 else None)
    with torch.no_grad():
        hooked = model(ids, dynamics=CemDynamics(layers=[1], keep="cpu"))
    handle.remove()
    assert torch.equal(hooked.dynamics.mlp[1].x[1], trajectory[1] + 1.0)

    def push(layer: int, kind: str, t: int, x: Tensor, u: Any, energy: Any) -> Tensor | None:
        return x + 1.0 if (layer, kind, t) == (1, "mlp", 1) else None

    with torch.no_grad():
        called = model(ids, dynamics=CemDynamics(keep="cpu", callback=push))
        assert torch.equal(called.logits, hooked.logits)
        assert not torch.equal(called.logits, out.logits)
        assert torch.equal(model(ids).logits, out.logits)
        with pytest.raises(UsageError, match="same shape"):
            model(ids, dynamics=CemDynamics(callback=lambda *a: a[3][:, :1]))


def test_no_steps_is_the_identity_and_too_many_warn():
    model, ids = tiny(), tokens()
    with torch.no_grad():
        out = model(ids, steps_attention=0, steps_mlp=0, output_hidden_states=True)
        assert torch.equal(out.hidden_states[1], out.hidden_states[0])
        with pytest.warns(UserWarning, match="steps_mlp=5 is above the trained 2"):
            model(ids, steps_mlp=5)
    with pytest.warns(UserWarning, match="above the trained 2"):
        model.set_steps(attention=3)
    with pytest.raises(UsageError, match="whole number"):
        model.set_steps(mlp=-1)


def test_energy_exact_falls_at_every_step_in_every_layer():
    torch.manual_seed(0)
    model = CemForCausalLM(CemConfig.preset("energy_exact", initializer_range=0.2, steps_attention=8)).eval().double()
    with torch.no_grad():
        out = model(torch.randint(0, 256, (2, 12)), output_energies=True)
    for energy in out.energies["attention"]:
        assert (energy.diff(dim=0) <= 1e-12 * energy[:-1].abs()).all()
        assert (energy[-1] < energy[0]).all()


def test_eager_and_fused_attention_agree():
    model, ids = tiny(diagonal="none"), tokens()
    with torch.no_grad():
        fused = model(ids).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids).logits, fused, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("layout", ["paper", "per-head", "mixed"])
def test_save_and_load(layout, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model, ids = tiny(torch.float32, **LAYOUTS[layout]), tokens()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, CemForCausalLM)
    again, _, facts = load_model(tmp_path)
    assert facts["model_type"] == "dynprobe_cem"
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    model.set_steps(attention=1)
    assert model.config.steps_attention == 2


def test_names_are_lazy_and_a_folder_loads_where_no_name_was_used(tmp_path: Path):
    tiny(torch.float32).save_pretrained(tmp_path)
    code = (
        "import sys, dynprobe.models as m; assert not {'torch', 'transformers'} & set(sys.modules);"
        f"print(type(m.load_model({str(tmp_path)!r})[0]).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "CemForCausalLM"


def test_the_auto_classes_know_the_type():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    fields = CemConfig.preset("nano").to_dict()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert type(config) is CemConfig
    assert type(AutoModelForCausalLM.from_config(config)) is CemForCausalLM
    assert type(AutoModel.from_config(config)) is type(CemForCausalLM(config).model)
    with pytest.raises(AttributeError, match="CemModell"):
        dp.models.CemModell  # noqa: B018


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_and_autocast(layout):
    model, ids = tiny(torch.float32, **LAYOUTS[layout]), tokens()
    exact = model(ids).logits.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    half = model.bfloat16()
    with torch.no_grad():
        out = half(ids, output_energies=True)
    assert out.logits.dtype == torch.bfloat16
    assert all(e.dtype == torch.float32 for e in out.energies["attention"] if e is not None)
    error = (out.logits.float() - exact).norm() / exact.norm()
    assert error < 0.15


def test_tied_embeddings(tmp_path: Path):
    model = tiny(torch.float32, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = CemForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_read_like_any_decoder(layout):
    model = tiny(torch.float32, **LAYOUTS[layout])
    subject = dp.discover(model, layers="model.layers.*")
    assert subject.block_path == "model.layers.*"
    assert (subject.n_layers, subject.dim) == (model.config.num_hidden_layers, 24)
    assert (subject.final_norm, subject.head, subject.embedding) == ("model.norm", "lm_head", "model.embed_tokens")
    assert subject.updates["attn_out"][0] == "self_attn"
    assert subject.updates["mlp_out"][0] == "mlp"
    assert subject.sequential
    tape = dp.capture(subject, tokens(), where="layers=all")
    resumed = dp.resume(tape, at=1, states=tape.states[1], logits="all")
    with torch.no_grad():  # without a cache, as it is captured: with one, some processors round the iterates otherwise
        out = model(tokens(), output_hidden_states=True, use_cache=False)
    assert torch.equal(tape.states[1], out.hidden_states[1])
    torch.testing.assert_close(resumed.logits, out.logits, atol=1e-5, rtol=1e-5)
    assert subject.resumable


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_learns(layout):
    model, ids = tiny(torch.float32, **LAYOUTS[layout]).train(), tokens()
    groups = model.decay_groups()
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    first = None
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        first = float(loss.detach()) if first is None else first
    assert float(loss.detach()) < first


def test_a_cache_of_another_recursion_is_refused():
    model, ids = tiny(attention="reuse"), tokens()
    for before, after in ((1, 2), (0, 1)):
        cache = model(ids, use_cache=True, steps_attention=before).past_key_values
        mask = torch.ones(2, 10, dtype=torch.long)
        with pytest.raises(UsageError, match="same steps_attention"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache, steps_attention=after)


def test_logits_to_keep_labels_and_tuples():
    model, ids = tiny(), tokens()
    with torch.no_grad():
        full = model(ids, labels=ids)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full.logits[:, [0, 4]])
        expected = functional.cross_entropy(full.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(full.loss, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
        assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(embedded, full.logits)
    with pytest.raises(UsageError, match="either input_ids"):
        model()
    with pytest.raises(UsageError, match="attention mask"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(UsageError, match="weights"):
        model(ids, output_attentions=True)
    cache = model(ids).past_key_values
    with pytest.raises(UsageError, match="DynamicCache"):
        model(ids[:, :1], attention_mask=torch.ones(2, 5), past_key_values=cache)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_mode_computes_the_same_numbers(layout):
    model, ids = tiny(**LAYOUTS[layout]), tokens()
    losses, gradients = [], []
    for training in (True, False):
        model.train(training).zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
