"""Which clips a stage uses in which bucket: a function of their probes and the stage.

Pinned in the stage's folder when it starts, so that a file which comes or goes later cannot
change the order of a stage that is under way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from elastic.data.clips import Clip, Clips, ids_of, read_parts, write_parts
from elastic.data.probes import Probed
from elastic.errors import InputError
from stages.schedule import Bucket
from stages.stage import Stage

# A clip smaller than this share of the bucket's pixels would be blown up (Open-Sora uses 0.8 too).
_SMALLEST_SHARE = 0.8
_SUFFIX = ".held-out"


def held_out_name(bucket: Bucket) -> str:
    """What the held-out part of a bucket is called in stores."""
    return bucket.name + _SUFFIX


@dataclass(frozen=True)
class Members:
    """The clips of each bucket by its name, in table order; held-out ones under their own name.

    Those that were read from a file travel to other processes as its path.
    """

    clips: Mapping[str, Sequence[Clip]]
    path: Path | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[Callable[..., "Members"], tuple[Any, ...]]:
        if self.path is not None:
            return load_members, (self.path,)
        return Members, (dict(self.clips),)

    def num_clips(self) -> int:
        """Different clips in all buckets."""
        return len(np.unique(np.concatenate([ids_of(clips) for clips in self.clips.values()])))


@dataclass(frozen=True)
class Assignment:
    """The rows of a table that each bucket has, by the names of `Members`."""

    clips: Clips
    rows: Mapping[str, NDArray[np.int64]]

    def save(self, path: Path) -> Members:
        """Pin it; the members as they will be read from now on."""
        write_parts(path, [(name, self._batches(rows)) for name, rows in self.rows.items()])
        return load_members(path)

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
            long = probed.can_fill(bucket.frames, stage.rate)
            yield (
                f"{bucket.name}: {len(train):,} clips, {len(held_out):,} held out; of "
                f"{len(self.clips):,} are {int((good & ~long).sum()):,} too short, "
                f"{int((good & long & ~_large(bucket, probed)).sum()):,} too small, "
                f"{int((~good).sum()):,} cannot be used"
            )


def assign(stage: Stage, probed: Probed) -> Assignment:
    """Put each clip into every bucket that it can fill; InputError where a bucket stays empty."""
    clips, rows = probed.clips, dict[str, NDArray[np.int64]]()
    is_held_out, good = clips.held_out(), probed.is_good
    for bucket in stage.buckets:
        fits = good & _large(bucket, probed) & probed.can_fill(bucket.frames, stage.rate)
        rows[bucket.name] = np.flatnonzero(fits & ~is_held_out)
        rows[held_out_name(bucket)] = np.flatnonzero(fits & is_held_out)
        for name, part in ((bucket.name, "train"), (held_out_name(bucket), "held-out")):
            if not len(rows[name]):
                raise InputError(
                    f"stage {stage.name!r}: bucket {bucket.name!r} has no {part} clip: of "
                    f"{len(clips)} clips {fits.sum()} are at least {bucket.frames} frames long "
                    f"at {stage.rate:g} a second and large enough; ask for fewer frames or a "
                    "smaller size, or add clips"
                )
    return Assignment(clips, rows)


def _large(bucket: Bucket, probed: Probed) -> NDArray[np.bool_]:
    large: NDArray[np.bool_] = probed.pixels() >= _SMALLEST_SHARE * bucket.width * bucket.height
    return large


def load_members(path: Path) -> Members:
    """The membership pinned when the stage started; its rows stay in the file."""
    return Members(read_parts(path), path)
