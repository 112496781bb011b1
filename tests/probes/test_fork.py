"""Branches off one clean forward are whole forwards, by every road: resumed, from a cache, and the slow one."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LAYERS, NAMES, ROWS, Net, build, seeded, subject
from torch import Tensor

from dynprobe.errors import SelfTestError, UsageError
from dynprobe.probes import (
    Fork,
    Perturb,
    PerturbWriter,
    RowsWriter,
    Subject,
    capture,
    discover,
    identical,
    live_hooks,
    make_batch,
)

CLOSE = {"atol": 5e-5, "rtol": 2e-4}
ALPHAS = np.array([0.0, 0.2, 0.8])
KEYS = ("a", "b", "c")
#: Architectures whose cache is made of layers that can be expanded row by row.
CACHED = tuple(n for n in NAMES if n not in ("rwkv", "mamba"))


def forked(found: Subject, side: str = "left", rows: Sequence[Sequence[int]] = ROWS, **more: Any) -> Fork:
    return Fork(found, make_batch(found, rows, side=side, row_keys=KEYS[: len(rows)]), **more)


def grid(fork: Fork, perturb: Perturb, alphas: np.ndarray = ALPHAS, **more: Any) -> tuple[Any, np.ndarray]:
    """Every row of the clean batch under every strength, in one batch."""
    source = np.repeat(np.arange(len(fork.batch.mask)), len(alphas))
    writer = PerturbWriter(fork.subject, perturb, magnitude=np.tile(alphas, len(fork.batch.mask)))
    return fork.branch(source, [writer], **more), source


def assert_is_the_whole_forward(
    fork: Fork, tape: Any, source: np.ndarray, perturb: Perturb, side: str, alphas: np.ndarray = ALPHAS,
    rows: Sequence[Sequence[int]] = ROWS, start: int = 0,
) -> None:  # fmt: skip
    width = fork.batch.mask.shape[1]
    assert tape.logits.shape[:2] == (len(source), width - start)
    for k, alpha in enumerate(alphas):
        whole = capture(
            fork.subject, [list(r) for r in rows], perturb=perturb.replace(alpha=float(alpha)), logits="all",
            padding=side, row_keys=KEYS[: len(rows)],
        )  # fmt: skip
        for row in np.flatnonzero(np.arange(len(source)) % len(alphas) == k):
            real = whole.mask[source[row]][start:]
            torch.testing.assert_close(tape.logits[row][real], whole.logits[source[row], start:][real], **CLOSE)
            assert tape.mask[row].tolist() == real.tolist()
            for depth in tape.states.depths:
                mine, theirs = tape.states[depth][row][real], whole.states[depth][source[row], start:][real]
                torch.testing.assert_close(mine, theirs, **CLOSE)


def untouched(found: Subject) -> bool:
    return live_hooks(found.model) == 0 and not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in found.model.modules()
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_branches_are_whole_forwards(name: str, side: str) -> None:
    found, rows = subject(name), ROWS
    if name == "rwkv" and side == "left":  # it reads its padding
        rows = [row[:3] for row in ROWS]
    fork = forked(found, side, rows)
    for layer in range(LAYERS):
        perturb = Perturb(1.0, layers=layer)
        read = [("resid_post", i) for i in range(layer, LAYERS)]
        tape, source = grid(fork, perturb, read=read)
        assert tape.states.depths == tuple(range(layer + 1, LAYERS + 1))
        assert_is_the_whole_forward(fork, tape, source, perturb, side, rows=rows)
    assert (fork.roads.resumed, fork.roads.whole, fork.roads.prefix) == (LAYERS, 0, 0)
    assert untouched(found)


@pytest.mark.parametrize("component", ["resid_pre", "attn_out", "mlp_out"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "neox"])
def test_branches_at_every_component(name: str, component: str) -> None:
    found = subject(name)
    fork = forked(found)
    for layer in (0, 2):
        perturb = Perturb(1.0, layers=layer, component=component)
        tape, source = grid(fork, perturb, read=[("resid_post", LAYERS - 1)])
        assert_is_the_whole_forward(fork, tape, source, perturb, "left")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_sites_start_at_the_lowest(name: str) -> None:
    found = subject(name)
    fork = forked(found)
    perturb = Perturb(1.0, layers="1+2", component="resid_post+mlp_out")
    tape, source = grid(fork, perturb)
    assert_is_the_whole_forward(fork, tape, source, perturb, "left")
    writers = [PerturbWriter(found, Perturb(0.3, layers=layer, seed=layer)) for layer in (2, 1)]
    both = fork.branch([0, 1, 2], writers)
    whole = capture(found, ROWS, perturb=["alpha=0.3,layers=2,seed=2", "alpha=0.3,layers=1,seed=1"], logits="all",
                    padding="left", row_keys=KEYS)  # fmt: skip
    torch.testing.assert_close(both.logits[whole.mask], whole.logits[whole.mask], **CLOSE)


def lower_calls(found: Subject, below: int, resumable: bool = True) -> tuple[list[int], list[Any]]:
    """Calls of modules inside the lower blocks from now on, and the hooks that count them."""
    calls: list[int] = []
    inner = [m for block in found.blocks[:below] for m in block.modules() if m is not block]
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in inner]
    found.resumable = resumable  # hooks in a block make it another question, which is not the one asked here
    return calls, handles


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "mamba", "bloom"])
def test_blocks_below_do_not_run(name: str) -> None:
    found = discover(build(name))
    assert found.resumable
    fork = forked(found)
    for layer in range(LAYERS):
        calls, handles = lower_calls(found, layer + 1)
        grid(fork, Perturb(1.0, layers=layer))
        assert calls == []
        grid(fork, Perturb(1.0, layers=layer), below=layer)
        assert calls != []
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", CACHED)
def test_shared_columns_give_the_same_tail(name: str) -> None:
    """One row is all padding before the first column that is run, another begins in the middle."""
    found = subject(name)
    fork = forked(found)
    start = 5
    for layer in range(LAYERS):
        perturb = Perturb(1.0, layers=layer, positions="-2:")
        widths: list[int] = []
        handle = found.blocks[-1].register_forward_pre_hook(lambda _, args, w=widths: w.append(args[0].shape[1]))
        tape, source = grid(fork, perturb, start=start, read=[("resid_post", LAYERS - 1)])
        handle.remove()
        assert widths[-1] == 2
        assert_is_the_whole_forward(fork, tape, source, perturb, "left", start=start)
        plain, _ = grid(fork, perturb)
        real = tape.mask
        torch.testing.assert_close(tape.logits[real], plain.logits[:, start:][real], **CLOSE)
        for unit, values in plain.passport.items():
            np.testing.assert_allclose(tape.passport[unit], values, rtol=1e-4, atol=1e-5, err_msg=unit)
    assert fork.roads.refusals == {}
    assert fork.roads.prefix == LAYERS
    assert 0 <= fork.roads.deviation < 1e-3
    assert untouched(found)


def test_a_cache_serves_branch_after_branch() -> None:
    """A branch must leave the shared columns as they were."""
    found = subject("gemma3")  # sliding and full layers
    fork = forked(found)
    perturb = Perturb(1.0, layers=0, positions="-1")
    first, _ = grid(fork, perturb, start=6)
    grid(fork, Perturb(3.0, layers=0, positions="-1", seed=9), start=6)
    again, _ = grid(fork, perturb, start=6)
    assert identical(first.logits, again.logits)
    assert fork.roads.prefix == 3


def test_padding_on_the_right_shares_columns_too() -> None:
    found = subject("llama")
    fork = forked(found, "right")
    perturb = Perturb(1.0, layers=1, positions="4:")
    tape, source = grid(fork, perturb, start=4)
    assert fork.roads.prefix == 1
    assert_is_the_whole_forward(fork, tape, source, perturb, "right", start=4)
    # The last token of the short row lies before column 4: it is asked for, so the branch begins earlier.
    last, _ = grid(fork, perturb, start=4, logits="last")
    for k, alpha in enumerate(ALPHAS):
        whole = capture(found, ROWS, perturb=perturb.replace(alpha=float(alpha)), row_keys=KEYS)
        torch.testing.assert_close(last.logits[k :: len(ALPHAS)], whole.logits, **CLOSE)


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_a_model_without_a_cache_of_layers_takes_the_long_road(name: str) -> None:
    found = subject(name)
    rows = [row[:3] for row in ROWS]
    fork = forked(found, rows=rows)
    perturb = Perturb(1.0, layers=1, positions="2:")
    tape, source = grid(fork, perturb, start=2)
    assert fork.roads.prefix == 0
    assert "past_key_values" in fork.roads.refusals[2] or "cache" in fork.roads.refusals[2]
    assert_is_the_whole_forward(fork, tape, source, perturb, "left", rows=rows)


class _Cacheless(torch.nn.Module):
    """A Llama whose forward takes a cache and returns none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:  # fmt: skip
        del past_key_values, use_cache
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits


def test_a_model_that_returns_no_cache_is_refused_and_recorded() -> None:
    found = discover(_Cacheless(build("llama")))
    fork = forked(found)
    perturb = Perturb(1.0, layers=1, positions="-1")
    tape, source = grid(fork, perturb, start=6)
    assert fork.roads.refusals == {6: "the model returns no cache made of layers"}
    assert fork.roads.prefix == 0
    assert_is_the_whole_forward(fork, tape, source, perturb, "left")


class _Forgetful(torch.nn.Module):
    """A Llama that loses what one layer's cache held: its cached tails are wrong, and nothing else is."""

    def __init__(self, model: Any, layer: int, error: Exception | None = None) -> None:
        super().__init__()
        self.inner, self.layer, self.error = model, layer, error

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:  # fmt: skip
        if past_key_values is not None:
            if self.error is not None:
                raise self.error
            held = past_key_values.layers[self.layer]
            held.values = torch.zeros_like(held.values)
        return self.inner(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache,
        )  # fmt: skip


def test_a_cache_that_gives_wrong_numbers_is_refused_and_the_long_road_is_right() -> None:
    found = discover(_Forgetful(build("llama"), 2))
    fork = forked(found)
    perturb = Perturb(1.0, layers=0, positions="-2:")
    for _ in range(2):  # refused once and for good
        tape, source = grid(fork, perturb, start=5)
        assert fork.roads.prefix == 0
        assert "changes the logits by" in fork.roads.refusals[5]
        assert_is_the_whole_forward(fork, tape, source, perturb, "left")


def test_a_fork_without_logits_compares_states() -> None:
    found = discover(_Forgetful(build("llama"), 2))
    fork = forked(found, logits=None)
    tape, _ = grid(fork, Perturb(1.0, layers=0, positions="-2:"), start=5)
    assert "changes the last states by" in fork.roads.refusals[5]
    assert tape.logits.shape[1] == 7


def test_rows_that_end_before_the_tail_prove_nothing_about_it() -> None:
    """The first two rows have no token there; the third one is compared."""
    found, rows = discover(_Forgetful(build("llama"), 2)), [[5, 6], [7, 8, 9], [3, 9, 27, 81, 44, 11]]
    fork = forked(found, "right", rows)
    perturb = Perturb(1.0, layers=0, positions="4:")
    tape, source = grid(fork, perturb, start=4)
    assert "changes the logits by" in fork.roads.refusals[4]
    assert_is_the_whole_forward(fork, tape, source, perturb, "right", rows=rows)
    fork = forked(subject("llama"), "right", rows)
    tape, source = grid(fork, perturb, start=4)
    assert fork.roads.prefix == 1
    assert_is_the_whole_forward(fork, tape, source, perturb, "right", rows=rows, start=4)


def test_what_was_proven_above_is_not_taken_for_proven_below() -> None:
    """The cache of the lowest block is not used by a branch above it, so that branch says nothing about it."""
    found = discover(_Forgetful(build("llama"), 0))
    fork = forked(found)
    for layer, refused in ((1, False), (0, False), (-1, True)):
        place: dict[str, Any] = {"layers": layer} if layer >= 0 else {"layers": 0, "component": "resid_pre"}
        perturb = Perturb(1.0, positions="-2:", **place)
        tape, source = grid(fork, perturb, start=5)
        assert (5 in fork.roads.refusals) is refused, layer
        assert_is_the_whole_forward(fork, tape, source, perturb, "left", start=0 if refused else 5)


def test_a_cache_that_raises_is_refused_and_memory_is_not_its_fault() -> None:
    perturb = Perturb(1.0, layers=1, positions="-1")
    fork = forked(discover(_Forgetful(build("llama"), 0, ValueError("no such column\nand more"))))
    tape, source = grid(fork, perturb, start=6)
    assert fork.roads.refusals == {6: "ValueError: no such column"}
    assert_is_the_whole_forward(fork, tape, source, perturb, "left")
    fork = forked(discover(_Forgetful(build("llama"), 0, RuntimeError("CUDA error: out of memory"))))
    with pytest.raises(RuntimeError, match="out of memory"):
        grid(fork, perturb, start=6)
    assert fork.roads.refusals == {}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
@pytest.mark.parametrize("start", [0, 5])
def test_the_slow_road_is_equal(name: str, start: int) -> None:
    found = discover(build(name))
    fork = forked(found)
    for layer in range(LAYERS):
        perturb = Perturb(1.0, layers=layer, positions="-2:")
        calls, handles = lower_calls(found, layer + 1, resumable=False)
        tape, source = grid(fork, perturb, start=start, read=[("resid_post", LAYERS - 1)])
        for handle in handles:
            handle.remove()
        assert calls
        begun = start if name != "mamba" else 0
        assert_is_the_whole_forward(fork, tape, source, perturb, "left", start=begun)
    assert (fork.roads.resumed, fork.roads.whole) == (0, LAYERS)


def test_logits_of_the_last_token_only_or_none() -> None:
    for side in ("left", "right"):
        fork = forked(subject("gpt2"), side, logits="last")
        assert fork.clean.logits.shape == (3, 100)  # type: ignore[union-attr]
        perturb = Perturb(1.0, layers=1)
        every, _ = grid(fork, perturb)
        last, _ = grid(fork, perturb, logits="last")
        none, _ = grid(fork, perturb, logits=None, read=[("resid_post", 2)])
        ends = fork.batch.mask.shape[1] - 1 - every.mask.flip(1).long().argmax(1)
        torch.testing.assert_close(last.logits, every.logits[torch.arange(9), ends], **CLOSE)
        assert none.logits is None
        assert none.states[3].shape == (9, 7, 32)
        whole = capture(subject("gpt2"), ROWS, padding=side)
        torch.testing.assert_close(fork.clean.logits, whole.logits, **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": "first"}, "logits='first'"),
        ({"start": 7}, r"start=7; the batch has columns 0…6"),
        ({"start": -1}, "start=-1"),
        ({"below": 2}, r"below=2.*writes at resid_post\.0"),
        ({"below": -1}, "below=-1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    fork = forked(subject("llama"))
    with pytest.raises(UsageError, match=message):
        grid(fork, Perturb(1.0, layers=0), **change)
    with pytest.raises(UsageError, match="logits='no'"):
        forked(subject("llama"), logits="no")


def test_gradients_mode_and_hooks_are_left_as_they_were() -> None:
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    found = discover(model)
    model.train()
    fork = forked(found)
    tape, _ = grid(fork, Perturb(1.0, layers=0, positions="-1"), start=6)
    assert all(m.training for m in model.modules())
    assert not tape.logits.requires_grad
    assert not fork.clean.states[3].requires_grad
    assert torch.is_grad_enabled()
    again, _ = grid(forked(found), Perturb(1.0, layers=0, positions="-1"), start=6)
    assert identical(tape.logits, again.logits)  # nothing dropped out
    assert untouched(found)

    class Broken:
        sites = (("resid_post", 1),)

        def write(self, state: Tensor, site: Any, step: Any) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fork.branch([0], [Broken()])
    assert untouched(found)
    assert all(m.training for m in model.modules())


def test_a_write_that_never_happens_is_an_error() -> None:
    fork = forked(discover(build("llama")))

    class Unreachable:
        sites = (("attn_out", 0),)

        def write(self, state: Tensor, site: Any, step: Any) -> Tensor:
            return state

    fork.subject.resumable = True
    with pytest.raises(SelfTestError, match=r"attn_out\.0 was written 0 times"), _without_attention(fork.subject):
        fork.branch([0], [Unreachable()])


@contextmanager
def _without_attention(found: Subject) -> Iterator[None]:
    """The first block, skipping its attention."""
    block: Any = found.blocks[0]
    block.forward = lambda hidden_states, **_: hidden_states
    try:
        yield
    finally:
        del block.forward


def test_models_of_a_users_own_branch_too() -> None:
    for kind in ("tensor", "dict", "tuple"):
        found = discover(seeded(lambda k=kind: Net(kind=k)), layers="stack.*")
        rows = [row[:3] for row in ROWS]
        fork = forked(found, rows=rows)
        perturb = Perturb(1.0, layers=1)
        tape, source = grid(fork, perturb, start=1)
        assert list(fork.roads.refusals) == [1]
        assert_is_the_whole_forward(fork, tape, source, perturb, "left", rows=rows)
    found = discover(seeded(lambda: Net(in_place=True)), layers="stack.*")
    fork = forked(found, rows=rows)
    before = copy.deepcopy([fork.clean.states[d] for d in range(4)])
    tape, source = grid(fork, perturb)
    assert_is_the_whole_forward(fork, tape, source, perturb, "left", rows=rows)
    assert all(identical(a, fork.clean.states[d]) for d, a in enumerate(before))


@pytest.fixture(scope="module")
def held() -> dict[tuple[str, str], Fork]:
    return {(n, s): forked(subject(n), s) for n in ("llama", "gpt2") for s in ("left", "right")}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["llama", "gpt2"]),
    side=st.sampled_from(["left", "right"]),
    layer=st.integers(0, LAYERS - 1),
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0.0, -0.0, 0.1, -0.5, 7.0]), st.integers(0, 1)),
        min_size=1, max_size=9,
    ),
    start=st.sampled_from([0, 5]),
    scale=st.sampled_from(["relnorm", "mad", "abs"]),
)  # fmt: skip
def test_alpha_zero_is_exact_in_every_batch_shape(
    held: Any, name: str, side: str, layer: int, rows: list[tuple[int, float, int]], start: int, scale: str
) -> None:
    """Beside rows that are written, a row with α = 0 is what it is where nothing writes, bit for bit."""
    fork = held[name, side]
    source = np.array([row for row, _, _ in rows])
    alphas, seeds = np.array([a for _, a, _ in rows]), np.array([s for _, _, s in rows])
    parts = []
    for seed in np.unique(seeds):
        mine = np.flatnonzero(seeds == seed)
        perturb = Perturb(1.0, layers=layer, seed=int(seed), positions="5:", scale=scale)
        parts.append((PerturbWriter(fork.subject, perturb, magnitude=alphas[mine]), mine))
    read = [("resid_post", i) for i in range(layer, LAYERS)]
    written = fork.branch(source, [RowsWriter(parts, len(rows))], start=start, read=read)
    bare = fork.branch(source, below=layer + 1, start=start, read=read)
    silent = torch.from_numpy(alphas == 0)
    assert identical(written.logits[silent], bare.logits[silent])
    for depth in bare.states.depths:
        assert identical(written.states[depth][silent], bare.states[depth][silent])
    loud = torch.from_numpy(alphas != 0) & (written.positions >= 5).any(1)
    if loud.any():
        reached = written.states[layer + 1][loud] != bare.states[layer + 1][loud]
        assert reached.flatten(1).any(1).all()
