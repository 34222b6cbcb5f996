"""Dealing a batch to ranks, and reading it ahead of training."""

# B sample

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLIP, STAGE, STILL, DrawnLatents

from elastic.data.deal import deal
from elastic.data.load import (
    Micro,
    Samples,
    Source,
    Stream,
    by_text,
    held_out_rounds,
    rounds_of,
)
from elastic.data.order import BatchPlan, batch_at
from elastic.data.permutation import Indices
from elastic.world import World
from models.context import Context
from stages import Bucket

COUNTS = {CLIP: 23, STILL: 17}
sizes = st.integers(1, 64)


def _world(rank: int, size: int, context: int = 1) -> World:
    """What a stream reads of a world; it sends no message, so no group is needed."""
    nobody = cast(Any, None)
    shared = Context(nobody, rank % context, context) if context > 1 else None
    return World(rank, size, torch.device("cpu"), nobody, context=shared)


class Breaking(DrawnLatents):
    """A source whose disk fails at a batch of stills."""

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        if bucket.name == STILL:
            raise OSError("the disk is gone")
        return super().fetch(bucket, indices)


@settings(deadline=None)
@given(batch=sizes, micro=sizes, world=st.integers(1, 12), exact=st.booleans())
def test_every_sample_counts_once_and_every_rank_computes_alike(
    batch: int, micro: int, world: int, exact: bool
) -> None:
    dealt = [deal(batch, micro, rank, world, exact) for rank in range(world)]
    counted = Counter(
        offset for rounds in dealt for offsets, real in rounds for offset in offsets[:real]
    )
    assert counted == Counter(range(batch))
    shapes = {tuple(len(offsets) for offsets, _ in rounds) for rounds in dealt}
    assert len(shapes) == 1, "ranks with fewer rounds would hang, those of others compile alone"
    assert all(
        0 <= offset < batch for rounds in dealt for offsets, _ in rounds for offset in offsets
    )
    (shape,) = shapes
    assert len(shape) == min(n for n in range(1, batch + 1) if n * micro * world >= batch)
    if exact:
        assert set(shape) == {micro}
    else:
        assert sum(shape) * world - batch < world, "a rank computes more than any has to"
        assert max(shape) <= micro
        assert max(shape) - min(shape) <= 1


@settings(deadline=None)
@given(batch=sizes, micro=sizes, world=st.integers(1, 12))
def test_of_an_exact_stage_the_same_micro_batches_are_cut_for_any_world(
    batch: int, micro: int, world: int
) -> None:
    def cuts(size: int) -> list[tuple[int, ...]]:
        dealt = [deal(batch, micro, rank, size, exact=True) for rank in range(size)]
        return [
            tuple(offsets[:real])
            for turn in zip(*dealt, strict=True)
            for offsets, real in turn
            if real
        ]

    assert cuts(world) == cuts(1)


def test_a_machine_less_costs_little_more_than_its_share() -> None:
    """Open-Sora 2.0's stills and clips on 224 GPUs, and on 216."""
    for batch, micro, most in ((10_080, 45, 47), (2_688, 12, 13), (672, 3, 4)):
        assert [len(offsets) for offsets, _ in deal(batch, micro, 0, 224)] == [micro]
        assert sum(len(offsets) for offsets, _ in deal(batch, micro, 0, 216)) == most


@pytest.mark.parametrize(("size", "rounds"), [(1, [2, 2, 3]), (2, [2, 2]), (3, [3]), (8, [1])])
def test_weights_are_one_for_each_sample_of_the_batch_and_zero_for_the_filling(
    size: int, rounds: list[int]
) -> None:
    source = DrawnLatents(STAGE, COUNTS, 100)
    plan = batch_at(STAGE, 165, COUNTS)
    assert len(plan.indices) == 7
    weights: Counter[int] = Counter()
    for rank in range(size):
        micros = list(rounds_of([plan], source, rank, size))
        assert [len(micro.samples.ids) for micro in micros] == rounds
        assert [micro.is_last for micro in micros] == [False] * (len(micros) - 1) + [True]
        for micro in micros:
            assert micro.batch == 7
            assert micro.samples.x_BCTHW.shape[1:] == (4, 2, 4, 4)
            pairs = zip(micro.samples.ids, micro.samples.weight_B.tolist(), strict=True)
            for number, weight in pairs:
                weights[int(number)] += int(weight)
    expected = source.sample_ids(plan.bucket, plan.indices)
    assert weights == Counter({int(number): 1 for number in expected})


@pytest.mark.parametrize(("size", "context"), [(1, 1), (2, 1), (3, 1), (2, 2), (6, 3)])
def test_held_out_samples_are_each_measured_once_and_no_more_than_asked(
    size: int, context: int
) -> None:
    source, bucket = DrawnLatents(STAGE, COUNTS, 100), STAGE.buckets[0]
    for most, expected in ((64, 23), (7, 7)):
        weights: Counter[int] = Counter()
        stage = STAGE.replace(held_out=most)
        for rank in range(size):
            for micro in held_out_rounds(source, stage, bucket, _world(rank, size, context)):
                pairs = zip(micro.samples.ids, micro.samples.weight_B.tolist(), strict=True)
                weights.update({int(number): 1 for number, weight in pairs if weight})
        assert weights == Counter(range(100, 100 + expected))


@given(
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=64),
    micro=st.integers(1, 16),
    world=st.integers(1, 6),
    exact=st.booleans(),
)
def test_texts_of_like_length_are_padded_together_whatever_the_world(
    lengths: list[int], micro: int, world: int, exact: bool
) -> None:
    count = len(lengths)
    plan = BatchPlan(0, STAGE.buckets[0], np.arange(count), np.arange(count) * 3)
    ordered, in_order = by_text(plan, np.array(lengths))
    assert sorted(ordered.indices.tolist()) == list(range(count))
    assert np.array_equal(ordered.epochs, ordered.indices * 3)
    assert in_order.tolist() == sorted(lengths, reverse=True)
    again, _ = by_text(plan, np.array(lengths))
    assert np.array_equal(again.indices, ordered.indices)

    dealt = [deal(count, micro, rank, world, exact) for rank in range(world)]
    cuts = [in_order[offsets] for rounds in dealt for offsets, _ in rounds]
    # Laid side by side, what one cut is padded by is no part of what another one is.
    padding = sum(len(cut) * cut.max() - cut.sum() for cut in cuts)
    assert padding <= max(map(len, cuts)) * (max(lengths) - min(lengths))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_micro_batch_says_how_long_its_longest_text_is(size: int) -> None:
    source = DrawnLatents(STAGE, COUNTS, 100)
    plan = batch_at(STAGE, 165, COUNTS)
    for rank in range(size):
        for micro in rounds_of([plan], source, rank, size):
            assert micro.samples.text is not None
            assert micro.samples.text.text_BLD.shape[1] == micro.text_tokens


def test_of_a_bucket_without_samples_there_is_no_round() -> None:
    source, none = DrawnLatents(STAGE, COUNTS, 100), np.empty(0, np.int64)
    assert list(rounds_of([BatchPlan(0, STAGE.buckets[0], none, none)], source, 0, 1)) == []


def test_ranks_of_one_context_read_the_same_samples_and_one_of_them_counts() -> None:
    source, bucket = DrawnLatents(STAGE, COUNTS, 100), STAGE.buckets[0]
    first, second, other = (
        list(held_out_rounds(source, STAGE, bucket, _world(rank, 4, 2))) for rank in (0, 1, 2)
    )
    for mine, theirs, elsewhere in zip(first, second, other, strict=True):
        assert torch.equal(mine.samples.x_BCTHW, theirs.samples.x_BCTHW)
        assert mine.samples.weight_B.sum() > theirs.samples.weight_B.sum() == 0
        assert not torch.equal(mine.samples.x_BCTHW, elsewhere.samples.x_BCTHW)


@pytest.fixture
def threads_end() -> Iterator[None]:
    """No reading thread may outlive its test."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def _stream(source: Source, position: int = 0) -> Stream[Micro]:
    return Stream(STAGE, source, _world(0, 1), position, lambda micro: micro)


@pytest.mark.usefixtures("threads_end")
@pytest.mark.parametrize("position", [0, 110, 165])
def test_steps_come_in_order_from_any_position_to_the_end(position: int) -> None:
    source = DrawnLatents(STAGE, COUNTS, 100)
    stream = _stream(source, position)
    while position < STAGE.budget:
        step = stream.step(position)
        plan = batch_at(STAGE, position, COUNTS)
        assert np.array_equal(step.sample_ids, source.sample_ids(plan.bucket, plan.indices))
        counted = [m.samples.ids[m.samples.weight_B.numpy() > 0] for m in step.micros]
        trained = np.concatenate(counted)
        assert np.array_equal(np.sort(trained), np.sort(step.sample_ids))
        position += plan.bucket.batch
    stream.close()


@pytest.mark.usefixtures("threads_end")
def test_a_stream_that_nobody_reads_can_be_closed() -> None:
    stream = _stream(DrawnLatents(STAGE, COUNTS, 100))
    stream.step(0)  # so that the thread runs, and fills the queue again
    stream.close()


@pytest.mark.usefixtures("threads_end")
def test_an_error_of_the_source_reaches_who_trains() -> None:
    stream = _stream(Breaking(STAGE, COUNTS, 100))
    position, first_still = 0, _first_still()
    while position < first_still:
        position += stream.step(position).plan.bucket.batch
    with pytest.raises(OSError, match="the disk is gone"):
        stream.step(position)
    stream.close()


def _first_still() -> int:
    position = 0
    while (plan := batch_at(STAGE, position, COUNTS)).bucket.name != STILL:
        position += plan.bucket.batch
    return position


def test_a_step_that_was_not_asked_for_in_order_is_noticed() -> None:
    stream = _stream(DrawnLatents(STAGE, COUNTS, 100))
    with pytest.raises(AssertionError, match="asked 110, read 0"):
        stream.step(110)
    stream.close()


def test_a_sample_is_the_same_whatever_comes_with_it() -> None:
    """The fake itself: what the tests of worlds rest on."""
    source, bucket = DrawnLatents(STAGE, COUNTS, 100), STAGE.buckets[0]
    alone = source.fetch(bucket, np.array([4]))
    among = source.fetch(bucket, np.array([1, 4, 2]))
    assert torch.equal(alone.x_BCTHW[0], among.x_BCTHW[1])
    assert not torch.equal(among.x_BCTHW[0], among.x_BCTHW[1])
