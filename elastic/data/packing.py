"""How the samples of a shard lie in its file: chunk after chunk, as they are or packed; an index.

Packed is Blosc with Zstandard over shuffled bytes: a quarter less, for about a millisecond
a megabyte when it is read. The CRC of a sample is that of its stored
bytes, and is compared before they are unpacked.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numcodecs import blosc
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

from elastic.data.shards import Bytes, crc32c

# With threads of its own, blocks would lie in the order in which these end.
blosc.use_threads = False
_LEVEL = 3
_ABSENT = np.uint64(2**64 - 1)
_ENTRY = 16  # bytes: where a chunk begins, and how long it is
_CHECKSUM = 4
CODEC = {
    "name": "blosc",
    "configuration": {
        "cname": "zstd",
        "clevel": _LEVEL,
        "shuffle": "shuffle",
        "typesize": 2,
        "blocksize": 0,
    },
}


class DamagedIndex(ValueError):
    """The index of a shard is not what its checksum says, or names bytes that are not there."""


def pack(chunk: Bytes) -> Bytes:
    """A chunk of bf16, packed."""
    codec = Blosc(cname="zstd", clevel=_LEVEL, shuffle=Blosc.SHUFFLE)
    return np.frombuffer(codec.encode(chunk.view(np.uint16)), np.uint8)


def unpack(stored: Bytes, sizes: Sequence[int], out: Bytes) -> None:
    """Unpack the chunks of a sample, which have these sizes; ValueError if they do not fill it."""
    at, codec = 0, Blosc()
    each = len(out) // len(sizes) if sizes else 0
    for number, size in enumerate(sizes):
        into = out[number * each : (number + 1) * each]
        chunk = stored[at : at + size]
        try:
            found = int.from_bytes(chunk[4:8].tobytes(), "little")  # Blosc's header says so
            if found != len(into):
                raise ValueError(f"holds {found} bytes instead of {len(into)}")
            codec.decode(chunk, out=into)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot be unpacked ({error})") from None
        at += size


@dataclass(frozen=True)
class Layout:
    """The form of the shards of an array."""

    slots: int  # samples of a shard
    chunks: int  # of a sample
    chunk_bytes: int  # before it is packed
    packed: bool

    @property
    def index_bytes(self) -> int:
        """Bytes of the index, at the end of the file."""
        return self.slots * self.chunks * _ENTRY + _CHECKSUM

    def stored(self, part: Bytes) -> tuple[Bytes, list[int]]:
        """The bytes of a sample as they are stored, and the size of each chunk of them."""
        size = self.chunk_bytes
        if not self.packed:
            return part, [size] * (len(part) // size)
        chunks = [pack(part[at : at + size]) for at in range(0, len(part), size)]
        return np.concatenate([part[:0], *chunks]), [len(chunk) for chunk in chunks]

    def index(self, samples: Iterable[Sequence[int]]) -> Bytes:
        """The index, given the stored size of each chunk of each sample; none of a missing one."""
        entries = np.full((self.slots, self.chunks, 2), _ABSENT, "<u8")
        at = 0
        for slot, sizes in enumerate(samples):
            starts = at + np.cumsum([0, *sizes])
            entries[slot, : len(sizes), 0] = starts[:-1]
            entries[slot, : len(sizes), 1] = sizes
            at = int(starts[-1])
        own = entries.reshape(-1).view(np.uint8)
        return np.concatenate([own, np.frombuffer(struct.pack("<I", crc32c(own)), np.uint8)])

    def read_index(self, data: Bytes) -> NDArray[np.int64]:
        """Where each chunk begins and how long it is (slots, chunks, 2); -1 for a missing one."""
        own, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:].tobytes()
        if len(data) != self.index_bytes or checksum != struct.pack("<I", crc32c(own)):
            raise DamagedIndex("the index is damaged")
        index: NDArray[np.int64] = own.view("<i8").reshape(self.slots, self.chunks, 2)
        return index

    def samples(self, data: Bytes, sizes: Sequence[int]) -> Iterator[Bytes]:
        """The stored bytes of each sample of a file, given what each has before it is packed.

        DamagedIndex, after those that could be found, where the index is not that of the file.
        """
        if self.packed:
            index = self.read_index(data[-self.index_bytes :])
            chunks = [index[slot, : size // self.chunk_bytes, 1] for slot, size in enumerate(sizes)]
        else:
            chunks = [np.full(size // self.chunk_bytes, self.chunk_bytes) for size in sizes]
        at = 0
        for each in chunks:
            yield data[at : at + int(each.sum())]
            at += int(each.sum())
        if not np.array_equal(data[at:], self.index(each.tolist() for each in chunks)):
            raise DamagedIndex("the index is damaged")
