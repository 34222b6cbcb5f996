"""Probes every clip of a table, once."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from elastic.data.clips import ROWS, Clip, Clips, sample_id
from elastic.data.decode import DECODE_VERSION, BadVideo, Unreachable
from elastic.data.decoders import Decoders
from elastic.data.places import Stamp, stamp
from elastic.data.probe import Probe

_SAVE_EVERY_S = 30.0
_CHUNK = 1024
_STATS = 32  # threads that ask for sizes: on a shared disk each question is a round trip

_FIELDS = np.dtype([
    ("frames", "i8"), ("rate_over", "i8"), ("rate_under", "i8"), ("width", "i8"),
    ("height", "i8"), ("rotation", "i8"), ("duration_s", "f8"),
])  # fmt: skip
_COLUMNS = {
    "path": pa.string(), "size": pa.int64(), "mtime_ns": pa.int64(), "reason": pa.string(),
    **{name: pa.from_numpy_dtype(_FIELDS[name]) for name in _FIELDS.names or ()},
}  # fmt: skip
_SCHEMA = pa.schema(_COLUMNS, metadata={"decode_version": str(DECODE_VERSION)})


class Probed:
    """The clips of a table, and for each what was found in its file, or why it is not used."""

    def __init__(self, clips: Clips) -> None:
        """Before anything is known."""
        self.clips = clips
        self.is_good = np.zeros(len(clips), np.bool_)
        self._fields = np.zeros(len(clips), _FIELDS)
        self._reasons = np.full(len(clips), "not probed", object)  # of those that are not good

    @classmethod
    def of(cls, clips: Sequence[Clip], found: Mapping[int, Probe]) -> "Probed":
        """From the probes by sample id; a clip without one cannot be used."""
        probed = cls(Clips.of(clips))
        for row, clip in enumerate(clips):
            if clip.sample_id in found:
                probed.put(row, found[clip.sample_id])
        return probed

    def put(self, row: int, found: Probe | str) -> None:
        """Note what was found in the file of a row."""
        self.is_good[row] = isinstance(found, Probe)
        if isinstance(found, str):
            self._reasons[row] = found
            return
        rate = found.rate
        self._fields[row] = (
            found.frames, rate.numerator, rate.denominator, found.width, found.height,
            found.rotation, found.duration_s,
        )  # fmt: skip

    def at(self, row: int) -> Probe | str:
        """What is known of a row."""
        if not self.is_good[row]:
            return str(self._reasons[row])
        frames, over, under, width, height, rotation, duration_s = self._fields[row].tolist()
        return Probe(frames, Fraction(over, under), width, height, rotation, duration_s)

    def quarantined(self) -> Iterator[tuple[Clip, str]]:
        """The rows that cannot be used, and why."""
        for row in np.flatnonzero(~self.is_good):
            yield self.clips[int(row)], str(self._reasons[row])

    def pixels(self) -> NDArray[np.int64]:
        """Of a frame of each row."""
        pixels: NDArray[np.int64] = self._fields["width"] * self._fields["height"]
        return pixels

    def can_fill(self, frames: int, rate: Fraction | float) -> NDArray[np.bool_]:
        """`probe.can_fill` of each row."""
        needed = (frames - 1) / Fraction(rate)
        near = float(needed)  # and whatever is longer than `needed` is at least the next one
        longer: NDArray[np.bool_] = self._fields["duration_s"] > near
        return longer | (self._fields["duration_s"] == near) if near > needed else longer


def probe_all(clips: Sequence[Clip], cache_path: str | Path, workers: int) -> Probed:
    """Probe every clip once; a file of the same size and time is taken from the cache."""
    probed = Probed(Clips.of(clips))
    cache = _Cache(Path(cache_path))
    todo: list[NDArray[np.int64]] = []
    stats = np.empty((len(clips), 2), np.int64)
    with ThreadPoolExecutor(_STATS) as pool:
        row = 0
        for batch in probed.clips.batches():
            paths = batch.column("path").to_pylist()
            for found in pool.map(_stamp, paths):
                stats[row] = found if isinstance(found, Stamp) else (-1, -1)
                if not isinstance(found, Stamp):
                    probed.put(row, found or "the file does not exist")
                row += 1
            rows = np.arange(row - len(paths), row)
            todo.append(rows[_take_known(cache, probed, rows, paths, stats[rows])])
    left = np.concatenate(todo)
    if len(left):
        _probe(cache, probed, left, stats, workers)
    return probed


def _take_known(
    cache: "_Cache",
    probed: Probed,
    rows: NDArray[np.int64],
    paths: list[str],
    stats: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Take from the cache what it has; which of the rows are left to be probed."""
    is_left = np.zeros(len(rows), bool)
    for number, (row, path) in enumerate(zip(rows, paths, strict=True)):
        if stats[number][0] < 0:
            continue
        found = cache.find(path, stats[number])
        if found is None:
            is_left[number] = True
        else:
            probed.put(int(row), found)
    return is_left


def _probe(
    cache: "_Cache", probed: Probed, left: NDArray[np.int64], stats: NDArray[np.int64], workers: int
) -> None:
    decoders = Decoders(workers)
    try:
        answers = decoders.probe(probed.clips[int(row)].path for row in left)
        saved = time.monotonic()
        for start in range(0, len(left), _CHUNK):
            rows = left[start : start + _CHUNK]
            for row, answer in zip(rows, islice(answers, len(rows)), strict=True):
                found = answer.reason if isinstance(answer, BadVideo) else answer
                if isinstance(found, Unreachable):  # a later run may read it
                    probed.put(int(row), str(found))
                    continue
                probed.put(int(row), found)
                cache.add(probed.clips[int(row)].path, stats[row], found)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                cache.save()
                saved = time.monotonic()
    finally:
        decoders.close()
    cache.save()


def _stamp(path: str) -> Stamp | str | None:
    try:
        return stamp(path)
    except OSError as error:  # a later run may find it
        return str(error)


class _Cache:
    """What earlier runs found in each file, while its size and time are the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._added: dict[str, tuple[int, int, Probe | str]] = {}
        table = _load(path)
        keys = [sample_id(path) for path in _strings(table, "path")]
        self._keys = np.array(keys, np.int64)
        self._order = np.argsort(self._keys)
        self._table = table.drop_columns("path")

    def find(self, path: str, stat: NDArray[np.int64]) -> Probe | str | None:
        """What is known of the file; None if that is nothing, or of before it changed."""
        if path in self._added:
            *known, found = self._added[path]
            return found if known == stat.tolist() else None
        if not len(self._keys):
            return None
        place = int(np.searchsorted(self._keys, key := sample_id(path), sorter=self._order))
        if place == len(self._keys) or self._keys[self._order[place]] != key:
            return None
        (row,) = self._table.slice(int(self._order[place]), 1).to_pylist()
        if [row.pop("size"), row.pop("mtime_ns")] != stat.tolist():
            return None
        reason = row.pop("reason")
        if reason is not None:
            return str(reason)
        return Probe(rate=Fraction(row.pop("rate_over"), row.pop("rate_under")), **row)

    def add(self, path: str, stat: NDArray[np.int64], found: Probe | str) -> None:
        """Note what was found in a file."""
        self._added[path] = (int(stat[0]), int(stat[1]), found)

    def save(self) -> None:
        """Publish what is known: the old rows that were not replaced, then the new ones."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with open(aside, "wb") as file, pyarrow.parquet.ParquetWriter(file, _SCHEMA) as writer:
            for batch in _load(self._path).to_batches(max_chunksize=ROWS):
                kept = [p not in self._added for p in batch.column("path").to_pylist()]
                writer.write_batch(batch.filter(pa.array(kept, pa.bool_())))
            writer.write_table(pa.Table.from_pylist(list(self._rows()), schema=_SCHEMA))
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self._path)

    def _rows(self) -> Iterator[dict[str, object]]:
        for path, (size, mtime_ns, found) in self._added.items():
            row: dict[str, object] = {"path": path, "size": size, "mtime_ns": mtime_ns}
            if isinstance(found, str):
                yield {**row, "reason": found}
                continue
            fields = found._asdict()
            rate = fields.pop("rate")
            yield {**row, **fields, "rate_over": rate.numerator, "rate_under": rate.denominator}


def _strings(table: pa.Table, column: str) -> Iterator[str]:
    for batch in table.select([column]).to_batches(max_chunksize=ROWS):
        yield from batch.column(0).to_pylist()


def _load(path: Path) -> pa.Table:
    """The cache, or nothing if it is missing, damaged, or of another decode version."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowInvalid):
        return _SCHEMA.empty_table()
    return table if table.schema.equals(_SCHEMA, check_metadata=True) else _SCHEMA.empty_table()
