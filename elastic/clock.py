"""When each line of the journals was written, whatever the machines' clocks did meanwhile.

A line carries the wall time of its sender and, where a tracker wrote it, `clock`: seconds since the
tracker's machine was booted, which nobody sets. The wall orders and dates the lines; `clock`
overrules it where the two drift apart by more than senders and queues explain.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from elastic.journal import Event, Metric

SECOND_US = 1_000_000
# Machines differ by less, and a busy tracker reads its queue sooner; a clock that is set, jumps.
TOLERANCE_US = 60 * SECOND_US
_FIRST_LINES = 5
_EVENT = frozenset({"wall", "kind", "stage"})
_METRIC = frozenset({"wall", "stage", "attempt", "position", "world", "values"})
_LATEST_WALL_S = 1e11  # year 5138: what lies beyond is no unix time in seconds


class Life(NamedTuple):
    """One driver's lines in the order of time; times are unix time in whole microseconds."""

    begin_us: int
    end_us: int
    events: list[tuple[int, Event]]
    metrics: list[tuple[int, Metric]]


def boot_clock() -> float:
    """Seconds since this machine was booted, sleep included; setting the time does not move it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def microseconds(seconds: object) -> int:
    """A duration from a journal; 0 for what is missing, negative, or no finite number."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return 0
    return round(seconds * SECOND_US) if 0 < seconds < _LATEST_WALL_S else 0


def lives(events: Sequence[Event], metrics: Sequence[Metric]) -> list[Life]:
    """The drivers of a run one after the other, without overlap.

    Both journals are taken in the order in which they were written; a line that has no wall, or
    not the fields that every line has, is left out.
    """
    groups = _by_driver([event for event in events if event.keys() >= _EVENT])
    lines = _by_attempt(groups, [metric for metric in metrics if metric.keys() >= _METRIC])
    found: list[Life] = []
    for number, group in enumerate(groups):
        base = _base(group)
        timed = list(_timed(group, base))
        measured = list(_timed(lines[number], base))
        following = next((at for g in groups[number + 1 :] for at, _ in _timed(g, None)), None)
        life = _life(timed, measured, following)
        if life is not None:
            found.append(_after(found[-1].end_us if found else 0, life))
    return found


def _by_driver(events: Sequence[Event]) -> list[list[Event]]:
    groups: list[list[Event]] = [[]]
    for event in events:
        if event["kind"] == "run_start":
            groups.append([])
        groups[-1].append(event)
    return groups


def _by_attempt(groups: list[list[Event]], metrics: Iterable[Metric]) -> list[list[Metric]]:
    """The metrics of each driver: an attempt's number, once taken, is never taken again."""
    owner = {
        (event["stage"], event.get("attempt")): number
        for number, group in enumerate(groups)
        for event in group
        if event["kind"] == "start"
    }
    lines: list[list[Metric]] = [[] for _ in groups]
    current = 1 if len(groups) > 1 and not groups[0] else 0
    for metric in metrics:
        current = max(current, owner.get((metric["stage"], metric["attempt"]), 0))
        lines[current].append(metric)
    return lines


def _base(lines: Iterable[Event]) -> int | None:
    """Wall time of a driver at clock 0, from its first lines that have both.

    The largest: a line waits for the tracker, and the first ones while it is started.
    """
    pairs = ((microseconds(line.get("wall")), microseconds(line.get("clock"))) for line in lines)
    first = islice((wall - clock for wall, clock in pairs if wall and clock), _FIRST_LINES)
    return max(first, default=None)


def _timed(lines: Iterable[Any], base: int | None) -> Iterator[tuple[int, Any]]:
    """Each line with its time; Any stands for Event or Metric."""
    latest, shift = 0, 0
    for line in lines:
        at = microseconds(line.get("wall"))
        clock = microseconds(line.get("clock"))
        if not at:
            continue
        if clock and base is not None:
            if abs(at - base - clock) > TOLERANCE_US:
                at = base + clock
        else:
            at += shift
            if at < latest - TOLERANCE_US:  # set back; how long it took is not known
                shift += latest - at
                at = latest
        latest = max(latest, at)
        yield at, line


def _life(
    events: list[tuple[int, Event]], metrics: list[tuple[int, Metric]], following: int | None
) -> Life | None:
    """One driver's life: from its first line to its run_end, or to its last sign of life."""
    if not events and not metrics:
        return None
    starts = [at for at, event in events if event["kind"] == "run_start"]
    begin = starts[0] if starts else min(at for at, _ in (*events, *metrics))
    ends = [at for at, event in events if event["kind"] == "run_end"]
    last_event = max((at for at, _ in events), default=begin)
    alive = max((at for at, _ in metrics), default=begin)
    if following is not None and following >= last_event:
        # Whose driver is not known for certain: none lives on into the next one's time.
        alive = min(alive, following)
    end = max(begin, ends[-1] if ends else max(alive, last_event))

    def clamped(lines: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        # Stable: lines of one moment stay in the order in which they were written.
        return sorted(((min(max(at, begin), end), x) for at, x in lines), key=lambda pair: pair[0])

    return Life(begin, end, clamped(events), clamped(metrics))


def _after(end_us: int, life: Life) -> Life:
    """The life, moved behind the one before if its clock says that it began earlier."""
    delay = max(0, end_us - life.begin_us)
    if not delay:
        return life
    return Life(
        life.begin_us + delay,
        life.end_us + delay,
        [(at + delay, event) for at, event in life.events],
        [(at + delay, metric) for at, metric in life.metrics],
    )
