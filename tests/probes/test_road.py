"""The trial of the fast road: it sees whatever a forward could look back at, and takes nothing on trust."""

from typing import Any

import pytest
import torch
from models import NAMES, ROWS, Net, build, seeded, subject
from torch import Tensor

from dynprobe.probes import capture, discover, make_batch, resume
from dynprobe.probes._road import RoadTrial, limit_for, try_road, try_road_unasked


@pytest.mark.parametrize("name", NAMES)
def test_every_depth_is_exact_where_blocks_keep_to_their_state(name: str) -> None:
    found = subject(name)
    trial = try_road(found, make_batch(found, ROWS))
    assert trial.passed
    assert list(trial.by_depth) == [0, 1, 2, 3]
    assert trial.worst <= 1e-6
    assert (trial.error, trial.reason) == ("", "")


class Sticky(Net):
    """Its last block reads what its first one left lying about."""

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for i, block in enumerate(self.stack.values()):
            h = block(h)
            if i == 0 and "forward" not in block.__dict__:  # a stub leaves nothing
                self.left = h
        return self.head(h + self.left)


def test_what_an_earlier_forward_left_behind_is_not_taken_for_this_ones() -> None:
    """The text on trial ran just before, so what it left would make a wrong resume look right."""
    found = discover(seeded(Sticky), layers="stack.*")
    trial = try_road_unasked(found)
    assert not trial.passed
    assert trial.by_depth[0] == 0.0
    assert all(trial.by_depth[d] > 0.01 for d in (1, 2, 3))
    tape = capture(found, ROWS, logits="all")
    capture(found, [[1, 2, 3, 4]])
    assert torch.equal(resume(tape, 2).logits, tape.logits)  # type: ignore[arg-type]


def test_a_forward_that_fails_is_a_reason_and_no_crash() -> None:
    class Needs(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            h, ran = self.embed(tokens), []
            for block in self.stack.values():
                h = block(h)
                ran += ["forward" not in block.__dict__]
            if not all(ran[1:]):
                raise KeyError("the keys of block 1")
            return self.head(h)

    found = discover(seeded(Needs), layers="stack.*")
    trial = try_road_unasked(found)
    assert (trial.passed, trial.worst) == (False, float("inf"))
    assert trial.reason == "resuming at depth 3: KeyError: 'the keys of block 1'"
    assert not found.resumable
    assert found.road.reason == trial.reason


def test_a_model_that_does_not_repeat_itself_shows_nothing() -> None:
    class Noisy(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) + torch.randn(())

    assert not discover(seeded(Noisy), layers="stack.*").resumable
    assert limit_for(torch.float32) == 1e-4
    assert limit_for(torch.float32, floor=2e-5) == pytest.approx(2e-4)
    assert limit_for(torch.float32, floor=1.0) == limit_for(torch.float32, floor=float("inf")) == 4e-4
    assert limit_for(torch.bfloat16) < 0.1


def test_logits_that_are_no_numbers_show_nothing() -> None:
    class Broken(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * float("nan")

    assert not discover(seeded(Broken), layers="stack.*").resumable


def test_nothing_tried_is_not_taken() -> None:
    assert not RoadTrial().passed
    found = discover(build("llama"))
    found.wrappers = ()
    assert "no trial forward was run" in try_road_unasked(found).reason
    without = discover(
        torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)]), trial_input=torch.zeros(1, 2, 4)
    )
    assert "no vocabulary" in try_road_unasked(without).reason


def test_the_verdict_is_asked_for_once_and_can_be_set() -> None:
    found: Any = discover(build("gpt2"))
    assert found.road.fast is None
    calls: list[int] = []
    handle = found.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert found.resumable
    assert found.resumable
    n = len(calls)
    assert n == 3 + found.n_layers + 1
    found.resumable = False
    assert not found.resumable
    assert len(calls) == n
    handle.remove()
