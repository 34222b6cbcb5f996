"""Which clips a stage uses in which bucket: a function of their probes and the stage.

Pinned in the stage's folder when it starts, so that a file which comes or goes later cannot
change the order of a stage that is under way.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from elastic.data.clips import Clip, Clips, ids_of, read_notes, read_parts, write_parts
from elastic.data.order import first_of, layout_of
from elastic.data.probes import Probed
from elastic.errors import InputError
from stages.schedule import Bucket
from stages.stage import Stage

# A clip smaller than this share of the bucket's pixels would be blown up (Open-Sora uses 0.8 too).
_SMALLEST_SHARE = 0.8
_SUFFIX = ".held-out"
_SOURCES = "sources"  # the note of how many clips each part has of each source of a mix


def held_out_name(bucket: Bucket) -> str:
    """What the held-out part of a bucket is called in stores."""
    return bucket.name + _SUFFIX


@dataclass(frozen=True)
class Members:
    """The clips of each bucket by its name, in table order; held-out ones under their own name.

    Of a mix, those of one source come after those of the other; `sources` are how many of each.
    Those that were read from a file travel to other processes as its path.
    """

    clips: Mapping[str, Sequence[Clip]]
    path: Path | None = field(default=None, compare=False)
    sources: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable[..., "Members"], tuple[Any, ...]]:
        if self.path is not None:
            return load_members, (self.path,)
        return Members, (dict(self.clips), None, dict(self.sources))

    def sizes(self, name: str) -> Sequence[int]:
        """How many clips of each source a part has; a part that is not there has none."""
        return self.sources.get(name) or [len(self.clips.get(name, ()))]

    def some(self, name: str, shares: Sequence[Fraction], most: int) -> list[Clip]:
        """Up to so many clips of a part, from the sources by their shares."""
        clips = self.clips[name]
        return [clips[int(index)] for index in first_of(shares, layout_of(self.sizes(name)), most)]

    def num_clips(self) -> int:
        """Different clips in all buckets."""
        return len(np.unique(np.concatenate([ids_of(clips) for clips in self.clips.values()])))


@dataclass(frozen=True)
class Assignment:
    """The rows of a table that each bucket has, by the names of `Members`.

    Of a mix the rows are those of one table after the other, with so many in each.
    """

    clips: Clips
    rows: Mapping[str, NDArray[np.int64]]
    sizes: Sequence[int]

    def save(self, path: Path) -> Members:
        """Pin it; the members as they will be read from now on."""
        sources = {name: self.sources(name) for name in self.rows}
        notes = {_SOURCES: json.dumps(sources)} if len(self.sizes) > 1 else None
        write_parts(path, [(name, self._batches(rows)) for name, rows in self.rows.items()], notes)
        return load_members(path)

    def added_to(self, members: Members) -> "Assignment":
        """What is trained on, of sources that a bucket has clips of already."""
        ends, rows = np.cumsum(self.sizes), {}
        for name, found in self.rows.items():
            if name in members.clips and not name.endswith(_SUFFIX):
                takes_part = np.array(members.sizes(name)) > 0
                rows[name] = found[takes_part[np.searchsorted(ends, found, side="right")]]
        return replace(self, rows=rows)

    def sources(self, name: str) -> list[int]:
        """How many clips of each source a part has."""
        edges = np.searchsorted(self.rows[name], np.cumsum([0, *self.sizes]))
        return [int(count) for count in np.diff(edges)]

    def _batches(self, rows: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        first = 0
        for batch in self.clips.batches():
            here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(batch))]
            yield batch.take(pa.array(here - first))
            first += len(batch)

    def lines(self, stage: Stage, probed: Probed) -> Iterator[str]:
        """How many clips each bucket has, and why it has no more."""
        good = probed.is_good
        for bucket in stage.buckets:
            train, held_out = self.rows[bucket.name], self.rows[held_out_name(bucket)]
            each = zip(self.sources(bucket.name), stage.data.sources, strict=True)
            parts = ", ".join(
                f"{count:,} of {videos.table}{'' if count else ', whose share the others have'}"
                for count, videos in each
            )
            of_each = f" ({parts})" if len(self.sizes) > 1 else ""
            long = probed.can_fill(bucket.frames, stage.rate)
            yield (
                f"{bucket.name}: {len(train):,} clips{of_each}, {len(held_out):,} held out; of "
                f"{len(self.clips):,} are {int((good & ~long).sum()):,} too short, "
                f"{int((good & long & ~_large(bucket, probed)).sum()):,} too small, "
                f"{int((~good).sum()):,} cannot be used"
            )


def assign(stage: Stage, probed: Probed, sizes: Sequence[int] | None = None) -> Assignment:
    """As `fitting`; InputError where a bucket stays empty, or a source is in none of them."""
    assigned, clips = fitting(stage, probed, sizes), probed.clips
    for bucket in stage.buckets:
        parts = {"train": bucket.name, "held-out": held_out_name(bucket)}
        for part, name in parts.items():
            if not len(assigned.rows[name]):
                num_fitting = sum(len(assigned.rows[name]) for name in parts.values())
                other = ", or a smaller held_out_every" if part == "held-out" else ""
                raise InputError(
                    f"stage {stage.name!r}: bucket {bucket.name!r} has no {part} clip: of "
                    f"{len(clips)} clips {num_fitting} are at least {bucket.frames} frames long "
                    f"at {stage.rate:g} a second and large enough; ask for fewer frames or a "
                    f"smaller size, or add clips{other}"
                )
    _require_each(stage, assigned)
    return assigned


def fitting(stage: Stage, probed: Probed, sizes: Sequence[int] | None = None) -> Assignment:
    """Put each clip into every bucket that it can fill.

    Of a mix, `sizes` are how many of the clips are of each source.
    """
    clips, rows = probed.clips, dict[str, NDArray[np.int64]]()
    is_held_out, good = clips.held_out(), probed.is_good
    for bucket in stage.buckets:
        fits = good & _large(bucket, probed) & probed.can_fill(bucket.frames, stage.rate)
        rows[bucket.name] = np.flatnonzero(fits & ~is_held_out)
        rows[held_out_name(bucket)] = np.flatnonzero(fits & is_held_out)
    return Assignment(clips, rows, sizes or [len(clips)])


def _require_each(stage: Stage, assigned: Assignment) -> None:
    counts = np.array([assigned.sources(bucket.name) for bucket in stage.buckets]).sum(0)
    for count, videos in zip(counts, stage.data.sources, strict=True):
        if not count:
            raise InputError(
                f"stage {stage.name!r}: {videos.table!r} has no train clip for any bucket: none is "
                "long and large enough and not held out; ask for fewer frames or a smaller size, "
                "add clips to it, or leave it out of the mix"
            )


def _large(bucket: Bucket, probed: Probed) -> NDArray[np.bool_]:
    large: NDArray[np.bool_] = probed.pixels() >= _SMALLEST_SHARE * bucket.width * bucket.height
    return large


def load_members(path: Path) -> Members:
    """The membership pinned when the stage started; its rows stay in the file."""
    sources = json.loads(read_notes(path).get(_SOURCES, "{}"))
    return Members(read_parts(path), path, sources)
