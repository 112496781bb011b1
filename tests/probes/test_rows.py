"""Rows that carry writes of their own: each is what its writer would have written had it been alone."""

from typing import Any

import numpy as np
import pytest
import torch
from models import ROWS, subject
from test_writers import yardstick

from dynprobe.errors import UsageError
from dynprobe.probes import Instrument, Perturb, PerturbWriter, RowsWriter, identical, make_batch
from dynprobe.probes._clock import Step
from dynprobe.probes._decode import decode
from dynprobe.probes._inputs import Batch
from dynprobe.probes._passport import UNITS

TEXTS = [ROWS[0], ROWS[1], ROWS[2], ROWS[0][:4], ROWS[2]]
KEYS = tuple("abcde")
DIRECTION = np.linspace(-1, 1, 32)
PERTURBS = [
    Perturb(0.3, layers=1),
    Perturb(0.2, layers="0+2", seed=4, scale="coordstd"),
    Perturb(0.5, layers=1, kind="direction", direction=DIRECTION, positions="-1"),
    Perturb(0.1, layers=2, kind="dropout", positions="all"),
]


def batch_of(rows: Any = range(5), side: str = "left") -> Batch:
    rows = list(rows)
    return make_batch(subject("llama"), [TEXTS[i] for i in rows], side=side, row_keys=[KEYS[i] for i in rows])


def run(writers: list[Any], batch: Batch) -> tuple[torch.Tensor, Instrument]:
    found = subject("llama")
    instrument = Instrument(found, [("resid_post", 2)], writers, **batch.rows)
    with torch.no_grad(), instrument:
        logits = found.model(**batch.model_inputs(found)).logits
    instrument.check_fired()
    return logits, instrument


def writer(number: int, **more: Any) -> PerturbWriter:
    return PerturbWriter(subject("llama"), PERTURBS[number], calibration=yardstick(), **more)


def same_row(one: Any, i: int, other: Any, j: int, batch: Batch, alone: Batch) -> None:
    torch.testing.assert_close(one[0][i][batch.mask[i]], other[0][j][alone.mask[j]], atol=3e-5, rtol=1e-4)
    mine, theirs = one[1].passport(), other[1].passport()
    for name in (*UNITS, "n_asked", "n_left_alone"):
        np.testing.assert_allclose(mine[name][i], theirs[name][j], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_what_its_writer_alone_would_write(side: str) -> None:
    batch = batch_of(side=side)
    parts = [(0, [0, 3]), (1, [1]), (2, [2]), (3, [4])]
    together = run([RowsWriter([(writer(n), np.array(rows)) for n, rows in parts], 5)], batch)
    for number, rows in parts:
        alone = batch_of(rows, side)
        found = run([writer(number)], alone)
        for j, row in enumerate(rows):
            same_row(together, row, found, j, batch, alone)


def test_overlapping_rows_are_written_by_both_in_turn_and_others_by_none() -> None:
    batch = batch_of()
    parts = [(writer(0), np.array([0, 1])), (writer(1), np.array([1, 2]))]
    together = run([RowsWriter(parts, 5)], batch)
    clean = run([], batch)
    for row in (3, 4):
        assert identical(together[0][row], clean[0][row])
        assert np.isnan(together[1].passport()["alpha_abs"][row])
        assert together[1].passport()["n_asked"][row] == 0
    for row, numbers in ((0, [0]), (1, [0, 1]), (2, [1])):
        alone = batch_of([row])
        same_row(together, row, run([writer(n) for n in numbers], alone), 0, batch, alone)


@pytest.mark.parametrize("order", [[4, 2, 0, 1, 3], [1, 0]])
def test_the_order_in_which_rows_are_named_changes_nothing(order: list[int]) -> None:
    batch = batch_of()
    alphas = np.linspace(0.1, 0.5, 5)
    rows = np.array(order)
    mixed = run([RowsWriter([(writer(0, magnitude=alphas[rows]), rows)], 5)], batch)
    rows = np.sort(rows)
    plain = run([RowsWriter([(writer(0, magnitude=alphas[rows]), rows)], 5)], batch)
    assert identical(mixed[0], plain[0])
    for name, values in plain[1].passport().items():
        np.testing.assert_array_equal(mixed[1].passport()[name], values, err_msg=name)
    if len(rows) == 5:
        np.testing.assert_allclose(plain[1].passport()["alpha_relnorm"], alphas, rtol=1e-5)


def test_the_order_of_parts_changes_nothing_where_they_share_no_row() -> None:
    batch = batch_of()
    parts = [(n, np.array(rows)) for n, rows in ((0, [0, 3]), (1, [1]), (3, [4]))]
    one = run([RowsWriter([(writer(n), rows) for n, rows in parts], 5)], batch)
    other = run([RowsWriter([(writer(n), rows) for n, rows in parts[::-1]], 5)], batch)
    assert identical(one[0], other[0])


def test_all_rows_in_one_part_is_the_writer_itself() -> None:
    batch = batch_of()
    one = run([RowsWriter([(writer(0), np.arange(5))], 5)], batch)
    other = run([writer(0)], batch)
    assert identical(one[0], other[0])
    assert {k: v.tolist() for k, v in one[1].passport().items()} == {
        k: v.tolist() for k, v in other[1].passport().items()
    }


def test_where_nothing_is_written_the_very_same_object_comes_back() -> None:
    far = PerturbWriter(subject("llama"), Perturb(0.3, layers=1, positions=90))
    together = RowsWriter([(far, np.array([1, 3]))], 5)
    state = torch.randn(5, 7, 32)
    step = Step(0, np.tile(np.arange(7), (5, 1)), np.full(5, 7), KEYS, None)
    assert together.write(state, ("resid_post", 1), step) is state
    assert together.write(state, ("resid_post", 0), step) is state
    assert together.passport() is None
    assert [counts.tolist() for counts in together.asked()] == [[0] * 5] * 2
    assert together.first_position([7] * 5, 7).tolist() == [7] * 5


def test_first_positions_are_the_earliest_of_each_rows_writers() -> None:
    parts = [(writer(0), np.array([0, 1])), (writer(2), np.array([1, 2])), (writer(3), np.array([3]))]
    first = RowsWriter(parts, 5).first_position([7, 3, 5, 4, 5], 7)
    assert first.tolist() == [1, 1, 4, 0, 7]  # positions=-1 is the prompt's last


def test_a_row_named_twice_or_not_there_is_refused() -> None:
    for rows in ([0, 0], [5], [-1]):
        with pytest.raises(UsageError, match=r"name each row once, 0…4"):
            RowsWriter([(writer(0), np.array(rows))], 5)
    assert RowsWriter([], 5).sites == ()


def test_rows_keep_their_writers_when_others_leave_the_batch() -> None:
    """Rows end at different steps; what is written to those that stay is what they would get alone."""
    found = subject("llama")
    perturbs = [Perturb(a, layers=1, seed=s) for a, s in ((0.2, 0), (0.9, 1), (1.5, 2))]
    rows = [np.array([0, 3]), np.array([1, 4]), np.array([2])]

    def forced(wanted: dict[int, int]) -> Any:
        """End row ``i`` after ``wanted[i]`` tokens by making token 2 the largest."""
        steps = {"n": 0}

        def adjust(scores: torch.Tensor, alive: np.ndarray) -> torch.Tensor:
            steps["n"] += 1
            scores[:, 2] = -torch.inf
            for place, row in enumerate(alive):
                if wanted.get(int(row)) == steps["n"]:
                    scores[place, 2] = torch.inf
            return scores

        return adjust

    batch = batch_of()
    ends = {0: 1, 4: 2, 3: 4}
    together = RowsWriter([(PerturbWriter(found, p), r) for p, r in zip(perturbs, rows, strict=True)], 5)
    instrument = Instrument(found, [("resid_post", 1)], [together], **batch.rows)
    with torch.no_grad(), instrument:
        new = decode(found, batch, 7, [2], forced(ends), instrument)
    assert [len(n) for n in new] == [1, 7, 7, 4, 2]
    assert len({len(s.positions) for s in instrument.steps}) > 2  # rows did leave
    tape, fed = instrument.tape(), np.array([len(t) + len(n) - 1 for t, n in zip(TEXTS, new, strict=True)])
    sizes = instrument.passport(fed)
    for row in range(5):
        number = next(i for i, r in enumerate(rows) if row in r)
        alone = Instrument(found, [("resid_post", 1)], [PerturbWriter(found, perturbs[number])], **batch_of([row]).rows)
        with torch.no_grad(), alone:
            mine = decode(found, batch_of([row]), 7, [2], forced({0: ends.get(row, 0)}), alone)
        assert mine[0] == new[row]
        own = alone.tape()
        real = tape.mask[row] & (tape.positions[row] < int(fed[row]))
        assert int(real.sum()) == fed[row]
        theirs = own.states[2][0][own.mask[0]][: fed[row]]
        torch.testing.assert_close(tape.states[2][row][real], theirs, atol=3e-5, rtol=1e-4)
        assert tape.token_ids is not None
        assert tape.token_ids[row][real].tolist() == [*TEXTS[row], *new[row]][: fed[row]]
        for name, value in alone.passport(fed[row : row + 1]).items():
            np.testing.assert_allclose(sizes[name][row], value[0], rtol=1e-4, err_msg=name)
