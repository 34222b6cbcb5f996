"""What the loop costs beside a bare one, and what passes from the command to the first update.

Ours is the real loop (`elastic.loop.train_stage`): agreement, reading ahead, noise addressed by
sample, meter, digest. The others (loop_peers.py) train the same model on the same batches with the
same update: FSDP2 alone, Lightning Fabric, Accelerate, a function for Ray Train. Two ranks on CPU
take turns with all of them in the same processes; Ray Train has its own. A first turn draws the
noise that ours draws, so that all losses must agree. The part of processor seconds says what is
computed, that of the clock also who waits for whom, on a machine that others use too.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import worlds
from figure import record
from loop_peers import PEERS, Task, Turn, ray_function
from tiny import DrawnLatents
from worlds import run_world

from elastic.checkpoint import Checkpoints, Fence
from elastic.data.load import Round, Samples, rounds_of
from elastic.data.moving_shapes import write_demo_videos
from elastic.data.order import BatchPlan, Layout, batch_at
from elastic.data.permutation import Indices
from elastic.journal import read_events, read_metrics
from elastic.loop import Run, train_stage
from elastic.meter import Meter
from elastic.objective import FlowMatching
from elastic.world import World
from models import DiT, HunyuanVAE, WordHash
from stages import AdamW, Bucket, DiffusionStage, Ema, Phase, Videos

ROOT = Path(__file__).resolve().parents[2]
BATCH, CLIPS, WARM_UPS, LOG_UPDATES, CHECKED = 8, 32, 3, 5, 8
GOAL = 1.05
LOSS_TOLERANCE = 1e-4
STAGE = DiffusionStage(
    name="overhead",
    data=Videos("none.csv"),
    vae=HunyuanVAE(channels=16, weights="none.safetensors"),
    model=DiT(depth=2, depth_single=2, width=192, heads=4, patch=2),
    text=WordHash(width=32),
    schedule=[
        Phase(until=BATCH * 10_000, buckets=[Bucket("64px", frames=17, batch=BATCH, micro=4)])
    ],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=1000),
    save_every=BATCH * 10_000,
    log_every=BATCH * LOG_UPDATES,
    evaluate_every=BATCH * 10_000,
    held_out=1,
)


PLAN = """
import os
from models import DCAE
from stages import AdamW, AutoencoderStage, Bucket, Ema, Phase, Plan, Videos

stage = AutoencoderStage(
    name="vae",
    data=Videos(os.environ["LAUNCH_TABLE"]),
    vae=DCAE(
        channels=8,
        widths=(8, 8, 8, 16, 16, 16),
        encoder_depths=(1, 1, 1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1, 1, 1),
        head_width=8,
    ),
    rate=8.0,
    schedule=[Phase(until=8, buckets=[Bucket("32px", frames=4, batch=4, micro=2)])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=16),
    workers=(2, 2),
    save_every=8,
    log_every=4,
    evaluate_every=8,
    held_out=1,
)
plan = Plan("launch", [stage])
"""


class Held:
    """Latents that lie in memory, so that no loop waits for them."""

    def __init__(self) -> None:
        self._drawn = DrawnLatents(STAGE, {STAGE.buckets[0].name: CLIPS}, 0)
        indices = torch.arange(CLIPS).numpy()
        self._all = self._drawn.fetch(STAGE.buckets[0], indices)
        self._lengths = self._drawn.text_lengths(STAGE.buckets[0], indices)

    def counts(self) -> dict[str, int]:
        """Samples by bucket."""
        return self._drawn.counts()

    def layouts(self) -> dict[str, Layout]:
        """Where they lie."""
        return self._drawn.layouts()

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        """Ids of samples."""
        return self._drawn.sample_ids(bucket, indices)

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        """Text tokens of samples."""
        return self._lengths[indices]  # a store has them in a column

    def fetch_all(self, rounds: Any) -> Any:
        """The samples of each round."""
        return (self._fetch(one) for one in rounds)

    def _fetch(self, one: Round) -> Samples:
        found, (_, indices) = self._all, one
        assert found.text is not None, "latents have text"
        text = type(found.text)(*(None if x is None else x[indices] for x in found.text))
        ids = self.sample_ids(*one)
        return Samples(found.x_BCTHW[indices], text, ids, torch.ones(len(ids)))


def goal_of() -> FlowMatching:
    """Flow matching on latents in memory."""
    source = Held()
    return FlowMatching(STAGE, source, source, STAGE.text.null())


def task_of(world: World, updates: int, is_check: bool = False) -> Task:
    """The batches that ours sees, for the others."""
    objective = goal_of()
    source = objective.source
    plans: list[BatchPlan] = [
        batch_at(STAGE, number * BATCH, source.counts()) for number in range(updates)
    ]
    found: list[list[Any]] = [[]]
    for micro in rounds_of(plans, source, world.rank, world.size):
        found[-1].append(micro)
        if micro.is_last:
            found.append([])
    return Task(STAGE, objective, found[:-1], 1 if is_check else LOG_UPDATES, is_check)


def ours(world: World, updates: int, is_check: bool = False) -> Turn:
    """The real loop; as a check it logs every update."""
    stage = STAGE.replace(log_every=BATCH) if is_check else STAGE
    folder = Path(world.from_first(tempfile.mkdtemp() if world.is_first else None))
    fence = world.from_first(Fence.take(folder) if world.is_first else None)
    marks: list[tuple[float, float]] = []
    lines: list[dict[str, Any]] = []

    begun: set[int] = set()

    def beat(phase: str, position: int) -> None:
        # An update begins with its first sign of life, and the last one ends with the save.
        if phase in ("read", "train", "compile", "save") and position not in begun:
            begun.add(position)
            marks.append((time.perf_counter(), time.process_time()))

    def ignored(*said: Any, **more: Any) -> None:
        pass

    run = Run(
        folder=folder,
        world=world,
        checkpoints=Checkpoints(folder, world, fence, ignored),
        meter=Meter(stage, world, fence.attempt, lines.append),
        stop_wanted=lambda: len(marks) >= updates,
        event=ignored,
        beat=beat,
    )
    train_stage(stage, goal_of(), run)
    if world.is_first:
        shutil.rmtree(folder)
    steps = list(itertools.pairwise(marks))
    assert len(steps) == updates, f"{len(steps)} updates, {updates} asked"
    return Turn(
        [after[0] - before[0] for before, after in steps],
        [after[1] - before[1] for before, after in steps],
        [line["values"]["loss"] for line in lines if line["context"] == {}],
    )


def turn_of(name: str, world: World, updates: int, is_check: bool) -> Turn:
    """One turn of a loop in this group."""
    if name == "ours":
        return ours(world, updates, is_check)
    return PEERS[name](task_of(world, updates, is_check), world)


def take_turns(world: World, names: list[str], updates: int, cycles: int) -> dict[str, Any]:
    """All loops in these processes, one after the other, and again; the first time as a check."""
    os.environ.update(
        RANK=str(world.rank),
        LOCAL_RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_WORLD_SIZE=str(world.size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # the group is there already
    )
    left_out: dict[str, str] = {}
    losses: dict[str, list[float]] = {}
    for name in list(names):
        try:
            losses[name] = turn_of(name, world, CHECKED, True).losses
        except ImportError as error:
            left_out[name] = str(error)
    names = [name for name in names if name not in left_out]
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for cycle in range(cycles):
        for name in names[cycle % len(names) :] + names[: cycle % len(names)]:
            turns[name].append(turn_of(name, world, updates, False))
    return {"losses": losses, "turns": turns, "left_out": left_out}


def ray_turns(updates: int) -> list[Turn]:
    """A function for Ray Train on two workers of a cluster of its own; the turn of each."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.local import LocalCluster

    ours = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
    os.environ["PYTHONPATH"] = os.pathsep.join(ours)  # for Ray's processes
    cluster = LocalCluster(cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        cluster.connect()
        try:
            trainer = TorchTrainer(
                ray_function,
                train_loop_config={"make": task_of, "updates": updates, "told": f"{folder}/told"},
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(name="overhead", storage_path=folder),
            )
            trainer.fit()
            return [Turn(*turn) for turn in json.loads(Path(folder, "told").read_text())]
        finally:
            ray.shutdown()
            cluster.stop()


def cost_of(turns: list[list[Turn]]) -> dict[str, float]:
    """Median seconds of an update, and processor seconds of one on all ranks; warm-ups left out."""
    walls = [wall for wall in turns[0] for wall in wall.wall_s[WARM_UPS:]]
    cpus = [statistics.median(c for one in rank for c in one.cpu_s[WARM_UPS:]) for rank in turns]
    return {"wall_s": statistics.median(walls), "cpu_s": sum(cpus)}


def one_round(number: int, updates: int, cycles: int, with_ray: bool) -> dict[str, Any]:
    """New processes, all loops in turn: the cost of each, and what was left out and why."""
    names = ["bare", "ours", *(name for name in PEERS if name != "bare")]
    names = names[number % len(names) :] + names[: number % len(names)]
    ranks = run_world(take_turns, 2, names, updates, cycles)
    losses = ranks[0]["losses"]
    for name, found in losses.items():
        for mine, theirs in zip(losses["ours"], found, strict=True):
            assert abs(theirs - mine) <= LOSS_TOLERANCE * abs(mine), f"{name}: {losses}"
    costs = {name: cost_of([rank["turns"][name] for rank in ranks]) for name in ranks[0]["turns"]}
    if with_ray:
        costs["ray train"] = cost_of([[turn] for turn in ray_turns(updates * cycles)])
    print(json.dumps({"round": number, "load": os.getloadavg()[0], **costs}), flush=True)
    return {"costs": costs, "left_out": ranks[0]["left_out"]}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in named.items()}


def compare(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Of each loop: seconds of an update, and over those of the bare loop of the same round."""
    return {
        name: {
            "update_s": spread([one[name]["wall_s"] for one in rounds]),
            "of_bare": spread([one[name]["wall_s"] / one["bare"]["wall_s"] for one in rounds]),
            "cpu_s": spread([one[name]["cpu_s"] for one in rounds]),
            "cpu_of_bare": spread([one[name]["cpu_s"] / one["bare"]["cpu_s"] for one in rounds]),
        }
        for name in rounds[0]
    }


CHILD = """
import json, os, sys, time
marks = {"python": time.time()}
from elastic.cli import main
marks["imports, command line"] = time.time()
import elastic.course, elastic.report
from elastic import drive
marks["imports, driver"] = time.time()
start = drive.start_cluster
def started(*given):
    cluster = start(*given)
    marks["cluster up"] = time.time()
    with open(os.environ["LAUNCH_MARKS"], "w") as file:
        json.dump(marks, file)
    return cluster
drive.start_cluster = started
sys.exit(main(sys.argv[1:]))
"""
# The part that ends with each event; "start" ends with what its own phases say.
ENDS = {"run_start": "tracker up", "launch": "clips chosen, controller up", "spawn": "workers up"}


def launch(folder: Path) -> dict[str, float]:
    """Seconds from the command to the end of the first update of a small stage, part by part."""
    table = write_demo_videos(folder / "videos", 12).table
    plan, marks = folder / "plan.py", folder / "marks.json"
    plan.write_text(PLAN)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LAUNCH_TABLE": str(table),
        "LAUNCH_MARKS": str(marks),
    }
    arguments = ["train", str(plan), "--cpus", "2", "--storage", str(folder / "runs")]
    at = time.time()
    subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env=environment,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    root, parts = folder / "runs" / "launch", {}
    events = read_events(root)
    ends = [(name, wall) for name, wall in json.loads(marks.read_text()).items()]
    ends += [(ENDS[event["kind"]], event["wall"]) for event in events if event["kind"] in ENDS]
    for name, wall in ends:
        parts[name], at = wall - at, wall
    (start,) = [event for event in events if event["kind"] == "start"]
    phases = start.get("phases") or {}
    parts["fork, group"] = start["wall"] - at - sum(phases.values()) + phases.pop("group")
    parts |= {f"process: {name}": seconds for name, seconds in phases.items()}
    first = min(metric["wall"] for metric in read_metrics(root) if not metric["context"])
    return {**parts, "first update": first - start["wall"]}


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds, without Ray Train")
    asked = parser.parse_args()
    worlds.DEADLINE_S = 1800.0
    num_rounds, updates, cycles = (2, 8, 1) if asked.quick else (9, 12, 3)
    rounds = [one_round(n, updates, cycles, not asked.quick) for n in range(num_rounds)]
    launches = []
    for _ in range(1 if asked.quick else 3):
        with tempfile.TemporaryDirectory(prefix="restage-bench-") as folder:
            launches.append(launch(Path(folder)))
            print(json.dumps({"load": os.getloadavg()[0], **launches[-1]}), flush=True)
    loops = compare([one["costs"] for one in rounds])
    record(
        "overhead",
        figures={
            "loops": loops,
            "left_out": rounds[0]["left_out"],
            "launch_s": {name: spread([one[name] for one in launches]) for name in launches[0]},
            "first_update_s": spread([sum(one.values()) for one in launches]),
        },
        goal=f"an update of ours takes at most {GOAL} x one of the bare loop, on 2 CPU ranks",
        holds=loops["ours"]["of_bare"]["median"] <= GOAL,
        keep=not asked.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
