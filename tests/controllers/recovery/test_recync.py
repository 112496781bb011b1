"""Recync as a controller: the published detector on the states of the run, a restart from three before the crisis."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe import metrics
from dynprobe.controllers import Restart, Seen, Steering, generate_with, why_not
from dynprobe.controllers.recovery import Recync, make_mode
from dynprobe.errors import UsageError
from dynprobe.probes import (
    Instrument,
    Perturb,
    PerturbWriter,
    Sampling,
    Subject,
    Where,
    generate,
    make_batch,
    sites_to_read,
)
from dynprobe.probes._clock import Step

PROMPT = [5, 6, 7, 8, 9]
WARM_UP = [0.9, 1.0] * 10


def shown(cosines: list[list[float]], controller: Recync | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """Show a controller rows of states whose neighbours have these cosines; its memory after every token."""
    controller = controller or Recync()
    angles = np.cumsum(np.arccos(np.array(cosines).T), axis=0)  # [token, row]
    angles = np.concatenate([np.zeros((1, angles.shape[1])), angles])
    memory, after = controller.start(angles.shape[1]), []
    for index, now in enumerate(angles):
        # Long states of any length: a cosine does not know of lengths.
        state = torch.tensor(np.stack([np.cos(now), np.sin(now)], -1) * (3.0 + index), dtype=torch.float64)[:, None]
        n = len(now)
        step = Step(index, np.full((n, 1), 4 + index), np.full(n, 5), tuple("abcdefgh"[:n]), None)
        controller.decide(Seen(step, {("resid_post", 2): state}), memory)
        after.append({name: np.array(memory[name]) for name in ("active", "signal")})
    return memory, after[1:]


@pytest.mark.parametrize("low", [0.91, 0.9195])
def test_the_published_vectors(low: float) -> None:
    memory, after = shown([[*WARM_UP, low, low, low]])
    fired = [bool(m["active"][0]) for m in after]
    assert fired == [False] * 22 + [True]
    np.testing.assert_allclose([m["signal"][0] for m in after], [*WARM_UP, low, low, low], atol=1e-6)
    new = list(range(24))  # the 24th token is chosen from the forward that shows the 23rd
    wanted = Recync().restart(new, [0.0] * 24, memory)
    assert wanted == Restart(19, seed_shift=10_000, why="recovery.recync/1: crisis at 22")
    assert memory["restarts"].tolist() == [1]


def test_a_constant_series_never_fires_and_two_low_values_are_no_crisis() -> None:
    assert not any(m["active"].any() for m in shown([[0.9] * 60, [0.3] * 60])[1])
    assert not any(m["active"].any() for m in shown([[*WARM_UP, 0.5, 0.5, 0.99, 0.5, 0.5]])[1])
    assert not any(m["active"].any() for m in shown([[*WARM_UP[:19], 0.5, 0.5, 0.5]])[1])  # the window is not full


@given(st.integers(0, 100_000), st.floats(0.05, 0.9))
@settings(max_examples=30, deadline=None)
def test_it_fires_where_the_metric_does(seed: int, spread: float) -> None:
    """On the cosines of the very states, rows side by side; the controller adds no formula of its own."""
    rng = np.random.default_rng(seed)
    rows = np.clip(0.8 - spread * rng.random((3, 70)), -0.99, 0.99).tolist()
    _, after = shown(rows, Recync(max_restarts=99))
    for number in range(3):
        cosines = [float(m["signal"][number]) for m in after]
        found = metrics.recync_detect(cosines)
        assert tuple(t for t, m in enumerate(after) if m["active"][number]) == found.at


def crisis(model: Subject, seed: int, new: int = 30) -> tuple[list[int], Any, np.ndarray]:
    """A plain text, what the detector finds in it afterwards, and its cosines."""
    batch = make_batch(model, [PROMPT], row_keys=["a"])
    instrument = Instrument(model, sites_to_read(model, Where.parse("layers=last")), (), **batch.rows)
    text = generate(model, batch, Sampling(new, 1.0, seed=seed, stop_at_eos=False), instrument)[0]
    states = instrument.tape().states[-1][0, len(PROMPT) - 1 :].double()
    cosines = metrics.token_cosine(states).numpy()
    return text, metrics.recync_detect(cosines), cosines


def test_a_run_restarts_where_the_metric_says(llama: Subject) -> None:
    seen = 0
    for seed in range(5):
        text, found, cosines = crisis(llama, seed)
        steering = Steering(Recync(), llama)
        batch = make_batch(llama, [PROMPT], row_keys=["a"])
        sampling = Sampling(30, 1.0, seed=seed, stop_at_eos=False)
        written = generate_with(llama, batch, sampling, None, [steering])
        if not found.at:
            assert written.new[0] == text
            assert written.restarts == [[]]
            continue
        seen += 1
        (record,) = written.restarts[0]
        assert (record.kept, record.at) == (found.restart[0], found.at[0] + 2)
        assert (record.seed, record.temperature) == (seed + 10_000, 1.0)
        assert record.dropped == tuple(text[found.restart[0] : found.at[0] + 2])
        other = Sampling(30 - record.kept, 1.0, seed=seed + 10_000, stop_at_eos=False)
        kept = make_batch(llama, [PROMPT + text[: record.kept]], row_keys=["a"])
        assert written.new[0] == text[: record.kept] + generate(llama, kept, other)[0]
        signal = written.actions[0]["signal"].to_numpy()
        assert np.isnan(signal[0])  # the prompt's last token
        np.testing.assert_allclose(signal[1 : 1 + record.kept], cosines[: record.kept], atol=1e-5)
        assert len(signal) == 30
    assert 2 <= seen <= 4  # and some runs have no crisis


def test_restarts_are_bounded_and_each_has_a_seed_of_its_own(llama: Subject) -> None:
    writer = PerturbWriter(llama, Perturb(0.7, layers=2))
    most = 0
    for seed in range(3):
        steering = Steering(Recync(max_restarts=2), llama)
        batch = make_batch(llama, [PROMPT], row_keys=["a"])
        instrument = Instrument(llama, (), [writer, steering], **batch.rows)
        sampling = Sampling(70, 1.0, seed=seed, stop_at_eos=False)
        records = generate_with(llama, batch, sampling, instrument, [steering]).restarts[0]
        assert [r.seed for r in records] == [seed + 10_000 * r.attempt for r in records]
        most = max(most, len(records))
    assert most == 2
    nothing = Steering(Recync(max_restarts=0), llama)
    assert generate_with(llama, batch, sampling, None, [nothing]).restarts == [[]]


def test_rows_together_are_rows_alone(llama: Subject) -> None:
    rows, keys = [PROMPT, [11, 12, 13], [3, 9, 27]], ["a", "b", "c"]
    sampling = Sampling(50, 1.0, seed=3, stop_at_eos=False)
    together = generate_with(
        llama, make_batch(llama, rows, side="left", row_keys=keys), sampling, None, [Steering(Recync(), llama)]
    )
    for number, ids in enumerate(rows):
        one = make_batch(llama, [ids], row_keys=[keys[number]])
        alone = generate_with(llama, one, sampling, None, [Steering(Recync(), llama)])
        assert (alone.new[0], alone.restarts[0]) == (together.new[number], together.restarts[number])
    assert sum(map(len, together.restarts)) >= 1


def test_greedy_decoding_and_texts_too_short_are_refused(llama: Subject) -> None:
    (mode,) = make_mode("recync", lambda: None)
    (twice,) = make_mode("recync", lambda: None, max_restarts=2, operators=None)
    assert (mode.id, mode.max_restarts, twice.max_restarts) == ("recovery.recync/1", 1, 2)
    assert "greedy" in str(why_not([mode], Sampling(50)))
    assert "24 new tokens" in str(why_not([mode], Sampling(23, 1.0)))
    assert why_not([mode], Sampling(24, 1.0)) is None
    batch = make_batch(llama, [PROMPT])
    with pytest.raises(UsageError, match="no effect under greedy decoding"):
        generate_with(llama, batch, Sampling(50), None, [Steering(mode, llama)])
    with pytest.raises(UsageError, match="max_restarts=-1"):
        Recync(max_restarts=-1)
