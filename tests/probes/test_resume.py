"""Resuming from a depth and reading out of one: exact, and without the blocks below."""

from typing import Any

import pytest
import torch
from models import CONTAINERS, NAMES, ROWS, Net, build, seeded, subject
from torch import Tensor

from dynprobe.errors import ModelError, SiteError, UsageError
from dynprobe.probes import (
    Subject,
    Tape,
    capture,
    check_resume,
    discover,
    live_hooks,
    logits_of,
    readout,
    record,
    resume,
)
from dynprobe.probes._stub import stubbed


def calls_below(found: Subject, depth: int, run: Any) -> int:
    """How often a module inside the blocks below ``depth`` runs."""
    calls: list[int] = []
    inner = [m for block in found.blocks[:depth] for m in block.modules() if m is not block]
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in inner]
    _ = found.resumable  # hooks inside blocks are a reason to try again, and the trial runs all blocks
    calls.clear()
    run()
    for handle in handles:
        handle.remove()
    return len(calls)


def clean(found: Subject) -> bool:
    return live_hooks(found.model) == 0 and not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in found.model.modules()
    )


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_the_identity_at_every_depth(name: str, padding: str) -> None:
    found = subject(name)
    tape = capture(found, ROWS, logits="all", padding=padding)
    real = tape.mask
    for depth in range(4):
        again = resume(tape, depth, tape.states[depth])
        assert again.depths == tuple(range(depth, 4))
        assert torch.equal(again.logits[real], tape.logits[real])  # type: ignore[index]
        for d in range(depth, 4):
            assert torch.equal(again.states[d][real], tape.states[d][real])
        assert torch.equal(again.positions, tape.positions)
    assert clean(found)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "mamba", "mixtral"])
def test_blocks_below_do_not_run(name: str) -> None:
    found = subject(name)
    tape = capture(found, ROWS)
    for depth in range(4):
        assert calls_below(found, depth, lambda d=depth: resume(tape, d)) == 0
    assert calls_below(found, 3, lambda: readout(found, tape.states[3])) == 0
    assert calls_below(found, 3, lambda: capture(found, ROWS)) > 0


@pytest.mark.parametrize("kind", CONTAINERS)
def test_stubs_answer_in_the_blocks_own_container(kind: str) -> None:
    found = discover(seeded(lambda: Net(kind=kind)), layers="stack.*")
    tape = capture(found, ROWS, logits="all")
    for depth in range(4):
        assert torch.equal(resume(tape, depth).logits, tape.logits)  # type: ignore[arg-type]
    assert torch.equal(readout(found, tape.states[3]), tape.logits)  # type: ignore[arg-type]


def test_resuming_in_place_models_does_not_spoil_the_tape() -> None:
    found = discover(seeded(lambda: Net(in_place=True)), layers="stack.*")
    tape = capture(found, ROWS, logits="all")
    before = tape.states[:]
    for depth in range(4):
        assert torch.equal(resume(tape, depth).logits, tape.logits)  # type: ignore[arg-type]
        assert torch.equal(tape.states[:], before)
    readout(found, tape.states[3])
    assert torch.equal(tape.states[:], before)


@pytest.mark.parametrize("name", NAMES)
def test_several_versions_at_once_are_each_alone(name: str) -> None:
    found = subject(name)
    tape = capture(found, ROWS, logits="all", padding="right")
    draw = torch.Generator().manual_seed(0)
    for depth in (0, 2):
        h = tape.states[depth]
        versions = [h, h + 0.3 * h.std() * torch.randn(h.shape, generator=draw), h * 1.5]
        together = resume(tape, depth, torch.cat(versions))
        assert together.row_keys == tape.row_keys * 3
        real = tape.mask
        for k, version in enumerate(versions):
            alone = resume(tape, depth, version)
            mine = together.logits[3 * k : 3 * k + 3]  # type: ignore[index]
            torch.testing.assert_close(mine[real], alone.logits[real], atol=3e-5, rtol=1e-4)  # type: ignore[index]
        assert not torch.allclose(together.logits[3:6][real], tape.logits[real], atol=1e-3)  # type: ignore[index]


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "mamba"])
def test_resuming_a_pushed_state_is_pushing(name: str) -> None:
    """A sweep at layers=l resumes at l + 1 and gets what the whole forward gets."""
    found, spec = subject(name), "alpha=0.4,layers=1"
    tape, pushed = capture(found, ROWS), capture(found, ROWS, perturb=spec, logits="all")
    again = resume(tape, 2, pushed.states[2])
    real = tape.mask
    assert torch.equal(again.logits[real], pushed.logits[real])  # type: ignore[index]
    assert torch.equal(again.states[3][real], pushed.states[3][real])


def test_a_recorded_generation_can_be_resumed_as_one_forward() -> None:
    found = subject("llama")
    model: Any = found.model
    with record(found) as recording, torch.no_grad():
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    tape: Tape = recording.tape
    whole = capture(found, tape.token_ids, logits="all")  # type: ignore[arg-type]
    torch.testing.assert_close(resume(tape, 2).logits, whole.logits, atol=1e-4, rtol=1e-3)


def test_models_that_look_back_take_the_slow_road() -> None:
    """A skip over the blocks: nobody asks for a self-test, and still every block runs and the answer is right."""

    class Skip(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            h = first = self.embed(tokens)
            for i, block in enumerate(self.stack.values()):
                h = block(h)
                first = h if i == 0 else first
            return self.head(h + first)

    found = discover(seeded(Skip), layers="stack.*")
    tape = capture(found, ROWS, logits="all")
    assert torch.equal(resume(tape, 2).logits, tape.logits)  # type: ignore[arg-type]
    assert not found.resumable
    assert "SD where the blocks below do not run" in found.road.reason
    found.resumable = True  # what the fast road would have given
    assert not torch.allclose(resume(tape, 2).logits, tape.logits)  # type: ignore[arg-type]
    assert not check_resume(found, tape).passed
    assert not found.resumable
    pushed = capture(found, ROWS, perturb="alpha=0.5,layers=1", logits="all")
    for depth in range(4):
        assert torch.equal(resume(tape, depth).logits, tape.logits)  # type: ignore[arg-type]
    again = resume(tape, 2, torch.cat([tape.states[2], pushed.states[2]])).logits
    torch.testing.assert_close(again, torch.cat([tape.logits, pushed.logits]))  # type: ignore[list-item]
    assert calls_below(found, 2, lambda: resume(tape, 2)) > 0
    assert clean(found)


def test_what_logits_are_given() -> None:
    tape = capture(subject("llama"), ROWS, logits="all")
    ends = torch.stack([tape.logits[i, len(r) - 1] for i, r in enumerate(ROWS)])  # type: ignore[index]
    assert torch.equal(resume(tape, 1, logits="last").logits, ends)  # type: ignore[arg-type]
    assert resume(tape, 1, logits=None).logits is None
    again = resume(tape, 1).logits
    assert again is not None
    assert not again.requires_grad


def test_states_of_another_dtype_are_taken() -> None:
    tape = capture(subject("llama"), ROWS, logits="all")
    assert torch.equal(resume(tape, 1, tape.states[1].double()).logits, tape.logits)  # type: ignore[arg-type]
    found = discover(build("mamba").to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    kept = capture(found, ROWS, logits="all")
    assert found.state_dtype == kept.states[3].dtype
    assert torch.equal(readout(found, kept.states[3]), kept.logits)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_readout_is_the_models_own_tail(name: str, padding: str) -> None:
    found = subject(name)
    tape = capture(found, ROWS, logits="all", padding=padding)
    assert torch.equal(readout(found, tape.states[3])[tape.mask], tape.logits[tape.mask])  # type: ignore[index]
    assert clean(found)


def test_readout_of_every_shape() -> None:
    found = subject("gpt2")
    tape = capture(found, ROWS, logits="all")
    h, expected = tape.states[3], tape.logits
    assert expected is not None
    torch.testing.assert_close(readout(found, h[0, 2]), expected[0, 2])
    torch.testing.assert_close(readout(found, h[0]), expected[0])
    assert readout(found, h[0]).shape == (7, 100)
    lens = readout(found, tape.states[:])
    assert lens.shape == (4, 3, 7, 100)
    torch.testing.assert_close(lens[3], expected)
    long = h[0, 0].expand(5000, 32)  # more states than the model has positions
    torch.testing.assert_close(readout(found, long), expected[0, 0].expand(5000, 100))


def test_the_tail_includes_what_follows_the_head() -> None:
    """Gemma 2 caps its logits; a tail put together from norm and head would miss it."""
    found = subject("gemma2")
    tape = capture(found, ROWS, logits="all")
    with torch.no_grad():
        by_hand = found.model.lm_head(found.model.model.norm(tape.states[3]))  # type: ignore[union-attr, operator]
    assert not torch.allclose(by_hand, tape.logits)  # type: ignore[arg-type]
    assert torch.equal(readout(found, tape.states[3]), tape.logits)  # type: ignore[arg-type]


def test_mistakes() -> None:
    found = subject("llama")
    tape = capture(found, ROWS, where="layers=1:")
    with pytest.raises(SiteError, match=r"depth 4 was asked for; llama has depths 0…3"):
        resume(tape, 4)
    with pytest.raises(SiteError, match="depth -1 was asked for"):
        resume(tape, -1)
    with pytest.raises(SiteError, match="the tape holds depths 2–3"):
        resume(tape, 1)
    for wrong in (torch.zeros(4, 7, 32), torch.zeros(3, 6, 32), torch.zeros(0, 7, 32)):
        with pytest.raises(UsageError, match=r"needs \[k·3, 7, dim\]"):
            resume(tape, 2, wrong)
    with pytest.raises(UsageError, match="width 31 were given; llama has width 32"):
        resume(tape, 2, torch.zeros(3, 7, 31))
    with pytest.raises(UsageError, match="width 31 were given; llama has width 32"):
        readout(found, torch.zeros(31))
    with pytest.raises(UsageError, match="'last', 'all' or None"):
        resume(tape, 2, logits="first")
    tape.token_ids = None
    with pytest.raises(ModelError, match="with token ids"):
        resume(tape, 2)
    assert clean(found)


def test_stubs_are_taken_off_after_an_exception() -> None:
    found = discover(build("llama"))
    tape = capture(found, ROWS)

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    handle = found.blocks[2].register_forward_pre_hook(fail)
    for depth in (0, 2):
        with pytest.raises(RuntimeError, match="mine"):
            resume(tape, depth)
    handle.remove()
    handle = found.model.lm_head.register_forward_pre_hook(fail)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="mine"):
        readout(found, tape.states[3])
    handle.remove()
    assert clean(found)
    assert torch.equal(capture(found, ROWS).states[:], tape.states[:])


def test_a_forward_that_somebody_else_replaced_is_put_back() -> None:
    """accelerate wraps the forward of every module it places."""
    found = discover(build("llama"))
    block, calls = found.blocks[0], []
    honest = block.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return honest(*args, **kwargs)

    block.forward = wrapped  # type: ignore[method-assign]
    assert found.resumable  # runs forwards of its own
    calls.clear()
    tape = capture(found, ROWS, logits="all")
    assert calls == [1]
    assert torch.equal(resume(tape, 2).logits, tape.logits)  # type: ignore[arg-type]
    assert calls == [1]
    assert block.__dict__["forward"] is wrapped


def test_stubs_pass_their_input_on_where_nothing_was_recorded() -> None:
    found = subject("llama")
    tape = capture(found, ROWS)
    with stubbed(found, 3, lambda _: None), torch.no_grad():
        through = capture(found, ROWS)
    assert torch.equal(through.states[3], tape.states[0])


def test_resume_and_readout_evaluate_and_put_the_mode_back() -> None:
    found = discover(build("gpt2", resid_pdrop=0.5))
    tape = capture(found, ROWS, logits="all")
    found.model.train()
    assert torch.equal(resume(tape, 1).logits, tape.logits)  # type: ignore[arg-type]
    assert torch.equal(readout(found, tape.states[3]), tape.logits)  # type: ignore[arg-type]
    assert all(m.training for m in found.model.modules())


def test_logits_of_outputs() -> None:
    tensor = torch.zeros(1, 2, 3)
    assert logits_of(tensor) is tensor
    with pytest.raises(ModelError, match="returned tuple without logits"):
        logits_of((tensor,))


def test_models_that_change_the_state_between_blocks_resume_too() -> None:
    found = discover(build("rwkv", num_hidden_layers=8))
    tape = capture(found, ROWS, logits="all")
    assert not found.chained
    for depth in range(9):
        again = resume(tape, depth)
        assert torch.equal(again.logits[tape.mask], tape.logits[tape.mask])  # type: ignore[index]
