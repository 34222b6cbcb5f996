"""What runs in a Ray Train worker: the training loop, and the switch that stops it."""

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elastic.align import Pairs
from elastic.checkpoint import Checkpoints, Fence
from elastic.checkpoint_ram import RamCopies
from elastic.checkpoint_store import DEFAULT_KEEP, Keep, settle
from elastic.data.assign import load_members
from elastic.data.sealed import SealedStore
from elastic.data.sources import LatentSource, VideoSource
from elastic.loop import Outcome, Run, train_stage
from elastic.meter import Meter
from elastic.objective import FlowMatching, Objective, Reconstructing
from elastic.ray_tracker import TrackerHandle
from elastic.start import Origin
from elastic.world import World
from stages.init import parent_of
from stages.stage import AutoencoderStage, DiffusionStage, Stage

log = logging.getLogger(__name__)

MEMBERS = "clips.parquet"
# A group that was asked to stop is ended by the controller within seconds; longer means that the
# resize did not happen, and then the group must start over rather than wait for ever.
_STOPPED_WAIT_S = 120.0
_LAST_SAVE_S = 30.0  # what a save in flight may take once its rank has failed

_stop = threading.Event()
_stopped = threading.Event()


class Latents(NamedTuple):
    """Which store a stage reads: refused if it is another one, or was sealed with other content."""

    root: Path
    fingerprint: str
    digest: str


@dataclass(frozen=True)
class WorkerJob:
    """Plain data that the driver sends to every worker."""

    stage: Stage
    folder: Path  # of the stage
    tracker: str
    latents: Latents | None = None  # of a diffusion stage
    parent: Path | None = None  # folder of the stage that the init policy starts from
    parent_latents: Latents | None = None  # of that stage, where latents are paired
    keep: Keep = DEFAULT_KEEP
    checkpoints: str | None = None  # where the checkpoints of all plans lie, if not in the runs


def request_stop() -> None:
    """Make the loop save at its next step and stop; runs in the worker's main thread."""
    _stop.set()


def has_stopped() -> bool:
    """Whether the loop has published and stopped."""
    return _stopped.is_set()


def train_worker(config: dict[str, Any]) -> None:
    """The training function that Ray Train calls in a thread of every worker."""
    job: WorkerJob = config["job"]
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = World.current()
    fence = world.from_first(Fence.take(job.folder) if world.is_first else None)
    pids = world.gather((os.getpid(), os.uname().nodename))
    tracker = TrackerHandle(job.tracker)

    def event(kind: str, position: int, reason: str, **more: Any) -> None:
        if world.is_first:
            if kind == "start":
                more = {**more, "pids": [pid for pid, _ in pids]}
            tracker.event(
                kind, job.stage.name, position, reason,
                attempt=fence.attempt, world=world.size, **more,
            )  # fmt: skip
            if kind == "publish" and reason == "finished":
                tracker.settle()  # the last lines of a stage are kept before it counts as finished

    run = Run(
        folder=job.folder,
        world=world,
        checkpoints=Checkpoints(
            job.folder,
            world,
            fence,
            event,
            job.keep,
            settle(job.folder, job.checkpoints),
            # The parent is the node's raylet, which outlives the workers and their copies' writers.
            RamCopies(job.folder, owner=os.getppid()),
        ),
        meter=Meter(job.stage, world, fence.attempt, tracker.metric),
        stop_wanted=_stop.is_set,
        event=event,
        origin=make_origin(job),
    )
    try:
        outcome = train_stage(job.stage, make_objective(job, world.device), run)
    except BaseException:
        run.checkpoints.abandon(_LAST_SAVE_S)
        raise
    if outcome is Outcome.STOPPED:
        _stopped.set()
        _wait_for_the_end()


def make_objective(job: WorkerJob, device: torch.device) -> Objective:
    """What the stage minimises, on its clips or its latents."""
    if isinstance(job.stage, AutoencoderStage):
        members = load_members(job.folder / MEMBERS)
        return Reconstructing(
            job.stage,
            VideoSource(job.stage, members, held_out=False),
            VideoSource(job.stage, members, held_out=True),
            device,
        )
    assert job.latents is not None, f"stage {job.stage.name} was started without its latents"
    store = SealedStore.open(*job.latents)
    source = LatentSource(job.stage, store, held_out=False)
    held_out = LatentSource(job.stage, store, held_out=True)
    return FlowMatching(job.stage, source, held_out, source.null_text())


def make_origin(job: WorkerJob) -> Origin:
    """Where the stage finds what it starts from; stores are opened only if they are asked for."""
    return Origin(job.parent, lambda: _pairs(job))


def _pairs(job: WorkerJob) -> Pairs:
    parent = parent_of(job.stage.init)
    assert isinstance(parent, DiffusionStage), f"{job.stage.name}: no parent with latents"
    assert isinstance(job.stage, DiffusionStage), type(job.stage)
    assert job.latents is not None, "the stage's own latents"
    assert job.parent_latents is not None, "the parent's latents"
    return Pairs(
        parent,
        LatentSource(parent, SealedStore.open(*job.parent_latents), held_out=False),
        LatentSource(job.stage, SealedStore.open(*job.latents), held_out=False),
    )


def _wait_for_the_end() -> None:
    """Returning would tell Ray Train that the run is finished, so wait for the controller."""
    deadline = time.monotonic() + _STOPPED_WAIT_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
    raise TimeoutError(f"asked to stop for a resize, but not ended within {_STOPPED_WAIT_S:.0f} s")
