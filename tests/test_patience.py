"""When silence is a hang: pure, on a clock of our own."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.budget import Budget
from elastic.patience import Patience


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def training(hang_after: float = 10.0, pace_s: float = 0.1) -> tuple[Patience, Clock]:
    clock = Clock()
    patience = Patience(hang_after, clock)
    for update in range(5):
        clock.now += pace_s
        patience.heard("train", update * 8)
    return patience, clock


def test_silence_in_training_is_a_hang_after_the_setting() -> None:
    patience, clock = training()
    clock.now += 10.0
    assert patience.complaint() is None
    clock.now += 0.1
    complaint = patience.complaint()
    assert complaint is not None
    assert "silent for 10 s in 'train' at 32 samples" in complaint
    assert "hang_after" in complaint


def test_a_sign_of_life_starts_the_count_again() -> None:
    patience, clock = training()
    clock.now += 9.9
    patience.heard("train", 32)
    clock.now += 9.9
    assert patience.complaint() is None


def test_slow_updates_are_no_hang() -> None:
    """A batch of minutes is normal where all of them were."""
    patience, clock = training(hang_after=10.0, pace_s=60.0)
    clock.now += 119.0
    assert patience.complaint() is None
    clock.now += 2.0
    assert patience.complaint()


def test_the_first_update_may_compile_and_other_phases_may_take_long() -> None:
    clock = Clock()
    patience = Patience(10.0, clock)
    for phase in ("restore", "train", "save", "evaluate"):
        patience.heard(phase, 0)
        clock.now += 99.0
        assert patience.complaint() is None, phase
        clock.now += 2.0
        assert patience.complaint(), phase


def test_one_long_silence_does_not_make_the_next_hang_invisible() -> None:
    patience, clock = training(hang_after=10.0)
    clock.now += 9.0
    patience.heard("train", 40)
    assert patience.limit == 90.0
    clock.now += 60.0
    patience.heard("train", 48)
    assert patience.limit == 120.0, "twice what was normal, no longer ten times"


def test_slow_storage_is_no_hang() -> None:
    patience, clock = training(hang_after=10.0)
    patience.heard("read", 40)
    clock.now += 99.0
    assert patience.complaint() is None
    patience.heard("train", 40)
    assert patience.limit == 10.0, "and it says nothing of how long an update takes"


def test_any_word_is_a_sign_of_life() -> None:
    patience, clock = training(hang_after=10.0)
    clock.now += 9.0
    patience.stirred()
    clock.now += 9.0
    assert patience.complaint() is None


@given(st.lists(st.floats(0.01, 1000), max_size=30), st.floats(0.5, 100))
def test_patience_never_falls_below_the_setting(gaps: list[float], hang_after: float) -> None:
    clock = Clock()
    patience = Patience(hang_after, clock)
    for position, gap in enumerate(gaps):
        clock.now += gap
        patience.heard("train", position)
        assert patience.limit >= hang_after


def test_a_budget_heals_with_progress_and_only_with_it() -> None:
    budget = Budget(max_crashes=2)
    assert budget.crashed(100)
    assert budget.crashed(100)
    assert budget.crashed(200), "a new checkpoint heals it"
    assert budget.crashed(200)
    assert not budget.crashed(200)
    assert not budget.crashed(150), "an older view of the journal is no progress"
    assert budget.crashed(300)
    assert not budget.crashed(300, num=3), "lives lost inside a group count each"
