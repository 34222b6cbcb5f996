"""Encoding the latents of later stages while another one trains, on what that one can never use.

Training comes first, by a rule that needs no agreement with its policies: tasks are given only what
is free beyond the most workers that the stage may have. Whatever its group does, it finds the slots
that it could have had. Where nodes go, so many tasks are ended at once, each with the shard that it
has begun. On a machine of which the stage may take every slot, nothing is encoded ahead.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as _state
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic.course import Course, pin_members
from elastic.data.assign import Members
from elastic.data.clips import Clips
from elastic.data.encode import (
    EncodeJob,
    ShardId,
    encode_shards,
    find_scale,
    open_store,
)
from elastic.data.latents import Scale
from elastic.data.places import is_url
from elastic.data.probes import probe_all
from elastic.data.store import LatentStore
from elastic.data.table import read_tables
from elastic.errors import last_line
from elastic.latent_pins import (
    codec_weights,
    forget_stale,
    jobs_of,
    note_ahead,
    pin_latents,
    pin_of,
    scale_ahead,
)
from elastic.ray_encode import begin, result_of
from elastic.ray_nodes import Spare, decoders_of_a_task, slots
from elastic.ray_tracker import EncodeTeller
from elastic.weights import file_digest, finished
from stages.init import Continue
from stages.stage import AutoencoderStage, DiffusionStage, Stage
from stages.videos import Data, Mix, Videos

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_LOST_TRIES = 3  # of one task whose machine was lost
_CLOSE_S = 10.0


class EncodeAhead:
    """What a driver does beside the training of each stage; nothing of it reaches the training."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def __call__(self, course: Course, stage: Stage) -> Iterator[None]:
        """While the block trains the stage, encode what later ones need."""
        self._stop = threading.Event()
        arguments = (course, stage, self._stop)
        self._thread = threading.Thread(target=_ahead, args=arguments, name="ahead", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()  # a store has one that seals it at a time

    def close(self) -> None:
        """Stop at the end of the driver; what is busy is not waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)


class Stopped(Exception):
    """The stage that trained has ended, or the driver."""


def _ahead(course: Course, stage: Stage, stop: threading.Event) -> None:
    try:
        # One after another: where one goes on from another, that is pinned by then.
        for later in after(course, stage):
            _encode_or_tell(course, later, stage.workers[1], stop)
    except Stopped:
        return
    except Exception as error:  # whatever it is: training goes on
        log.warning("nothing more is encoded ahead of its turn: %s", error)


def _encode_or_tell(
    course: Course, stage: DiffusionStage, most: int, stop: threading.Event
) -> None:
    try:
        _encode(course, stage, Tasks(most, course.gpus, stop))
    except Stopped:
        raise
    except Exception as error:  # whatever it is: training goes on, and its turn tries again
        if stop.is_set():
            raise Stopped from error
        log.warning("stage %r cannot be encoded ahead: %s", stage.name, error)
        why = f"failed, and is tried again at its turn: {last_line(error)}"
        course.tracker.event("encode_ahead_end", stage.name, None, why)


def after(course: Course, stage: Stage) -> Iterator[DiffusionStage]:
    """The later stages whose codec is finished and whose scale does not wait for another stage."""
    plan, folder = course.plan.stages, course.folder
    for later in plan[[one.name for one in plan].index(stage.name) + 1 :]:
        if not isinstance(later, DiffusionStage) or finished(folder.stage(later.name)) is not None:
            continue
        forget_stale(folder, later)
        if isinstance(later.vae, AutoencoderStage):
            has_codec = finished(folder.stage(later.vae.name)) is not None
        else:
            has_codec = later.vae.weights is not None and os.path.isfile(later.vae.weights)
        goes_on = later.init.stage if isinstance(later.init, Continue) else None
        has_scale = goes_on is None or pin_of(folder, goes_on).exists()
        if has_codec and has_scale and not pin_of(folder, later).exists():
            yield later


def _encode(course: Course, stage: DiffusionStage, tasks: "Tasks") -> None:
    """Pin the clips of a stage, encode its latents, and pin those."""
    folder, own = course.folder, course.folder.stage(stage.name)
    own.mkdir(parents=True, exist_ok=True)
    spilled = own / ".ahead.arrow"
    try:
        tasks.one(_probe, absolute(stage.data), folder.probes, spilled, tasks.decoders)
    finally:
        spilled.unlink(missing_ok=True)
    digest = file_digest(codec_weights(folder, stage))
    note_ahead(folder, stage, scale_ahead(folder, stage, digest), digest)
    members = pin_members(course, stage)

    def scale_of(weights: Path) -> Scale:
        scale: Scale = tasks.one(find_scale, stage, weights, members, tasks.decoders)
        note_ahead(folder, stage, scale, digest)
        return scale

    (job,) = jobs_of(folder, stage, members, scale_of, course.packs)
    began, teller = time.monotonic(), EncodeTeller(course.tracker.name, stage.name, is_ahead=True)
    store = open_store(job)
    missing = store.missing()
    course.tracker.event(
        "encode_ahead", stage.name, None, f"to {job.fingerprint}", shards=len(missing)
    )
    begin(teller, store, missing)
    told = _Told(course, stage, members, store, began)
    try:
        shared = ray.put(job)
        calls = [(shared, shard, tasks.decoders, teller) for shard in missing]
        for shard in tasks.all(_encode_shard, calls):
            told.shard(shard)
        sealed = store.seal()
        pin_latents(folder, [job], [sealed])
    except Stopped:
        told.end("stopped: its turn encodes the rest")
        raise
    told.end(f"sealed as {sealed}")


class _Told:
    """The event at the end of an encoding ahead."""

    def __init__(
        self, course: Course, stage: Stage, members: Members, store: LatentStore, began: float
    ) -> None:
        self._shards = self._clips = 0
        self._course = course
        self._stage = stage
        self._members = members
        self._store = store
        self._began = began

    def shard(self, shard: ShardId) -> None:
        """Count a shard."""
        self._shards += 1
        self._clips += len(self._store.planned(shard))

    def end(self, reason: str) -> None:
        """Tell it."""
        self._course.tracker.event(
            "encode_ahead_end", self._stage.name, None, reason, shards=self._shards,
            clips=self._members.num_clips(), quarantined=len(self._store.quarantined()),
            encoded=self._clips, seconds=round(time.monotonic() - self._began, 3),
        )  # fmt: skip


def _probe(data: Data, probes: Path, spilled: Path, workers: int) -> None:
    """Look into every file, for whoever pins the clips: what was looked into is cached."""
    probe_all(Clips.joined(read_tables(data, spilled)), probes, workers)


def _encode_shard(job: EncodeJob, shard: ShardId, decoders: int, teller: EncodeTeller) -> ShardId:
    encode_shards(job, [shard], decoders=decoders, committed=teller.committed)
    return shard


def absolute(data: Data) -> Data:
    """The same videos for a task, which runs in another folder."""
    if isinstance(data, Mix):
        parts = (part.replace(videos=_absolute(part.videos)) for part in data.parts)
        return data.replace(parts=tuple(parts))
    return _absolute(data)


def _absolute(videos: Videos) -> Videos:

    def whole(path: str | None) -> str | None:
        return path if path is None or is_url(path) else os.path.abspath(path)

    return videos.replace(table=whole(videos.table), folder=whole(videos.folder))


class _Call(NamedTuple):
    """A task, and how often its machine was lost."""

    arguments: tuple[Any, ...]
    num_lost: int = 0


class _Running(NamedTuple):
    call: _Call
    node: str


class Tasks:
    """Ray tasks on slots that training cannot want: as many as these are now, and no queue."""

    def __init__(self, most: int, gpus: float, stop: threading.Event) -> None:
        self._per = {"GPU": gpus} if gpus else {"CPU": 1.0}  # of a training worker
        self._gpus = gpus
        self._stop = stop
        self._spare = Spare(most)
        self._allowed = 0  # tasks at once
        self._looked_at = float("-inf")
        self._free: dict[str, int] = {}  # where a task may run: slots of each node
        self.decoders = decoders_of_a_task(ray.nodes(), gpus)

    def one(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one task."""
        (result,) = self.all(function, [arguments])
        return result

    def all(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """The result of each task as it comes; Stopped, or the error of one, ends the others.

        A task that has to give way, or whose machine is lost, is done again.
        """
        left, running = deque(_Call(one) for one in arguments), dict[Any, _Running]()
        try:
            while left or running:
                if self._stop.is_set():
                    raise Stopped
                self._look(len(running))
                while len(running) > self._allowed:
                    reference, (call, _) = running.popitem()  # the one that has begun last
                    ray.cancel(reference, force=True)
                    left.appendleft(call)
                while left and len(running) < self._allowed and (node := self._node()):
                    call = left.popleft()
                    running[self._submit(function, call, node)] = _Running(call, node)
                yield from self._finished(left, running)
        finally:
            if running and ray.is_initialized():
                for reference in running:
                    ray.cancel(reference, force=True)
                # Whoever works on the same store next is not to meet them.
                ray.wait(list(running), num_returns=len(running), timeout=_CLOSE_S)

    def _finished(self, left: "deque[_Call]", running: dict[Any, _Running]) -> Iterator[Any]:
        """Results that come within a look's time; lost tasks go back to those that are left."""
        if not running:
            self._stop.wait(_LOOK_EVERY_S)
            return
        done, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_EVERY_S)
        for reference in done:
            call, node = running.pop(reference)
            self._free[node] = self._free.get(node, 0) + 1
            try:
                result = result_of(reference)
            except RayError as error:
                if isinstance(error, RayTaskError) or call.num_lost == _LOST_TRIES:
                    raise
                log.info("a task was lost, and is done again: %s", last_line(error))
                self._free.pop(node)  # perhaps with its node: the next look knows
                left.appendleft(call._replace(num_lost=call.num_lost + 1))
            else:
                yield result

    def _look(self, num_running: int) -> None:
        """Find, now and then, how many tasks there may be, and where."""
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        going = set(_state.get_draining_nodes())
        free = {n: have for n, have in available_resources_per_node().items() if n not in going}
        self._free = slots(free, {**self._per, "CPU": 1.0})
        num_free = sum(slots(free, self._per).values())
        spare = self._spare.look(num_free, held_by_groups(going))
        self._allowed = max(0, num_running + spare)
        if spare:
            self._spare.changed()

    def _node(self) -> str | None:
        """The node with most free slots, which training's groups are least likely on."""
        node = max(self._free, key=lambda name: self._free[name], default=None)
        return node if node is not None and self._free[node] > 0 else None

    def _submit(self, function: Callable[..., Any], call: _Call, node: str) -> Any:
        self._free[node] -= 1
        task = ray.remote(function).options(
            num_cpus=1, num_gpus=self._gpus, max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )  # fmt: skip
        return task.remote(*call.arguments)


def held_by_groups(going: set[str]) -> int:
    """Slots of this job's training group, without those on nodes that are about to go."""
    job = ray.get_runtime_context().get_job_id()
    groups = placement_group_table().items()
    return sum(
        node not in going
        for hex_id, group in groups
        if hex_id.endswith(job) and group["state"] == "CREATED"  # the id carries the job
        for node in group["bundles_to_node_id"].values()
    )
