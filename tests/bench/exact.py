"""Whether exact=True keeps every bit on any world and through faults, and what it costs.

A DiT, and an autoencoder with a discriminator, are trained for 200 updates on 1, 2, 3 and 4 gloo
ranks, and once more on 2 ranks, then 3, then 1, with a SIGKILL of one of the three in between.
Compared are every value of every line of the log and every tensor of the last checkpoint. Then a
wider DiT is timed with and without exact=True, in turns.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

# What lies beside this script is measured, whatever is installed; the others are in tests/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny
import worlds
from figure import record
from test_adversarial import STAGE as JUDGED
from test_adversarial import DrawnClips

from elastic import shard
from elastic.checkpoint import Checkpoints, Fence, published
from elastic.loop import Run, train_stage
from elastic.meter import OF_THE_MACHINES, Meter
from elastic.objective import Objective, Reconstructing
from elastic.world import World
from stages import AdamW, AutoencoderStage, Bucket, DiffusionStage, Phase, Stage

WORLDS = (1, 2, 3, 4)
TIMED_WORLDS = (1, 2)
LINES = "lines.jsonl"
Line = tuple[int, str, str]  # position, context, values and digest of the order as JSON


class Course(NamedTuple):
    """A stage of so many updates, and those after which its faulty run stops, is killed, stops."""

    stage: Stage
    updates: int
    first_stop: int
    kill: int
    second_stop: int


def courses(shorter: int) -> dict[str, Course]:
    """Both kinds of stage, 200 / `shorter` updates each; no world but 1 divides their batches."""
    updates = 200 // shorter
    # 36 % of the way: stopped; 55 %: killed, behind a checkpoint; 80 %: stopped.
    faults = [round(updates * share) for share in (0.36, 0.55, 0.8)]
    cycles, rest = updates * 9 // 20, updates // 10
    diffusion = tiny.STAGE.replace(
        schedule=[
            Phase(until=11 * cycles, buckets=tiny.STAGE.schedule[0].buckets),
            Phase(until=11 * cycles + 7 * rest, buckets=tiny.STAGE.schedule[1].buckets),
        ],
        optimizer=AdamW(lr=3e-3, warmup=40, weight_decay=0.01),
    )
    half = updates // 2
    assert JUDGED.adversarial is not None
    autoencoder = JUDGED.replace(
        schedule=[
            Phase(until=5 * half, buckets=JUDGED.schedule[0].buckets),
            Phase(until=12 * half, buckets=JUDGED.schedule[1].buckets),
        ],
        adversarial=JUDGED.adversarial.replace(start=5 * half),
    )
    return {
        name: Course(
            stage.replace(
                exact=True,
                log_every=1,
                save_every=stage.budget // 7,
                evaluate_every=stage.budget // 3,
            ),
            updates,
            *faults,
        )
        for name, stage in (("diffusion", diffusion), ("autoencoder", autoencoder))
    }


def goal_of(stage: Stage) -> Objective:
    """What the stage minimises, on data made up in memory."""
    if isinstance(stage, AutoencoderStage):
        return Reconstructing(stage, DrawnClips(23, 100), DrawnClips(5, 5000))
    return tiny.objective(stage)


def train(
    world: World, folder: Path, stage: Stage, stop_at: int | None = None, kill_at: int | None = None
) -> None:
    """One attempt; its lines are kept as they come. Updates are counted from the attempt's start.

    It stops in order after `stop_at`; or the last rank dies at once, and all with it.
    """
    shard.SMALLEST_GROUP = 0  # layers in groups of their own, as those of a large model are
    fence = world.from_first(Fence.take(folder) if world.is_first else None)
    asked = -1

    def stop_wanted() -> bool:
        nonlocal asked
        asked += 1
        last = world.rank == world.size - 1
        if last and asked == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return last and asked == stop_at

    with (folder / LINES).open("a", buffering=1) as file:
        run = Run(
            folder=folder,
            world=world,
            checkpoints=Checkpoints(folder, world, fence, lambda *a, **k: None),
            meter=Meter(
                stage, world, fence.attempt, lambda line: print(json.dumps(line), file=file)
            ),
            stop_wanted=stop_wanted,
            event=lambda *a, **k: None,
        )
        train_stage(stage, goal_of(stage), run)


def said(folder: Path) -> list[Line]:
    """What the lines of all attempts say that is no time, speed, world or attempt."""
    lines = []
    for text in (folder / LINES).read_text().splitlines():
        line = json.loads(text)
        values = {k: v for k, v in line["values"].items() if k not in OF_THE_MACHINES}
        told = json.dumps([values, line["order_digest"]], sort_keys=True)
        lines.append((line["position"], json.dumps(line["context"]), told))
    return lines


def digest_of_state(stage: Stage, folder: Path) -> str:
    """SHA-256 of every tensor of the last checkpoint, read by one rank whoever wrote it."""
    digest = hashlib.sha256()
    with tiny.world_of_one() as world:
        state = tiny.restored(world, folder, stage, goal_of(stage))
        samples = state.progress.samples
        assert samples == stage.budget, f"{folder} holds {samples} samples"
        for name, whole in sorted(tiny.whole_bytes(state).items()):
            digest.update(name.encode() + whole)
    return digest.hexdigest()


def undisturbed(course: Course, folder: Path, size: int) -> tuple[list[Line], str]:
    """Lines and digest of a run from end to end on one world."""
    worlds.run_world(train, size, folder, course.stage)
    return said(folder), digest_of_state(course.stage, folder)


def disturbed(course: Course, folder: Path) -> tuple[list[Line], str, int]:
    """Two resizes and a kill: lines and digest, and how many updates were made again."""
    stage = course.stage
    worlds.run_world(train, 2, folder, stage, course.first_stop)
    before = course.kill - course.first_stop
    try:
        worlds.run_world(train, 3, folder, stage, None, before)
    except RuntimeError as death:
        print(f"as meant: {death}".splitlines()[0], file=sys.stderr)
    else:
        raise AssertionError("the rank was to be killed")
    reached = max(position for position, *_ in said(folder))
    saved = published(folder / "checkpoints")[0]
    positions = sorted({p for p, context, _ in said(folder) if context == "{}" and p > saved})
    assert saved < reached, "killed at a checkpoint: nothing was lost"
    rest = course.second_stop - course.kill + len(positions)
    worlds.run_world(train, 3, folder, stage, rest)
    worlds.run_world(train, 1, folder, stage)
    return said(folder), digest_of_state(stage, folder), len(positions)


def compare(name: str, course: Course, folder: Path) -> dict[str, Any]:
    """All runs of a stage against that on one rank."""
    lines, digest = undisturbed(course, folder / f"{name}-1", 1)
    reference = {(position, context): told for position, context, told in lines}
    runs: dict[str, Any] = {"updates": course.updates, "lines": len(lines), "digest": digest}
    for size in WORLDS[1:]:
        runs[f"world {size}"] = _verdict(
            reference, digest, *undisturbed(course, folder / f"{name}-{size}", size)
        )
        print(f"{name}, world {size}: {runs[f'world {size}']}", file=sys.stderr, flush=True)
    *faulty, repeated = disturbed(course, folder / f"{name}-faults")
    runs["worlds 2, 3, killed, 3, 1"] = {
        **_verdict(reference, digest, *faulty),
        "updates_made_again": repeated,
    }
    print(f"{name}, faults: {runs['worlds 2, 3, killed, 3, 1']}", file=sys.stderr, flush=True)
    plain = course._replace(stage=course.stage.replace(exact=False))
    control = [
        {(p, c): told for p, c, told in undisturbed(plain, folder / f"{name}-plain-{n}", n)[0]}
        for n in (1, 2)
    ]
    differing = sum(told != control[1][at] for at, told in control[0].items())
    return {**runs, "lines_that_differ_without_exact": differing}


def _verdict(
    reference: dict[tuple[int, str], str], digest: str, lines: list[Line], other: str
) -> dict[str, Any]:
    found = {(position, context) for position, context, _ in lines}
    return {
        "differing_lines": sum(reference[p, c] != told for p, c, told in lines),
        "missing_lines": len(reference.keys() - found),
        "same_state": other == digest,
    }


def timed_stage(exact: bool, updates: int) -> DiffusionStage:
    """1.5 M parameters, 8 micro-batches an update: 8 rounds on one rank, 4 on two."""
    batch, micro = 16, 2
    return tiny.STAGE.replace(
        model=tiny.STAGE.model.replace(depth=2, depth_single=2, width=128, heads=4),
        schedule=[
            Phase(
                until=batch * updates, buckets=[Bucket("64px", frames=5, batch=batch, micro=micro)]
            )
        ],
        optimizer=AdamW(lr=1e-3),
        exact=exact,
        log_every=1,
        save_every=batch * updates,
        evaluate_every=batch * updates,
    )


def stints(world: World, folder: Path, pairs: int, updates: int) -> list[tuple[float, float]]:
    """Median seconds an update of plain and exact training, in turns; each stint from the start."""
    medians = []
    for number in range(pairs):
        pair: dict[bool, float] = {}
        for exact in (False, True) if number % 2 else (True, False):
            own, stage = folder / f"{world.size}-{number}-{exact}", timed_stage(exact, updates)
            if world.is_first:
                own.mkdir()
            world.barrier()
            train(world, own, stage)
            seconds = []
            for text in (own / LINES).read_text().splitlines():
                line = json.loads(text)
                if line["context"] == {}:
                    seconds.append(stage.buckets[0].batch / line["values"]["samples_per_s"])
            pair[exact] = statistics.median(seconds[2:])  # the first ones set up
        medians.append((pair[False], pair[True]))
    return medians


def cost(folder: Path, pairs: int, updates: int) -> dict[str, Any]:
    """Time of an exact update over that of a plain one."""
    figures: dict[str, Any] = {}
    for size in TIMED_WORLDS:
        medians = worlds.run_world(stints, size, folder, pairs, updates)[0]
        ratios = sorted(exact / plain for plain, exact in medians)
        figures[f"world {size}"] = {
            "plain_s": statistics.median(plain for plain, _ in medians),
            "exact_s": statistics.median(exact for _, exact in medians),
            "ratio": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
        }
        print(f"cost, world {size}: {figures[f'world {size}']}", file=sys.stderr, flush=True)
    return figures


def is_same(runs: dict[str, Any]) -> bool:
    """Whether every run was the one on a single rank, and the comparison could have failed."""
    verdicts = [found for found in runs.values() if isinstance(found, dict)]
    return runs["lines_that_differ_without_exact"] > 0 and all(
        found["same_state"] and not found["differing_lines"] and not found["missing_lines"]
        for found in verdicts
    )


def main() -> None:
    """Compare the bits, then time the updates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the updates, few timings")
    flags = parser.parse_args()
    worlds.DEADLINE_S = 3600.0  # a rank says nothing before its attempt is over
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = {
            name: compare(name, course, Path(scratch))
            for name, course in courses(10 if flags.quick else 1).items()
        }
        pairs, updates = (3, 8) if flags.quick else (9, 24)
        ratios = cost(Path(scratch), pairs, updates)
    record(
        "exact",
        figures={**results, "cost": ratios, "minutes": round((time.monotonic() - began) / 60, 1)},
        goal="identical bits of every loss and of the whole last state on worlds 1, 2, 3 and 4, "
        "and through two resizes and one kill",
        holds=all(map(is_same, results.values())),
        keep=not flags.quick,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
