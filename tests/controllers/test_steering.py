"""Memory, books, rows that leave, tokens that are taken back."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from toys import NEW, PROMPTS, History, Scale, fed

from dynprobe.controllers import Controller, Steering
from dynprobe.errors import ModelError, UsageError
from dynprobe.probes import Instrument, Sampling, Steerer, discover, generate, make_batch
from dynprobe.testing import tiny_gpt2, tiny_llama

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


class Keeps(Controller):
    """A memory of a test's choosing."""

    def __init__(self, begins: Any, goes_on: Any = None) -> None:
        self.begins, self.goes_on = begins, goes_on

    def start(self, n_rows: int) -> Any:
        return {"x": self.begins}

    def decide(self, seen: Any, memory: Any) -> None:
        if self.goes_on is not None:
            memory["x"] = self.goes_on


GOOD = np.zeros((2, 5))


@pytest.mark.parametrize(
    ("begins", "goes_on", "found"),
    [
        (np.zeros(3), None, r"\[3\] for 2 rows"),
        (torch.zeros(5, 2), None, r"\[5, 2\] for 2 rows"),
        ([0, 0], None, "a list"),
        (0.0, None, "a float"),
        (np.float64(1), None, "a float64"),
        (np.array(1.0), None, r"\[\] for 2 rows"),
        (GOOD, np.zeros(1), r"\[1\] for 2 rows"),
        (GOOD, "text", "a str"),
    ],
)
def test_memory_is_per_row(begins: Any, goes_on: Any, found: str) -> None:
    subject = tiny_llama()
    with pytest.raises(UsageError, match=rf"Keeps: memory 'x' is {found}; .* first axis"):  # noqa: SIM117
        with Keeps(begins, goes_on).attach(subject):
            subject.model(IDS)


def test_memory_that_is_right_is_kept() -> None:
    subject = tiny_llama()
    with Keeps(GOOD, torch.ones(2, 3, 4)).attach(subject) as handle:
        subject.model(IDS)
        assert handle.memory["x"].shape == (2, 3, 4)


def test_a_state_of_another_shape_is_refused() -> None:
    class Wrong(Scale):
        def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
            return state[:, :1] if not seen.decoding else state

    subject = tiny_llama()
    with pytest.raises(UsageError, match=r"Wrong returned \(2, 1, 32\) at resid_post.1; it must return \(2, 4, 32\)"):  # noqa: SIM117
        with Wrong().attach(subject):
            subject.model(IDS)


def test_it_is_a_steerer() -> None:
    assert isinstance(Steering(Scale(), tiny_llama()), Steerer)


# -------------------------------------------------------------------------------------------------------------- books


def test_energy_is_that_of_the_write_over_that_of_the_state() -> None:
    subject = tiny_llama()

    class Twist(Scale):
        def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
            after = state.clone()
            if seen.decoding:
                after[0, 0, 3] += 2.0
            return after

    run = fed(subject, PROMPTS[:2], NEW[:2], Twist())
    below = fed(subject, PROMPTS[:2], NEW[:2], Scale(1.0))
    table = run.actions
    pos = len(PROMPTS[0])
    h = below.state(0, pos, 2).double()
    first = table[(table["row"] == 0) & (table["pos"] == pos)]
    assert first["energy"].item() == pytest.approx(4.0 / float(h @ h), rel=1e-6)
    assert (table[table["row"] == 1]["energy"] == 0).all()
    assert (table[table["row"] == 1]["site"] == "").all()


def test_one_line_per_token_and_one_per_site_that_was_written() -> None:
    subject = tiny_llama()
    both = Scale()
    both.writes = "layers=0+2"
    table = fed(subject, PROMPTS[:2], [NEW[0][:4], NEW[1][:4]], both).actions
    assert table[["row", "pos", "site"]].values.tolist() == [
        *([0, 6 + 0, ""],), *([0, p, s] for p in (7, 8, 9) for s in ("resid_post.0", "resid_post.2")),
        *([1, 2, ""],), *([1, p, s] for p in (3, 4, 5) for s in ("resid_post.0", "resid_post.2")),
    ]  # fmt: skip
    assert table["signal"].isna().all()
    assert table["gain"].isna().all()
    assert not table["active"].any()


def test_what_was_in_force_stands_at_the_token_it_was_in_force_at() -> None:
    class Alternates(Controller):
        def start(self, n_rows: int) -> Any:
            return {"active": np.zeros(n_rows, bool), "gain": torch.zeros(n_rows), "signal": np.full(n_rows, np.nan)}

        def decide(self, seen: Any, memory: Any) -> None:
            memory["active"] = ~memory["active"]
            memory["gain"] += 1
            memory["signal"] = seen.step.positions.max(axis=1).astype(float)

    table = fed(tiny_llama(), PROMPTS[:1], [NEW[0][:4]], Alternates()).actions
    assert table["pos"].tolist() == table["signal"].tolist() == [6, 7, 8, 9]
    assert table["active"].tolist() == [False, True, False, True]
    assert table["gain"].tolist() == [0, 1, 2, 3]


def test_what_happens_to_a_row_after_its_end_can_be_left_out() -> None:
    prompts, new = [*PROMPTS, *PROMPTS, *PROMPTS], [NEW[0][:3], *[NEW[1]] * 8]  # one of nine is not worth cutting for
    run = fed(tiny_llama(), prompts, new, Scale())
    whole = run.actions
    lengths = np.array([len(p) + len(n) - 1 for p, n in zip(prompts, new, strict=True)])
    kept = run.steerings[0].actions(lengths)
    assert len(whole[whole["row"] == 0]) == 8
    assert kept[kept["row"] == 0]["pos"].tolist() == [6, 7, 8]
    alone = fed(tiny_llama(), prompts[:1], new[:1], Scale()).actions
    pd.testing.assert_frame_equal(kept[kept["row"] == 0].reset_index(drop=True), alone, rtol=1e-5)


def test_rows_keep_their_numbers_when_others_leave() -> None:
    new = [NEW[0][:2], NEW[1], NEW[2][:5]]
    run = fed(tiny_gpt2(), PROMPTS, new, History())
    table = run.actions
    # A row leaves one forward after its end: it is fed its last token's successor, a padding token, never.
    for row, n in enumerate(new):
        pos = table[table["row"] == row]["pos"].to_numpy()
        assert pos.tolist() == list(range(len(PROMPTS[row]) - 1, len(PROMPTS[row]) + len(n)))[: len(pos)]
        assert len(pos) >= len(n)
    assert run.steerings[0].memory["text"][0, :10].tolist() == [*PROMPTS[1], *NEW[1][:7]]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_generation_with_rows_that_end_is_each_rows_own(make: Any) -> None:
    subject = make()

    class Turns(Scale):
        """Acts by what the row itself has gone through."""

        reads = "layers=0"

        def start(self, n_rows: int) -> Any:
            return {"sum": torch.zeros(n_rows)}

        def decide(self, seen: Any, memory: Any) -> None:
            memory["sum"] = 0.5 * memory["sum"] + seen.states["resid_post", 0][:, -1].sum(-1)

        def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
            return state + memory["sum"].tanh()[:, None, None] if seen.decoding else state

    def written(prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
        subject.model.generation_config.eos_token_id = ends
        batch = make_batch(subject, prompts, side="left")
        instrument = Instrument(subject, (), [Steering(Turns(), subject)], **batch.rows)
        return generate(subject, batch, Sampling(max_new_tokens=10), instrument)

    free = written(PROMPTS, [10**6])
    ends = [free[0][2], free[2][5]]
    together = written(PROMPTS, ends)
    assert len({len(n) for n in together}) > 1
    assert subject.facts["decodes_alone"]
    assert together == [written([p], ends)[0] for p in PROMPTS]


# -------------------------------------------------------------------------------------------------------- taking back


def _feed(subject: Any, steering: Steering, tokens: list[int], back: dict[int, int]) -> Any:
    """Feed tokens one by one; after ``back``'s keys so many are taken back and given again."""
    batch = make_batch(subject, [PROMPTS[0]])
    with torch.no_grad(), Instrument(subject, [("resid_post", 2)], [steering], **batch.rows) as instrument:
        output = subject.model(batch.input_ids, use_cache=True)
        t = 0
        while t < len(tokens):
            output = subject.model(torch.tensor([[tokens[t]]]), past_key_values=output.past_key_values, use_cache=True)
            t += 1
            n = back.pop(t, 0)
            if n:
                output.past_key_values.crop(-n)
                instrument.rewind(n)
                t -= n
        instrument.check_fired()
        return instrument.tape()


class Counts(Scale):
    """Changes its memory in place, which a copy must not be reached by."""

    reads = "layers=1"

    def start(self, n_rows: int) -> Any:
        return {"seen": np.zeros((n_rows, 2)), "sum": torch.zeros(n_rows), "tries": np.zeros(n_rows, int)}

    def survives(self) -> tuple[str, ...]:
        return ("tries",)

    def decide(self, seen: Any, memory: Any) -> None:
        memory["seen"][:, 0] += 1
        memory["sum"] += seen.states["resid_post", 1][:, -1].norm(dim=-1)
        memory["tries"] += 1


def test_what_was_taken_back_never_was_but_for_what_survives() -> None:
    subject = tiny_llama()
    plain, back = Steering(Counts(), subject), Steering(Counts(), subject, remember=True)
    one, two = _feed(subject, plain, NEW[0], {}), _feed(subject, back, NEW[0], {3: 2, 6: 5, 8: 8})
    assert torch.equal(one.positions, two.positions)
    for depth in one.depths:
        torch.testing.assert_close(one.states[depth], two.states[depth])
    pd.testing.assert_frame_equal(plain.actions(), back.actions())
    assert plain.memory["seen"].tolist() == back.memory["seen"].tolist() == [[9, 0]]
    torch.testing.assert_close(plain.memory["sum"], back.memory["sum"])
    assert plain.memory["tries"].tolist() == [9]
    assert back.memory["tries"].tolist() == [9 + 2 + 5 + 8]


def test_refusals_of_taking_back() -> None:
    subject = tiny_llama()
    with pytest.raises(UsageError, match="2 tokens were to be taken back; Counts remembers 0"):
        _feed(subject, Steering(Counts(), subject), NEW[0], {3: 2})
    with pytest.raises(ModelError, match="9 decode steps were to be taken back; there are 3"):
        _feed(subject, Steering(Counts(), subject, remember=True), NEW[0], {3: 9})

    class Forgets(Counts):
        def survives(self) -> tuple[str, ...]:
            return ("restarts",)

    with pytest.raises(UsageError, match="Forgets: 'restarts' is to survive a restart and is not in its memory"):
        _feed(subject, Steering(Forgets(), subject, remember=True), NEW[0], {3: 2})


def test_rows_that_leave_leave_the_past_too() -> None:
    subject = tiny_llama()
    steering = Steering(Counts(), subject, remember=True)
    batch = make_batch(subject, IDS.tolist())
    with torch.no_grad(), Instrument(subject, (), [steering], **batch.rows) as instrument:
        output = subject.model(IDS, use_cache=True)
        for _ in range(3):
            output = subject.model(torch.tensor([[3], [4]]), past_key_values=output.past_key_values, use_cache=True)
        type(output.past_key_values).reorder_cache(output.past_key_values, torch.tensor([1]))
        instrument.select(np.array([1]))
        output = subject.model(torch.tensor([[4]]), past_key_values=output.past_key_values, use_cache=True)
        output.past_key_values.crop(-3)
        instrument.rewind(3)
        subject.model(torch.tensor([[4]]), past_key_values=output.past_key_values, use_cache=True)
    assert steering.memory["seen"].tolist() == [[3, 0]]
    table = steering.actions()
    assert table[table["row"] == 1]["pos"].tolist() == [3, 4, 5]


def test_half_precision_states_get_back_what_they_are() -> None:
    subject = discover(tiny_llama().model.half())
    run = fed(subject, PROMPTS, NEW, Scale(0.25))
    energy = run.actions["energy"]
    np.testing.assert_allclose(energy[energy > 0], 0.5625, rtol=1e-3)
