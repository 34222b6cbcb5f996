"""Finds out what every file really holds before any of it is used."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import pyarrow as pa
import pyarrow.parquet

from elastic.data.decode import (
    DEADLINE_S,
    DECODE_VERSION,
    MAX_FRAMES,
    MAX_SECONDS,
    BadVideo,
    Unreachable,
    frame_time,
    last_frame_length,
    open_video,
)
from elastic.data.table import Clip

_SAVE_EVERY_S = 30.0
_CHUNK = 1024


class Probe(NamedTuple):
    """What was counted in a file; width and height are those on screen, after turning."""

    frames: int
    rate: Fraction
    width: int
    height: int
    rotation: int
    duration_s: float


class Probed(NamedTuple):
    """The probes of the good clips by sample id, and the others with a reason, in table order."""

    good: dict[int, Probe]
    quarantined: list[tuple[Clip, str]]


class _Entry(NamedTuple):
    """What the cache knows of a file: a probe or a reason, while size and time are the same."""

    size: int
    mtime_ns: int
    found: Probe | str


def can_fill(probe: Probe, frames: int, rate: Fraction | float) -> bool:
    """Whether the clip is on screen long enough for `frames` pictures at `rate` a second."""
    return (frames - 1) / Fraction(rate) < probe.duration_s


def probe(path: str) -> Probe:
    """Decode the first frame and count the packets of the rest; BadVideo if it cannot be used."""
    deadline = time.monotonic() + DEADLINE_S
    first: av.VideoFrame | None = None
    times: list[Fraction] = []
    end = Fraction(0)
    with open_video(path) as (container, stream):
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.pts is None or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise BadVideo(f"damaged after {len(times)} frames")
            times.append(packet.pts * packet.time_base)
            length = last_frame_length(packet.duration, packet.time_base, stream)
            end = max(end, times[-1] + length)
            if len(times) > MAX_FRAMES:
                raise BadVideo(f"more than {MAX_FRAMES:,} frames")
            if time.monotonic() > deadline:
                raise BadVideo(f"took more than {DEADLINE_S:.0f} s to read through")
    if first is None or not times:
        raise BadVideo("no frame could be decoded")
    frame_time(first)  # BadVideo for what decoding would refuse as well
    return _measure(first, sorted(times), end, stream.average_rate)


def _measure(
    first: av.VideoFrame, times: list[Fraction], end: Fraction, header_rate: Fraction | None
) -> Probe:
    duration = end - times[0]
    if duration > MAX_SECONDS:
        raise BadVideo(f"{float(duration):.0f} s long, more than {MAX_SECONDS:.0f} s")
    span = times[-1] - times[0]
    rate = (len(times) - 1) / span if span else header_rate or Fraction(1)
    width, height = first.width, first.height
    if first.rotation % 180:
        width, height = height, width
    return Probe(len(times), rate, width, height, first.rotation, float(duration))


def probe_all(clips: Sequence[Clip], cache_path: str | Path, workers: int) -> Probed:
    """Probe every clip once; a file of the same size and time is taken from the cache."""
    cache_path = Path(cache_path)
    cache = _load(cache_path)
    unreachable: dict[str, str] = {}  # not cached: a later run may read them
    stats = {clip.path: _stat(clip.path) for clip in clips}
    todo = []
    for path, stat in stats.items():
        known = cache.get(path)
        if stat is not None and (known is None or known[:2] != stat):
            todo.append(path)
    saved = time.monotonic()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for start in range(0, len(todo), _CHUNK):
            some = todo[start : start + _CHUNK]
            for path, found in zip(some, pool.map(_probe_or_reason, some), strict=True):
                stat = stats[path]
                assert stat is not None, f"{path} was listed without a size"
                if isinstance(found, Unreachable):
                    unreachable[path] = str(found)
                else:
                    cache[path] = _Entry(*stat, found)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                _save(cache, cache_path)
                saved = time.monotonic()
    if todo:
        _save(cache, cache_path)
    missing = {path: "the file does not exist" for path, stat in stats.items() if stat is None}
    return _divide(clips, cache, unreachable | missing)


def _divide(clips: Sequence[Clip], cache: dict[str, _Entry], reasons: dict[str, str]) -> Probed:
    probed = Probed({}, [])
    for clip in clips:
        found = reasons.get(clip.path) or cache[clip.path].found
        if isinstance(found, str):
            probed.quarantined.append((clip, found))
        else:
            probed.good[clip.sample_id] = found
    return probed


def _stat(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _probe_or_reason(path: str) -> Probe | str | Unreachable:
    try:
        return probe(path)
    except BadVideo as bad:
        return bad.reason
    except Unreachable as error:
        return error


_COLUMNS = {
    "path": pa.string(),
    "size": pa.int64(),
    "mtime_ns": pa.int64(),
    "reason": pa.string(),
    "frames": pa.int64(),
    "rate_over": pa.int64(),
    "rate_under": pa.int64(),
    "width": pa.int64(),
    "height": pa.int64(),
    "rotation": pa.int64(),
    "duration_s": pa.float64(),
}
_SCHEMA = pa.schema(_COLUMNS, metadata={"decode_version": str(DECODE_VERSION)})


def _save(cache: dict[str, _Entry], cache_path: Path) -> None:
    rows = []
    for path, (size, mtime_ns, found) in cache.items():
        row = {"path": path, "size": size, "mtime_ns": mtime_ns}
        if isinstance(found, str):
            rows.append({**row, "reason": found})
            continue
        fields = found._asdict()
        rate = fields.pop("rate")
        parts = {"rate_over": rate.numerator, "rate_under": rate.denominator}
        rows.append({**row, **fields, **parts})
    cache_path.parent.mkdir(parents=True, exist_ok=True)
    aside = cache_path.with_name(f".{cache_path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, cache_path)


def _load(cache_path: Path) -> dict[str, _Entry]:
    """The cache, or nothing if it is missing, damaged, or of another decode version."""
    try:
        table = pyarrow.parquet.read_table(cache_path)
    except (OSError, pa.ArrowInvalid):
        return {}
    if not table.schema.equals(_SCHEMA, check_metadata=True):
        return {}
    cache = {}
    for row in table.to_pylist():
        found: Probe | str
        if row["reason"] is not None:
            found = row["reason"]
        else:
            rate = Fraction(row["rate_over"], row["rate_under"])
            found = Probe(
                row["frames"],
                rate,
                row["width"],
                row["height"],
                row["rotation"],
                row["duration_s"],
            )
        cache[row["path"]] = _Entry(row["size"], row["mtime_ns"], found)
    return cache
