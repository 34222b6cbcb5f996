"""How far the encoding of latents has come: in clips, as their shards are committed."""

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from elastic.journal import Event

ENCODING = "encoding.json"  # in a stage's folder, while its latents are encoded
WINDOW_S = 300.0


class Encoded(NamedTuple):
    """How far an encoding is; a clip counts once in each bucket that it is in."""

    total: int
    done: int  # before this encoding began, or in it
    quarantined: int
    rate: float | None  # clips a second; None before the first are done

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None where there is none."""
        return (self.total - self.done) / self.rate if self.rate else None

    def as_json(self) -> dict[str, float | None]:
        """For programs, as docs/json.md says."""
        return {
            "clips": self.total,
            "done": self.done,
            "quarantined": self.quarantined,
            "clips_per_s": self.rate,
            "seconds_left": self.seconds_left,
        }

    def text(self) -> str:
        """For a line of progress."""
        share = self.done / self.total if self.total else 1.0
        parts = [f"{self.done:,} of {self.total:,} clips ({share:.0%})"]
        if self.rate is not None:
            parts.append(f"{self.rate:.1f} clips/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        if self.quarantined:
            parts.append(f"{self.quarantined:,} quarantined")
        return "  ".join(parts)


class EncodeMeter:
    """Counts what is committed, each shard once, however often it is told.

    The rate is that of the last five minutes, or since the beginning if that is less, so that it
    follows workers who come and go. What was there before is done, and not in the rate.
    """

    def __init__(
        self,
        total: int,
        done: int,
        quarantined: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._before = done
        self._quarantined = quarantined
        self._clock = clock
        self._told: set[tuple[str, int]] = set()
        self._marks = deque([(clock(), 0)])  # when so many had been encoded here

    def committed(self, shard: tuple[str, int], clips: int, absent: int) -> None:
        """Count a shard of so many clips, of which some could not be decoded."""
        if shard in self._told:
            return
        self._told.add(shard)
        self._quarantined += absent
        self._marks.append((self._clock(), self._marks[-1][1] + clips))

    def now(self) -> Encoded:
        """How far it is."""
        now, encoded = self._clock(), self._marks[-1][1]
        while len(self._marks) > 1 and self._marks[1][0] <= now - WINDOW_S:
            self._marks.popleft()
        since, before = self._marks[0]
        rate = (encoded - before) / max(now - since, 1e-3) if encoded else None
        return Encoded(self._total, self._before + encoded, self._quarantined, rate)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def encoding_lines(run_dir: Path, stages: Sequence[str], events: Sequence[Event]) -> list[str]:
    """What is known of the latents of a run: encoded, or being encoded, and what is left out."""
    lines = []
    for stage in stages:
        mine = [event for event in events if event["stage"] == stage]
        ends = [event for event in mine if event["kind"] == "encode_end"]
        if ends:
            ahead = [event for event in mine if event["kind"] == "encode_ahead_end"]
            encoded = sum(event.get("encoded", 0) for event in ends + ahead)
            seconds = sum(event.get("seconds", 0.0) for event in ends + ahead)
            probed = [event.get("count", 0) for event in mine if event["kind"] == "quarantine"]
            lines.append(
                f"latents of {stage}: {ends[-1].get('clips', 0):,} clips; quarantined: "
                f"{sum(probed[-1:]):,} when probed, {ends[-1].get('quarantined', 0):,} when "
                f"encoded; {encoded:,} encoded in {seconds:,.0f} s"
            )
        encoding = read_encoding(run_dir, stage)
        if encoding is not None:
            at = time.strftime("%H:%M:%S", time.localtime(encoding[0]))
            lines.append(f"encoding {stage}: {encoding[1].text()} (at {at})")
    return lines


def read_encoding(run_dir: Path, stage: str) -> tuple[float, Encoded] | None:
    """When, in seconds of the epoch, the encoding of a stage was how far; None without one."""
    path = run_dir / "stages" / stage / ENCODING
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found.pop("wall"), Encoded(**found)
