"""What a run cost: the time in which its worker groups held machines, times how many they were."""

from typing import NamedTuple

from elastic.clock import microseconds
from elastic.journal import Event
from elastic.summary import History
from elastic.timeline import CAPACITY, DOWN, ENCODING, SAMPLING, TRAINING, Span

COUNTED = (
    "From the moment a worker group is placed until it is given up: starts, saves and lost work "
    "cost as much as training. Making samples takes one. What encoding takes is not in the "
    "journals, so it is not counted."
)
_GROUP = ("launch", "spawn", "start")
_NO_GROUP = ("run_start", "run_end", "stage_start", "stage_end", "encode_start", "waiting")


class Cost(NamedTuple):
    """Hours of one worker: held in all, and those of them that were training that was kept."""

    held: float
    kept: float


def cost(history: History) -> dict[str, Cost]:
    """By stage, in the order in which they took time; stages that held nothing are left out."""
    events = sorted(history.events, key=lambda event: event["wall"])
    spent: dict[str, Cost] = {}
    world, number = 0, 0
    for span in history.account.spans:
        while number < len(events) and microseconds(events[number]["wall"]) <= span.begin_us:
            world = _world_after(events[number], world)
            number += 1
        held = _workers(span, world) * span.seconds / 3600
        if held:
            stage = span.stage or ""
            before = spent.get(stage, Cost(0.0, 0.0))
            kept = held if span.activity == TRAINING else 0.0
            spent[stage] = Cost(before.held + held, before.kept + kept)
    return spent


def unit(history: History) -> str:
    """What one worker holds: a GPU, or nothing that the journals know more of."""
    has_gpus = any(event.get("gpus") for event in history.events if event["kind"] == "run_start")
    return "GPU" if has_gpus else "worker"


def _world_after(event: Event, world: int) -> int:
    if event["kind"] in _GROUP:
        return event.get("world") or world
    return 0 if event["kind"] in _NO_GROUP else world


def _workers(span: Span, world: int) -> int:
    if span.activity == SAMPLING:
        return 1
    return 0 if span.activity in (DOWN, CAPACITY, ENCODING) else span.world or world
