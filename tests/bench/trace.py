"""Goodput while a spot market gives and takes nodes: ours, vanilla Ray Train, and the ideal.

A recorded count of spot nodes is replayed with raylets of this machine. Counted are node-seconds:
what is there is the sum over time of the nodes that are up, and the ideal uses all of it. What is
used is the sum over updates, each counted once however often it was done, of the workers that made
it times the seconds that an update takes them at that time: the mean of those around it, without
those that took 1.5 times the median, as one beside a save does. So the count hangs neither on how
many workers the cores of this machine can feed at once, nor on what else it has to do.

Time is ten times as fast as in the record, and the defaults that are seconds are scaled alike.
Saves come as often as Young's formula says for each system, which loses work to every change
(vanilla) or to losses without notice alone (ours).
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from elastic_driver import BATCH, DIT, Driver, DriverGone, Spec, copied, prepare
from elastic_timeline import Update, new_updates, rates, undisturbed, updates_of
from figure import record

from elastic.data.moving_shapes import write_demo_videos
from elastic.journal import read_events, read_metrics

# (nodes, ticks of 300 s): a stretch of 4.7 hours out of the 11 days for which skypilot-org/
# spot-traces (availability/16-node/aws-08-27-2023, us-west-2a, V100; used in Wu et al., "Can't Be
# Late", NSDI 24) counted how many of 16 spot nodes were to be had; stretches of 0 are left out.
COUNTS = (
    *((4, 2), (2, 1), (10, 2), (16, 4), (9, 2), (16, 1), (11, 1), (16, 2), (14, 2), (16, 16)),
    *((14, 1), (16, 4), (8, 1), (16, 1), (6, 1), (16, 4), (2, 1), (16, 2), (8, 3), (1, 2)),
    *((2, 2), (9, 1)),
)
MOST_COUNTED, MOST = 16, 4  # nodes in the trace, workers here
TICK_S = 30.0  # 300 s of the trace: a start costs seconds here and a minute on a real machine
NOTICE = 0.4  # of a tick: two minutes of five, which is what the market gives
KILLED_EVERY = 5  # every fifth loss comes without notice
IDEAL_GOAL, VANILLA_GOAL = 0.95, 1.3
_STILL_S = 2.0  # so long without an update is a stop
AROUND = 25  # updates on either side
PLAN = Spec(
    storage="",
    table="",
    nodes=("n0",),
    dit_updates=100_000,  # never reached: a run is ended with the trace
    workers=(1, MOST),
    # A third of the stay is what nodes of this machine need to start one after another.
    settings={"min_stay": 6.0, "leave_before": 60.0 * TICK_S / 300.0},
)
# A save costs both about 0.15 s of updates, which take 0.07 s. Of vanilla's run a part is lost at
# every change, one in 60 to 100 s; of ours at every fifth loss, one in 500 to 700 s.
SAVE_UPDATES = {"ours": 160, "vanilla": 60}


class Step(NamedTuple):
    """Something that happens to one node, `after_s` seconds into the trace."""

    after_s: float
    do: str
    node: str


class Replayed(NamedTuple):
    """How many nodes were up when, and the end."""

    counts: "list[Count]"
    end: float

    @classmethod
    def read(cls, path: Path, system: str) -> "Replayed":
        """As it was kept; ValueError where it was made with other settings."""
        kept = json.loads(path.read_text())
        if kept["settings"] != settings_of(system):
            raise ValueError(f"{path} was made with {kept['settings']}; give another --folder")
        counts = [Count(*count) for count in kept["counts"]]
        return cls(counts, kept["end"])


class Count(NamedTuple):
    """From `wall` on, so many nodes are up."""

    wall: float
    nodes: int


def settings_of(system: str) -> dict[str, Any]:
    """What a kept run depends on."""
    return {"tick_s": TICK_S, "save_updates": SAVE_UPDATES[system], **PLAN.settings}


def scaled(count: int) -> int:
    """Nodes of the trace as workers here."""
    return -(-count * MOST // MOST_COUNTED)


def schedule(ticks: int, tick_s: float, seed: int) -> list[Step]:
    """What happens to which node, and when; the first nodes are there from the start."""
    draw = random.Random(seed)
    levels = [scaled(count) for count, length in COUNTS for _ in range(length)][:ticks]
    up = list(PLAN.nodes)
    assert levels[0] == len(up), "the run starts with the nodes of the first tick"
    steps: list[Step] = []
    names, losses = itertools.count(len(up)), itertools.count(1)
    for number, level in enumerate(levels):
        at = number * tick_s
        while len(up) > level:
            node = up.pop(draw.randrange(len(up)))
            if next(losses) % KILLED_EVERY:
                steps.append(Step(at - NOTICE * tick_s, "drain", node))
            else:
                steps.append(Step(at, "kill_node", node))
        while len(up) < level:
            up.append(f"n{next(names)}")
            steps.append(Step(at, "add", up[-1]))
    return sorted(steps, key=lambda step: step.after_s)


def replay(driver: Driver, steps: list[Step], length_s: float, tick_s: float) -> Replayed:
    """Let it all happen; how many nodes were really up from when on."""
    driver.wait(lambda: driver.position() > 0, "the first update", 120)
    began = time.time()
    changes = [(began, len(PLAN.nodes))]
    for step in steps:
        time.sleep(max(0.0, began + step.after_s - time.time()))
        more = {"seconds": NOTICE * tick_s} if step.do == "drain" else {}
        wall = driver.tell(step.do, node=step.node, **more)["wall"]
        # A drained node is there until its deadline, and counted until then.
        changes.append((wall + more.get("seconds", 0.0), 1 if step.do == "add" else -1))
    time.sleep(max(0.0, began + length_s - time.time()))
    changes.sort()
    sums = itertools.accumulate(change for _, change in changes)
    counts = [Count(wall, nodes) for (wall, _), nodes in zip(changes, sums, strict=True)]
    return Replayed(counts, time.time())


def stretches(counts: list[Count], start: float, end: float) -> Iterator[tuple[float, int]]:
    """(seconds, nodes) of each stretch between two moments."""
    ends = [*(count.wall for count in counts[1:]), float("inf")]
    for count, until in zip(counts, ends, strict=True):
        seconds = min(end, until) - max(start, count.wall)
        if seconds > 0:
            yield seconds, count.nodes


def nodes_s(counts: list[Count], start: float, end: float) -> float:
    """Node-seconds that were there between two moments."""
    return sum(seconds * nodes for seconds, nodes in stretches(counts, start, end))


def account(root: Path, replayed: Replayed) -> dict[str, Any]:
    """What was there, what was used, and where the rest went, in node-seconds."""
    counts, end = replayed.counts, replayed.end
    events, metrics = read_events(root), read_metrics(root)
    start = counts[0].wall
    new = [u for u in new_updates(metrics, DIT) if start < u.wall <= end]
    used = sum(
        update.world * seconds
        for _, attempt in itertools.groupby(new, key=lambda update: update.attempt)
        for update, seconds in with_seconds(list(attempt))
    )
    first = new[0]._replace(wall=start)
    # A run that stands still when the trace ends stands in its last stop.
    last = new[-1]._replace(wall=end, attempt=new[-1].attempt)
    if end - new[-1].wall > _STILL_S:
        last = last._replace(attempt=-1)
    pairs = list(itertools.pairwise([first, *new, last]))
    stops = [(a.wall, b.wall) for a, b in pairs if a.attempt != b.attempt]
    training = [(a, b) for a, b in pairs if a.attempt == b.attempt]
    idle = sum(nodes_s(counts, a.wall, b.wall) - (b.wall - a.wall) * b.world for a, b in training)
    starts = _ray_starts(events, start, end)
    there = nodes_s(counts, start, end)
    ray = sum(nodes_s(counts, one, other) for one, other in starts)
    return {
        "there": round(there, 1),
        "used": round(used, 1),
        "of_ideal": round(used / there, 3),
        "of_ideal_less_ray_starts": round(used / (there - ray), 3),
        "ray_starts": round(ray, 1),
        "ray_starts_s": [round(other - one, 2) for one, other in starts],
        "stopped": round(sum(nodes_s(counts, *stop) for stop in stops), 1),
        "stops_s": [round(other - one, 2) for one, other in stops],
        "nodes_not_used": round(idle, 1),
        "updates": len(new),
        "updates_done_again": _redone(metrics, start, end),
    }


def with_seconds(attempt: list[Update]) -> Iterator[tuple[Update, float]]:
    """The updates of an attempt with the seconds that one takes at that time."""
    gaps = [other.wall - one.wall for one, other in itertools.pairwise(attempt)]
    for number, update in enumerate(attempt):
        around = gaps[max(0, number - AROUND) : number + AROUND]
        if around:
            yield update, undisturbed(around)


def _redone(metrics: list[Any], start: float, end: float) -> int:
    done = [u for u in updates_of(metrics, DIT) if start < u["wall"] <= end]
    return len(done) - len({u["position"] for u in done})


def _ray_starts(events: list[Any], start: float, end: float) -> list[tuple[float, float]]:
    """From each placing of a worker group to the moment at which its workers run."""
    found, launched = [], 0.0
    for event in events:
        if event["stage"] != DIT or not start <= event["wall"] <= end:
            continue
        if event["kind"] == "launch":
            launched = event["wall"]
        elif event["kind"] == "spawn" and launched:
            found.append((launched, event["wall"]))
            launched = 0.0
    return found


def run(spec: Spec, steps: list[Step], length_s: float, tick_s: float) -> Replayed:
    """One run through the trace: what happened."""
    driver = Driver(spec)
    try:
        return replay(driver, steps, length_s, tick_s)
    finally:
        driver.kill()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first ten ticks")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where runs are kept, and not made again; a temporary one if not",
    )
    parser.add_argument("--system", choices=("ours", "vanilla"), help="only this one, to look at")
    options = parser.parse_args()
    most = sum(length for _, length in COUNTS)
    ticks = 10 if options.quick else most
    steps, length_s = schedule(ticks, TICK_S, seed=0), ticks * TICK_S
    systems = [options.system] if options.system else ["ours", "vanilla"]
    ran: dict[str, Replayed] = {}
    roots: dict[str, Path] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as temporary:
        folder = options.folder or Path(temporary)
        videos = write_demo_videos(folder / "videos", clips=24)
        plan = replace(PLAN, table=str(videos.table))
        if not (folder / "base").exists():
            prepare(plan, folder / "base")
        for system in systems:
            spec = replace(
                plan,
                storage=str(folder / system),
                system=system,
                save_updates=SAVE_UPDATES[system],
            )
            kept = folder / f"{system}-{ticks}.json"
            roots[system] = spec.folder.root
            try:
                if not kept.exists():
                    shutil.rmtree(spec.storage, ignore_errors=True)  # of a run that was cut off
                    done = run(copied(folder / "base", spec), steps, length_s, TICK_S)
                    content = {**done._asdict(), "settings": settings_of(system)}
                    kept.write_text(json.dumps(content))
                ran[system] = Replayed.read(kept, system)
            except (TimeoutError, DriverGone) as error:
                failed[system] = str(error)[:2000]
                print(json.dumps(failed), file=sys.stderr, flush=True)
        # One table of rates for both: an update costs the same, and the machine is shared.
        lines = [line for system in ran for line in read_metrics(roots[system])]
        rate = rates(lines, DIT, BATCH[DIT])
        accounts = {system: account(roots[system], replayed) for system, replayed in ran.items()}
    figures: dict[str, Any] = {"samples_per_s": {k: round(v, 1) for k, v in sorted(rate.items())}}
    if len(accounts) == 2:
        ours, vanilla = accounts["ours"]["of_ideal"], accounts["vanilla"]["of_ideal"]
        figures["ours_over_vanilla"] = round(ours / vanilla, 3)
    losses = [step for step in steps if step.do != "add"]
    killed = sum(step.do == "kill_node" for step in losses)
    figures |= {
        **accounts,
        "failed": failed,
        "trace": {"ticks": ticks, "tick_s": TICK_S, "joins": len(steps) - len(losses),
                  "noticed": len(losses) - killed, "killed": killed},
    }  # fmt: skip
    record(
        "trace",
        figures=figures,
        goal=(
            f"goodput at least {IDEAL_GOAL} of the ideal less the time that Ray needs to start "
            f"processes, and at least {VANILLA_GOAL} x vanilla's"
        ),
        holds=(
            len(accounts) == 2
            and accounts["ours"]["of_ideal_less_ray_starts"] >= IDEAL_GOAL
            and figures["ours_over_vanilla"] >= VANILLA_GOAL
        ),
        keep=not options.quick and len(systems) == 2,
    )


if __name__ == "__main__":
    main()
