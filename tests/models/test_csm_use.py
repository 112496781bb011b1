"""The CSM-style model in use: depth, halting, padding, decoding, saving, reading and writing iterations, training."""

import copy
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from csm_small import small, tokens
from torch.autograd import forward_ad

from dynprobe.errors import ModelError, UsageError
from dynprobe.models import CsmCache, CsmConfig, CsmForCausalLM, DeltaHalt, load_model

INF = float("inf")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more)


# depth


def test_depth_is_an_argument_of_the_call():
    model, ids = small(num_iterations=5), tokens()
    assert run(model, ids).iterations == 5
    assert run(model, ids, num_iterations=0).iterations == 0
    model.config.num_iterations = 7
    assert run(model, ids).iterations == 7
    a, b = run(model, ids, num_iterations=3).logits, run(model, ids, num_iterations=9).logits
    assert (a - b).abs().max() > 1e-3
    for wrong in (-1, 2.5, True):
        with pytest.raises(UsageError, match="num_iterations"):
            model(ids, num_iterations=wrong)


def test_iteration_approaches_the_fixed_point():
    model, ids = small(step_size=0.3), tokens()
    out = run(model, ids, num_iterations=600, output_deltas=True)
    assert out.deltas[-1].max() < 1e-3 * out.deltas[0].min()
    step = model.model.refine
    with torch.no_grad():
        memory, context = model.model.writer(model.model.embed_tokens(ids))
        drive, gates = model.model.landscape(memory, context)
        unit = step.unit(out.final_state)
        back = step.unit(step.force(unit, drive, gates))
    assert (back - unit).square().mean((-1, -2)).sqrt().max() < 1e-2


# halting


def expected_halt(deltas, tol, patience):
    """First k with `patience` still updates in a row, by loops; −1 if never."""
    out = torch.full(deltas.shape[1:], -1)
    for b in range(deltas.shape[1]):
        for t in range(deltas.shape[2]):
            row = 0
            for k in range(len(deltas)):
                row = row + 1 if deltas[k, b, t] < tol else 0
                if row == patience:
                    out[b, t] = k + 1
                    break
    return out


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_halting_by_delta(patience):
    model, ids = small(), tokens(3, 8)
    free = run(model, ids, num_iterations=40, output_deltas=True, output_hidden_states=True)
    assert free.halted_at is None
    tol = float(free.deltas[8].median())
    out = run(
        model, ids, num_iterations=40, halt=DeltaHalt(tol, patience), output_deltas=True, output_hidden_states=True
    )
    wanted = expected_halt(free.deltas, tol, patience)
    assert torch.equal(out.halted_at, wanted)
    assert len(set(wanted.flatten().tolist())) > 2
    last = torch.where(wanted < 0, 40, wanted)
    assert out.iterations == int(last.max())
    for b in range(3):
        for t in range(8):
            k = int(last[b, t])
            assert torch.equal(out.final_state[b, t], free.hidden_states[k][b, t])
            assert torch.equal(out.deltas[:k, b, t], free.deltas[:k, b, t])
            assert out.deltas[k:, b, t].isnan().all()


def test_halting_extremes_and_configuration():
    ids = tokens()
    model = small(halt_tol=INF, halt_patience=3)
    out = run(model, ids, num_iterations=20)
    assert out.iterations == 3
    assert (out.halted_at == 3).all()
    never = run(model, ids, num_iterations=20, halt=DeltaHalt(0.0))
    assert never.iterations == 20
    assert (never.halted_at == -1).all()


def test_halting_does_not_depend_on_the_batch():
    model, ids = small(), tokens(3, 8)
    halt = DeltaHalt(0.02)
    together = run(model, ids, num_iterations=60, halt=halt)
    for b in range(3):
        alone = run(model, ids[b : b + 1], num_iterations=60, halt=halt)
        assert torch.equal(alone.halted_at, together.halted_at[b : b + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[b], atol=1e-12, rtol=0)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:1]], 1)
    mask = torch.tensor([[0] * 5 + [1] * 8])
    one = run(model, ids[:1], num_iterations=60, halt=halt)
    two = run(model, padded, attention_mask=mask, num_iterations=60, halt=halt)
    assert one.iterations == two.iterations


# padding


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("more", [{}, {"carry": "refined"}, {"init": "noise"}, {"init": "learned"}])
def test_padding_changes_nothing(side, more):
    model = small(**more)
    rows = [tokens(1, n, seed=n)[0] for n in (3, 8, 6)]
    ids, mask = torch.full((3, 8), 17), torch.zeros(3, 8, dtype=torch.long)
    places = []
    for b, row in enumerate(rows):
        n = len(row)
        at = {"left": torch.arange(8 - n, 8), "right": torch.arange(n)}.get(side)
        if at is None:
            at = torch.randperm(8, generator=torch.Generator().manual_seed(b))[:n].sort().values
        ids[b, at], mask[b, at] = row, 1
        places.append(at)
    out = run(model, ids, attention_mask=mask, use_cache=True, output_energies=True)
    for b, row in enumerate(rows):
        alone = run(model, row[None], use_cache=True, output_energies=True)
        torch.testing.assert_close(out.logits[b, places[b]], alone.logits[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(out.energies[:, b, places[b]], alone.energies[:, 0], atol=1e-11, rtol=0)
        for name in ("memory", "window", "refined", "seen"):
            kept, own = getattr(out.past_key_values, name), getattr(alone.past_key_values, name)
            assert (kept is None) == (own is None)
            if kept is not None:
                torch.testing.assert_close(kept[b], own[0], atol=1e-12, rtol=0)
    assert out.logits.isfinite().all()


def test_padding_gradients_are_finite_and_zero():
    model, ids = small(), tokens(1, 6)
    embedded = model.model.embed_tokens(torch.cat([ids * 0, ids], 1)).detach().requires_grad_()
    mask = torch.tensor([[0] * 6 + [1] * 6])
    model(inputs_embeds=embedded, attention_mask=mask).logits[:, 6:].square().sum().backward()
    assert embedded.grad.isfinite().all()
    assert not embedded.grad[:, :6].any()
    assert embedded.grad[:, 6:].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# decoding


def test_decoding_state_is_of_constant_size():
    model = small(torch.float32)
    sizes = {n: run(model, tokens(2, n), use_cache=True).past_key_values.nbytes for n in (1, 5, 200)}
    assert len(set(sizes.values())) == 1
    cache = run(model, tokens(2, 200), use_cache=True).past_key_values
    assert cache.memory.numel() == 2 * 16 * 12
    assert cache.memory.untyped_storage().nbytes() == cache.memory.numel() * 4
    assert cache.window.shape == (2, 3, 20)
    assert cache.get_seq_length() == 200
    assert cache.seen.tolist() == [200, 200]
    with pytest.raises(ModelError, match="cut back"):
        cache.crop(3)


@pytest.mark.parametrize("more", [{}, {"carry": "refined"}, {"init": "noise"}, {"conv_width": 1}, {"memory": "shared"}])
def test_generate_with_and_without_cache(more):
    model = small(**more)
    prompts = [tokens(1, n, seed=n)[0] for n in (4, 7, 1)]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for b, row in enumerate(prompts):
        ids[b, 7 - len(row) :], mask[b, 7 - len(row) :] = row, 1
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "num_iterations": 4}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert cached.shape == (3, 16)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    for b, row in enumerate(prompts):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], cached[b, 7:])
        text = row[None]
        for _ in range(9):
            text = torch.cat([text, run(model, text, num_iterations=4).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(text[0, len(row) :], cached[b, 7:])
    deep = model.generate(ids, attention_mask=mask, **{**options, "num_iterations": 0})
    assert not torch.equal(deep, cached)


def test_generate_beams_samples_and_scores():
    model, ids = small(), tokens(2, 5)
    plain = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **plain), model.generate(ids, use_cache=False, **plain))
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, max_new_tokens=3, num_return_sequences=2)
    assert sampled.shape == (4, 8)
    out = model.generate(
        ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
        output_hidden_states=True,
    )  # fmt: skip
    full = run(model, out.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, 4:].float(), atol=1e-5, rtol=1e-5)
    assert isinstance(out.past_key_values, CsmCache)


def test_a_decoding_state_can_be_forked():
    model, ids = small(), tokens(1, 6)
    cache = run(model, ids, use_cache=True).past_key_values
    fork = copy.deepcopy(cache)
    a = run(model, torch.tensor([[3]]), past_key_values=cache).logits
    run(model, torch.tensor([[9]]), past_key_values=cache)
    assert torch.equal(run(model, torch.tensor([[3]]), past_key_values=fork).logits, a)
    fork.batch_repeat_interleave(2)
    assert run(model, torch.tensor([[3], [4]]), past_key_values=fork).logits.shape[0] == 2
    fork.batch_select_indices(torch.tensor([1]))
    assert len(fork.memory) == 1


# saving


@pytest.mark.parametrize("more", [{}, {"memory": "shared", "init": "learned"}, {"tie_word_embeddings": False}])
def test_save_and_load(tmp_path, more):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    model, ids = small(torch.float32, **more), tokens()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert AutoConfig.from_pretrained(tmp_path).model_type == "dynprobe_csm"
    logits = run(model, ids).logits
    for loaded in (CsmForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(loaded, CsmForCausalLM)
        assert torch.equal(run(loaded.eval(), ids).logits, logits)
        shared = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
        assert shared is more.get("tie_word_embeddings", True)
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(body, ids).final_state, run(model, ids).final_state)
    own, _, facts = load_model(str(tmp_path), device="cpu")
    assert torch.equal(run(own, ids).logits, logits)
    assert facts["model_type"] == "dynprobe_csm"
    assert facts["n_parameters"] == model.num_parameters()


def test_loading_in_a_fresh_interpreter(tmp_path):
    """The Auto classes learn of the type when a checkpoint of it is loaded, without naming the class before."""
    import subprocess
    import sys

    small(torch.float32).save_pretrained(tmp_path)
    code = (
        "import sys, dynprobe.models as m; assert 'transformers' not in sys.modules;"
        f"model, _, _ = m.load_model({str(tmp_path)!r}, device='cpu'); print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "CsmForCausalLM", done.stderr


def test_bfloat16_runs_and_keeps_energy_wide():
    model, ids = small(torch.float32), tokens()
    want = run(model, ids, output_energies=True)
    got = run(copy.deepcopy(model).to(torch.bfloat16), ids, output_energies=True)
    assert got.logits.dtype == got.final_state.dtype == torch.bfloat16
    assert got.energies.dtype == torch.float32
    assert got.past_key_values.memory.dtype == torch.float32
    assert ((got.energies - want.energies).abs() < 0.02 * want.energies.abs()).all()


# reading and writing iterations


def test_call_index_hook_reads_every_iteration():
    model, ids = small(), tokens()
    seen, starts = [], []
    hooks = [
        model.model.refine.register_forward_hook(lambda m, args, out: seen.append((args[0], out))),
        model.model.start.register_forward_hook(lambda m, args, out: starts.append(out)),
    ]
    out = run(model, ids, num_iterations=6, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 6
    assert torch.equal(starts[0], out.hidden_states[0])
    for k, (before, after) in enumerate(seen):
        assert torch.equal(before, out.hidden_states[k])
        assert torch.equal(after, out.hidden_states[k + 1])
    assert torch.equal(run(model, ids, num_iterations=6).logits, out.logits)


@pytest.mark.parametrize("k", [0, 3, 6])
def test_writing_a_slot_of_an_iteration(k):
    """A push on slot 5 at iteration k: hook and callback agree, earlier iterations are untouched, others follow."""
    model, ids = small(), tokens()
    push = torch.zeros(16, 12, dtype=torch.float64)
    push[5] = 0.3
    calls = [0]

    def hook(module, args, out):
        calls[0] += 1
        return out + push if calls[0] == k else None

    def callback(index, state, stage, energy):
        assert stage == "core"
        assert energy is None
        return state + push if index == k else None

    place = model.model.start if k == 0 else model.model.refine
    handle = place.register_forward_hook((lambda m, a, out: out + push) if k == 0 else hook)
    hooked = run(model, ids, num_iterations=6, output_hidden_states=True)
    handle.remove()
    told = run(model, ids, num_iterations=6, output_hidden_states=True, on_iteration=callback)
    clean = run(model, ids, num_iterations=6, output_hidden_states=True)
    for i in range(7):
        assert torch.equal(hooked.hidden_states[i], told.hidden_states[i])
        same = torch.equal(told.hidden_states[i], clean.hidden_states[i])
        assert same is (i < k)
    torch.testing.assert_close(told.hidden_states[k] - clean.hidden_states[k], push.expand(2, 9, 16, 12))
    if k < 6:  # the other slots follow one iteration later, through J
        moved = (told.hidden_states[k + 1] - clean.hidden_states[k + 1]).abs().amax((0, 1, 3))
        assert (moved > 0).all()


def test_callback_gets_states_and_energies():
    model, ids = small(), tokens()
    got = []
    out = run(
        model, ids, num_iterations=4, output_hidden_states=True, output_energies=True,
        on_iteration=lambda k, state, stage="core", energy=None: got.append((k, state, energy)),
    )  # fmt: skip
    assert [k for k, _, _ in got] == [0, 1, 2, 3, 4]
    for k, state, energy in got:
        assert torch.equal(state, out.hidden_states[k])
        assert torch.equal(energy, out.energies[k])
    with pytest.raises(UsageError, match=r"iteration 0.*\[2, 9, 16, 12\]"):
        model(ids, on_iteration=lambda k, state, stage, energy: state[0])
    with pytest.raises(UsageError, match="float"):
        model(ids, on_iteration=lambda k, state, stage, energy: 1.0)


def test_resuming_from_an_iteration():
    model, ids = small(), tokens()
    whole = run(model, ids, num_iterations=9, output_hidden_states=True)
    rest = run(model, ids, num_iterations=5, initial_state=whole.hidden_states[4])
    assert torch.equal(rest.logits, whole.logits)
    with pytest.raises(UsageError, match="initial_state"):
        model(ids, initial_state=whole.hidden_states[4][:, 1:])


# starts and carries


def test_starts():
    ids = tokens(2, 6)
    model = small(init="noise")
    a = run(model, ids, num_iterations=2, output_hidden_states=True).hidden_states[0]
    assert torch.equal(a[0], a[1])
    assert len({tuple(a[0, t, 0].tolist()) for t in range(6)}) == 6
    assert abs(float(a[0].mean())) < 0.1
    assert abs(float(a[0].std()) - 1) < 0.1
    cache = run(model, ids[:, :4], use_cache=True).past_key_values
    later = run(model, ids[:, 4:], past_key_values=cache, output_hidden_states=True, num_iterations=2)
    assert torch.equal(later.hidden_states[0], a[:, 4:])
    model.config.init_seed = 1
    b = run(model, ids, num_iterations=2, output_hidden_states=True).hidden_states[0]
    assert (a - b).abs().min() > 0
    learned = small(init="learned")
    state = run(learned, ids, num_iterations=0).final_state
    assert torch.equal(state, learned.model.start.state.expand_as(state))


def test_refined_carry_is_the_loop_over_positions():
    model, ids = small(carry="refined"), tokens(2, 5)
    out = run(model, ids, num_iterations=3, output_hidden_states=True, output_energies=True, output_deltas=True)
    body = model.model
    with torch.no_grad():
        memory, context = body.writer(body.embed_tokens(ids))
        drive, gates = body.landscape(memory, context)
        state = memory[:, :1]
        for t in range(5):
            at = slice(t, t + 1)
            torch.testing.assert_close(out.hidden_states[0][:, at], state, atol=1e-12, rtol=0)
            for _ in range(3):
                state = body.refine(state, drive[:, at], gates[:, at])
            torch.testing.assert_close(out.final_state[:, at], state, atol=1e-12, rtol=0)
    assert out.energies.shape == (4, 2, 5)
    assert out.deltas.shape == (3, 2, 5)
    cache, pieces = None, []
    for t in range(5):
        one = run(model, ids[:, t : t + 1], past_key_values=cache, use_cache=True, num_iterations=3)
        cache = one.past_key_values
        pieces.append(one.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), out.logits, atol=1e-12, rtol=0)
    halted = run(model, ids, num_iterations=30, halt=DeltaHalt(0.05), output_deltas=True, output_hidden_states=True)
    assert (halted.halted_at > 0).any()
    assert len(halted.hidden_states) == halted.iterations + 1 == len(halted.deltas) + 1
    with pytest.raises(UsageError, match="refined"):
        model(ids, on_iteration=lambda *a, **k: None)


# what is refused


def test_inputs_are_checked():
    model, ids = small(), tokens()
    with pytest.raises(UsageError, match="input_ids"):
        model()
    with pytest.raises(UsageError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(UsageError, match="CsmCache"):
        model(ids, past_key_values=())
    with pytest.raises(TypeError, match="num_iteration"):
        model(ids, num_iteration=3)


# derivatives and training


def test_truncated_gradients_leave_the_numbers_alone():
    model, ids = small(), tokens()
    grads = {}
    for last in (None, 8, 3, 0):
        model.zero_grad()
        loss = model(ids, labels=ids, num_iterations=8, grad_iterations=last).loss
        assert loss.item() == pytest.approx(float(run(model, ids, labels=ids, num_iterations=8).loss), rel=1e-12)
        loss.backward()
        grad = model.model.refine.memory.grad
        grads[last] = None if grad is None else grad.clone()
    torch.testing.assert_close(grads[None], grads[8], atol=1e-12, rtol=0)
    assert grads[0] is None
    assert not torch.allclose(grads[None], grads[3])


def test_loss_and_kept_logits():
    model, ids = small(), tokens(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    out = run(model, ids, labels=labels)
    logp = out.logits.log_softmax(-1)
    picked = [-logp[b, t, ids[b, t + 1]] for b in range(2) for t in range(5) if labels[b, t + 1] != -100]
    assert float(out.loss) == pytest.approx(float(sum(picked) / len(picked)), rel=1e-6)
    assert torch.equal(run(model, ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(run(model, ids, logits_to_keep=torch.tensor([1, 4])).logits, out.logits[:, [1, 4]])
    as_tuple = run(model, ids, return_dict=False)
    assert torch.equal(as_tuple[0], out.logits)


def test_tangents_flow_forward():
    """Forward-mode derivatives, which the exponents are made of, agree with finite differences."""
    model, ids = small(), tokens(1, 6)
    embedded = model.model.embed_tokens(ids).detach()
    direction = torch.randn_like(embedded)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(embedded, direction)
        tangent = forward_ad.unpack_dual(model(inputs_embeds=dual, use_cache=False).logits).tangent
    h = 1e-6
    up, down = (run(model, None, inputs_embeds=embedded + s * h * direction).logits for s in (1, -1))
    torch.testing.assert_close(tangent, (up - down) / (2 * h), atol=1e-6, rtol=1e-5)


def python_text():
    library = Path(sysconfig.get_path("stdlib"))
    return torch.tensor(list(b"".join(p.read_bytes() for p in sorted(library.glob("*.py"))[:60])))


def train(steps, batch, length=64, seed=0):
    """The first phase of the recipe: T uniform in 1…8, gradients through the last four iterations."""
    torch.manual_seed(seed)
    text, draw = python_text(), torch.Generator().manual_seed(seed)
    learn, held = text[:-20000], text[-20000:]
    model = CsmForCausalLM(CsmConfig.preset("nano"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        at = torch.randint(0, len(learn) - length - 1, (batch,), generator=draw)
        ids = torch.stack([learn[a : a + length + 1] for a in at.tolist()])
        depth = int(torch.randint(1, 9, (1,), generator=draw))
        model(ids, labels=ids, num_iterations=depth, grad_iterations=4).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    model.eval()
    ids = held[: 8 * 129].view(8, 129)
    nll = {k: float(run(model, ids, labels=ids, num_iterations=k).loss) for k in (0, 1, 3)}
    energy = run(model, ids, num_iterations=20, output_energies=True).energies
    return nll, float((energy.diff(dim=0) > 1e-4 * energy[1:].abs()).float().mean()), model.model.refine.alpha.item()


def test_c10_a_short_training_run_learns():
    nll, _, _ = train(25, 8)
    assert nll[3] < 3.0 < math.log(256)
    assert nll[3] < nll[0]


@pytest.mark.slow
def test_c10_and_c8_after_a_minute_of_training():
    nll, rises, alpha = train(200, 12)
    assert nll[3] < 2.3
    assert nll[3] < nll[0]
    assert alpha < 0.6
    assert rises < 0.002
