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
from elastic.data.shapes import has_rivals, is_large, nearest
from elastic.errors import InputError
from stages.schedule import Bucket
from stages.stage import Match, Stage

_SUFFIX = ".held-out"
_SOURCES = "sources"  # the note of how many clips each part has of each source of a mix
_MATCH = "match"  # the note of the rule by which they were chosen


def held_out_name(bucket: Bucket) -> str:
    """What the held-out part of a bucket is called in stores."""
    return bucket.name + _SUFFIX


@dataclass(frozen=True)
class Members:
    """The clips of each bucket by its name, in table order; held-out ones under their own name.

    Of a mix, those of one source come after those of the other; `sources` are how many of each.
    `match` is the rule by which they were chosen, which was "any" when there was no other.
    Those that were read from a file travel to other processes as its path.
    """

    clips: Mapping[str, Sequence[Clip]]
    path: Path | None = field(default=None, compare=False)
    sources: Mapping[str, Sequence[int]] = field(default_factory=dict)
    match: Match = "any"

    def __reduce__(self) -> tuple[Callable[..., "Members"], tuple[Any, ...]]:
        if self.path is not None:
            return load_members, (self.path,)
        return Members, (dict(self.clips), None, dict(self.sources), self.match)

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
    match: Match = "any"

    def save(self, path: Path) -> Members:
        """Pin it; the members as they will be read from now on."""
        notes: dict[str, str] = {_MATCH: self.match}
        if len(self.sizes) > 1:
            notes[_SOURCES] = json.dumps({name: self.sources(name) for name in self.rows})
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
        good, none = probed.is_good, np.ones(len(self.clips), np.bool_)
        for bucket in stage.buckets:
            train, held_out = self.rows[bucket.name], self.rows[held_out_name(bucket)]
            none[train] = none[held_out] = False
            each = zip(self.sources(bucket.name), stage.data.sources, strict=True)
            parts = ", ".join(
                f"{count:,} of {videos.table}{'' if count else ', whose share the others have'}"
                for count, videos in each
            )
            of_each = f" ({parts})" if len(self.sizes) > 1 else ""
            long = probed.can_fill(bucket.frames, stage.rate)
            large = is_large(bucket, probed, stage.match)
            others = int((good & long & large).sum()) - len(train) - len(held_out)
            yield (
                f"{bucket.name}: {len(train):,} clips{of_each}, {len(held_out):,} held out; of "
                f"{len(self.clips):,} are {int((good & ~long).sum()):,} too short, "
                f"{int((good & long & ~large).sum()):,} too small, "
                + (f"{others:,} nearer to another bucket's shape, " if others else "")
                + f"{int((~good).sum()):,} cannot be used"
            )
        if none.any():
            yield _of_none(stage, probed, none)


def _of_none(stage: Stage, probed: Probed, none: NDArray[np.bool_]) -> str:
    """Why some clips are in no bucket."""
    shortest = min(bucket.frames for bucket in stage.buckets)
    short = none & probed.is_good & ~probed.can_fill(shortest, stage.rate)
    return (
        f"in no bucket: {int(none.sum()):,} of {len(probed.clips):,} clips: "
        f"{int(short.sum()):,} too short, "
        f"{int((none & probed.is_good & ~short).sum()):,} too small where they are long enough, "
        f"{int((none & ~probed.is_good).sum()):,} cannot be used"
    )


def assign(stage: Stage, probed: Probed, sizes: Sequence[int] | None = None) -> Assignment:
    """As `fitting`; InputError where a bucket stays empty, or a source is in none of them."""
    assigned = fitting(stage, probed, sizes)
    for bucket in stage.buckets:
        parts = {"train": bucket.name, "held-out": held_out_name(bucket)}
        num_fitting = sum(len(assigned.rows[name]) for name in parts.values())
        for part, name in parts.items():
            if not len(assigned.rows[name]):
                of = f"of {len(probed.clips)} clips {num_fitting}"
                raise InputError(_has_none(stage, bucket, part, of))
    _require_each(stage, assigned)
    return assigned


def _has_none(stage: Stage, bucket: Bucket, part: str, of: str) -> str:
    near = other = ""
    if has_rivals(stage, bucket):
        near = ", and nearer to its shape than to that of another bucket"
        other = ", or leave the bucket out, or write match='any'"
    if part == "held-out":
        other += ", or a smaller held_out_every, or say which in a column split"
    return (
        f"stage {stage.name!r}: bucket {bucket.name!r} has no {part} clip: {of} are at least "
        f"{bucket.frames} frames long at {stage.rate:g} a second and large enough{near}; ask for "
        f"fewer frames or a smaller size, or add clips{other}"
    )


def fitting(stage: Stage, probed: Probed, sizes: Sequence[int] | None = None) -> Assignment:
    """Put each clip into every bucket that it can fill and that is nearest to its shape.

    Of a mix, `sizes` are how many of the clips are of each source.
    """
    clips, rows = probed.clips, dict[str, NDArray[np.int64]]()
    is_held_out, good = clips.held_out(), probed.is_good
    large = {bucket.name: is_large(bucket, probed, stage.match) for bucket in stage.buckets}
    near = nearest(stage, large, probed)
    for bucket in stage.buckets:
        fits = good & near[bucket.name] & probed.can_fill(bucket.frames, stage.rate)
        rows[bucket.name] = np.flatnonzero(fits & ~is_held_out)
        rows[held_out_name(bucket)] = np.flatnonzero(fits & is_held_out)
    return Assignment(clips, rows, sizes or [len(clips)], stage.match)


def _require_each(stage: Stage, assigned: Assignment) -> None:
    counts = np.array([assigned.sources(bucket.name) for bucket in stage.buckets]).sum(0)
    for count, videos in zip(counts, stage.data.sources, strict=True):
        if not count:
            raise InputError(
                f"stage {stage.name!r}: {videos.table!r} has no train clip for any bucket: none is "
                "long and large enough and not held out; ask for fewer frames or a smaller size, "
                "add clips to it, or leave it out of the mix"
            )


def load_members(path: Path) -> Members:
    """The membership pinned when the stage started; its rows stay in the file."""
    notes = read_notes(path)
    match: Match = "aspect" if notes.get(_MATCH) == "aspect" else "any"
    return Members(read_parts(path), path, json.loads(notes.get(_SOURCES, "{}")), match)
