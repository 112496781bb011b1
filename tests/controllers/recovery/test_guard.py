"""The guard fires by its two rules, takes back eight tokens, and stops after two attempts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynprobe as dp
from dynprobe.controllers import Restart, Steering, generate_with, why_not
from dynprobe.controllers.recovery import Always, Guard, Recovery, make_mode, mode_name
from dynprobe.controllers.recovery._guard import repeats
from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import Calibration, Instrument, Perturb, PerturbWriter, Sampling, Subject, generate, make_batch

PROMPT = [5, 6, 7, 8, 9]
GREEDY = Sampling(24, stop_at_eos=False)
DRAWN = Sampling(24, temperature=1.0, seed=5, stop_at_eos=False)


Level = Callable[[Subject, float], Calibration]


@pytest.fixture(scope="module")
def level(made_up: Callable[..., Calibration]) -> Level:
    """``level(model, limit)``: a calibration whose clean windows all have this mean NLL."""
    return lambda model, limit: made_up(model, {"nll_mean8": np.full(201, float(limit))})


@pytest.fixture
def bound(llama: Subject, level: Level) -> Callable[[float], Guard]:
    def make(limit: float) -> Guard:
        guard = Guard()
        guard.bind(llama, level(llama, limit))
        return guard

    return make


@pytest.fixture
def write(level: Level) -> Callable[..., Any]:
    def run(model: Subject, limit: float, sampling: Sampling, prompt: list[int] = PROMPT) -> Any:
        steering = Steering(Guard(), model, level(model, limit))
        return generate_with(model, make_batch(model, [prompt], row_keys=["a"]), sampling, None, [steering])

    return run


@given(st.lists(st.integers(0, 2), max_size=30))
@settings(max_examples=80, deadline=None)
def test_repeats_against_strings(new: list[int]) -> None:
    text = "".join(map(str, new))
    count, start = 0, text.find(text[-4:]) if len(text) >= 4 else -1
    while start >= 0:
        count, start = count + 1, text.find(text[-4:], start + 1)
    assert repeats(new) == count


def test_the_rule_on_the_nll_is_strict_and_waits_for_eight_tokens(bound: Any) -> None:
    guard, memory = bound(2.0), bound(2.0).start(1)
    new = list(range(100, 109))
    assert guard.restart(new[:7], [50.0] * 7, memory) is None
    assert guard.restart(new[:8], [2.0] * 8, memory) is None
    assert memory["signal"].tolist() == [2.0]
    fired = guard.restart(new[:9], [0.0, *[2.0] * 7, 2.1], memory)
    assert fired == Restart(1, 0.7, 10_000, hold=8, why=fired.why)
    assert "mean NLL 2.01 of the last 8 tokens > 2" in fired.why
    assert memory["restarts"].tolist() == [1]


def test_the_rule_on_repeated_tokens_and_the_number_of_attempts(bound: Any) -> None:
    guard = bound(1e9)
    memory = guard.start(1)
    again = [1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3, 4]
    assert all(guard.restart(again[:n], [0.0] * n, memory) is None for n in range(1, 14))
    assert guard.restart(again, [0.0] * 14, memory) == Restart(6, 0.7, 10_000, hold=8, why="recovery.guard/1: 4 tokens "
                                                              "stood there 3 times")  # fmt: skip
    short = guard.restart([7] * 6, [0.0] * 6, memory)  # fewer than eight there: all of them
    assert (short.keep, short.seed_shift, short.hold) == (0, 20_000, 6)
    assert guard.restart([7] * 6, [0.0] * 6, memory) is None
    assert guard.survives() == ("restarts",)


def test_nothing_fires_on_ordinary_text_and_then_it_is_bit_identical(llama: Subject, write: Any) -> None:
    batch = make_batch(llama, [PROMPT], row_keys=["a"])
    written = write(llama, 1e9, DRAWN)
    assert written.restarts == [[]]
    assert written.new == generate(llama, batch, DRAWN)
    assert not written.actions[0]["active"].any()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_it_draws_eight_tokens_anew_and_goes_on_as_before(llama: Subject, write: Any, sampling: Sampling) -> None:
    """A level that everything is above: both attempts are made at the eighth token."""
    written = write(llama, 0.0, sampling)
    assert [(r.attempt, r.at, r.kept, r.seed - sampling.seed, r.temperature) for r in written.restarts[0]] == [
        (1, 8, 0, 10_000, 0.7), (2, 8, 0, 20_000, 0.7),
    ]  # fmt: skip
    plain = generate(llama, make_batch(llama, [PROMPT], row_keys=["a"]), sampling)[0]
    assert written.restarts[0][0].dropped == tuple(plain[:8])
    for record, text in zip(written.restarts[0], (written.restarts[0][1].dropped, written.new[0]), strict=True):
        drawn = Sampling(8, temperature=0.7, seed=record.seed, stop_at_eos=False)
        assert list(text[:8]) == generate(llama, make_batch(llama, [PROMPT], row_keys=["a"]), drawn)[0]
    rest = Sampling(16, sampling.temperature, seed=sampling.seed, stop_at_eos=False)
    longer = make_batch(llama, [[*PROMPT, *written.new[0][:8]]], row_keys=["a"])
    assert written.new[0][8:] == generate(llama, longer, rest)[0]


def test_a_text_that_goes_round_in_circles_is_broken_up(write: Any) -> None:
    model = dp.load("tiny-llama")
    ids = model.tokenizer("the the the the the")["input_ids"]
    sampling = Sampling(90, stop_at_eos=False)
    plain = generate(model, make_batch(model, [ids], row_keys=["a"]), sampling)[0]
    first = next(n for n in range(1, 91) if repeats(plain[:n]) >= 3)
    written = write(model, 1e9, sampling, ids)
    record = written.restarts[0][0]
    assert (record.at, record.kept, record.why) == (first, first - 8, "recovery.guard/1: 4 tokens stood there 3 times")
    assert written.new[0][: record.kept] == plain[: record.kept]


def test_its_level_is_the_q99_of_the_models_own_calibration() -> None:
    model = dp.load("tiny-llama")
    prompts = ["The river ran past the old mill and on towards the sea.", "Two and two are four, and four is even."]
    made = dp.calibrate(model, prompts)
    guard = Guard()
    guard.bind(model, made)
    means = []
    for text in prompts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logp = torch.log_softmax(model.model(ids).logits.double(), -1)[0]
        nll = -logp[torch.arange(1, ids.shape[1] - 1), ids[0, 2:]].numpy()
        means += [nll[i : i + 8].mean() for i in range(len(nll) - 7)]
    assert guard.limit == pytest.approx(np.quantile(means, 0.99), rel=1e-3)


def test_the_nll_is_seen_under_the_perturbation(llama: Subject, level: Level) -> None:
    """A level between the clean and the perturbed text's: only the perturbed run restarts."""
    batch = make_batch(llama, [PROMPT], row_keys=["a"])

    def run(limit: float, alpha: float) -> Any:
        steering = Steering(Guard(), llama, level(llama, limit))
        writer = PerturbWriter(llama, Perturb(alpha, layers=1))
        instrument = Instrument(llama, (), [writer, steering], **batch.rows)
        return generate_with(llama, batch, Sampling(20, 0.3, seed=2, stop_at_eos=False), instrument, [steering])

    clean, pushed = (run(1e9, alpha).actions[0]["signal"].max() for alpha in (0.0, 1.5))
    assert clean < pushed
    between = (clean + pushed) / 2
    assert [bool(run(between, alpha).restarts[0]) for alpha in (0.0, 1.5)] == [False, True]


def test_what_is_missing_is_said(llama: Subject, level: Level, made_up: Any) -> None:
    with pytest.raises(CalibrationError, match="there is none"):
        Steering(Guard(), llama)
    with pytest.raises(CalibrationError, match="nll_mean8"):
        Steering(Guard(), llama, made_up(llama, {}))
    assert "at least 6 new tokens" in str(why_not([Guard()], Sampling(5)))
    with pytest.raises(UsageError, match=r"dp\.recover"), Guard().attach(llama, level(llama, 1.0)):
        pass


def test_hybrid_is_slerp_and_guard() -> None:
    made = make_mode("HYBRID_RECOVERY", lambda: Always(0.5))
    assert mode_name("HYBRID_RECOVERY") == "hybrid"
    assert [type(c) for c in made] == [Recovery, Guard]
    assert {c.id for c in made} == {"recovery.hybrid/1"}
    assert [c.restarts for c in made] == [False, True]


def test_hybrid_acts_on_states_and_takes_back_what_it_wrote(llama: Subject, level: Level) -> None:
    modes = make_mode("hybrid", lambda: Always(0.5), site="layers=1")
    steerings = [Steering(c, llama, level(llama, 0.0)) for c in modes]
    batch = make_batch(llama, [PROMPT, PROMPT[:3]], side="left", row_keys=["a", "b"])
    written = generate_with(llama, batch, DRAWN, None, steerings)
    assert [len(r) for r in written.restarts] == [2, 2]
    slerp = written.actions[0]
    for row, length in ((0, 5), (1, 3)):
        mine = slerp[slerp["row"] == row]
        assert mine["pos"].tolist() == list(range(length - 1, length + 23))
        assert (mine["energy"] > 0).tolist() == [False] + [True] * 23
