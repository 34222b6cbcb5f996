"""A part of a file, in time, that is a clip of its own."""

from fractions import Fraction
from typing import NamedTuple

SECOND = 1_000_000  # microseconds: whole numbers, so that 0.7 s is seven tenths of one


class Segment(NamedTuple):
    """From where to where a file is used, after its first frame; no end: to that of the file."""

    start_us: int = 0
    end_us: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the file."""
        return self == WHOLE

    @property
    def start(self) -> Fraction:
        """Its first moment, in seconds after the first frame of the file."""
        return Fraction(self.start_us, SECOND)

    @property
    def length(self) -> Fraction | None:
        """Seconds from its start to its end; None where that is the end of the file."""
        return None if self.end_us is None else Fraction(self.end_us - self.start_us, SECOND)

    def __str__(self) -> str:
        """In words that follow those on a file: ` from 3 s to 4.5 s`, or none of a whole one."""
        if self.is_whole:
            return ""
        end = "on" if self.end_us is None else f"to {self.end_us / SECOND:g} s"
        return f" from {self.start_us / SECOND:g} s {end}"


WHOLE = Segment()
