"""Reading ahead: in order, as deep as it has to be, and ended cleanly."""

import itertools
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.ahead import Depth, read_ahead


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """No reading thread may outlive its test."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_answers_come_in_order_whatever_the_order_of_arrival() -> None:
    turn, arrived = threading.Condition(), []

    def read(number: int) -> int:
        # Two at a time, the second of them first.
        with turn:
            ahead = number + 1 if number % 2 == 0 else None
            assert turn.wait_for(lambda: ahead is None or ahead in arrived, 10)
            arrived.append(number)
            turn.notify_all()
        return number * number

    assert list(read_ahead(read, range(10), most=2)) == [n * n for n in range(10)]
    assert arrived == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]


def test_an_error_is_raised_in_its_place_and_ends_the_reading() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise OSError("the disk is gone")
        return number

    answers = read_ahead(read, itertools.count(), most=4)
    assert [next(answers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)
    assert next(answers, None) is None


def test_what_nobody_asks_for_any_more_is_not_read() -> None:
    read: list[int] = []
    answers = read_ahead(lambda n: read.append(n) or n, itertools.count(), most=3)
    assert next(answers) == 0
    answers.close()  # type: ignore[attr-defined]  # it is a generator
    so_far = list(read)
    assert len(so_far) <= 3
    assert read == so_far


@given(
    read_s=st.floats(1e-4, 2.0),
    step_s=st.floats(1e-3, 2.0),
    most=st.integers(2, 32),
)
def test_the_depth_settles_where_nobody_waits_or_at_the_most(
    read_s: float, step_s: float, most: int
) -> None:
    """Reads that do not slow one another: with `now` of them, one is there every read_s / now."""
    depth = Depth(most)
    for _ in range(200):
        depth.told(read_s, max(step_s, read_s / depth.now))
    assert 2 <= depth.now <= most
    waits = read_s / depth.now > step_s
    if waits:
        assert depth.now == most
    # Not deeper than it has to be, but for a read to spare and what rounding adds.
    assert depth.now <= max(2, read_s / step_s + 3)
