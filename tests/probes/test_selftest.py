"""The self-tests: they pass where all is well, and fail where something is broken on purpose."""

import json
import math
from typing import Any

import pytest
import torch
from models import IGNORES_MASK, NAMES, ROWS, Net, build, seeded, subject
from torch import Tensor, nn

from dynprobe.probes import (
    SELF_TESTS,
    Batch,
    Check,
    Perturb,
    Subject,
    capture,
    check_alone,
    check_fired,
    check_null,
    check_readout,
    check_resume,
    discover,
)
from dynprobe.testing import tiny_causal_lm


def checks(found: Subject, rows: list[list[int]] = ROWS) -> dict[str, Check]:
    tape = capture(found, rows, logits="all")
    return {
        "null": check_null(found, rows),
        "alone": check_alone(found, rows),
        "resume": check_resume(found, tape),
        "fired": check_fired(found, rows),
        "readout": check_readout(found, tape),
    }


@pytest.mark.parametrize("name", NAMES)
def test_all_five_on_every_architecture(name: str) -> None:
    found = checks(subject(name))
    assert tuple(found) == SELF_TESTS
    for test, check in found.items():
        assert check.name == test
        assert check.passed is (not (test == "alone" and name in IGNORES_MASK))
        assert check.passed is (check.value <= check.limit)
    assert found["null"].value == found["fired"].value == found["readout"].value == 0.0
    assert found["resume"].value <= 1e-6
    json.dumps([check.as_dict() for check in found.values()])


def test_rwkv_reads_its_padding_and_is_caught() -> None:
    assert check_alone(subject("rwkv"), ROWS).value > 0.1
    assert check_alone(subject("rwkv"), ROWS, side="right").passed


def test_alone_fails_when_gpt2_gets_no_position_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    found = subject("gpt2")
    assert check_alone(found, ROWS).passed
    honest = Batch.model_inputs

    def careless(self: Batch, to: Subject, **more: Any) -> dict[str, Any]:
        return {k: v for k, v in honest(self, to, **more).items() if k != "position_ids"}

    monkeypatch.setattr(Batch, "model_inputs", careless)
    check = check_alone(found, ROWS)
    assert not check.passed
    assert check.value > 100 * check.limit
    assert check.detail["states"] > 0.01
    rotary = check_alone(subject("llama"), ROWS)  # its positions are relative: reading does not need them
    assert rotary.detail["states"] < 1e-4
    assert not rotary.passed  # but writing goes on with others


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_alone_fails_when_the_mask_is_withheld(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Batch.model_inputs

    def careless(self: Batch, to: Subject, **more: Any) -> dict[str, Any]:
        # Position ids that start again would tell transformers where each text begins, mask or no mask.
        return {k: v for k, v in honest(self, to, **more).items() if k not in ("attention_mask", "position_ids")}

    assert check_alone(subject(name), ROWS).passed
    monkeypatch.setattr(Batch, "model_inputs", careless)
    assert not check_alone(subject(name), ROWS).passed


@pytest.mark.parametrize("rows", [[[5, 6, 7, 8]], [[5]], [[5, 6, 7], [8, 9, 10]], [[1], [2]], [[5, 6]] * 9])
def test_alone_always_has_padding_to_look_at(rows: list[list[int]]) -> None:
    """One prompt, or prompts of one length, would pass anything; the verdict is cached for other batches."""
    assert not check_alone(subject("rwkv"), rows).passed
    assert check_alone(subject("llama"), rows).passed


def test_alone_reports_kappa_only_where_there_is_one() -> None:
    assert math.isfinite(check_alone(subject("llama"), ROWS).detail["kappa_phase"])


def test_null_fails_for_a_writer_that_adds_zero_carelessly(monkeypatch: pytest.MonkeyPatch) -> None:
    """−0 + 0 = 0: a bit is gone, and a comparison of values would not see it."""

    class Zeros(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens) * -0.0
            for block in self.stack.values():
                h = block(h)
            return self.head(h)

    class Keep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    def make() -> Zeros:
        net = Zeros()
        net.stack = nn.ModuleDict({str(i): Keep() for i in range(3)})
        return net

    found = discover(seeded(make), layers="stack.*")
    assert check_null(found, ROWS).passed
    monkeypatch.setattr("dynprobe.probes._writers.apply", lambda h, u, mask: h + u)
    check = check_null(found, ROWS)
    assert not check.passed
    assert check.value == 0.0  # no value differs, only a sign bit


def test_null_of_a_model_with_nan_is_still_exact() -> None:
    """A non-finite activation is counted elsewhere; it is no reason to distrust the write path."""

    class Broken(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens)
            for block in self.stack.values():
                h = block(h)
            return self.head(h).masked_fill(tokens[..., None] == 9, float("nan"))

    found = discover(seeded(Broken), layers="stack.*")
    assert check_null(found, ROWS).passed


def test_null_fails_in_training_mode_of_a_model_that_has_dropout() -> None:
    found = discover(build("gpt2"))
    assert check_null(found, ROWS).passed
    found.model.train()
    assert not check_null(found, ROWS).passed


def test_null_takes_the_runs_own_perturbation() -> None:
    check = check_null(subject("llama"), ROWS, Perturb(0.3, layers="1", scale="mad", positions="last"))
    assert check.passed
    assert check.detail["spec"] == "alpha=0,scale=mad,layers=1,positions=last,kind=gaussian,seed=0"
    assert check.detail["sites"] == 5


def test_resume_fails_for_a_model_that_looks_back() -> None:
    """A skip from the first block to the last: resuming in between cannot know the skipped state."""

    class Skip(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            h = first = self.embed(tokens)
            for i, block in enumerate(self.stack.values()):
                h = block(h)
                first = h if i == 0 else first
            return self.head(h + first)

    found = discover(seeded(Skip), layers="stack.*")
    tape = capture(found, ROWS, logits="all")
    check = check_resume(found, tape)
    assert not check.passed
    assert check.detail["by_depth"][0] < 1e-6
    assert check.detail["by_depth"][2] > 0.01
    assert not check_readout(found, tape).passed


def test_fired_fails_for_a_block_that_is_skipped() -> None:
    found = discover(build("llama"))
    found.blocks = (*found.blocks[:2], build("llama").model.layers[2])  # a block that never runs
    check = check_fired(found, ROWS)
    assert not check.passed
    assert check.value == 1.0
    assert "resid_post.2 was read 0 times" in check.detail["error"]


def test_half_precision_has_its_own_limit() -> None:
    found = discover(build("llama").to(torch.bfloat16))
    for check in checks(found).values():
        assert check.passed
    assert check_alone(found, ROWS).limit >= 0.2


def test_alone_lets_rows_write_and_says_what_their_states_do_meanwhile() -> None:
    fine = check_alone(subject("llama"), ROWS)
    assert fine.detail["writing"] <= 1e-5
    assert fine.detail["decode"] <= 1e-5
    assert "writing" not in check_alone(subject("llama"), ROWS, side="right").detail
    mixing = check_alone(subject("rwkv"), ROWS)
    assert mixing.detail["writing"] == math.inf
    assert "mixes the rows of a batch when it decodes" in mixing.detail["writing_said"]


def test_alone_fails_where_padding_is_read_right_and_written_from_wrong() -> None:
    """GIT in transformers 5.23: nothing but a text that is written shows it."""
    check = check_alone(discover(tiny_causal_lm("git"), name="git"), ROWS)
    assert not check.passed
    assert check.unit == "norm of a state, while writing"
    assert check.value == check.detail["writing"] > 0.01
    assert check.detail["states"] < 1e-4
    assert check.detail["decode"] < 1e-4


def test_a_cache_that_is_another_model_is_measured_and_passes() -> None:
    """Moshi in transformers 5.23: step by step it writes other states than a whole forward over its text has."""
    check = check_alone(discover(tiny_causal_lm("moshi"), name="moshi"), ROWS)
    assert check.passed
    assert check.detail["decode"] > 0.01


def test_a_model_that_cannot_write_has_no_deviation_while_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise NotImplementedError("this one\nreads only")

    monkeypatch.setattr("dynprobe.probes._while_writing.generate", fails)
    check = check_alone(subject("llama"), ROWS)
    assert check.passed
    assert math.isnan(check.detail["writing"])
    assert math.isnan(check.detail["decode"])
    assert check.detail["writing_said"] == "NotImplementedError: this one reads only"
