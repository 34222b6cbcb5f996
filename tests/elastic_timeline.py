"""What a fault cost, read from a run's events and metrics: lost updates, seconds, and phases."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from elastic.journal import Event, Metric

# What ends each stretch of the way from a fault to the first new update, in the order of the way.
_ENDS = {
    "notice": ("drain",),
    "detect": ("crash", "hang", "resize_requested"),
    "save": ("publish",),
    "teardown": ("launch",),
    "launch": ("spawn",),
    "start": ("start",),
}


class Update(NamedTuple):
    """One update that was done for the first time."""

    wall: float
    position: int
    attempt: int
    world: int


class Cost(NamedTuple):
    """What one fault cost; seconds, and updates that were thrown away and done again."""

    stopped_s: float
    """From the last update before it to the first that was new afterwards."""
    lost_updates: int
    lost_s: float
    """What of the stop went into doing lost updates again."""
    reacted_s: float
    """From the fault to the last update before the stop: training goes on before a resize."""
    world: int
    phases_s: dict[str, float]


def updates_of(metrics: Sequence[Metric], stage: str) -> list[dict[str, Any]]:
    """The lines of a stage that stand for an update, in order of time."""
    lines = [m for m in metrics if m["stage"] == stage and not m["context"]]
    return sorted(({**m} for m in lines), key=lambda m: m["wall"])


def new_updates(metrics: Sequence[Metric], stage: str) -> list[Update]:
    """The updates that reached a position for the first time."""
    new: list[Update] = []
    for m in updates_of(metrics, stage):
        if not new or m["position"] > new[-1].position:
            new.append(Update(m["wall"], m["position"], m["attempt"], m["world"]))
    return new


def recovered(events: Sequence[Event], metrics: Sequence[Metric], stage: str, wall: float) -> bool:
    """Whether a new attempt has made new updates since `wall`."""
    new = new_updates(metrics, stage)
    before = [u for u in new if u.wall <= wall]
    attempt = before[-1].attempt if before else 0
    return bool(new) and new[-1].wall > wall and new[-1].attempt > attempt


def cost_of(
    events: Sequence[Event], metrics: Sequence[Metric], stage: str, wall: float, batch: int
) -> Cost:
    """What the fault at `wall` cost; a new attempt has made new updates since."""
    new = new_updates(metrics, stage)
    attempt = [u for u in new if u.wall <= wall][-1].attempt
    last = [u for u in new if u.attempt == attempt][-1]
    first = next(u for u in new if u.attempt > attempt)
    told = [e for e in events if e["stage"] == stage and wall <= e["wall"] <= first.wall]
    starts = [e for e in told if e["kind"] == "start" and e["position"] is not None]
    start = starts[-1]
    assert start["position"] is not None, "a start has a position"
    redone = [u for u in updates_of(metrics, stage) if u["attempt"] == first.attempt]
    redone = [u for u in redone if u["position"] <= last.position]
    lost_s = redone[-1]["wall"] - start["wall"] if redone else 0.0
    return Cost(
        stopped_s=first.wall - last.wall,
        lost_updates=max(0, last.position - start["position"]) // batch,
        lost_s=lost_s,
        reacted_s=max(0.0, last.wall - wall),
        world=first.world,
        phases_s=phases(told, max(wall, last.wall), start, first.wall, lost_s),
    )


def phases(
    told: Sequence[Event], stopped: float, start: Event, first: float, lost_s: float
) -> dict[str, float]:
    """Where the seconds from the stop to the first new update go, by the events on the way.

    What the start says about itself (import, group, restore, ...) stands under `start.NAME`.
    """
    found: dict[str, float] = {}
    reached = stopped
    for name, kinds in _ENDS.items():
        walls = [e["wall"] for e in told if e["kind"] in kinds and e["wall"] >= reached]
        if name == "start":
            walls = [start["wall"]]
        elif name == "save":  # without a stop that was asked for, nothing was saved on the way
            walls = [e["wall"] for e in told if e["kind"] == "publish" and e["reason"] == "stop"]
            walls = [wall for wall in walls if wall >= reached]
        if walls:
            found[name] = round(walls[0] - reached, 3)
            reached = walls[0]
    for name, seconds in start.get("phases", {}).items():
        found[f"start.{name}"] = round(seconds, 3)
    found["redo"] = round(lost_s, 3)
    found["first_update"] = round(first - reached - lost_s, 3)
    return found


def rates(metrics: Sequence[Metric], stage: str, batch: int) -> dict[int, float]:
    """Samples per second that a stage trains at by world, where nothing disturbs it.

    From the mean time between two updates, those left out that took 1.5 times the median: they had
    a save beside them, or other work of the machine.
    """
    gaps: dict[int, list[float]] = {}
    lines = updates_of(metrics, stage)
    for one, other in itertools.pairwise(lines):
        if one["attempt"] == other["attempt"] and other["position"] - one["position"] == batch:
            gaps.setdefault(other["world"], []).append(other["wall"] - one["wall"])
    return {world: batch / undisturbed(found) for world, found in gaps.items()}


def undisturbed(seconds: list[float]) -> float:
    """The mean without those of 1.5 times the median and more."""
    most = 1.5 * statistics.median(seconds)
    return statistics.mean(each for each in seconds if each <= most)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most and the number of values."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "n": len(values),
    }
