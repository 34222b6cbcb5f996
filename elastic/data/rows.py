"""What was sealed of each planned sample: id, length of its text, CRCs; left in their files."""

import math
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from elastic.data.schema import SEAL, TEXT_BLOCK, StoreSchema
from elastic.data.shards import CHECKSUM_BYTES, chunk_name
from elastic.data.store_folder import OpenFile, StoreFolder

_SCAN = 2**20  # ids looked at at once
_MANY = 16  # one in so many of all: then all are read at once
_Item = TypeVar("_Item", bound=np.generic)


class DamagedStore(Exception):
    """Data on the disk is not what was committed; the message names the file and the sample."""


class Place(NamedTuple):
    """Where a present sample lies: its slot in the plan, its shard, and what is before it there."""

    slot: int
    shard: int
    samples: int  # present ones before it in the shard


class _Column(Generic[_Item]):
    """An array of a few values for each planned sample, read where it is asked for.

    Not mapped: pages of a mapping stay in the process until nearly all of the file does.
    """

    def __init__(
        self, file: OpenFile, where: str, shape: tuple[int, ...], dtype: "np.dtype[_Item]"
    ) -> None:
        self._file, self._where, self._dtype = file, where, dtype
        self._count, self._each = shape[0], shape[1:]
        self._items = math.prod(self._each)

    def __len__(self) -> int:
        return self._count

    def between(self, first: int, end: int) -> NDArray[_Item]:
        """The values of slots in a row."""
        found = self._file.array(self._dtype, (end - first) * self._items, first * self._items)
        if len(found) != (end - first) * self._items:
            raise DamagedStore(
                f"{self._where} has been cut off since it was opened; encode the stage again"
            )
        return found.reshape(end - first, *self._each)

    def at(self, slots: NDArray[np.int64]) -> NDArray[_Item]:
        """The values of some slots; of many, by way of all."""
        if _MANY * len(slots) > len(self):
            return self.between(0, len(self))[slots]
        out = np.empty((len(slots), *self._each), self._dtype)
        for number, slot in enumerate(slots.tolist()):
            out[number] = self.between(slot, slot + 1)[0]
        return out


class Rows:
    """What was sealed of each planned sample of a bucket, left in its files; 10^9 take no memory.

    Absent samples are the exception, so their slots alone are kept.
    """

    def __init__(
        self,
        sample_id: _Column[np.int64],
        length: _Column[np.int32],
        crcs: _Column[np.uint32],
        absent_M: NDArray[np.int64],
        per_shard: int,
    ) -> None:
        self._sample_id, self._length, self._crcs = sample_id, length, crcs
        self._absent_M, self._per_shard = absent_M, per_shard
        # How many present samples come before each absent one.
        self._present_M = absent_M - np.arange(len(absent_M))

    def __len__(self) -> int:
        return len(self._sample_id) - len(self._absent_M)

    def ids(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of present samples."""
        return self._sample_id.at(self._slots(indices)).astype(np.int64, copy=False)

    def present_before(self, slot: int) -> int:
        """How many of the samples that are planned before a slot are present."""
        return slot - self._absent_before(slot)

    def text_lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Text tokens of present samples."""
        return self._length.at(self._slots(indices)).astype(np.int64)

    def place(self, index: int) -> Place:
        """Where a present sample lies."""
        if len(self._absent_M):
            slot = index + int(np.searchsorted(self._present_M, index, side="right"))
        else:
            slot = index
        shard = slot // self._per_shard
        first = shard * self._per_shard
        return Place(slot, shard, index - first + self._absent_before(first))

    def _absent_before(self, slot: int) -> int:
        return int(np.searchsorted(self._absent_M, slot)) if len(self._absent_M) else 0

    def text(self, place: Place) -> tuple[int, int]:
        """Blocks of text before a sample's in its shard, and its own text tokens."""
        lengths = self._length.between(place.shard * self._per_shard, place.slot + 1)
        return int((-(-lengths[:-1] // TEXT_BLOCK)).sum()), int(lengths[-1])

    def crc(self, place: Place, column: int) -> int:
        """The CRC of a sample's part in an array."""
        return int(self._crcs.between(place.slot, place.slot + 1)[0, column])

    def id(self, place: Place) -> int:
        """The id of a sample."""
        return int(self._sample_id.between(place.slot, place.slot + 1)[0])

    def _slots(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices + np.searchsorted(self._present_M, indices, side="right")


def load_rows(
    folder: StoreFolder, schema: StoreSchema, bucket: str, sealed: dict[str, str]
) -> Rows:
    """The rows of a bucket; DamagedStore where they are not what was sealed."""
    count = len(schema.bucket(bucket).sample_ids)
    ids = _column(folder, bucket, "sample_id", (count,), np.dtype("<i8"), sealed)
    lengths = _column(folder, bucket, "text_length", (count,), np.dtype("<i4"), sealed)
    columns = (count, len(schema.arrays(bucket)))
    crcs = _column(folder, bucket, "crc32c", columns, np.dtype("<u4"), sealed)
    return Rows(ids, lengths, crcs, _absent(ids), schema.samples_per_shard)


def _absent(ids: _Column[np.int64]) -> NDArray[np.int64]:
    """The slots without a sample."""
    found = [np.empty(0, np.int64)]
    for first in range(0, len(ids), _SCAN):
        here = ids.between(first, min(first + _SCAN, len(ids)))
        found.append(first + np.flatnonzero(here < 0))
    return np.concatenate(found)


def _column(
    folder: StoreFolder,
    bucket: str,
    name: str,
    shape: tuple[int, ...],
    dtype: "np.dtype[_Item]",
    sealed: dict[str, str],
) -> _Column[_Item]:
    path = f"{bucket}/{name}/{chunk_name(0, len(shape))}"
    file = folder.kept(path, sealed[name], without=CHECKSUM_BYTES)
    if file is None:
        raise DamagedStore(
            f"{folder.where}/{path} is not what was sealed; delete {SEAL} there and encode again"
        )
    return _Column(file, f"{folder.where}/{path}", shape, dtype)
