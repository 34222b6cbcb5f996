"""Encoding as Ray tasks of a few shards: nodes come and go, and what was lost is done again."""

import signal
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ray
from ray.exceptions import RayTaskError

from elastic.data.assign import Members
from elastic.data.encode import (
    EncodeJob,
    ShardId,
    Tally,
    encode_null_text,
    encode_shards,
    find_scale,
    open_store,
)
from elastic.data.latents import Scale
from elastic.data.store import LatentStore
from elastic.data.verify import Verdict
from elastic.errors import InputError, StageBlocked
from elastic.ray_nodes import decoders_of_a_task
from stages.stage import DiffusionStage

_RETRIES = 8
MOST_SHARDS = 8  # of one task
_TURNS = 4  # of each worker, at least, if there are shards enough


class Done(NamedTuple):
    """A sealed store: its digest, the clips that it lacks and why, and how many were encoded."""

    digest: str
    quarantined: dict[int, str]
    clips: int
    frames_per_s: float | None
    """Of one device: frames that went into its codec; None where nothing was to be encoded."""


class Watch(Protocol):
    """Whom to tell how far an encoding is; it travels to the workers."""

    def begin(self, total: int, done: int, quarantined: int) -> None:
        """How many clips there are, how many are there, and how many of these are left out."""
        ...

    def committed(self, shard: ShardId, clips: int, absent: int) -> None:
        """A shard of so many clips has been committed."""
        ...


def find_scale_on_ray(stage: DiffusionStage, weights: Path, members: Members, gpus: float) -> Scale:
    """`find_scale` on a worker, which has the codec's memory and perhaps a GPU."""
    decoders = decoders_of_a_task(ray.nodes(), gpus)
    task = ray.remote(find_scale).options(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)
    scale: Scale = result_of(task.remote(stage, weights, members, decoders))
    return scale


def _num_tasks(gpus: float) -> int:
    """How many tasks run at once now."""
    have = ray.cluster_resources()
    return int(have.get("GPU", 0.0) / gpus if gpus else have.get("CPU", 1.0))


def in_groups(shards: list[ShardId], at_once: int) -> list[list[ShardId]]:
    """Shards for one task each: some of them, so that work overlaps from one to the next; and few
    enough that all workers are busy to the end, and that little is done again.
    """
    size = max(1, min(MOST_SHARDS, len(shards) // max(1, _TURNS * at_once)))
    return [shards[first : first + size] for first in range(0, len(shards), size)]


def result_of(reference: Any) -> Any:  # Any: Ray has no types
    """The result of a task; its own error instead of Ray's, which carries a remote traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        is_ours = isinstance(error.cause, InputError | StageBlocked)
        raise (error.cause if is_ours else error) from None


def encode_on_ray(
    job: EncodeJob, gpus: float, watch: Watch, damaged: Verdict | None = None
) -> Done:
    """Encode what the store lacks, and seal it.

    What a verdict says to be damaged is encoded again, and stays as it is until that is done.

    A task that fails for a reason of its own, such as a full disk, is raised after the others.
    InputError, which every other shard would only repeat, cancels what has not begun.
    """
    store = open_store(job, [fault.name for fault in damaged.seal] if damaged else ())
    again = set(damaged.shards) if damaged else set()
    wanted = {*store.missing(), *again}
    missing = [shard for shard in store.shard_ids() if shard in wanted]
    decoders = decoders_of_a_task(ray.nodes(), gpus)
    task = ray.remote(_encode_whole).options(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)
    shared = ray.put(job)
    lost_text = damaged is not None and damaged.lost_null_text
    # Otherwise the first shard brings it along.
    if lost_text or (not missing and not store.has_null_text()):
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": _RETRIES}
        result_of(ray.remote(encode_null_text).options(**options).remote(shared, lost_text))
    groups = in_groups([shard for shard in missing if shard not in again], _num_tasks(gpus))
    groups += [[shard] for shard in missing if shard in again]
    num_clips = begin(watch, store, missing)
    running = [task.remote(shared, group, group[0] in again, decoders, watch) for group in groups]
    encoded: list[Tally] = []
    failure: Exception | None = None
    while running:
        (done,), running = ray.wait(running, num_returns=1)
        try:
            encoded.append(result_of(done))
        except InputError as error:
            _drain(running)
            raise error from failure
        except Exception as error:  # raised when the other shards are committed
            failure = failure or error
    if failure is not None:
        raise failure
    return Done(store.seal(), store.quarantined(), num_clips, _frames_per_s(encoded))


def _frames_per_s(encoded: list[Tally]) -> float | None:
    seconds = sum(one.seconds for one in encoded)
    return round(sum(one.num_frames for one in encoded) / seconds, 1) if seconds else None


def begin(watch: Watch, store: LatentStore, missing: list[ShardId]) -> int:
    """Tell what there is to encode; returns how many clips that are."""
    total = sum(len(bucket.sample_ids) for bucket in store.schema.buckets)
    left = sum(len(store.planned(shard)) for shard in missing)
    watch.begin(total, total - left, len(store.quarantined()))
    return left


def _encode_whole(
    job: EncodeJob, shards: list[ShardId], again: bool, decoders: int, watch: Watch
) -> Tally:
    """`encode_shards`, undisturbed: Ray cancels a task that runs by an interrupt."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return encode_shards(job, shards, again, decoders, watch.committed)
    finally:
        signal.signal(signal.SIGINT, before)


def _drain(running: list[Any]) -> None:  # Any: Ray has no types
    """Cancel the tasks that have not begun, and wait for those that have to commit."""
    for reference in running:
        ray.cancel(reference)
    if running:
        ray.wait(running, num_returns=len(running))
