"""The mode ``sampling`` narrows what the next token is drawn from, where it is active, and nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from dynprobe.controllers import Steering, generate_with, why_not
from dynprobe.controllers.recovery import Always, Guard, Narrowing, Never, Oracle, make_mode
from dynprobe.controllers.recovery._sampling import narrowed
from dynprobe.errors import UsageError
from dynprobe.probes import Instrument, Perturb, Sampling, Subject, generate, identical, make_batch
from dynprobe.probes._outputs import logits_of

ROWS, KEYS = [[5, 6, 7, 8, 9], [11, 12, 13], [3, 9, 27, 81]], ["a", "b", "c"]
DRAWN = Sampling(10, temperature=1.3, seed=1, stop_at_eos=False)


@given(st.integers(0, 10_000), st.integers(2, 60), st.floats(0.01, 0.99), st.floats(0.1, 8))
@settings(max_examples=60, deadline=None)
def test_it_is_the_librarys_temperature_and_then_its_nucleus(seed: int, vocab: int, gain: float, spread: float) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    cooled = TemperatureLogitsWarper(1 - gain)(None, logits)
    want = TopPLogitsWarper(1 - gain)(None, cooled)
    got = narrowed(logits, torch.full((3,), gain, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_its_ends() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert identical(narrowed(logits, torch.zeros(2)), logits)
    alone = narrowed(logits, torch.ones(2))
    assert alone.isfinite().sum(-1).tolist() == [1, 1]
    assert torch.equal(alone.argmax(-1), logits.argmax(-1))
    mixed = narrowed(logits.half(), torch.tensor([0.0, 0.5]))
    assert mixed.dtype == torch.float16
    assert identical(mixed[0], logits.half()[0])
    assert not mixed[1].isfinite().all()


class _Some:
    """Active at the tokens of some positions, with a gain of its own for each row."""

    reads: str | None = None

    def __init__(self, positions: set[int], gains: list[float]) -> None:
        self.positions, self.gains = positions, np.array(gains)

    def bind(self, subject: Any, calibration: Any) -> None: ...

    def start(self, n_rows: int) -> Any:
        return {
            "active": np.zeros(n_rows, bool), "gain": np.zeros(n_rows), "signal": np.full(n_rows, np.nan),
            "depth": np.full(n_rows, -1), "own": self.gains[:n_rows],
        }  # fmt: skip

    def decide(self, seen: Any, memory: Any) -> None:
        memory["active"] = np.isin(seen.step.positions.max(axis=1) + 1, list(self.positions))
        memory["gain"] = np.where(memory["active"], memory["own"], 0.0)


def test_the_logits_of_a_token_are_narrowed_by_the_gain_in_force_at_it(llama: Subject) -> None:
    """Seen by whoever calls the model; the model's own logits are what is measured."""
    timing = _Some({4, 6}, [0.5, 0.0, 0.8])
    steering = Steering(Narrowing(timing), llama)
    batch = make_batch(llama, [[5, 6, 7]] * 3, row_keys=KEYS)
    model_own: list[torch.Tensor] = []
    instrument = Instrument(
        llama, (), [steering], listeners=(lambda step, out: model_own.append(logits_of(out)[:, -1].clone()),)
    )
    handed: list[torch.Tensor] = []
    with torch.no_grad(), instrument:
        output = llama.model(batch.input_ids, use_cache=True)
        handed.append(output.logits[:, -1].clone())
        for token in (10, 11, 12, 13):
            output = llama.model(torch.full((3, 1), token), past_key_values=output.past_key_values, use_cache=True)
            handed.append(output.logits[:, -1].clone())
    for forward, (own, given_out) in enumerate(zip(model_own, handed, strict=True)):
        position = 2 + forward  # of the token that was fed last
        for number, gain in enumerate((0.5, 0.0, 0.8)):
            if position in (4, 6) and gain:
                want = narrowed(own[[number]], torch.tensor([gain]))[0]
                assert identical(given_out[number], want)
                assert not identical(given_out[number], own[number])
            else:
                assert identical(given_out[number], own[number])
    table = steering.actions()
    assert table[table["active"]]["pos"].unique().tolist() == [4, 6]
    assert (table["energy"] == 0).all()


def test_always_on_is_a_generation_at_a_lower_temperature_and_nucleus(llama: Subject) -> None:
    """From the second new token on: the first comes from the prompt's own forward."""
    for number, ids in enumerate(ROWS):
        one = make_batch(llama, [ids], row_keys=[KEYS[number]])
        steering = Steering(Narrowing(Always(g_max=0.4)), llama)
        new = generate_with(llama, one, Sampling(10, 1.0, seed=1, stop_at_eos=False), None, [steering]).new[0]
        assert new[0] == generate(llama, one, Sampling(1, 1.0, seed=1))[0][0]
        rest = make_batch(llama, [[*ids, new[0]]], row_keys=[KEYS[number]])
        assert new[1:] == generate(llama, rest, Sampling(9, 0.6, 0.6, seed=1, stop_at_eos=False))[0]


def test_inactive_is_bit_identical_and_rows_together_are_rows_alone(llama: Subject) -> None:
    batch = make_batch(llama, ROWS, side="left", row_keys=KEYS)
    plain = generate(llama, batch, DRAWN)
    for idle in (Never(), _Some({4, 5, 6, 7}, [0.0, 0.0, 0.0])):
        assert generate_with(llama, batch, DRAWN, None, [Steering(Narrowing(idle), llama)]).new == plain
    narrow = generate_with(llama, batch, DRAWN, None, [Steering(Narrowing(Always(0.7)), llama)])
    assert narrow.new != plain
    for number, ids in enumerate(ROWS):
        one = make_batch(llama, [ids], row_keys=[KEYS[number]])
        alone = generate_with(llama, one, DRAWN, None, [Steering(Narrowing(Always(0.7)), llama)])
        assert alone.new[0] == narrow.new[number]


def test_oracle_timing_narrows_the_logits_of_perturbed_tokens(llama: Subject) -> None:
    perturb = Perturb(1.0, layers=1, positions=7)
    steering = Steering(Narrowing(Oracle((perturb,), g_max=0.9)), llama)
    generate_with(llama, make_batch(llama, [ROWS[0]], row_keys=["a"]), DRAWN, None, [steering])
    table = steering.actions()
    assert table[table["active"]]["pos"].tolist() == [7]


def test_greedy_decoding_is_told_to_be_without_effect(llama: Subject) -> None:
    (mode,) = make_mode("sampling", lambda: Always(0.5))
    assert isinstance(mode, Narrowing)
    assert mode.id == "recovery.sampling/1"
    assert "greedy" in str(why_not([mode], Sampling(10)))
    assert why_not([mode], DRAWN) is None
    batch = make_batch(llama, [ROWS[0]])
    with pytest.raises(UsageError, match=r"no effect under greedy decoding .* give a temperature"):
        generate_with(llama, batch, Sampling(10), None, [Steering(mode, llama)])


def test_a_guard_sees_the_models_own_nll(llama: Subject, made_up: Any) -> None:
    """Narrowed logits would make every token look likely."""
    calibration = made_up(llama, {"nll_mean8": np.full(201, 1e9)})
    seen: list[float] = []

    class Watching(Guard):
        def restart(self, new: list[int], nll: list[float], memory: Any) -> Any:
            seen[:] = nll
            return super().restart(new, nll, memory)

    batch = make_batch(llama, [ROWS[0]], row_keys=["a"])
    steerings = [Steering(Narrowing(Always(0.9)), llama), Steering(Watching(), llama, calibration)]
    new = generate_with(llama, batch, DRAWN, None, steerings).new[0]
    with torch.no_grad():
        logits = llama.model(torch.tensor([[*ROWS[0], *new[:-1]]])).logits[0, len(ROWS[0]) - 1 :]
    want = -torch.log_softmax(logits.double(), -1)[torch.arange(10), torch.tensor(new)]
    np.testing.assert_allclose(seen, want, atol=1e-4)
