"""The order of samples: a pure function of (seed, stage, position)."""

import time
import tracemalloc
from collections import Counter
from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import CLIP, STAGE, STILL

from elastic.data import permutation
from elastic.data.deal import deal
from elastic.data.order import (
    EMPTY_DIGEST,
    BatchPlan,
    batch_at,
    bucket_at,
    chain_digest,
    updates_before,
)
from elastic.data.permutation import Permutation, WindowedPermutation
from stages import AdamW, Bucket, DiffusionStage, Phase, Windows

COUNTS = {CLIP: 23, STILL: 17}
# Pearson's statistic over 255 degrees of freedom: mean 255, deviation 22.6; this is 6.6 of them.
CHI_SQUARE_BOUND = 405.0


def _one_bucket(batch: int, num_batches: int) -> DiffusionStage:
    bucket = Bucket("32px", frames=5, batch=batch)
    schedule = [Phase(until=batch * num_batches, buckets=(bucket,))]
    return STAGE.replace(schedule=schedule, optimizer=AdamW(lr=1e-3))


def _walk(stage: DiffusionStage, counts: dict[str, int]) -> list[BatchPlan]:
    """Every batch of a stage, one after another."""
    plans, position = [], 0
    while position < stage.budget:
        plans.append(batch_at(stage, position, counts))
        position += plans[-1].bucket.batch
    assert position == stage.budget
    return plans


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_a_permutation_is_a_bijection_of_any_size(size: int, key: int) -> None:
    there = Permutation(size, "test", key)(np.arange(size))
    assert np.array_equal(np.sort(there), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_smallest_sizes_reach_every_order_of_two_and_are_bijections(size: int) -> None:
    orders = {tuple(Permutation(size, "test", key)(np.arange(size))) for key in range(200)}
    assert all(sorted(found) == list(range(size)) for found in orders)
    assert len(orders) > 1 or size == 1


WINDOWS = st.builds(Windows, run=st.integers(8, 70), mixed=st.integers(8, 20))


@settings(deadline=None)
@given(size=st.integers(1, 3000), windows=WINDOWS, key=st.integers(0, 2**63))
def test_windows_are_a_bijection_of_any_size(size: int, windows: Windows, key: int) -> None:
    there = WindowedPermutation(size, windows, "test", key)(np.arange(size))
    assert np.array_equal(np.sort(there), np.arange(size))


def test_windows_too_small_to_shuffle_are_refused() -> None:
    with pytest.raises(ValueError, match="run 7 x mixed 9 = 63 samples"):
        Windows(run=7, mixed=9)


def test_a_window_is_read_from_as_many_runs_as_are_mixed_and_mixes_them() -> None:
    size, windows = 10_000 - 7, Windows(run=50, mixed=8)
    there = WindowedPermutation(size, windows, "test")(np.arange(size))
    before: set[int] = set()
    for first in range(0, size, 400):
        runs = np.bincount(there[first : first + 400] // 50, minlength=200)
        most = np.flatnonzero(runs > 7)  # fewer are those that the short last run sends elsewhere
        assert len(most) <= 8
        assert not before & set(most.tolist()), "a run is read in one window"
        before |= set(most.tolist())
        # Each run is spread over its window: so many of its samples come in the first half.
        early = np.bincount(there[first : first + 200] // 50, minlength=200)[most]
        assert (early > 10).all()
        assert (early < 40).all()
    other = WindowedPermutation(size, windows, "another")(np.arange(size))
    assert (there == other).mean() < 0.01


@settings(deadline=None)
@given(size=st.integers(1, 60), batch=st.integers(1, 80), windows=st.one_of(st.none(), WINDOWS))
def test_each_sample_comes_once_an_epoch(size: int, batch: int, windows: Windows | None) -> None:
    plans = _walk(_one_bucket(batch, 6).replace(order=windows), {CLIP: size})
    stream = np.concatenate([plan.indices for plan in plans])
    epochs = np.concatenate([plan.epochs for plan in plans])
    assert np.array_equal(epochs, np.arange(6 * batch) // size)
    for first in range(0, len(stream) - size + 1, size):
        assert np.array_equal(np.sort(stream[first : first + size]), np.arange(size))


def test_epochs_go_on_through_phases_and_whatever_the_batch() -> None:
    """A sample comes again only when all of its bucket have been used, phases notwithstanding."""
    used: dict[str, list[int]] = {CLIP: [], STILL: []}
    for plan in _walk(STAGE, COUNTS):
        used[plan.bucket.name].extend(plan.indices.tolist())
    assert len(used[CLIP]) == 15 * 5 + 20 * 7
    assert len(used[STILL]) == 15 * 6
    for name, size in COUNTS.items():
        for first in range(0, len(used[name]) - size + 1, size):
            assert sorted(used[name][first : first + size]) == list(range(size))


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (None, "1ca9c139f7a453b9d1d5e9cb5bf0da99"),
        (Windows(), "8d5f8685a9d3f19ce94f9b15380c745a"),
    ],
)
def test_the_order_is_that_of_runs_that_began_before(
    windows: Windows | None, expected: str
) -> None:
    """Of before there were mixes: a run that goes on with another order sees samples twice."""
    digest = EMPTY_DIGEST
    for plan in _walk(STAGE.replace(order=windows), COUNTS):
        digest = chain_digest(chain_digest(digest, plan.indices), plan.epochs)
    assert digest == expected


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_what_the_ranks_get_together_is_the_batch(world: int) -> None:
    for plan in _walk(STAGE, COUNTS):
        dealt = [deal(plan.bucket.batch, plan.bucket.micro, rank, world) for rank in range(world)]
        # Round by round and rank by rank is the order in which micro-batches are cut.
        seen = [
            plan.indices[offsets[:num_real]]
            for turn in zip(*dealt, strict=True)
            for offsets, num_real in turn
        ]
        assert np.array_equal(np.concatenate(seen), plan.indices)


def test_any_position_can_be_asked_first_last_and_twice() -> None:
    plans = _walk(STAGE, COUNTS)
    for plan in reversed(plans):
        again = batch_at(STAGE, plan.position, COUNTS)
        assert again.bucket == plan.bucket
        assert np.array_equal(again.indices, plan.indices)
        assert np.array_equal(again.epochs, plan.epochs)


def test_a_position_inside_a_batch_or_after_the_end_is_refused() -> None:
    inside = STAGE.schedule[0].buckets[0].batch - 2
    with pytest.raises(ValueError, match=f"'tiny': position {inside} is inside a batch"):
        batch_at(STAGE, inside, COUNTS)
    with pytest.raises(ValueError, match=f"position {STAGE.budget}: the schedule ends"):
        batch_at(STAGE, STAGE.budget, COUNTS)


def test_each_bucket_comes_once_a_cycle_and_not_always_in_one_order() -> None:
    buckets = STAGE.schedule[0].buckets
    turns = set()
    for start in range(0, STAGE.schedule[0].until, 11):
        first = bucket_at(STAGE, start)[1]
        second = bucket_at(STAGE, start + first.batch)[1]
        assert {first, second} == set(buckets)
        turns.add(first.name)
    assert turns == {CLIP, STILL}


def test_micro_batches_do_not_change_the_order() -> None:
    smaller = [
        phase.replace(buckets=[bucket.replace(micro=1) for bucket in phase.buckets])
        for phase in STAGE.schedule
    ]
    for mine, theirs in zip(
        _walk(STAGE.replace(schedule=smaller), COUNTS), _walk(STAGE, COUNTS), strict=True
    ):
        assert np.array_equal(mine.indices, theirs.indices)


@pytest.mark.parametrize("change", [{"seed": 1}, {"name": "other"}])
def test_another_seed_or_name_is_another_order(change: dict[str, object]) -> None:
    mine = np.concatenate([p.indices for p in _walk(_one_bucket(100, 5), {CLIP: 500})])
    stage = _one_bucket(100, 5).replace(**change)
    theirs = np.concatenate([p.indices for p in _walk(stage, {CLIP: 500})])
    # Two random orders of 500 agree in one place on average.
    assert (mine == theirs).sum() < 10


def test_another_epoch_is_another_order() -> None:
    plans = _walk(_one_bucket(500, 3), {CLIP: 500})
    assert all((plans[a].indices == plans[b].indices).sum() < 10 for a, b in [(0, 1), (0, 2)])


def _serial_chi_square(there: NDArray[np.int64], cells: int = 16) -> float:
    """Pearson's statistic of neighbouring pairs, each value put into one of `cells` classes."""
    size = len(there)
    classes = there * cells // size
    pairs = np.bincount(classes[:-1] * cells + classes[1:], minlength=cells**2)
    expected = (size - 1) / cells**2
    return float(((pairs - expected) ** 2 / expected).sum())


def test_neighbours_in_the_order_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 100_000
    found = [_serial_chi_square(Permutation(size, "chi", k)(np.arange(size))) for k in range(8)]
    assert max(found) < CHI_SQUARE_BOUND
    # The control: two half-rounds are too few, and the statistic sees it.
    monkeypatch.setattr(permutation, "_HALF_ROUNDS", 2)
    weak = [_serial_chi_square(Permutation(size, "chi", k)(np.arange(size))) for k in range(8)]
    assert min(weak) > CHI_SQUARE_BOUND


@pytest.mark.parametrize("windows", [None, Windows()])
def test_a_batch_of_a_thousand_million_samples_costs_no_time_and_no_memory(
    windows: Windows | None,
) -> None:
    size = 10**9
    stage = _one_bucket(10_080, 400_000).replace(order=windows)
    position = 10_080 * 312_345
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        plan = batch_at(stage, position, {CLIP: size})
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    try:
        batch_at(stage, position, {CLIP: size})
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(plan.indices)) == 10_080
    assert plan.indices.min() >= 0
    assert plan.indices.max() < size
    assert min(seconds) < 0.05  # the best of five: other work on the machine is not its cost
    # A few columns of the batch; a shuffle of the epoch would take 8 GB.
    assert peak_bytes < 20 * 8 * 10_080


@settings(deadline=None)
@given(size=st.integers(1, 10**12))
def test_walking_into_range_takes_few_steps(size: int) -> None:
    """The grid is larger than the size by less than one row, so a walk seldom has a second step."""
    mapped = Permutation(size, "grid")
    cells = mapped._rows * mapped._columns
    assert size <= cells < size + isqrt(size) + 1
    some = np.unique(np.linspace(0, size - 1, 200).astype(np.int64))
    there = mapped(some)
    assert len(np.unique(there)) == len(some)
    assert there.min() >= 0
    assert there.max() < size


def test_updates_before_a_position_are_those_one_counts_by_walking() -> None:
    plans = _walk(STAGE, COUNTS)
    counted = {plan.position: number for number, plan in enumerate(plans)}
    counted[STAGE.budget] = len(plans)
    assert {position: updates_before(STAGE, position) for position in counted} == counted


def test_the_digest_depends_on_every_id_and_on_their_order() -> None:
    digests = Counter[str]()
    for ids in ([1, 2, 3], [1, 3, 2], [1, 2], [1, 2, 4], []):
        digests[chain_digest(EMPTY_DIGEST, np.array(ids, dtype=np.int64))] += 1
    digests[EMPTY_DIGEST] += 1
    assert set(digests.values()) == {1}
    one = chain_digest(EMPTY_DIGEST, np.array([5, 6]))
    assert one == chain_digest(EMPTY_DIGEST, np.array([5, 6], dtype=np.int32))
