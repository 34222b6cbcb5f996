"""Which samples make up the batch at a position: a pure function of (seed, stage, position).

O(1) in time and memory for any number of samples; the permutations are in `permutation.py`, and
how a mix of sources is interleaved in `mix.py`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from elastic.data.mix import Dealt, deal_sources, quotas, used_before
from elastic.data.permutation import Indices, Permutation, WindowedPermutation
from stages.init import Continue, parent_samples
from stages.schedule import Bucket, Slot, samples_before, slot_at
from stages.stage import Stage


class Extent(NamedTuple):
    """Samples of one source that lie side by side in a bucket: the first index, and how many.

    They are drawn from when on `start` samples of the source have been: the end of an epoch of it.
    """

    first: int
    size: int
    start: int = 0


Layout = tuple[tuple[Extent, ...], ...]
"""Where the samples of each source of the stage lie in a bucket; those that came later come last.
"""


class Later(NamedTuple):
    """How many samples of each source came later to a bucket, and their `Extent.start`."""

    sizes: Sequence[int]
    starts: Sequence[int]


def layout_of(sizes: Sequence[int], later: Sequence[Later] = ()) -> Layout:
    """Sources of these sizes, one after the other; and all of that again for each `later`."""
    found: list[list[Extent]] = [[] for _ in sizes]
    first = 0
    for some, starts in (Later(sizes, [0] * len(sizes)), *later):
        for extents, size, start in zip(found, some, starts, strict=True):
            extents.append(Extent(first, size, start))
            first += size
    return tuple(map(tuple, found))


def first_of(shares: Sequence[Fraction], layout: Layout, most: int) -> Indices:
    """The indices of up to so many samples, the first of each source, by the sources' shares."""
    began = [extents[0] for extents in layout]
    counts = quotas(shares, [extent.size for extent in began], most)
    parts = [one.first + np.arange(count) for one, count in zip(began, counts, strict=True)]
    return np.concatenate(parts)


class Era(NamedTuple):
    """A stretch of a source's samples that are drawn from the same ones, epoch after epoch."""

    start: int
    epoch: int  # the first in it
    size: int


def eras_of(extents: Sequence[Extent]) -> list[Era]:
    """One for each extent: it ends where the next one begins."""
    eras = [Era(0, 0, extents[0].size)]
    for extent in extents[1:]:
        before = eras[-1]
        epochs, inside = divmod(extent.start - before.start, before.size)
        assert not inside, f"{extent} does not begin at an epoch of {before}"
        eras.append(Era(extent.start, before.epoch + epochs, before.size + extent.size))
    return eras


class BatchPlan(NamedTuple):
    """The global batch at a position: its bucket and the indices of its samples in that bucket."""

    position: int
    bucket: Bucket
    indices: Indices
    epochs: Indices  # of each sample's source, counted from 0


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
    and that of the bucket is dealt from them by their shares; one that had no sample of the bucket
    when the stage began takes no part in it. A number stands for one source that
    had all of its samples from the beginning.
    """
    slot, bucket = bucket_at(stage, position)
    found = layouts[bucket.name]
    layout = layout_of([found]) if isinstance(found, int) else found
    numbers, shares = _taking_part(stage, layout)
    dealt = _dealt(stage, bucket, shares, samples_before(stage.schedule, slot, bucket))
    indices, epochs = np.empty_like(dealt.rank), np.empty_like(dealt.rank)
    for place, number in enumerate(numbers):
        here = dealt.source == place
        key = _order_key(stage, bucket, layout, number)
        indices[here], epochs[here] = _drawn(stage, layout[number], dealt.rank[here], *key)
    return BatchPlan(position, bucket, indices, epochs)


def _taking_part(stage: Stage, layout: Layout) -> tuple[list[int], list[Fraction]]:
    """The sources that have samples in a bucket, and their shares there: as in all, relatively."""
    assert len(layout) == len(stage.data.shares), f"{stage.name}: {len(layout)} sources"
    numbers = [number for number, extents in enumerate(layout) if extents[0].size]
    shares = [stage.data.shares[number] for number in numbers]
    return numbers, [share / sum(shares) for share in shares]


def _order_key(stage: Stage, bucket: Bucket, layout: Layout, source: int) -> tuple[str | int, ...]:
    key = ("order", stage.seed, stage.name, bucket.name)
    return (*key, f"source {source}") if len(layout) > 1 else key


def _dealt(stage: Stage, bucket: Bucket, shares: Sequence[Fraction], first: int) -> Dealt:
    """The sources of a batch that begins at a place of the bucket's stream."""
    if len(shares) > 1:
        return deal_sources(shares, first, bucket.batch, stage.seed, stage.name, bucket.name)
    stream = np.arange(first, first + bucket.batch)
    return Dealt(np.zeros_like(stream), stream)


def ranks_before(stage: Stage, bucket: Bucket, layout: Layout, place: int) -> list[int]:
    """How many samples of each source come before a place of the bucket's stream."""
    numbers, shares = _taking_part(stage, layout)
    used = [place]
    if len(shares) > 1:
        used = used_before(shares, place, stage.seed, stage.name, bucket.name)
    own = dict(zip(numbers, used, strict=True))
    return [own.get(number, 0) for number in range(len(layout))]


def _drawn(
    stage: Stage, extents: Sequence[Extent], ranks: Indices, *key: str | int
) -> tuple[Indices, Indices]:
    """The indices and epochs of some of the samples of a source."""
    if len(extents) == 1:
        epochs, within = np.divmod(ranks, extents[0].size)
        return extents[0].first + _shuffled(stage, extents[0].size, epochs, within, *key), epochs
    eras, sizes = eras_of(extents), np.array([extent.size for extent in extents])
    edges = np.cumsum(sizes)
    shifts = np.array([extent.first for extent in extents]) - (edges - sizes)
    numbers = np.searchsorted([era.start for era in eras], ranks, side="right") - 1
    indices, epochs = np.empty_like(ranks), np.empty_like(ranks)
    for number in np.unique(numbers):
        here, (start, epoch, size) = numbers == number, eras[number]
        passed, within = np.divmod(ranks[here] - start, size)
        epochs[here] = epoch + passed
        places = _shuffled(stage, size, epoch + passed, within, *key)
        indices[here] = places + shifts[np.searchsorted(edges, places, side="right")]
    return indices, epochs


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
    return updates_carried(init.stage) + updates_before(init.stage, parent_samples(init))


def samples_carried(stage: Stage) -> int:
    """Samples that the stage's average had behind it when the stage began."""
    if not isinstance(stage.init, Continue):
        return 0
    return samples_carried(stage.init.stage) + parent_samples(stage.init)


def chain_digest(before: str, sample_ids: Indices) -> str:
    """Digest of everything seen so far: of the digest before and the ids of one more batch."""
    ids = np.ascontiguousarray(sample_ids, dtype="<i8").tobytes()
    return hashlib.blake2b(bytes.fromhex(before) + ids, digest_size=16).hexdigest()


EMPTY_DIGEST = hashlib.blake2b(b"", digest_size=16).hexdigest()
