"""The time of a run as spans: every moment from its first line to its last lies in exactly one."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, cast

from elastic.clock import Life, microseconds
from elastic.journal import Event, Metric

TRAINING, LOST, SAVING, EVALUATING = "training", "lost work", "saving", "evaluating"
DATA, RESTORING, STARTING = "waiting for data", "restoring", "starting"
CAPACITY, ENCODING, SAMPLING = "waiting for machines", "encoding", "sampling"
OTHER, DOWN = "other", "down"
ACTIVITIES = (
    TRAINING, LOST, SAVING, EVALUATING, DATA, RESTORING, STARTING, CAPACITY, ENCODING, SAMPLING,
    OTHER, DOWN,
)  # fmt: skip

# What goes on after an event of this kind, until the next one.
_NEXT = {
    "run_start": STARTING,
    "stage_start": STARTING,
    "encode_start": ENCODING,
    "encode_end": STARTING,
    "waiting": CAPACITY,
    "launch": STARTING,
    "spawn": STARTING,
    "stopped": STARTING,  # of no journal: see _with_stops
    "start": TRAINING,
    "crash": STARTING,
    "hang": STARTING,
    "stage_end": SAMPLING,
    "sample": OTHER,
    "sample_failed": OTHER,
    "blocked": OTHER,
    "run_end": DOWN,
}
_FAULTS = ("crash", "hang")


class Span(NamedTuple):
    """A stretch of time with one activity; both ends in whole microseconds of unix time."""

    begin_us: int
    end_us: int
    activity: str
    stage: str | None
    world: int | None = None  # of the worker group, while there is one

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return (self.end_us - self.begin_us) / 1e6

    @property
    def begin(self) -> float:
        """Unix time in seconds."""
        return self.begin_us / 1e6

    @property
    def end(self) -> float:
        """Unix time in seconds."""
        return self.end_us / 1e6


class Mark(NamedTuple):
    """A stretch of time known from one line, such as a save; it may overlap others."""

    begin_us: int
    end_us: int


def timeline(found: list[Life]) -> list[Span]:
    """The spans of a run's drivers in order, without gap or overlap."""
    found = [_with_stops(_repaired(life)) for life in found]
    spans: list[Span] = []
    for life in found:
        if spans and life.begin_us > spans[-1].end_us:
            spans.append(Span(spans[-1].end_us, life.begin_us, DOWN, None))
        spans += _states(life)
    for activity, marks, over in _inside(found):
        spans = _painted(spans, marks, activity, over)
    for stage, marks in _lost(found).items():
        spans = _painted(spans, marks, LOST, (TRAINING, DATA), stage)
    return spans


def merged(spans: Iterable[Span], fuse: Callable[[Span, Span], bool]) -> Iterator[Span]:
    """Neighbours that belong together as one span, with the activity of the first."""
    last: Span | None = None
    for span in spans:
        if last is not None and last.end_us == span.begin_us and fuse(last, span):
            last = last._replace(end_us=span.end_us)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def thinned(spans: list[Span], most: int) -> list[Span]:
    """At most so many spans without a stage: of equal stretches, what took most of each."""
    bare = [span._replace(stage=None, world=None) for span in spans]
    joined = list(merged(bare, lambda a, b: a.activity == b.activity))
    if len(joined) <= most:
        return joined
    begin, end = joined[0].begin_us, joined[-1].end_us
    width = -(-(end - begin) // most)
    sums: list[Counter[str]] = [Counter() for _ in range(-(-(end - begin) // width))]
    for span in joined:
        at = span.begin_us
        while at < span.end_us:
            number = (at - begin) // width
            until = min(span.end_us, begin + (number + 1) * width)
            sums[number][span.activity] += until - at
            at = until
    edges = [min(end, begin + number * width) for number in range(len(sums) + 1)]
    equal = [
        Span(left, right, one.most_common(1)[0][0], None)
        for left, right, one in zip(edges[:-1], edges[1:], sums, strict=True)
    ]
    return list(merged(equal, lambda a, b: a.activity == b.activity))


def _repaired(life: Life) -> Life:
    """The life with a start for each attempt whose own line was torn, but not its metrics.

    Without what is said about an attempt once a newer one trains: a crash may be told late.
    """
    begun = {_attempt(event) for _, event in life.events if event["kind"] == "start"}
    events = list(life.events)
    for at, metric in life.metrics:
        if _attempt(metric) in begun:
            continue
        begun.add(_attempt(metric))
        fields = {name: metric.get(name) for name in ("stage", "attempt", "position", "world")}
        events.append(
            (at, cast(Event, {"kind": "start", "reason": "", "wall": at / 1e6, **fields}))
        )
    newest: dict[str | None, int] = {}
    kept = []
    for at, event in sorted(events, key=lambda pair: pair[0]):
        stage, attempt = _attempt(event)
        if event["kind"] == "start":
            newest[stage] = max(attempt, newest.get(stage, attempt))
        if event["kind"] not in _FAULTS or not 0 <= attempt < newest.get(stage, 0):
            kept.append((at, event))
    return life._replace(events=kept)


def _with_stops(life: Life) -> Life:
    """The life with a line where a group stopped that had nothing new to save: nothing was said.

    It was asked to stop, and the next group comes without a save or a crash in between. The last
    line of its log is taken for the end of its training.
    """
    events: list[tuple[int, Event]] = []
    asked: int | None = None  # since when a group is to stop
    for at, event in life.events:
        kind = event["kind"]
        if kind in ("waiting", "launch", "spawn", "start") and asked is not None:
            logged = [line_at for line_at, _ in life.metrics if asked < line_at <= at]
            stopped = {**event, "kind": "stopped", "world": None, "wall": 0.0}
            events.append((max([asked, *logged]), cast(Event, stopped)))
        if kind == "resize_requested":
            asked = at
        elif kind == "publish" or kind in _NEXT:
            asked = None
        events.append((at, event))
    return life._replace(events=events)


def _attempt(line: Event | Metric) -> tuple[str | None, int]:
    """Stage and attempt of a line; the attempt is -1 if it is not known."""
    attempt = line.get("attempt")
    return line.get("stage"), -1 if attempt is None else attempt


def _states(life: Life) -> Iterator[Span]:
    """A driver's time, split where the events say that something else goes on."""
    state, since = Span(life.begin_us, life.begin_us, STARTING, None), life.begin_us
    is_resizing = False
    for at, event in life.events:
        kind = event["kind"]
        is_resizing = (is_resizing or kind == "resize_requested") and kind not in _NEXT
        after = _NEXT.get(kind)
        if kind == "publish":
            after = _after_publish(event, is_resizing)
        if after is None:
            continue
        if at > since:
            yield state._replace(begin_us=since, end_us=at)
        stage = None if kind in ("run_start", "run_end") else event.get("stage") or state.stage
        is_group = after in (TRAINING, SAVING)
        world = (event.get("world") or state.world) if is_group else None
        state, since = Span(at, at, after, stage, world), at
    if life.end_us > since:
        yield state._replace(begin_us=since, end_us=life.end_us)


def _after_publish(event: Event, is_resizing: bool) -> str | None:
    if event.get("reason") == "finished":
        return SAVING  # of the finished weights, until stage_end
    if event.get("reason") == "stop" or is_resizing:
        return STARTING  # of the next group
    return None


def _inside(found: list[Life]) -> list[tuple[str, list[Mark], tuple[str, ...]]]:
    """Activities that are known from their length alone, with what they are cut out of."""
    saves: list[Mark] = []
    measures: list[Mark] = []
    restores: list[Mark] = []
    samples: list[Mark] = []
    previews: list[Mark] = []
    waits: list[Mark] = []
    positions: dict[tuple[str | None, int], int] = {}  # of the last line of each attempt
    for life in found:
        for at, event in life.events:
            kind, seconds = event["kind"], microseconds(event.get("seconds"))
            if kind in ("publish", "save_failed"):
                at -= microseconds(event.get("background"))
                saves.append(Mark(at - seconds, at))
            elif kind in ("sample", "sample_failed"):
                samples.append(Mark(at - seconds, at))
            elif kind in ("preview", "preview_failed"):
                previews.append(Mark(at - seconds, at))
            elif kind == "start":
                restores.append(Mark(at - microseconds(_restore(event)), at))
                positions[_attempt(event)] = event.get("position") or 0
        for at, metric in life.metrics:
            if metric.get("context") == {"subset": "held_out"}:
                measures.append(Mark(at - microseconds(metric.get("seconds")), at))
            values = metric.get("values", {})
            rate = values.get("samples_per_s")
            if rate:
                attempt, position = _attempt(metric), metric["position"]
                num_samples = max(0, position - positions.get(attempt, position))
                share = min(1.0, values.get("data_wait") or 0.0)
                # Together at the end of the log interval, although every step waited a little.
                waits.append(Mark(at - microseconds(share * num_samples / rate), at))
                positions[attempt] = position
    return [
        (RESTORING, restores, (STARTING,)),
        (SAMPLING, samples, (STARTING, OTHER)),
        (SAVING, saves, (TRAINING,)),
        (EVALUATING, measures, (TRAINING,)),
        (SAMPLING, previews, (TRAINING,)),
        (DATA, waits, (TRAINING,)),
    ]


def _restore(event: Event) -> object:
    phases = event.get("phases")
    return phases.get("restore") if isinstance(phases, dict) else None


def _painted(
    spans: Iterable[Span],
    marks: Iterable[Mark],
    activity: str,
    over: Collection[str],
    stage: str | None = None,
) -> list[Span]:
    """The spans, with `activity` where a mark lies over one of those, in one stage or in all."""
    joined = _union(marks)
    painted: list[Span] = []
    first = 0
    for span in spans:
        at = span.begin_us
        while first < len(joined) and joined[first].end_us <= at:
            first += 1
        is_covered = span.activity in over and stage in (None, span.stage)
        for number in range(first, len(joined)) if is_covered else ():
            mark = joined[number]
            if mark.begin_us >= span.end_us:
                break
            begin, end = max(at, mark.begin_us), min(mark.end_us, span.end_us)
            if begin > at:
                painted.append(span._replace(begin_us=at, end_us=begin))
            painted.append(span._replace(begin_us=begin, end_us=end, activity=activity))
            at = end
        if at < span.end_us:
            painted.append(span._replace(begin_us=at))
    return painted


def _union(marks: Iterable[Mark]) -> list[Mark]:
    joined: list[Mark] = []
    for mark in sorted(mark for mark in marks if mark.end_us > mark.begin_us):
        if joined and mark.begin_us <= joined[-1].end_us:
            joined[-1] = Mark(joined[-1].begin_us, max(joined[-1].end_us, mark.end_us))
        else:
            joined.append(mark)
    return joined


class _Point(NamedTuple):
    at_us: int
    position: int
    kind: str


def _lost(found: list[Life]) -> dict[str, list[Mark]]:
    """By stage, the time in which updates were done that a later start did not find.

    From the moment at which the position was reached that the next attempt went on from. A stage
    whose last attempt crashed, or ended with its driver, is taken to go on from what it published
    last.
    """
    lost: dict[str, list[Mark]] = {}
    points: dict[str, list[_Point]] = {}
    crashed: dict[str, _Point] = {}
    for stage, point in _points(found):
        known = points.setdefault(stage, [])
        if point.kind in _FAULTS:
            crashed[stage] = point
            continue
        if point.kind == "start":
            crashed.pop(stage, None)
            reached = _reached(known, point.position)
            if reached is not None:
                lost.setdefault(stage, []).append(Mark(reached, point.at_us))
        known.append(point)
    for stage, crash in crashed.items():
        kept = [p.position for p in points.get(stage, []) if p.kind in ("start", "publish")]
        reached = _reached(points[stage], kept[-1]) if kept else None
        if reached is not None:
            lost.setdefault(stage, []).append(Mark(reached, crash.at_us))
    return lost


def _points(found: list[Life]) -> Iterator[tuple[str, _Point]]:
    """Where the stages were at which time, in the order of time."""
    for life in found:
        points: list[tuple[str, _Point]] = []
        for at, event in life.events:
            kind, stage = event["kind"], event.get("stage")
            if kind == "run_end":  # with the driver goes what it has not published
                begun = dict.fromkeys(stage for stage, _ in points)
                points += [(stage, _Point(at, 0, "crash")) for stage in begun]
            if stage is None or kind not in ("start", "publish", "stage_end", *_FAULTS):
                continue
            if kind == "stage_end":  # its weights are there, whatever was said of its checkpoints
                kind = "publish"
            elif kind == "publish":  # its state is that of the loop when it stood still
                at = max(life.begin_us, at - microseconds(event.get("background")))
            points.append((stage, _Point(at, event.get("position") or 0, kind)))
        points += [(m["stage"], _Point(at, m["position"], "metric")) for at, m in life.metrics]
        yield from sorted(points, key=lambda pair: pair[1].at_us)


def _reached(known: list[_Point], position: int) -> int | None:
    """When `position` was last reached, or None if that is not known; forgets what lies beyond."""
    beyond: _Point | None = None
    while known and known[-1].position > position:
        beyond = known.pop()
    if not known or (beyond is None and known[-1].position < position):
        return None
    last = known[-1]
    if beyond is None or last.position == position:
        return last.at_us
    share = (position - last.position) / (beyond.position - last.position)
    return round(last.at_us + share * (beyond.at_us - last.at_us))
