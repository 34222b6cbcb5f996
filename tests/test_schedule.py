"""Phases and buckets by arithmetic alone, and durations in samples."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages import AdamW, Bucket, Ema, Phase
from stages.optimizer import ema_beta, learning_rate
from stages.schedule import Slot, check_schedule, samples_before, slot_at

NAMES = (("32px", 5), ("32px", 1), ("64x32", 5))


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Phase, ...]:
    """One to four phases, each a whole number of cycles of one to three buckets."""
    phases, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        kinds = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        buckets = tuple(
            Bucket(size, frames=frames, batch=draw(st.integers(1, 9))) for size, frames in kinds
        )
        cycle = sum(bucket.batch for bucket in buckets)
        start += cycle * draw(st.integers(1, 6))
        phases.append(Phase(until=start, buckets=buckets))
    return tuple(phases)


def _walk(schedule: tuple[Phase, ...]) -> list[tuple[int, Slot]]:
    """The start of every cycle with its slot, by counting up."""
    cycles, start = [], 0
    for index, phase in enumerate(schedule):
        for cycle, position in enumerate(range(start, phase.until, phase.cycle)):
            cycles.append((position, Slot(index, start, phase, cycle)))
        start = phase.until
    return cycles


@settings(deadline=None)
@given(schedule=schedules())
def test_a_position_lies_in_the_cycle_that_counting_finds(schedule: tuple[Phase, ...]) -> None:
    check_schedule(schedule)
    for start, slot in _walk(schedule):
        for position in range(start, start + slot.phase.cycle):
            assert slot_at(schedule, position) == slot
    end = schedule[-1].until
    with pytest.raises(ValueError, match=f"position {end}: the schedule ends at {end}"):
        slot_at(schedule, end)


@settings(deadline=None)
@given(schedule=schedules())
def test_samples_of_a_bucket_before_a_cycle_are_those_that_counting_finds(
    schedule: tuple[Phase, ...],
) -> None:
    used = {f"{size}-{frames}f": 0 for size, frames in NAMES}
    for _, slot in _walk(schedule):
        for size, frames in NAMES:
            bucket = Bucket(size, frames=frames, batch=1)
            assert samples_before(schedule, slot, bucket) == used[bucket.name]
        for bucket in slot.phase.buckets:
            used[bucket.name] += bucket.batch


@settings(deadline=None)
@given(
    start=st.integers(0, 50),
    batches=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    length=st.integers(1, 200),
)
def test_a_phase_of_broken_cycles_is_told_the_nearest_whole_one(
    start: int, batches: list[int], length: int
) -> None:
    before = [Phase(until=start, buckets=(Bucket("32px", frames=1, batch=start),))] if start else []
    buckets = tuple(Bucket("32px", frames=k + 1, batch=n) for k, n in enumerate(batches))
    phase = Phase(until=start + length, buckets=buckets)
    if length % phase.cycle == 0:
        return check_schedule((*before, phase))
    with pytest.raises(ValueError, match="not a whole number") as caught:
        check_schedule((*before, phase))
    message = str(caught.value)
    assert f"schedule[{len(before)}].until {start + length}" in message
    assert f"{phase.cycle} samples" in message
    nearest = int(re.findall(r"\d+", message)[-1])
    check_schedule((*before, phase.replace(until=nearest)))
    whole = [start + k * phase.cycle for k in range(1, 203)]
    assert abs(nearest - phase.until) == min(abs(n - phase.until) for n in whole)


def test_phases_must_rise() -> None:
    phase = Phase(until=16, buckets=(Bucket("32px", frames=1, batch=8),))
    with pytest.raises(
        ValueError, match=r"schedule\[1\]\.until 16: must be greater than .* \(16\)"
    ):
        check_schedule((phase, phase))
    with pytest.raises(ValueError, match=r"schedule \[\]: a stage needs at least one Phase"):
        check_schedule(())


def test_a_phase_holds_each_bucket_once_and_at_least_one() -> None:
    bucket = Bucket("32px", frames=1, batch=8)
    with pytest.raises(ValidationError, match=r"\['32px-1f'\] stands twice in one phase"):
        Phase(until=16, buckets=(bucket, bucket.replace(batch=3)))
    with pytest.raises(ValidationError, match="needs at least one Bucket"):
        Phase(until=16, buckets=())


@pytest.mark.parametrize(
    ("size", "height", "width"), [("256px", 256, 256), ("288x512", 288, 512), ("8x9", 8, 9)]
)
def test_a_size_is_a_square_or_height_by_width(size: str, height: int, width: int) -> None:
    bucket = Bucket(size, frames=33, batch=1)
    assert (bucket.height, bucket.width, bucket.name) == (height, width, f"{size}-33f")


@pytest.mark.parametrize(
    "size", ["256", "px", "0px", "256x0", "256 px", "-8px", "8x8x8", "8x8px\n"]
)
def test_another_word_for_a_size_is_refused_with_the_two_that_are_right(size: str) -> None:
    with pytest.raises(ValidationError, match="write '256px' or 'HEIGHTxWIDTH'"):
        Bucket(size, frames=1, batch=1)


@settings(deadline=None)
@given(warmup=st.integers(0, 500), decay=st.integers(0, 500), samples=st.integers(1, 1000))
def test_the_learning_rate_follows_the_samples_and_is_never_zero(
    warmup: int, decay: int, samples: int
) -> None:
    rate = learning_rate(AdamW(lr=2.0, warmup=warmup, decay=decay), samples, budget=1000)
    warm = samples / warmup if samples < warmup else 1.0
    cool = (1000 - samples) / decay if 1000 - samples < decay else 1.0
    assert rate == pytest.approx(2.0 * warm * max(cool, 0.01))
    assert rate > 0


def test_the_halflife_grows_with_progress_up_to_its_value() -> None:
    ema = Ema(halflife=100, rampup=0.1)
    # After 200 samples the half-life is 20, so a batch of 20 halves the old weight.
    assert ema_beta(ema, samples=200, batch=20) == pytest.approx(0.5)
    assert ema_beta(ema, samples=10_000, batch=100) == pytest.approx(0.5)
    assert ema_beta(ema, samples=8, batch=8) < 1e-3, "the random start must be forgotten"


@given(st.lists(st.integers(1, 64), min_size=1, max_size=20))
def test_the_weight_of_the_old_average_depends_on_samples_and_not_on_updates(
    batches: list[int],
) -> None:
    ema = Ema(halflife=100, rampup=1e9)
    product = 1.0
    for batch in batches:
        product *= ema_beta(ema, samples=10_000, batch=batch)
    assert product == pytest.approx(ema_beta(ema, samples=10_000, batch=sum(batches)))
