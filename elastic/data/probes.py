"""Probes every clip of a table, once."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from elastic.data.clips import NO_END, ROWS, Clip, Clips, sample_id
from elastic.data.decode import DECODE_VERSION, BadVideo, Unreachable, is_mount_gone
from elastic.data.decoders import Decoders
from elastic.data.places import Stamp, stamp
from elastic.data.probe import Probe
from elastic.data.segment import SECOND
from elastic.files import published

log = logging.getLogger(__name__)

_SAVE_EVERY_S = 30.0
_MOST_ADDED = 200_000  # files; they are objects until they are saved
_STATS = 32  # threads that ask for sizes: on a shared disk each question is a round trip

_FIELDS = np.dtype([
    ("frames", "i8"), ("rate_over", "i8"), ("rate_under", "i8"), ("width", "i8"),
    ("height", "i8"), ("rotation", "i8"), ("duration_s", "f8"),
    ("stretch_over", "i8"), ("stretch_under", "i8"),
])  # fmt: skip
_RATIOS = ("rate", "stretch")  # each is kept as two numbers
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
        self.unreachable: list[int] = []  # rows that say nothing about their files
        self._reasons = np.full(len(clips), "not probed", object)  # of those that are not good
        self._starts, self._ends = clips.segments()
        self.is_segment = (self._starts > 0) | (self._ends < NO_END)  # others are whole files

    @classmethod
    def of(cls, clips: Sequence[Clip], found: Mapping[int, Probe]) -> "Probed":
        """From the probes by sample id; a clip without one cannot be used."""
        probed = cls(Clips.of(clips))
        for row, clip in enumerate(clips):
            if clip.sample_id in found:
                probed.put(row, found[clip.sample_id])
        return probed

    def put_unreachable(self, row: int, why: str) -> None:
        """Note that the file of a row cannot be read just now."""
        self.unreachable.append(row)
        self._reasons[row] = why

    def put(self, row: int, found: Probe | str) -> None:
        """Note what was found in the file of a row; a segment that it has not is none."""
        if isinstance(found, Probe):
            found = self._missing(row, found) or found
        self.is_good[row] = isinstance(found, Probe)
        if isinstance(found, str):
            self._reasons[row] = found
            return
        rate, stretch = found.rate, found.stretch
        self._fields[row] = (
            found.frames, rate.numerator, rate.denominator, found.width, found.height,
            found.rotation, found.duration_s, stretch.numerator, stretch.denominator,
        )  # fmt: skip

    def put_answer(
        self, rows: list[int], answer: Probe | BadVideo | Unreachable
    ) -> Probe | str | None:
        """Note what came of probing the file of some rows; None if that says nothing about it."""
        if isinstance(answer, Unreachable):  # a later run may read it
            for row in rows:
                self.put_unreachable(row, str(answer))
            return None
        found = answer.reason if isinstance(answer, BadVideo) else answer
        for row in rows:
            self.put(row, found)
        return found

    def _missing(self, row: int, found: Probe) -> str | None:
        """Why a file has not the segment that a row names; None if it has."""
        start_s = self._starts[row] / SECOND
        if self.is_segment[row] and found.frames == 1:
            return "one picture, of which there is no start and no end: leave both out"
        if self.is_segment[row] and start_s >= found.duration_s:
            return f"starts at {start_s:g} s, and the file is {found.duration_s:g} s long"
        return None

    def at(self, row: int) -> Probe | str:
        """What is known of a row."""
        if not self.is_good[row]:
            return str(self._reasons[row])
        return _probe(dict(zip(_FIELDS.names or (), self._fields[row].tolist(), strict=True)))

    def quarantined(self) -> Iterator[tuple[Clip, str]]:
        """The rows that cannot be used, and why."""
        for row in np.flatnonzero(~self.is_good):
            yield self.clips[int(row)], str(self._reasons[row])

    def pixels(self) -> NDArray[np.int64]:
        """Of a frame of each row."""
        pixels: NDArray[np.int64] = self._fields["width"] * self._fields["height"]
        return pixels

    def shown(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Height and width of each row as it is shown, in the height of its pixels."""
        of = self._fields
        stretch = of["stretch_over"] / np.maximum(of["stretch_under"], 1)
        return of["height"].astype(np.float64), of["width"] * stretch

    def can_fill(self, frames: int, rate: Fraction | float) -> NDArray[np.bool_]:
        """Whether a clip is on screen long enough for so many pictures at so many a second.

        It is if (frames - 1) / rate, exactly, is less than its duration; a segment lasts to its
        end, or to that of the file.
        """
        needed = (frames - 1) / Fraction(rate)
        near = float(needed)  # and whatever is longer than `needed` is at least the next one
        longer: NDArray[np.bool_] = self._fields["duration_s"] > near
        longer = longer | (self._fields["duration_s"] == near) if near > needed else longer
        return np.where(self.is_segment, self._last(needed), longer)

    def _last(self, needed_s: Fraction) -> NDArray[np.bool_]:
        """Whether segments last longer than so many seconds."""
        needed = needed_s * SECOND
        cut = self._ends - self._starts > needed.numerator // needed.denominator
        # Ends of files are rounded: what is a nanosecond too long is as long as needed.
        left = self._fields["duration_s"] * SECOND - self._starts > float(needed) + 1e-3
        both: NDArray[np.bool_] = cut & left
        return both


def probe_all(clips: Sequence[Clip], cache_path: str | Path, workers: int) -> Probed:
    """Probe every file once; one of the same size and time is taken from the cache."""
    probed = Probed(Clips.of(clips))
    cache, decoders, first = _Cache(Path(cache_path)), Decoders(workers), 0
    shared: dict[str, Probe | str] = {}  # of files that have several clips, in any of the batches
    try:
        with ThreadPoolExecutor(_STATS) as pool:
            for batch in probed.clips.batches():
                paths = batch.column("path").to_pylist()
                names = list(dict.fromkeys(paths))
                stamps = dict(zip(names, pool.map(_stamp, names), strict=True))
                stamped = ((path, stamps[path]) for path in paths)
                left = _take_known(cache, probed, first, stamped)
                rows: dict[str, list[int]] = {}
                for row in left:
                    rows.setdefault(paths[row - first], []).append(row)
                for path, found in _files_probed(probed, decoders, rows, shared):
                    cache.add(path, left[rows[path][0]], found)
                first += len(paths)
    finally:
        try:
            decoders.close()
        finally:
            cache.save()
    return probed


def _files_probed(
    probed: Probed,
    decoders: Decoders,
    rows: Mapping[str, list[int]],
    shared: dict[str, Probe | str],
) -> Iterator[tuple[str, Probe | str]]:
    """Probe files for their rows; what is found in each that is not `shared` already."""
    for path in rows.keys() & shared.keys():
        for row in rows[path]:
            probed.put(row, shared[path])
    left = [path for path in rows if path not in shared]
    for path, answer in zip(left, decoders.probe(left), strict=True):
        found = probed.put_answer(rows[path], answer)
        if found is None:
            continue
        if probed.is_segment[rows[path]].any():
            shared[path] = found
        yield path, found


def _take_known(
    cache: "_Cache", probed: Probed, first: int, stamps: Iterable[tuple[str, Stamp | str | None]]
) -> dict[int, Stamp]:
    """Take from the cache what it has of some rows; those that are left to be probed."""
    there: list[tuple[int, str, Stamp]] = []
    for row, (path, now) in enumerate(stamps, start=first):
        if isinstance(now, Stamp):
            there.append((row, path, now))
        elif now is not None:
            probed.put_unreachable(row, now)
        elif is_mount_gone(path):
            probed.put_unreachable(row, f"{path} is not there, nor is anything in its folder")
        else:
            probed.put(row, "the file does not exist")
    known = cache.find([path for _, path, _ in there], [now for *_, now in there])
    left: dict[int, Stamp] = {}
    for (row, _, now), found in zip(there, known, strict=True):
        if found is None:
            left[row] = now
        else:
            probed.put(row, found)
    return left


def _stamp(path: str) -> Stamp | str | None:
    try:
        return stamp(path)
    except OSError as error:  # a later run may find it
        return str(error)


class _Cache:
    """What was found in each file, while its size and time are the same; kept as Parquet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._added: dict[str, tuple[Stamp, Probe | str]] = {}  # since it was saved
        self._saved, self._pause_s = time.monotonic(), _SAVE_EVERY_S
        known = pa.schema([field for field in _SCHEMA if field.name != "path"])
        keys, batches = [np.empty(0, np.int64)], []
        for batch in _load(path):
            paths = batch.column("path").to_pylist()
            keys.append(np.array([sample_id(path) for path in paths], np.int64))
            batches.append(batch.select(known.names))
        self._keys = np.concatenate(keys)
        self._order = np.argsort(self._keys)
        self._table = pa.Table.from_batches(batches, schema=known)

    def find(self, paths: Sequence[str], now: Sequence[Stamp]) -> list[Probe | str | None]:
        """What is known of each file; None if that is nothing, or of before it changed."""
        if not len(self._keys) or not paths:
            return [None] * len(paths)
        keys = np.array([sample_id(path) for path in paths], np.int64)
        places = np.searchsorted(self._keys, keys, sorter=self._order)
        rows = self._order[np.minimum(places, len(self._keys) - 1)]
        # In the order in which they lie; a take is dear for each and cheap for many.
        found = self._table.take(pa.array(rows)).to_pylist()
        same = (self._keys[rows] == keys).tolist()
        return [
            _known(row, stamp) if is_it else None
            for row, stamp, is_it in zip(found, now, same, strict=True)
        ]

    def add(self, path: str, now: Stamp, found: Probe | str) -> None:
        """Note what was found in a file; what was noted is saved now and then."""
        self._added[path] = now, found
        is_due = time.monotonic() - self._saved > self._pause_s
        if is_due or len(self._added) >= _MOST_ADDED:
            self.save()

    def save(self) -> None:
        """Publish what is known: the old rows that were not replaced, then the new ones."""
        if not self._added:
            return
        began = time.monotonic()
        with (
            published(self._path) as file,
            pyarrow.parquet.ParquetWriter(file, _SCHEMA) as writer,
        ):
            for batch in _load(self._path):
                kept = [p not in self._added for p in batch.column("path").to_pylist()]
                writer.write_batch(batch.filter(pa.array(kept, pa.bool_())))
            writer.write_table(pa.Table.from_pylist(list(self._rows()), schema=_SCHEMA))
        self._added.clear()
        self._saved = time.monotonic()
        # All of it is written each time: with many rows, not oftener than a tenth of the time.
        self._pause_s = max(_SAVE_EVERY_S, 10 * (self._saved - began))

    def _rows(self) -> Iterator[dict[str, object]]:
        for path, (known, found) in self._added.items():
            row: dict[str, object] = {
                "path": path, "size": known.size, "mtime_ns": known.changed,
            }  # fmt: skip
            if isinstance(found, str):
                yield {**row, "reason": found}
                continue
            fields = found._asdict()
            for name in _RATIOS:
                ratio = fields.pop(name)
                fields[f"{name}_over"], fields[f"{name}_under"] = ratio.as_integer_ratio()
            yield {**row, **fields}


def _known(row: dict[str, Any], now: Stamp) -> Probe | str | None:
    """A row of the cache, if it is of the file as it is now."""
    if Stamp(row.pop("size"), row.pop("mtime_ns")) != now:
        return None
    reason = row.pop("reason")
    if reason is not None:
        return str(reason)
    return _probe(row)


def _probe(fields: dict[str, Any]) -> Probe:  # Any: whatever a probe holds
    """From a row of columns."""
    for name in _RATIOS:
        fields[name] = Fraction(fields.pop(f"{name}_over"), fields.pop(f"{name}_under"))
    return Probe(**fields)


def _load(path: Path) -> Iterator[pa.RecordBatch]:
    """The cache, some rows at a time; none if it is missing, damaged, or of another version."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if file.schema_arrow.equals(_SCHEMA, check_metadata=True):
                yield from file.iter_batches(batch_size=ROWS)
    except (OSError, pa.ArrowInvalid) as error:
        if path.exists():
            log.warning("%s cannot be read, so files are probed again: %s", path, error)
