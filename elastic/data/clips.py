"""Rows of clips in columns: a data set of any size, of which memory holds what is looked at."""

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from elastic.data.segment import WHOLE, Segment
from elastic.files import published

SCHEMA = pa.schema({
    "sample_id": pa.int64(), "path": pa.string(), "text": pa.string(), "held_out": pa.bool_(),
    "start_us": pa.int64(), "end_us": pa.int64(),
})  # fmt: skip
NO_END = 2**62  # of a segment, where ends are numbers in an array
ROWS = 16_384  # of one batch


class Clip(NamedTuple):
    """One row: `sample_id` is a hash of the path as the table writes it, `path` is absolute.

    Of a file of which only a part is used, from where to where; the hash is of both.
    """

    sample_id: int
    path: str
    text: str
    held_out: bool
    start_us: int = 0
    end_us: int | None = None

    @property
    def segment(self) -> Segment:
        """The part of the file that it is."""
        return Segment(self.start_us, self.end_us)


def sample_id(path: str, segment: Segment = WHOLE) -> int:
    """63 bits of BLAKE2b of the path as the table writes it: the same on every machine.

    Two parts of a file are two clips; of all of it, what it is called is enough.
    """
    if not segment.is_whole:
        path = f"{path}\0{segment.start_us}..{'' if segment.end_us is None else segment.end_us}"
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Clips(Sequence[Clip]):
    """Clips in the columns of an Arrow table, which may be a file that is mapped into memory."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._ids = table.column("sample_id").chunks
        sizes = [len(chunk) for chunk in self._ids]
        self._starts = list(itertools.accumulate(sizes, initial=0))

    @classmethod
    def of(cls, clips: Iterable[Clip]) -> "Clips":
        """Some clips in columns; those that are in columns are taken as they are."""
        if isinstance(clips, Clips):
            return clips
        return cls(pa.Table.from_pylist([clip._asdict() for clip in clips], schema=SCHEMA))

    @classmethod
    def joined(cls, parts: Sequence["Clips"]) -> "Clips":
        """The clips of some parts, one part after the other."""
        return parts[0] if len(parts) == 1 else cls(pa.concat_tables(p._table for p in parts))

    def picked(self, is_picked: NDArray[np.bool_]) -> "Clips":
        """Some of the clips, in their order."""
        return Clips(self._table.filter(pa.array(is_picked)))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, at: int) -> Clip: ...
    @overload
    def __getitem__(self, at: slice) -> "Clips": ...
    def __getitem__(self, at: int | slice) -> "Clip | Clips":
        if isinstance(at, slice):
            places = range(len(self))[at]
            if places.step == 1:
                return Clips(self._table.slice(places.start, len(places)))
            return Clips(self._table.take(list(places)))
        (row,) = self._table.slice(range(len(self))[at], 1).to_pylist()
        return Clip(**row)

    def __iter__(self) -> Iterator[Clip]:
        for batch in self.batches():
            columns = (batch.column(name).to_pylist() for name in SCHEMA.names)
            yield from map(Clip._make, zip(*columns, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, some at a time."""
        return iter(self._table.to_batches(max_chunksize=ROWS))

    def ids(self) -> NDArray[np.int64]:
        """The sample ids."""
        return self._table.column("sample_id").to_numpy()  # type: ignore[no-any-return]

    def ids_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample ids at some places, whose pages alone are read."""
        found = np.empty(len(places), np.int64)
        for number, place in enumerate(places.tolist()):
            chunk = bisect.bisect_right(self._starts, place) - 1
            found[number] = self._ids[chunk][place - self._starts[chunk]].as_py()
        return found

    def held_out(self) -> NDArray[np.bool_]:
        """Which of them are held out."""
        return self._table.column("held_out").to_numpy()  # type: ignore[no-any-return]

    def segments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The microseconds from which on their files are used, and up to which, or NO_END."""
        ends = self._table.column("end_us").fill_null(NO_END)
        return self._table.column("start_us").to_numpy(), ends.to_numpy()

    def texts(self) -> Iterator[str]:
        """The captions."""
        for batch in self.batches():
            yield from batch.column("text").to_pylist()


def ids_of(clips: Sequence[Clip]) -> NDArray[np.int64]:
    """The sample ids of some clips."""
    return Clips.of(clips).ids()


def write_parts(
    path: Path,
    parts: Iterable[tuple[str, Iterator[pa.RecordBatch]]],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Publish clips by the name of their part, as an Arrow file that `read_parts` maps."""
    schema = SCHEMA.append(pa.field("part", pa.string())).with_metadata(notes)
    with published(path) as file, pa.ipc.new_file(file, schema) as writer:
        for name, batches in parts:
            for batch in batches:
                names = pa.array([name]).take(pa.array(np.zeros(len(batch), np.int8)))
                writer.write_batch(batch.append_column("part", names))


def read_notes(path: Path) -> dict[str, str]:
    """What was noted of clips when they were written."""
    notes = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}
    return {name.decode(): text.decode() for name, text in notes.items()}


def read_parts(path: Path) -> dict[str, Clips]:
    """What was written, part by part; the rows stay in the file until they are looked at."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    parts: dict[str, list[pa.RecordBatch]] = {}
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        if len(batch):  # a batch holds rows of one part alone
            part = batch.column("part")[0].as_py()
            parts.setdefault(part, []).append(_with_segments(batch).select(SCHEMA.names))
    return {name: Clips(pa.Table.from_batches(batches)) for name, batches in parts.items()}


def _with_segments(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Of clips that were written before there were segments: all are whole files."""
    if "start_us" in batch.schema.names:
        return batch
    batch = batch.append_column("start_us", pa.array(np.zeros(len(batch), np.int64)))
    return batch.append_column("end_us", pa.nulls(len(batch), pa.int64()))
