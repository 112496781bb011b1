import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.engines import Item, Schedule, content_key
from dynprobe.errors import EngineError


def plan(n, seats, **settings):
    items = [Item(number, number, content_key(number)) for number in range(n)]
    return items, Schedule(items, seats, **settings)


@given(st.integers(0, 40), st.integers(1, 7), st.randoms(use_true_random=False))
def test_every_item_is_given_once_whatever_the_order_in_which_seats_ask(n, seats, random):
    items, schedule = plan(n, seats)
    given_out, idle = [], set()
    while len(idle) < seats:
        seat = random.randrange(seats)
        item = schedule.take(seat)
        if item is None:
            idle.add(seat)
        else:
            assert not idle, "a seat was told that nothing is left, and there was"
            given_out.append(item)
    assert sorted(item.number for item in given_out) == list(range(n))
    assert len(items) == len(given_out)


def test_a_seat_gets_neighbours_and_takes_the_later_half_of_the_longest_stretch():
    _, schedule = plan(12, 3)
    assert [schedule.take(0).number for _ in range(4)] == [0, 1, 2, 3]
    assert schedule.take(1).number == 4
    # seat 2 still has 8..11, seat 1 has 5, 6, 7
    assert [schedule.take(0).number for _ in range(2)] == [10, 11]
    assert schedule.take(2).number == 8


def test_an_item_given_back_is_the_next_of_its_seat_and_not_for_ever():
    items, schedule = plan(4, 2, tries=2)
    first = schedule.take(0)
    schedule.give_back(0, first, "signal SIGKILL")
    assert schedule.take(0) is first
    with pytest.raises(EngineError, match=r"unit 0 of the plan ended 2 workers.*SIGKILL.*--batch-size"):
        schedule.give_back(0, first, "signal SIGKILL")
    schedule.give_back(1, items[2], "signal SIGKILL")  # each item has its own count
