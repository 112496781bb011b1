"""Groups that do not fit are halved; every other error is somebody's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.probes._chunks import halving, out_of_memory

NO_ROOM = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
]


class Memory:
    """Work that fits up to ``room`` items; keeps the sizes it was asked for."""

    def __init__(self, room: int, error: BaseException) -> None:
        self.room, self.error, self.sizes = room, error, []

    def __call__(self, group):
        self.sizes.append(len(group))
        if len(group) > self.room:
            raise self.error
        return list(group)


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda e: type(e).__name__)
def test_halving_down_to_what_fits_and_keeping_it(error):
    assert out_of_memory(error)
    work, noted = Memory(2, error), []
    made = list(halving(range(11), 8, work, noted.append))
    assert work.sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert noted == [8, 4]
    assert [item for group in made for item in group] == list(range(11))


@given(n=st.integers(0, 40), size=st.integers(-1, 20), room=st.integers(1, 20))
def test_every_item_is_done_once_and_in_order(n, size, room):
    work, noted = Memory(room, MemoryError()), []
    made = list(halving(list(range(n)), size, work, noted.append))
    assert [item for group in made for item in group] == list(range(n))
    assert all(0 < len(group) <= min(max(size, 1), room) for group in made)
    assert all(group > room for group in noted)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("mine"), KeyboardInterrupt()]
)
def test_other_errors_pass_through_at_once(error):
    assert not out_of_memory(error)
    work = Memory(1, error)
    with pytest.raises(type(error)) as raised:
        list(halving(range(6), 4, work))
    assert raised.value is error
    assert work.sizes == [4]


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda e: type(e).__name__)
def test_a_single_row_that_does_not_fit_says_what_to_do(error):
    work, noted = Memory(0, error), []
    with pytest.raises(MemoryError, match="one row alone does not fit into memory; take shorter texts") as raised:
        list(halving(range(4), 4, work, noted.append))
    assert raised.value.__cause__ is error
    assert work.sizes == [4, 2, 1]
    assert noted == [4, 2]


def test_what_was_done_before_memory_ran_out_is_kept():
    sizes = iter([4, 1, 4, 4])

    def work(group):
        if len(group) > next(sizes):
            raise MemoryError
        return len(group)

    assert list(halving(range(8), 4, work)) == [4, 2, 2]
