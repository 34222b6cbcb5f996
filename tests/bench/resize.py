"""A node added, drained with notice, killed, and a process killed: ours and vanilla Ray Train.

Both train the same DiT on the same latents, in turn, on the same kind of cluster: raylets of one
CPU each on this machine. One repeat is one run of each system that meets all four, with a drawn
number of updates between them, so that a crash finds the interval at another place every time.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from elastic_driver import BATCH, DIT, Driver, DriverGone, Spec, copied, prepare
from elastic_timeline import Cost, cost_of, new_updates, rates, recovered, spread
from figure import record

from cluster import faults
from elastic.data.moving_shapes import write_demo_videos
from elastic.journal import read_events, read_metrics

SAVE_UPDATES = 40
NOTICE_S = 8.0
FIRST_S, RECOVER_S = 120.0, 300.0  # vanilla waits 60 s and more for a lost node
KILL_GOAL, NODE_GOAL = 0.6, 0.4  # of vanilla's seconds without an update
PLAN = Spec(
    storage="",
    table="",
    nodes=("a", "b"),
    dit_updates=50_000,  # never reached: each run is ended when it has met all faults
    save_updates=SAVE_UPDATES,
    settings={"min_stay": 2.0},
)


def add(driver: Driver, node: str) -> float:
    """A node joins; the moment at which it takes work."""
    return float(driver.tell("add", node=node)["wall"])


def drain(driver: Driver, node: str) -> float:
    """A node is announced to be lost; the moment of the notice."""
    return float(driver.tell("drain", node=node, seconds=NOTICE_S)["wall"])


def kill_node(driver: Driver, node: str) -> float:
    """A node is lost without notice."""
    return float(driver.tell("kill_node", node=node)["wall"])


def kill_process(driver: Driver, node: str) -> float:
    """A training process, on whatever node, is ended by SIGKILL."""
    wall = new_updates(read_metrics(driver.folder.root), DIT)[-1].wall
    faults.kill(driver.pids()[-1])
    return wall


# In this order: every scene finds the nodes that the ones before it have left.
Scene = tuple[str, Callable[[Driver, str], float], str]
SCENES: list[Scene] = [
    ("added", add, "c"),
    ("drained", drain, "c"),
    ("killed", kill_process, ""),
    ("added", add, "d"),
    ("node", kill_node, "d"),
]
QUICK: list[Scene] = [("killed", kill_process, ""), ("node", kill_node, "b")]


def meet(driver: Driver, scene: Scene, updates_before: int) -> Cost:
    """Train some updates, let the scene happen, and wait for new updates."""
    root, batch = driver.folder.root, BATCH[DIT]
    goal = driver.position() + updates_before * batch
    driver.wait(lambda: driver.position() >= goal, f"{updates_before} updates", FIRST_S)
    _, act, node = scene
    wall = act(driver, node)

    def is_over() -> bool:
        return recovered(read_events(root), read_metrics(root), DIT, wall)

    driver.wait(is_over, f"new updates after {scene[0]}", RECOVER_S)
    return cost_of(read_events(root), read_metrics(root), DIT, wall, batch)


def run(
    spec: Spec, scenes: list[Scene], seed: int
) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """One run through all scenes: their costs, and the rate by world."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    driver = Driver(spec)
    fault = "start"
    try:
        driver.wait(lambda: driver.position() > 0, "the first update", FIRST_S)
        for scene in scenes:
            fault = scene[0]
            row: dict[str, Any] = {"fault": fault, "system": spec.system, "seed": seed}
            cost = meet(driver, scene, draw.randint(SAVE_UPDATES // 2, 2 * SAVE_UPDATES))
            rows.append({**row, **cost._asdict()})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    except (TimeoutError, DriverGone) as error:
        rows.append({"fault": fault, "system": spec.system, "failed": str(error)[:2000]})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        driver.kill()
    return rows, rates(read_metrics(driver.folder.root), DIT, BATCH[DIT])


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By fault and system: seconds without an update, updates lost, and the median phases."""
    found: dict[str, Any] = {}
    for fault in dict.fromkeys(row["fault"] for row in rows):
        for system in ("ours", "vanilla"):
            mine = [r for r in rows if (r["fault"], r["system"]) == (fault, system)]
            whole = [r for r in mine if "failed" not in r]
            if not whole:
                continue
            names = dict.fromkeys(name for r in whole for name in r["phases_s"])
            found.setdefault(fault, {})[system] = {
                "stopped_s": spread([r["stopped_s"] for r in whole]),
                "lost_updates": spread([r["lost_updates"] for r in whole]),
                "lost_s": spread([r["lost_s"] for r in whole]),
                "reacted_s": spread([r["reacted_s"] for r in whole]),
                "phases_s": {
                    name: round(statistics.median(r["phases_s"].get(name, 0.0) for r in whole), 2)
                    for name in names
                },
                "failed": len(mine) - len(whole),
            }
    return found


def ratio(faults_table: dict[str, Any], fault: str) -> float | None:
    """Ours over vanilla, of the median seconds without an update."""
    both = faults_table.get(fault, {})
    if len(both) < 2:
        return None
    ours, vanilla = (both[s]["stopped_s"]["median"] for s in ("ours", "vanilla"))
    return round(ours / vanilla, 3)


def constants(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the goodput model takes: our seconds for each thing, lost work apart."""
    ours = [r for r in rows if r["system"] == "ours" and "failed" not in r]
    crashed = [r for r in ours if r["fault"] in ("killed", "node")]

    def stop(*names: str) -> list[float]:
        return [r["stopped_s"] - r["lost_s"] for r in ours if r["fault"] in names]

    found = {
        "detect_s": [r["phases_s"].get("detect", 0.0) for r in crashed],
        "planned_s": stop("added", "drained"),
        "crash_s": stop("killed"),
        "node_s": stop("node"),
        "lost_s": [r["lost_s"] for r in crashed],
    }
    return {name: spread(values) for name, values in found.items() if values}


def holds(rows: list[dict[str, Any]], ratios: dict[str, float | None]) -> bool:
    """Whether nothing of ours is lost but by a crash, and ours is as fast as the goal says."""
    ours = [r for r in rows if r["system"] == "ours"]
    allowed = {"added": 0, "drained": 0, "killed": SAVE_UPDATES, "node": SAVE_UPDATES}
    if any("failed" in r or r["lost_updates"] > allowed[r["fault"]] for r in ours):
        return False
    goals = (("killed", KILL_GOAL), ("node", NODE_GOAL))
    return all(ratios[name] is not None and ratios[name] <= most for name, most in goals)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, the two kills only")
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary one if not")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    scenes, repeats = (QUICK, 1) if options.quick else (SCENES, options.repeats)
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as temporary:
        folder = options.folder or Path(temporary)
        videos = write_demo_videos(folder / "videos", clips=24)
        plan = replace(PLAN, table=str(videos.table))
        base = folder / "base"
        if not base.exists():
            prepare(plan, base)
        rows: list[dict[str, Any]] = []
        rate: dict[str, dict[int, float]] = {}
        for repeat in range(repeats):
            for system in ("ours", "vanilla"):
                storage = folder / f"{system}-{repeat}"
                spec = copied(base, replace(plan, storage=str(storage), system=system))
                more, rate[system] = run(spec, scenes, seed=repeat)
                rows += more
    by_fault = table(rows)
    ratios = {name: ratio(by_fault, name) for name in ("added", "drained", "killed", "node")}
    record(
        "resize",
        figures={
            **constants(rows),
            "interval_updates": SAVE_UPDATES,
            "notice_s": NOTICE_S,
            "faults": by_fault,
            "ratios": ratios,
            "samples_per_s": rate,
            "rows": rows,
        },
        goal=(
            "updates lost: 0 when a node is added or drained, at most the interval when something "
            f"is killed; seconds without an update at most {KILL_GOAL} x vanilla's when a process "
            f"is killed, {NODE_GOAL} x when a node is"
        ),
        holds=holds(rows, ratios),
        keep=not options.quick,
    )


if __name__ == "__main__":
    main()
