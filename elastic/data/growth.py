"""Clips that came to a stage after it had begun: which, and from where in its order on.

Kept in the stage's folder, so that the order stays a function of what is written there: a start
that looked at the table itself would depend on the moment.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic.data.assign import Assignment, Members, load_members
from elastic.data.order import Extent, Later, Layout, bucket_at, eras_of, ranks_before
from elastic.errors import InputError
from elastic.files import write_atomic
from stages.schedule import samples_before, slot_at
from stages.stage import Stage

GROWTHS = "growths.json"
SCHEMA = 1


@dataclass(frozen=True)
class Growth:
    """New clips by bucket; each source of a bucket takes its own in at an epoch of its own.

    `starts` are, by bucket and source, how many samples of the source are drawn before; `position`
    is that of the newest checkpoint when the stage grew.
    """

    position: int
    starts: Mapping[str, Sequence[int]]
    members: Members

    def later(self, bucket: str) -> Later:
        """What came to a bucket as its members have it."""
        return Later(self.members.sizes(bucket), self.starts[bucket])


def load_growths(folder: Path) -> tuple[Growth, ...]:
    """What the stage in this folder has taken in since it began, in order."""
    path = folder / GROWTHS
    if not path.exists():
        return ()
    try:
        record = json.loads(path.read_text())
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']!r}, this version reads {SCHEMA}")
        return tuple(
            Growth(int(one["position"]), one["starts"], load_members(folder / one["clips"]))
            for one in record["growths"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); it says where in the order clips were added, so "
            "put it back from a copy, with the files that it names"
        ) from error


def growth_lines(folder: Path) -> Iterator[str]:
    """What the stage in this folder has taken in, for people."""
    for growth in load_growths(folder):
        yield (
            f"grown: {folder.name} by {growth.members.num_clips():,} clips, when it had seen "
            f"{growth.position:,} samples"
        )


def record_growth(
    folder: Path, position: int, starts: Mapping[str, Sequence[int]], new: Assignment
) -> Growth:
    """Write down that the stage in this folder takes in new clips; from then on it has grown."""
    before = load_growths(folder)
    names = [f"clips-{number}.arrow" for number in range(1, len(before) + 2)]
    growth = Growth(position, starts, new.save(folder / names[-1]))
    growths = [
        {"position": one.position, "clips": name, "starts": {**one.starts}}
        for one, name in zip((*before, growth), names, strict=True)
    ]
    # Last: it says that the clips are there.
    write_atomic(folder / GROWTHS, json.dumps({"schema": SCHEMA, "growths": growths}).encode())
    return growth


def starts_after(
    stage: Stage, position: int, layouts: Mapping[str, Layout]
) -> dict[str, list[int]]:
    """Where clips that come now are taken in, if `position` samples have been trained on.

    The next end of an epoch of each source of each bucket, so that what has been seen stays as it
    was and no sample of that epoch is left out or seen twice.
    """
    used = _used_before(stage, position)
    found = {}
    for bucket in stage.buckets:
        layout = layouts[bucket.name]
        ranks = ranks_before(stage, bucket, layout, used[bucket.name])
        each = zip(layout, ranks, strict=True)
        found[bucket.name] = [_next_epoch(extents, rank) for extents, rank in each]
    return found


def _used_before(stage: Stage, position: int) -> dict[str, int]:
    """How many samples of each bucket, by its name, come before a position."""
    slot = slot_at(stage.schedule, position)
    used = {bucket.name: samples_before(stage.schedule, slot, bucket) for bucket in stage.buckets}
    at = slot.phase_start + slot.cycle * slot.phase.cycle
    while at < position:
        bucket = bucket_at(stage, at)[1]
        used[bucket.name] += bucket.batch
        at += bucket.batch
    return used


def _next_epoch(extents: Sequence[Extent], rank: int) -> int:
    """The first end of an epoch that is not before a rank; a source without samples has none."""
    if not extents[0].size:
        return 0
    era = eras_of(extents)[-1]
    return era.start + -(-max(rank - era.start, 0) // era.size) * era.size
