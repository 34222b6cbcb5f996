"""One life of one training process: join the group, build, train. Runs without Ray."""

import errno
import faulthandler
import logging
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from elastic.align import Pairs
from elastic.checkpoint import Checkpoints, Fence
from elastic.checkpoint_place import open_storage, settle
from elastic.checkpoint_ram import RamCopies
from elastic.checkpoint_read import answered, host
from elastic.checkpoint_store import DEFAULT_KEEP, Keep
from elastic.data.assign import load_members
from elastic.data.decoders import shared_decoders
from elastic.data.growth import load_growths
from elastic.data.sealed import SealedStore
from elastic.data.sources import LatentSource, VideoSource
from elastic.errors import InputError, StageBlocked, last_line
from elastic.folders import MEMBERS
from elastic.heap import keep_freed_memory
from elastic.link import Ended, Failed, Link, Measured, Order, Told
from elastic.loop import Run, train_stage
from elastic.meter import Meter
from elastic.objective import FlowMatching, Objective, Reconstructing
from elastic.preview import PreviewJob, Previews
from elastic.sample import clips_looked_at
from elastic.start import Origin
from elastic.world import COLLECTIVE, World
from stages.init import parent_of
from stages.stage import AutoencoderStage, DiffusionStage, Stage

log = logging.getLogger(__name__)

STACKS = signal.SIGUSR1  # prints the stacks of all threads to the log
_STORE = timedelta(seconds=300)  # longer than a supervisor waits for a fork host
# Of a storage that takes nothing more: another life would meet it again. Checkpoints have a
# patience of their own; this is for the small files around them.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MAKE_ROOM = (
    "the run folder takes no more; make room, or have it mounted for writing, and give the same "
    "command again: it goes on from the newest checkpoint"
)
_LAST_SAVE_S = 30.0  # what a save in flight may take once its rank has failed


class Latents(NamedTuple):
    """Which store a stage reads: refused if it is another one, or was sealed with other content."""

    root: str
    fingerprint: str
    digest: str


@dataclass(frozen=True)
class WorkerJob:
    """What to train and where it is kept: plain data, the same for every process of the stage."""

    stage: Stage
    folder: Path  # of the stage
    latents: tuple[Latents, ...] = ()  # of a diffusion stage: of its beginning, and what came later
    parent: Path | None = None  # folder of the stage that the init policy starts from
    parent_latents: tuple[Latents, ...] = ()  # of that stage, where latents are paired
    keep: Keep = DEFAULT_KEEP
    checkpoints: str | None = None  # where the checkpoints of all plans lie, if not in the runs
    previews: PreviewJob | None = None  # of a stage that is sampled while it trains


class Phases:
    """What a start was spent on, in seconds."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens inside as this phase, and give a sign of life when it begins."""
        self._link.beat(name, 0)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 3)


def main(pipe: "Connection[Any, Any]", listening: int | None) -> int:
    """Carry out the order that comes through the pipe; an exit code.

    `listening` is the socket that rank 0's store is to use. How it ended is told through the pipe.
    """
    keep_freed_memory()
    faulthandler.enable()
    faulthandler.register(STACKS, all_threads=True)
    logging.basicConfig(level=logging.INFO)
    link = Link(pipe)
    order: Order = pipe.recv()
    try:
        outcome = run(order, link, listening)
    except (StageBlocked, InputError) as error:
        traceback.print_exc()
        kind = "InputError" if isinstance(error, InputError) else "StageBlocked"
        return _tell(link, Failed(kind, str(error)))
    except OSError as error:
        traceback.print_exc()
        if error.errno not in _REFUSALS:
            return _tell(link, Failed("crash", f"{type(error).__name__}: {last_line(error)}"))
        return _tell(link, Failed("StageBlocked", f"{error}; {_MAKE_ROOM}"))
    except BaseException as error:
        traceback.print_exc()
        return _tell(link, Failed("crash", f"{type(error).__name__}: {last_line(error)}"))
    return _tell(link, Ended(outcome), code=0)


def _tell(link: Link, message: Ended | Failed, code: int = 1) -> int:
    sys.stderr.flush()
    try:
        link.send(message)
    except OSError:
        log.warning("the supervisor is gone and was not told: %s", message)
    return code


def run(order: Order, link: Link, listening: int | None) -> str:
    """Train the stage of an order in the group that it names; `finished` or `stopped`."""
    phases = Phases(link)
    torch.set_num_threads(order.num_threads)
    with phases("group"):
        _join(order, listening)
        world = World.current()
        job: WorkerJob = pickle.loads(order.job)  # from this run's own driver
        fence = world.from_first(Fence.take(job.folder) if world.is_first else None)
        pids = world.gather((os.getpid(), order.supervisor))
    with phases("place"):
        place = answered(
            world,
            job.checkpoints or str(job.folder),
            lambda: world.on_first(lambda: settle(job.folder, job.checkpoints, fence.run)),
        )

    def event(kind: str, position: int, reason: str, **more: Any) -> None:
        if not world.is_first:
            link.beat(kind, position)  # a save that is tried again for a minute is no hang
            return
        if kind == "start":
            own, supervisors = zip(*pids, strict=True)
            more |= {"pids": own, "supervisors": supervisors, "phases": phases.seconds}
        more |= {"attempt": fence.attempt, "world": world.size}
        link.send(Told(kind, job.stage.name, position, reason, more))
        if kind == "publish" and reason == "finished":
            link.settle()  # the last lines of a stage are kept before it counts as finished

    with phases("data"):
        objective = make_objective(job, world.device, order.num_decoders)
    settings = Run(
        folder=job.folder,
        world=world,
        checkpoints=Checkpoints(
            job.folder,
            world,
            fence,
            event,
            job.keep,
            open_storage(place),
            RamCopies(job.folder, owner=order.node, ranks=world.gather(host()).count(host())),
        ),
        meter=Meter(job.stage, world, fence.attempt, lambda line: link.send(Measured({**line}))),
        stop_wanted=link.stop_wanted,
        save_wanted=link.save_wanted,
        event=event,
        beat=link.beat,
        phase=phases,
        origin=make_origin(job),
        previews=make_previews(job, objective),
    )
    try:
        outcome = train_stage(job.stage, objective, settings)
    except BaseException:
        settings.checkpoints.abandon(_LAST_SAVE_S)
        raise
    world.barrier()  # rank 0 keeps the store that the others still need
    return outcome.value


def _join(order: Order, listening: int | None) -> None:
    if order.use_gpu:
        torch.cuda.set_device(0)  # the supervisor lets this process see its own GPU alone
    store = dist.TCPStore(
        order.host,
        order.port,
        order.size,
        is_master=order.rank == 0,
        timeout=_STORE,
        master_listen_fd=listening if order.rank == 0 else None,
    )
    dist.init_process_group(
        "nccl" if order.use_gpu else "gloo",
        store=store,
        rank=order.rank,
        world_size=order.size,
        timeout=COLLECTIVE,
        device_id=torch.device("cuda", 0) if order.use_gpu else None,
    )


def make_objective(job: WorkerJob, device: torch.device, num_decoders: int) -> Objective:
    """What the stage minimises, on its clips or its latents."""
    growths = load_growths(job.folder)
    if isinstance(job.stage, AutoencoderStage):
        members, decoders = load_members(job.folder / MEMBERS), shared_decoders(num_decoders)
        decoders.start()  # they come up while the model is built
        return Reconstructing(
            job.stage,
            VideoSource(job.stage, members, held_out=False, decoders=decoders, growths=growths),
            VideoSource(job.stage, members, held_out=True, decoders=decoders),
            device,
        )
    assert job.latents, f"stage {job.stage.name} was started without its latents"
    stores = [SealedStore.open(*latents) for latents in job.latents]
    is_mixed = growths or len(job.stage.data.sources) > 1
    mix = load_members(job.folder / MEMBERS) if is_mixed else None
    is_gpu = device.type == "cuda"
    source = LatentSource(job.stage, stores, False, mix, growths, is_gpu)
    held_out = LatentSource(job.stage, stores, True, mix, pinned=is_gpu)
    return FlowMatching(job.stage, source, held_out, source.null_text(), source.text_tokens)


def make_previews(job: WorkerJob, objective: Objective) -> Previews | None:
    """What samples the stage while it trains, if it is to be sampled then."""
    if job.previews is None:
        return None
    assert isinstance(job.stage, DiffusionStage), f"{job.stage.name} makes nothing of captions"
    assert isinstance(objective, FlowMatching), type(objective)
    members = load_members(job.folder / MEMBERS)
    clips = clips_looked_at(job.stage, members)
    return Previews(job.stage, job.previews, clips, objective.held_out, objective.null)


def make_origin(job: WorkerJob) -> Origin:
    """Where the stage finds what it starts from; stores are opened only if they are asked for."""
    return Origin(job.parent, lambda: _pairs(job))


def _pairs(job: WorkerJob) -> Pairs:
    parent = parent_of(job.stage.init)
    assert isinstance(parent, DiffusionStage), f"{job.stage.name}: no parent with latents"
    assert isinstance(job.stage, DiffusionStage), type(job.stage)
    assert job.latents, "the stage's own latents"
    assert job.parent_latents, "the parent's latents"
    old, new = (
        [SealedStore.open(*latents) for latents in some]
        for some in (job.parent_latents, job.latents)
    )
    return Pairs(
        parent,
        LatentSource(parent, old, held_out=False),
        LatentSource(job.stage, new, held_out=False),
    )
