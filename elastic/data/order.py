"""Which samples make up the batch at a position: a pure function of (seed, stage, position).

O(1) in time and memory for any number of samples; the permutations are in `permutation.py`, and
how a mix of sources is interleaved in `mix.py`.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from elastic.data.mix import Dealt, deal_sources, quotas
from elastic.data.permutation import Indices, Permutation, WindowedPermutation
from stages.init import Continue
from stages.schedule import Bucket, Slot, samples_before, slot_at
from stages.stage import Stage


class Extent(NamedTuple):
    """Samples of one source that lie side by side in a bucket: the first index, and how many."""

    first: int
    size: int


Layout = tuple[Extent, ...]
"""Where the samples of each source of the stage lie in a bucket, in the order of the sources."""


def layout_of(sizes: Sequence[int]) -> Layout:
    """Sources of these sizes, one after the other."""
    firsts = itertools.accumulate(sizes, initial=0)
    return tuple(Extent(first, size) for first, size in zip(firsts, sizes, strict=False))


def first_of(shares: Sequence[Fraction], layout: Layout, most: int) -> Indices:
    """The indices of up to so many samples, the first of each source, by the sources' shares."""
    counts = quotas(shares, [size for _, size in layout], most)
    parts = [first + np.arange(count) for (first, _), count in zip(layout, counts, strict=True)]
    return np.concatenate(parts)


class BatchPlan(NamedTuple):
    """The global batch at a position: its bucket and the indices of its samples in that bucket."""

    position: int
    bucket: Bucket
    indices: Indices
    epochs: Indices  # of each sample's source: how often it was used before in this stage


def bucket_at(stage: Stage, position: int) -> tuple[Slot, Bucket]:
    """The bucket whose turn it is at `position`: each once a cycle, in an order of the cycle's own.

    `position` must be the start of a batch.
    """
    slot = slot_at(stage.schedule, position)
    buckets = slot.phase.buckets
    turns = Permutation(len(buckets), "turns", stage.seed, stage.name, slot.phase_index, slot.cycle)
    start = slot.phase_start + slot.cycle * slot.phase.cycle
    for turn in turns(np.arange(len(buckets))):
        if start == position:
            return slot, buckets[turn]
        start += buckets[turn].batch
    raise ValueError(f"stage {stage.name!r}: position {position} is inside a batch, not its start")


def batch_at(stage: Stage, position: int, layouts: Mapping[str, int | Layout]) -> BatchPlan:
    """The batch at `position`, given where the samples of each bucket (by name) lie.

    A bucket is read as one endless stream, epoch after epoch, each in its own order; so batches
    are always full, and each sample comes once an epoch. Of a mix, each source is such a stream,
    and that of the bucket is dealt from them by their shares. A number stands for one source.
    """
    slot, bucket = bucket_at(stage, position)
    found = layouts[bucket.name]
    layout = (Extent(0, found),) if isinstance(found, int) else found
    assert len(layout) == len(stage.data.shares), f"{bucket.name} has {len(layout)} sources"
    dealt = _dealt(stage, bucket, samples_before(stage.schedule, slot, bucket))
    indices, epochs = np.empty_like(dealt.rank), np.empty_like(dealt.rank)
    for number, (first, size) in enumerate(layout):
        here = dealt.source == number
        key = _order_key(stage, bucket, layout, number)
        epochs[here], within = np.divmod(dealt.rank[here], size)
        indices[here] = first + _shuffled(stage, size, epochs[here], within, *key)
    return BatchPlan(position, bucket, indices, epochs)


def _order_key(stage: Stage, bucket: Bucket, layout: Layout, source: int) -> tuple[str | int, ...]:
    key = ("order", stage.seed, stage.name, bucket.name)
    return (*key, f"source {source}") if len(layout) > 1 else key


def _dealt(stage: Stage, bucket: Bucket, first: int) -> Dealt:
    """The sources of a batch that begins at a place of the bucket's stream."""
    shares = stage.data.shares
    if len(shares) > 1:
        return deal_sources(shares, first, bucket.batch, stage.seed, stage.name, bucket.name)
    stream = np.arange(first, first + bucket.batch)
    return Dealt(np.zeros_like(stream), stream)


def _shuffled(
    stage: Stage, size: int, epochs: Indices, within: Indices, *key: str | int
) -> Indices:
    """Where samples lie that come at some places of their epochs."""
    out = np.empty_like(within)
    for epoch in np.unique(epochs):
        here, windows = epochs == epoch, stage.order
        own = (*key, int(epoch))
        order = WindowedPermutation(size, windows, *own) if windows else Permutation(size, *own)
        out[here] = order(within[here])
    return out


def updates_before(stage: Stage, position: int) -> int:
    """Optimizer updates made when `position` samples have been seen."""
    if position == stage.budget:
        last = stage.schedule[-1]
        slot = slot_at(stage.schedule, position - last.cycle)
        inside = len(last.buckets)
    else:
        slot = slot_at(stage.schedule, position)
        inside, at = 0, slot.phase_start + slot.cycle * slot.phase.cycle
        while at < position:
            at += bucket_at(stage, at)[1].batch
            inside += 1
    updates, start = 0, 0
    for phase in stage.schedule[: slot.phase_index]:
        updates += (phase.until - start) // phase.cycle * len(phase.buckets)
        start = phase.until
    return updates + slot.cycle * len(slot.phase.buckets) + inside


def updates_carried(stage: Stage) -> int:
    """Updates that the stage's optimizer had behind it when the stage began."""
    init = stage.init
    if not isinstance(init, Continue) or init.optimizer == "reset":
        return 0
    return updates_carried(init.stage) + updates_before(init.stage, init.stage.budget)


def samples_carried(stage: Stage) -> int:
    """Samples that the stage's average had behind it when the stage began."""
    if not isinstance(stage.init, Continue):
        return 0
    return samples_carried(stage.init.stage) + stage.init.stage.budget


def chain_digest(before: str, sample_ids: Indices) -> str:
    """Digest of everything seen so far: of the digest before and the ids of one more batch."""
    ids = np.ascontiguousarray(sample_ids, dtype="<i8").tobytes()
    return hashlib.blake2b(bytes.fromhex(before) + ids, digest_size=16).hexdigest()


EMPTY_DIGEST = hashlib.blake2b(b"", digest_size=16).hexdigest()
