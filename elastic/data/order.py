"""Which samples make up the batch at a position: a pure function of (seed, stage, position).

The permutation is a keyed Feistel network over a grid of about sqrt(n) x sqrt(n) with cycle
walking: O(1) in time and memory for any n, a bijection for any n, and after six half-rounds its
serial pairs pass a chi-square test (four would do; two fail).
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.fresh import named_seed
from stages.init import Continue
from stages.schedule import Bucket, Slot, Windows, samples_before, slot_at
from stages.stage import Stage

_HALF_ROUNDS = 6
Indices = NDArray[np.int64]


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): full avalanche in three rounds.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A keyed bijection of [0, size)."""

    def __init__(self, size: int, *key: str | int) -> None:
        assert size > 0, f"cannot permute {size} elements"
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._keys = [np.uint64(named_seed(*key, r)) for r in range(_HALF_ROUNDS)]

    def __call__(self, index: Indices) -> Indices:
        """Where each of the given indices goes."""
        out = self._round_trip(np.asarray(index, dtype=np.uint64))
        # The grid holds fewer than sqrt(n) cells too many: walk those on until they land inside.
        while (outside := out >= self.size).any():
            out[outside] = self._round_trip(out[outside])
        return out.astype(np.int64)

    def _round_trip(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left, right = np.divmod(x, columns)
        with np.errstate(over="ignore"):
            for turn, key in enumerate(self._keys):
                if turn % 2:
                    right = (right + _mix64(left + key) % columns) % columns
                else:
                    left = (left + _mix64(right + key) % rows) % rows
        return np.asarray(left * columns + right)


class WindowedPermutation:
    """A keyed bijection of [0, size) that keeps neighbours near one another.

    Runs of places side by side are permuted, and then the places of `mixed` runs at a time. The
    last run may reach beyond the size: places there are walked on until they land inside, which
    sends less than a run of samples somewhere else.
    """

    def __init__(self, size: int, windows: Windows, *key: str | int) -> None:
        assert size > 0, f"cannot permute {size} elements"
        self.size = size
        self._run = min(windows.run, size)
        self._num_runs = -(-size // self._run)
        self._mixed = windows.mixed
        self._runs = Permutation(self._num_runs, *key, "runs")
        self._key = key

    def __call__(self, index: Indices) -> Indices:
        """Where each of the given indices goes."""
        out = self._place(np.asarray(index, dtype=np.int64))
        while (outside := out >= self.size).any():
            out[outside] = self._place(out[outside])
        return out

    def _place(self, x: Indices) -> Indices:
        window_size = self._mixed * self._run
        windows, within = np.divmod(x, window_size)
        out = np.empty_like(x)
        for window in np.unique(windows):
            here = windows == window
            first = int(window) * self._mixed
            num_runs = min(self._mixed, self._num_runs - first)
            mix = Permutation(num_runs * self._run, *self._key, "window", int(window))
            runs, offsets = np.divmod(mix(within[here]), self._run)
            out[here] = self._runs(first + runs) * self._run + offsets
        return out


class BatchPlan(NamedTuple):
    """The global batch at a position: its bucket and the indices of its samples in that bucket."""

    position: int
    bucket: Bucket
    indices: Indices
    epochs: Indices  # how often each sample was used before in this stage


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


def batch_at(stage: Stage, position: int, counts: dict[str, int]) -> BatchPlan:
    """The batch at `position`, given how many samples each bucket (by name) holds.

    A bucket is read as one endless stream, epoch after epoch, each in its own order; so batches
    are always full, and each sample comes once an epoch.
    """
    slot, bucket = bucket_at(stage, position)
    size = counts[bucket.name]
    first = samples_before(stage.schedule, slot, bucket)
    stream = np.arange(first, first + bucket.batch)
    epochs, within = np.divmod(stream, size)
    indices = np.empty_like(within)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        key = ("order", stage.seed, stage.name, bucket.name, int(epoch))
        windows = stage.order
        order = WindowedPermutation(size, windows, *key) if windows else Permutation(size, *key)
        indices[here] = order(within[here])
    return BatchPlan(position, bucket, indices, epochs)


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
