"""Capture and record: the model's own states, and nothing else touched, run or kept."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import CONTAINERS, IGNORES_MASK, NAMES, ROWS, SEQUENTIAL, TWO_UPDATES, Net, build, seeded, subject
from torch import Tensor, nn

from dynprobe.errors import ModelError, SiteError, UsageError
from dynprobe.probes import (
    Perturb,
    Subject,
    Tape,
    as_subject,
    capture,
    discover,
    live_hooks,
    make_batch,
    perturb,
    readout,
    record,
)

PAIRED = "layers=all,component=resid_pre+resid_post+attn_out+mlp_out"


def untouched(model: nn.Module) -> bool:
    """No hook of anyone's and no replaced forward on any module."""
    return live_hooks(model) == 0 and not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()
    )


@contextmanager
def counted(modules: Any) -> Iterator[list[nn.Module]]:
    calls: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda module, _: calls.append(module)) for m in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def inner_modules(found: Subject, layer: int) -> list[nn.Module]:
    return [m for m in found.blocks[layer].modules() if m is not found.blocks[layer]]


# ------------------------------------------------------------------------------------------- the model's own states


@pytest.mark.parametrize("name", NAMES)
def test_states_equal_the_models_own(name: str) -> None:
    """The last that transformers hands out is after the final norm; its recurrent models leave the embedding out."""
    found = discover(build(name))  # transformers leaves hooks of its own behind when it is asked for states
    batch, first = make_batch(found, ROWS), 1 if name in ("mamba", "rwkv") else 0
    real, tape = batch.mask, capture(found, ROWS)
    with torch.no_grad():
        own = found.model(**batch.model_inputs(found), output_hidden_states=True).hidden_states
        normed = found.model.get_submodule(found.final_norm)(tape.states[3])  # type: ignore[arg-type]
    assert len(own) == len(tape.states) == 4
    for depth, state in enumerate(own[:-1], start=first):
        assert torch.equal(tape.states[depth][real], state[real])
    assert torch.equal(normed[real], own[-1][real])
    with torch.no_grad():
        embedded = found.model.get_submodule(found.embedding)(batch.input_ids)  # type: ignore[arg-type]
    if name in (
        "llama",
        "qwen2",
        "mixtral",
        "mamba",
        "phi",
        "falcon",
        "mistral",
        "gptj",
        "rwkv",
    ):  # nothing is added to it
        assert torch.equal(tape.states[0][real], embedded[real])


@pytest.mark.parametrize("name", NAMES)
def test_capture_never_asks_for_hidden_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    honest = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert not kwargs.get("output_hidden_states")
        out = honest(self, *args, **kwargs)
        assert out.hidden_states is None
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    tape = capture(discover(model), ROWS, logits="all")
    assert len(tape.states) == 4
    assert not model.config.output_hidden_states


@pytest.mark.parametrize("name", TWO_UPDATES)
def test_attention_and_mlp_are_what_a_block_adds(name: str) -> None:
    tape = capture(subject(name), ROWS, where=PAIRED)
    for layer in range(3):
        pre, post = tape["resid_pre", layer], tape["resid_post", layer]
        attn, mlp = tape["attn_out", layer], tape["mlp_out", layer]
        torch.testing.assert_close(pre + attn + mlp, post, atol=1e-5, rtol=1e-5)
        assert attn.abs().max() > 1e-3
        assert mlp.abs().max() > 1e-3


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_attention_is_what_mixes_positions(name: str) -> None:
    """Change the first token: at the last position of block 0 only attention can know."""
    found = subject(name)
    a, b = (capture(found, [[first, 7, 8, 9]], where=PAIRED + "+resid_mid") for first in (5, 50))
    assert torch.equal(a.states[0][:, -1], b.states[0][:, -1])
    assert not torch.allclose(a["attn_out", 0][:, -1], b["attn_out", 0][:, -1])
    # The MLP sees one position: where the state after attention is the same, so is its output.
    twin, _ = (capture(found, [[5, 7, 8, 9]], where=PAIRED) for _ in range(2))
    assert torch.equal(twin["mlp_out", 0], a["mlp_out", 0])
    torch.testing.assert_close(a["resid_mid", 0] + a["mlp_out", 0], a.states[1], atol=1e-5, rtol=1e-5)


def test_a_mixers_output_is_what_a_state_space_block_adds() -> None:
    tape = capture(subject("mamba"), ROWS, where="layers=all,component=resid_pre+resid_post+attn_out")
    for layer in range(3):
        torch.testing.assert_close(tape.states[layer] + tape["attn_out", layer], tape.states[layer + 1])


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_users_blocks_whatever_they_return(kind: str) -> None:
    net, plain = (discover(seeded(lambda k=k: Net(kind=k)), layers="stack.*") for k in (kind, "tensor"))
    tape, reference = capture(net, ROWS, logits="all"), capture(plain, ROWS, logits="all")
    assert all(torch.equal(a, b) for a, b in zip(tape.states, reference.states, strict=True))
    assert torch.equal(tape.logits, reference.logits)  # type: ignore[arg-type]
    assert tape.mask.sum(1).tolist() == [7, 3, 5]  # the model takes no mask; the batch knows it
    pushed = [capture(n, ROWS, perturb="alpha=0.5,layers=1") for n in (net, plain)]
    assert torch.equal(pushed[0].states[3], pushed[1].states[3])
    assert not torch.equal(pushed[0].states[3], tape.states[3])


def test_transformer_lens_names() -> None:
    found = subject("llama")
    tape = capture(found, ROWS, where="blocks.1.hook_mlp_out")
    assert list(tape.updates) == [("mlp_out", 1)]
    assert torch.equal(tape["hook_mlp_out", 1], capture(found, ROWS, where=PAIRED)["mlp_out", 1])
    assert capture(found, ROWS, where="blocks.1.hook_resid_post").depths == (2,)
    assert capture(found, ROWS, where="layers=1,component=hook_resid_pre").depths == (1,)


# ------------------------------------------------------------------------------------------- padding, order, texts


@pytest.mark.parametrize("name", NAMES)
def test_left_is_right_is_alone(name: str) -> None:
    found = subject(name)
    right, left = (capture(found, ROWS, padding=side, logits="all") for side in ("right", "left"))
    last = capture(found, ROWS, padding="right", logits="last")
    for i, row in enumerate(ROWS):
        alone = capture(found, [row], logits="all")
        sides = [right] if name in IGNORES_MASK else [right, left]
        for tape in sides:
            mine = tape.mask[i]
            assert tape.token_ids[i][mine].tolist() == row  # type: ignore[index]
            assert tape.positions[i][mine].tolist() == list(range(len(row)))
            for depth in range(4):
                torch.testing.assert_close(tape.states[depth][i][mine], alone.states[depth][0], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(tape.logits[i][mine], alone.logits[0], atol=2e-4, rtol=1e-3)  # type: ignore[index]
        torch.testing.assert_close(last.logits[i], alone.logits[0, -1], atol=2e-4, rtol=1e-3)  # type: ignore[index]
    assert right.row_keys == left.row_keys


@pytest.mark.parametrize("padding", ["left", "right"])
def test_last_logits_are_the_last_real_tokens(padding: str) -> None:
    for name in ("gpt2", "llama", "bloom"):
        found = subject(name)
        whole, last = (capture(found, ROWS, padding=padding, logits=what) for what in ("all", "last"))
        ends = [len(r) - 1 if padding == "right" else 6 for r in ROWS]
        expected = torch.stack([whole.logits[i, e] for i, e in enumerate(ends)])  # type: ignore[index]
        torch.testing.assert_close(last.logits, expected, atol=1e-5, rtol=1e-4)
        assert last.logits.shape == (3, 100)  # type: ignore[union-attr]


def test_a_tensor_of_ids_and_row_names() -> None:
    found = subject("llama")
    tape = capture(found, torch.tensor([[5, 6, 7], [8, 9, 10]]), row_keys=["a", "b"])
    assert tape.row_keys == ("a", "b")
    assert tape.n_prompt.tolist() == [3, 3]
    assert tape.subject is found


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"where": "layers=3"}, SiteError, "layers=3 is out of range"),
        ({"logits": "first"}, UsageError, "'last', 'all' or None"),
        ({"padding": "top"}, UsageError, "'left' or 'right'"),
        ({"where": "layers=1,component=rsid_post"}, UsageError, "Did you mean 'resid_post'"),
    ],
)
def test_mistakes(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        capture(subject("llama"), ROWS, **call)
    assert untouched(subject("llama").model)


def test_a_backbone_has_no_logits() -> None:
    found = discover(build("llama").model)
    with pytest.raises(ModelError, match=r"without logits; .*logits=None"):
        capture(found, ROWS)
    assert torch.equal(capture(found, ROWS, logits=None).states[3], capture(subject("llama"), ROWS).states[3])


# --------------------------------------------------------------------------------------- only the work that is needed


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "mamba"])
def test_without_logits_nothing_runs_that_is_not_needed(name: str) -> None:
    found = subject(name)
    full = capture(found, ROWS)
    after = [m for layer in (2,) for m in (found.blocks[layer], *inner_modules(found, layer))]
    tail = [found.model.get_submodule(found.head), found.model.get_submodule(found.final_norm)]  # type: ignore[arg-type]
    with counted([*after, *tail]) as calls:
        tape = capture(found, ROWS, where="layers=0:2", logits=None)
    assert calls == []
    assert tape.logits is None
    assert tape.depths == (1, 2)
    assert torch.equal(tape.states[2], full.states[2])
    with counted(tail) as calls:
        capture(found, ROWS, logits=None)
    assert calls == []
    with counted(tail) as calls:
        capture(found, ROWS)
    assert len(calls) == 2
    assert untouched(found.model)


def test_the_embedding_alone_runs_no_block() -> None:
    found = subject("llama")
    with counted(inner_modules(found, 0)) as calls:
        tape = capture(found, ROWS, where="layers=0,component=resid_pre", logits=None)
    assert calls == []
    assert torch.equal(tape.states[0], capture(found, ROWS).states[0])
    with counted(inner_modules(found, 1)) as calls:
        tape = capture(found, ROWS, where="layers=1,component=resid_pre", logits=None, perturb="alpha=0.5,layers=0")
    assert calls == []
    pushed = capture(found, ROWS, perturb="alpha=0.5,layers=0")
    assert torch.equal(tape.states[1], pushed.states[1])


def test_the_head_sees_only_last_tokens_where_it_can() -> None:
    found, shapes = subject("llama"), []
    capture(found, ROWS, padding="left")  # whether it can is tried once
    handle = found.model.lm_head.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[1]))  # type: ignore[union-attr, operator]
    capture(found, ROWS, padding="left")
    capture(found, [r[:3] for r in ROWS], padding="right")
    capture(found, ROWS, padding="right")
    handle.remove()
    assert shapes == [1, 1, 7]


# ------------------------------------------------------------------------------------------- modes, gradients, dtypes


def test_gradients_flow_only_when_asked() -> None:
    found = subject("llama")
    tape = capture(found, ROWS, grad=True, perturb="alpha=0.1,layers=0", logits="last")
    assert tape.states[3].requires_grad
    (grad,) = torch.autograd.grad(tape.logits.logsumexp(-1).sum(), tape.states[1])  # type: ignore[union-attr]
    assert grad.abs().max() > 0
    assert grad.shape == tape.states[1].shape
    plain = capture(found, ROWS)
    assert not any(s.requires_grad for s in plain.states)
    assert not plain.logits.requires_grad  # type: ignore[union-attr]
    torch.testing.assert_close(tape.states[0], plain.states[0], atol=0, rtol=0)
    assert all(p.grad is None for p in found.model.parameters())


def test_gradients_through_record() -> None:
    found, ids = subject("gpt2"), torch.tensor([[5, 6, 7]])
    with record(found, grad=True) as tape:
        out = found.model(input_ids=ids)
    (grad,) = torch.autograd.grad(out.logits.sum(), tape.states[2])
    assert torch.isfinite(grad).all()
    with record(found) as tape:  # the user's own graph is not cut where nothing is kept of it
        out = found.model(input_ids=ids)
    assert out.logits.requires_grad
    assert not tape.states[2].requires_grad


def test_tensors_are_ordinary_inside_inference_mode() -> None:
    found = subject("llama")
    with torch.inference_mode():
        taken = capture(found, ROWS, where=PAIRED, perturb="alpha=0.1,layers=1", logits="all")
        with record(found) as recorded:
            found.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        inside = recorded.tape
        logits = readout(found, taken.states[3])
    for tape in (taken, inside):
        tensors = [*tape.states, *tape.updates.values(), tape.mask, tape.positions, tape.token_ids, tape.n_prompt]
        for tensor in (*tensors, tape.logits, logits):
            assert tensor is None or not tensor.is_inference()
    plain = capture(found, ROWS, where=PAIRED, perturb="alpha=0.1,layers=1", logits="all")
    assert all(torch.equal(a, b) for a, b in zip(taken.states, plain.states, strict=True))
    taken.states[1].mul_(2.0).requires_grad_()


def test_bf16_models_keep_their_dtype() -> None:
    found = discover(build("llama").to(torch.bfloat16))
    assert found.updates == subject("llama").updates
    assert found.sequential
    tape = capture(found, ROWS, where=PAIRED, perturb="alpha=0.2,layers=1")
    assert {s.dtype for s in (*tape.states, *tape.updates.values())} == {torch.bfloat16}
    assert tape.passport["alpha_relnorm"] == pytest.approx(0.2, rel=0.02)


def test_capture_evaluates_and_record_leaves_the_users_mode() -> None:
    """Dropout: what dynprobe runs itself is exact; what the user runs is the user's."""
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    reference = capture(discover(build("gpt2")), ROWS)
    model.train()
    model.transformer.ln_f.eval()
    modes = [m.training for m in model.modules()]
    assert torch.equal(capture(model, ROWS).states[:], reference.states[:])
    assert [m.training for m in model.modules()] == modes
    ids = torch.tensor([ROWS[0]])
    with record(model) as tape, torch.no_grad():
        model(input_ids=ids)
    assert [m.training for m in model.modules()] == modes
    assert (tape.states[0] == 0).float().mean() > 0.3  # the user's dropout was on, and is seen
    with perturb(model, "alpha=0.1"), torch.no_grad():
        model(input_ids=ids)
    assert [m.training for m in model.modules()] == modes


# ---------------------------------------------------------------------------------- contexts: order, leaving, releasing


@pytest.mark.parametrize("order", ["record first", "perturb first"])
def test_what_is_recorded_is_what_was_written(order: str) -> None:
    found, ids, spec = subject("llama"), torch.tensor([ROWS[0]]), "alpha=0.5,layers=1"
    expected = capture(found, [ROWS[0]], perturb=spec)
    first, second = (
        (record(found), perturb(found, spec)) if order == "record first" else (perturb(found, spec), record(found))
    )
    with first as a, second as b, torch.no_grad():
        found.model(input_ids=ids)
    tape: Any = a if order == "record first" else b
    assert torch.equal(tape.states[:], expected.states[:])


def test_perturbations_compose() -> None:
    found, ids = subject("llama"), torch.tensor([ROWS[0]])
    specs = ["alpha=0.5,layers=0", "alpha=0.2,layers=1,seed=3", "alpha=0.2,layers=1,seed=4,scale=abs"]
    together = capture(found, [ROWS[0]], perturb=specs)
    with (
        record(found) as tape,
        perturb(found, specs[0]),
        perturb(found, specs[1]),
        perturb(found, specs[2]),
        torch.no_grad(),
    ):
        found.model(input_ids=ids)
    assert torch.equal(tape.states[:], together.states[:])
    turned = capture(found, [ROWS[0]], perturb=[specs[0], specs[2], specs[1]])
    assert not torch.equal(turned.states[2], together.states[2])  # the order given is the order written


def test_leaving_in_any_order_leaves_nothing() -> None:
    found = subject("llama")
    contexts = [record(found), perturb(found, "alpha=0.1"), record(found, "layers=1,component=mlp_out")]
    for context in contexts:
        context.__enter__()
    assert live_hooks(found.model) > 0
    with torch.no_grad():
        found.model(input_ids=torch.tensor([[5, 6]]))
    for i in (1, 0, 2):
        contexts[i].__exit__(None, None, None)
    assert untouched(found.model)


@pytest.mark.parametrize("where", ["body", "forward", "writer"])
def test_exceptions_leave_nothing(where: str) -> None:
    found = discover(build("llama"))

    def fail(*_: Any) -> Any:
        raise RuntimeError("mine")

    handle = found.blocks[1].register_forward_pre_hook(fail) if where == "forward" else None
    spec: Any = fail if where == "writer" else "alpha=0.1"
    call: Any = fail if where == "body" else found.model
    with pytest.raises(RuntimeError, match="mine"), record(found), perturb(found, spec):
        call(torch.tensor([[5, 6]]))
    if where != "body":
        with pytest.raises(RuntimeError, match="mine"):
            capture(found, ROWS, perturb=spec, logits=None)
    if handle is not None:
        handle.remove()
    assert untouched(found.model)
    assert torch.is_grad_enabled()
    fresh = capture(found, ROWS)
    assert torch.equal(fresh.states[:], capture(subject("llama"), ROWS).states[:])


def refs(tape: Tape | Any) -> list[weakref.ref[Tensor]]:
    held = [*tape.states, *tape.updates.values()] + ([tape.logits] if tape.logits is not None else [])
    return [weakref.ref(t) for t in held]


@pytest.mark.parametrize("logits", ["all", "last", None])
def test_nothing_keeps_states_alive(logits: str | None) -> None:
    """Without the cycle collector: memory is free the moment the tape is."""
    found = subject("llama")
    capture(found, ROWS)
    gc.collect()
    gc.disable()
    try:
        tape: Any = capture(found, ROWS, where=PAIRED, perturb="alpha=0.1,layers=1", logits=logits)
        watched = refs(tape)
        del tape
        assert [ref() for ref in watched if ref() is not None] == []
        with record(found) as tape, perturb(found, "alpha=0.1"), torch.no_grad():
            out = found.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        watched = refs(tape)
        del tape, out
        assert [ref() for ref in watched if ref() is not None] == []
    finally:
        gc.enable()


def test_a_recording_does_not_keep_the_cache() -> None:
    found = subject("llama")
    with record(found) as tape, torch.no_grad():
        out = found.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)
    watched = weakref.ref(out.past_key_values)
    del out
    assert watched() is None
    assert len(tape.states) == 4


def test_models_are_not_kept_alive_by_being_looked_at() -> None:
    model = build("gpt2")
    as_subject(model)
    capture(model, ROWS)
    watched = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert watched() is None
    finally:
        gc.enable()


def test_a_bare_module_and_its_subject_are_one() -> None:
    model = build("llama")
    assert torch.equal(capture(model, ROWS).states[:], capture(discover(model), ROWS).states[:])
    with perturb(model, Perturb(0.5, layers=1)), record(model) as tape, torch.no_grad():
        model(input_ids=torch.tensor([ROWS[0]]))
    assert torch.equal(tape.states[:], capture(model, [ROWS[0]], perturb="alpha=0.5,layers=1").states[:])
