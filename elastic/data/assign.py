"""Which clips a stage uses in which bucket: a function of their probes and the stage.

Pinned in the stage's folder when it starts, so that a file which comes or goes later cannot
change the order of a stage that is under way.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from elastic.data.probe import Probe, can_fill
from elastic.data.table import Clip
from elastic.errors import InputError
from elastic.files import write_atomic
from stages.schedule import Bucket
from stages.stage import Stage

# A clip smaller than this share of the bucket's pixels would be blown up (Open-Sora uses 0.8 too).
_SMALLEST_SHARE = 0.8
_SUFFIX = ".held-out"


def held_out_name(bucket: Bucket) -> str:
    """What the held-out part of a bucket is called in stores."""
    return bucket.name + _SUFFIX


class Members(NamedTuple):
    """The clips of each bucket by its name, in table order; held-out ones under their own name."""

    clips: dict[str, list[Clip]]

    def num_clips(self) -> int:
        """Different clips in all buckets."""
        return len({clip.sample_id for clips in self.clips.values() for clip in clips})


def assign(stage: Stage, clips: list[Clip], probes: Mapping[int, Probe]) -> Members:
    """Put each clip into every bucket that it can fill; InputError where a bucket stays empty."""
    members: dict[str, list[Clip]] = {}
    for bucket in stage.buckets:
        fitting = [
            c
            for c in clips
            if c.sample_id in probes and _fits(bucket, stage.rate, probes[c.sample_id])
        ]
        members[bucket.name] = [clip for clip in fitting if not clip.held_out]
        members[held_out_name(bucket)] = [clip for clip in fitting if clip.held_out]
        for name, part in ((bucket.name, "train"), (held_out_name(bucket), "held-out")):
            if not members[name]:
                raise InputError(
                    f"stage {stage.name!r}: bucket {bucket.name!r} has no {part} clip: of "
                    f"{len(clips)} clips {len(fitting)} are at least {bucket.frames} frames long "
                    f"at {stage.rate:g} a second and large enough; ask for fewer frames or a "
                    "smaller size, or add clips"
                )
    return Members(members)


def _fits(bucket: Bucket, rate: float, probe: Probe) -> bool:
    large_enough = probe.width * probe.height >= _SMALLEST_SHARE * bucket.width * bucket.height
    return large_enough and can_fill(probe, bucket.frames, rate)


def save_members(path: Path, members: Members) -> None:
    """Pin the membership."""
    rows = [
        {"bucket": name, **clip._asdict()}
        for name, clips in members.clips.items()
        for clip in clips
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    write_atomic(path, buffer.getvalue())


def load_members(path: Path) -> Members:
    """The membership pinned when the stage started."""
    members: dict[str, list[Clip]] = {}
    for row in pq.read_table(path).to_pylist():
        members.setdefault(row.pop("bucket"), []).append(Clip(**row))
    return Members(members)
