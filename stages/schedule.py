"""Buckets, phases, and which bucket comes at which position.

Positions are counted in samples seen since the start of the stage. A phase is cut into cycles:
one batch of each of its buckets. So the bucket of a position, and how many batches of that bucket
came before it, follow from arithmetic alone, for any position, without replay.
"""

import re
from typing import NamedTuple

from pydantic import Field, field_validator, model_validator

from models.record import Record

SMALLEST_WINDOW = 64
_SIZE = re.compile(r"(\d+)px|(\d+)x(\d+)")


class Bucket(Record):
    """One shape of clip and its global batch.

    `size` is "256px" (256 x 256) or "288x512" (height x width) in pixels. `micro` is how many
    samples one worker computes at a time at most: it changes memory and speed, never the result
    (with `exact=True` it decides how sums are rounded, and so the last bits).
    """

    size: str
    frames: int = Field(ge=1)
    batch: int = Field(ge=1)
    micro: int = Field(default=8, ge=1)

    def __init__(self, size: str, **fields: object) -> None:
        super().__init__(**{"size": size, **fields})

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str) -> str:
        match = _SIZE.fullmatch(size)
        if not match or 0 in (int(g) for g in match.groups() if g):
            raise ValueError(f"size {size!r}: write '256px' or 'HEIGHTxWIDTH', such as '288x512'")
        return size

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(re.findall(r"\d+", self.size)[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(re.findall(r"\d+", self.size)[-1])

    @property
    def name(self) -> str:
        """What the bucket is called in stores, logs and the dashboard, such as '256px-33f'."""
        return f"{self.size}-{self.frames}f"


class Windows(Record):
    """An order for storage that is slow at random places: neighbours are read near one another.

    Runs of `run` samples that lie side by side are put into an order of their own in each epoch,
    and `mixed` of them at a time are shuffled together: so many shards are read from at once.
    A `run` of 64 is a shard of small latents, or several of large ones; where clips could not be
    encoded, a run begins in one shard and ends in the next.
    """

    run: int = Field(default=64, ge=1)
    mixed: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _check_size(self) -> "Windows":
        if self.run * self.mixed < SMALLEST_WINDOW:
            raise ValueError(
                f"run {self.run} x mixed {self.mixed} = {self.run * self.mixed} samples: so few "
                f"shuffled together are no shuffle; the least is {SMALLEST_WINDOW}"
            )
        return self


class Phase(Record):
    """A stretch of a stage with fixed buckets, up to `until` samples seen in the stage."""

    until: int = Field(gt=0)
    buckets: tuple[Bucket, ...]

    @model_validator(mode="after")
    def _check_buckets(self) -> "Phase":
        if not self.buckets:
            raise ValueError("buckets []: a phase needs at least one Bucket")
        names = [bucket.name for bucket in self.buckets]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"buckets: {sorted(twice)} stands twice in one phase; add the batches")
        return self

    @property
    def cycle(self) -> int:
        """Samples in one batch of every bucket."""
        return sum(bucket.batch for bucket in self.buckets)


def check_schedule(schedule: tuple[Phase, ...]) -> None:
    """Raise ValueError unless every phase is a whole number of cycles and `until` rises."""
    if not schedule:
        raise ValueError("schedule []: a stage needs at least one Phase")
    start = 0
    for index, phase in enumerate(schedule):
        length = phase.until - start
        where = f"schedule[{index}].until {phase.until}"
        if length <= 0:
            raise ValueError(f"{where}: must be greater than the phase before it ({start})")
        if length % phase.cycle:
            below = start + length // phase.cycle * phase.cycle
            near = below or phase.cycle, below + phase.cycle
            nearest = min((n for n in near if n > start), key=lambda n: abs(n - phase.until))
            raise ValueError(
                f"{where}: the phase is {length} samples, which is not a whole number of rounds "
                f"of {phase.cycle} samples (one batch of each bucket); nearest is {nearest}"
            )
        start = phase.until


class Slot(NamedTuple):
    """What the schedule says about one cycle of one phase."""

    phase_index: int
    phase_start: int
    phase: Phase
    cycle: int  # cycles of this phase that are finished


def slot_at(schedule: tuple[Phase, ...], position: int) -> Slot:
    """The phase and cycle in which the update at `position` lies."""
    start = 0
    for index, phase in enumerate(schedule):
        if position < phase.until:
            return Slot(index, start, phase, (position - start) // phase.cycle)
        start = phase.until
    raise ValueError(f"position {position}: the schedule ends at {start}")


def samples_before(schedule: tuple[Phase, ...], slot: Slot, bucket: Bucket) -> int:
    """Samples of this bucket (by name) that earlier cycles and phases of the stage have used."""
    used, start = 0, 0
    for index, phase in enumerate(schedule[: slot.phase_index + 1]):
        cycles = slot.cycle if index == slot.phase_index else (phase.until - start) // phase.cycle
        used += sum(cycles * other.batch for other in phase.buckets if other.name == bucket.name)
        start = phase.until
    return used
