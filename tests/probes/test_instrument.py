"""Counting, wholeness and the refusals of an instrument."""

from typing import Any

import pytest
import torch
from models import ROWS, Block, Net, build, seeded, subject
from torch import Tensor, nn

from dynprobe.errors import ModelError, SelfTestError, SiteError, UsageError
from dynprobe.probes import (
    Instrument,
    Where,
    capture,
    discover,
    live_hooks,
    make_batch,
    make_writers,
    record,
    sites_to_read,
)

ALL = Where.parse("layers=all")


def test_sites_of_a_spec() -> None:
    llama = subject("llama")
    post = [("resid_post", i) for i in range(3)]
    assert sites_to_read(llama, ALL) == [("resid_pre", 0), *post]
    assert sites_to_read(llama, Where.parse("layers=1")) == [("resid_post", 1)]
    assert sites_to_read(llama, Where.parse("blocks.1.hook_mlp_out")) == [("mlp_out", 1)]
    assert sites_to_read(llama, Where.parse("layers=2,component=resid_mid")) == [("resid_pre", 2), ("attn_out", 2)]
    assert sites_to_read(llama, Where.parse("")) == sites_to_read(llama, ALL)


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        ("llama", "layers=7", "layers=7 is out of range: this model has 3, layers 0…2"),
        ("phi", "layers=1,component=resid_mid", "side by side; it has no resid_mid"),
        ("mamba", "layers=1,component=mlp_out", "no module of mamba's blocks"),
        ("rwkv", "layers=1,component=attn_out", "no module of rwkv's blocks"),
        ("rwkv", "layers=1,component=resid_mid", "no module of rwkv's blocks"),
        ("llama", "layers=1,positions=last", "positions was given .*reading keeps whole rows.*tape.at"),
        ("llama", "phase=decode", "phase was given"),
        ("llama", "iterations=3", "iterations was given"),
    ],
)
def test_specs_that_cannot_be_read(name: str, where: str, message: str) -> None:
    with pytest.raises((SiteError, UsageError), match=message):
        sites_to_read(subject(name), Where.parse(where))


def test_a_block_that_does_not_run_is_an_error_and_not_a_shorter_table() -> None:
    class Skips(Net):
        skip = False

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens)
            for i, block in enumerate(self.stack.values()):
                h = h if self.skip and i == 1 else block(h)
            return self.head(h)

    net = discover(seeded(Skips), layers="stack.*")
    capture(net, ROWS)
    net.model.skip = True
    with pytest.raises(SelfTestError, match=r"resid_post.1 was read 0 times in 1 forwards; it must be 1"):
        capture(net, ROWS)
    with pytest.raises(SelfTestError, match=r"resid_post.1 was read 0 times"), record(net):
        net.model(torch.tensor(ROWS[:1]))
    assert live_hooks(net.model) == 0


def test_a_block_that_runs_twice_is_an_error() -> None:
    class Twice(Net):
        twice = False

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens)
            for i, block in enumerate(self.stack.values()):
                h = block(block(h)) if self.twice and i == 0 else block(h)
            return self.head(h)

    net = discover(seeded(Twice), layers="stack.*")
    net.model.twice = True
    with pytest.raises(SelfTestError, match=r"resid_pre.0 was read 2 times in 1 forwards"):
        capture(net, ROWS)


def test_counts() -> None:
    llama = subject("llama")
    batch = make_batch(llama, ROWS)
    writers = [*make_writers(llama, "alpha=0.1,layers=all"), *make_writers(llama, "alpha=0.1,layers=1,seed=1")]
    instrument = Instrument(llama, sites_to_read(llama, ALL), writers)
    with instrument, torch.no_grad():
        for _ in range(2):
            llama.model(**batch.model_inputs(llama))
    assert len(instrument.steps) == 1  # the second forward began a new sequence
    assert instrument.check_fired() == {"forwards": 1, "sites": 8, "fired": 8}


@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_that_write_in_place_are_copied(in_place: bool) -> None:
    net = discover(seeded(lambda: Net(in_place=in_place)), layers="stack.*")
    plain = capture(discover(seeded(Net), layers="stack.*"), ROWS)
    assert net.mutates is in_place
    tape = capture(net, ROWS)
    for a, b in zip(tape.states, plain.states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tape.logits, plain.logits)  # type: ignore[arg-type]
    assert len({s.data_ptr() for s in tape.states}) == 4


@pytest.mark.parametrize("logits", ["all", None])
def test_mutation_that_the_trial_did_not_show(logits: str | None) -> None:
    net = discover(seeded(Net), layers="stack.*")
    for block in net.blocks:
        block.in_place = True
    with pytest.raises(ModelError, match=r"changed the state of resid_\w+.0 in place.*subject.mutates = True"):
        capture(net, ROWS, logits=logits)
    assert live_hooks(net.model) == 0
    net.mutates = True
    reference = capture(discover(seeded(Net), layers="stack.*"), ROWS)
    for a, b in zip(capture(net, ROWS, logits=logits).states, reference.states, strict=True):
        assert torch.equal(a, b)


def test_updates_that_are_overwritten_are_copied() -> None:
    """Falcon adds attention to its MLP's output in place."""
    falcon = subject("falcon")
    assert falcon.mutates
    tape = capture(falcon, ROWS, where="layers=all,component=resid_pre+resid_post+attn_out+mlp_out")
    for layer in range(3):
        total = tape["resid_pre", layer] + tape["attn_out", layer] + tape["mlp_out", layer]
        torch.testing.assert_close(total, tape["resid_post", layer])


def test_an_unfinished_forward_is_no_tape() -> None:
    net = discover(seeded(Net), layers="stack.*")
    with record(net) as tape:
        with pytest.raises(IndexError):
            net.model(torch.tensor([[1, 5000]]))
        with pytest.raises(ModelError, match="did not finish"):
            _ = tape.states
        net.model(torch.tensor([[1, 50]]))
    assert tape.states[3].shape == (1, 2, 16)


def test_nothing_recorded() -> None:
    with record(subject("llama")) as tape:
        assert repr(tape) == "Recording(nothing yet)"
    with pytest.raises(ModelError, match="nothing was recorded"):
        _ = tape.states
    with pytest.raises(AttributeError):
        _ = tape._private


def test_a_failure_while_entering_leaves_nothing() -> None:
    llama = subject("llama")
    instrument = Instrument(llama, [("resid_post", 0), ("resid_post", 9)])
    with pytest.raises(SiteError, match="layer 9"), instrument:
        pass
    assert live_hooks(llama.model) == 0
    assert not llama.model._forward_hooks
    assert not llama.model._forward_pre_hooks


def test_images_take_the_positions_of_their_first_state() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, stride=4)
            self.blocks = nn.ModuleList([Block(16), Block(16)])

        def forward(self, pixels: Tensor) -> Tensor:
            h = self.patch(pixels).flatten(2).transpose(1, 2)
            for block in self.blocks:
                h = block(h)
            return h.mean(1)

    image = torch.randn(2, 3, 12, 8)
    net = discover(seeded(Vision), trial_input=image)
    with record(net) as tape, torch.no_grad():
        out = net.model(image)
    assert tape.positions.tolist() == [list(range(6))] * 2
    assert tape.n_prompt.tolist() == [6, 6]
    assert torch.equal(tape.states[2].mean(1), out)


def test_a_changing_number_of_positions_is_refused() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x)[:, ::2])

    x = torch.randn(1, 6, 8)
    net = discover(seeded(Pools), layers="blocks.*", trial_input=x)
    with pytest.raises(ModelError, match=r"state \(1, 3, 8\) does not fit the 1 × 6 positions"), record(net):
        net.model(x)


def test_listeners_see_each_forward_and_all_logits_can_be_forced() -> None:
    llama, seen = subject("llama"), []

    def listen(step: Any, output: Any) -> None:
        seen.append((step.index, tuple(output.logits.shape)))

    ids = torch.tensor([[5, 6, 7]])
    with Instrument(llama, listeners=[listen], all_logits=True), torch.no_grad():
        llama.model(input_ids=ids, logits_to_keep=1)
    with Instrument(llama, listeners=[listen]), torch.no_grad():
        llama.model(input_ids=ids, logits_to_keep=1)
    assert seen == [(0, (1, 3, 100)), (0, (1, 1, 100))]


def test_blocks_called_outside_a_forward_of_the_root_are_no_trajectory() -> None:
    model = build("gpt2")
    found = discover(model)
    with Instrument(found, sites_to_read(found, ALL)) as instrument, torch.no_grad():
        found.blocks[0](torch.zeros(1, 2, 32))
    assert not instrument.steps
    assert not instrument.fired
