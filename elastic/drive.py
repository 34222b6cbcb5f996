"""A driver: cluster and tracker up, the course in a thread, the main thread watching over it.

The main thread owns the cluster's processes (they end with the thread that started them), shows
the progress, takes Ctrl-C, and runs whatever should happen while the course goes on.
"""

import fcntl
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from cluster.local import LocalCluster, prepare_environment
from elastic.checkpoint_store import Keep
from elastic.course import Course
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.latent_place import settle_latents
from elastic.progress import ProgressLine
from elastic.ray_ahead import EncodeAhead
from elastic.ray_host import Hosts
from elastic.ray_tracker import TrackerHandle
from elastic.ray_train import Limits
from elastic.record import check_unchanged, write_record
from elastic.settings import Settings
from stages.plan import Plan

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_ANSWER_S = 5.0  # for a TCP connection to the head
# Called twice a second with the course and what the tracker knows last.
Watch = Callable[[Course, dict[str, Any]], None]


def run_course(
    plan: Plan,
    settings: Settings,
    work: Callable[[Course], None],
    cluster: LocalCluster | None = None,
    watch: Watch | None = None,
) -> RunFolder:
    """Run `work` for a plan on the cluster of the settings, or on the given one.

    Raises what the work raises. Everything that was told to the tracker is on disk at the end.
    """
    folder = RunFolder.of(settings.storage_path, plan)
    if cluster is None:
        check_address(settings)
    with locked(folder):
        check_unchanged(folder, plan)
        write_record(folder, plan)
        settle_latents(folder, settings.latents)
        own = None if cluster or _attached(settings) else start_cluster(settings)
        try:
            connect(settings, cluster or own)
            _supervise(plan, settings, folder, work, watch)
        finally:
            ray.shutdown()
            if own is not None:
                own.stop()
    return folder


def start_cluster(settings: Settings, cpus: int | None = None) -> LocalCluster:
    """A cluster of this machine; from the main thread."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return LocalCluster(cpus=cpus or settings.cpus or os.cpu_count() or 1, gpus=gpus)


def _attached(settings: Settings) -> str | None:
    # Ray sets RAY_ADDRESS for the entrypoint of a submitted job.
    return settings.ray_address or os.environ.get("RAY_ADDRESS")


def check_address(settings: Settings) -> None:
    """InputError unless something listens at the Ray address, if one was given.

    Ray itself tries for many minutes, and would have a run folder made before it gives up.
    """
    address = _attached(settings)
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    advice = "start a cluster with ray start --head, or leave --ray-address out"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise InputError(
            f"Ray address {address!r}: write HOST:PORT of the cluster's head, such as "
            f"127.0.0.1:6379; {advice}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise InputError(f"Ray address {address!r}: nothing answers ({error}); {advice}") from None


def connect(settings: Settings, cluster: LocalCluster | None) -> None:
    """Make this process a driver of the given cluster, or of that of the settings."""
    if cluster is not None:
        cluster.connect()
        return
    prepare_environment()
    try:
        ray.init(address=_attached(settings), log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"Ray address {_attached(settings)!r}: no cluster answers there ({error}); start one "
            "with ray start --head, or leave --ray-address out"
        ) from None


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Hold the run for this driver alone; InputError if another one holds it."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        handle = (folder.root / ".driver.lock").open("a+")
    except OSError as error:
        raise InputError(
            f"storage {str(folder.root.parent)!r} cannot be written ({error.strerror}); "
            "choose another folder with --storage"
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run {str(folder.root)!r} is in the hands of another driver on this machine; "
                "wait for it, or look with python -m elastic status"
            ) from None
        yield


def _supervise(
    plan: Plan,
    settings: Settings,
    folder: RunFolder,
    work: Callable[[Course], None],
    watch: Watch | None,
) -> None:
    budgets = {stage.name: stage.budget for stage in plan.stages}
    name = f"tracker-{uuid.uuid4().hex[:12]}"
    tracker = TrackerHandle.launch(name, folder.root, plan.name, budgets, settings.aim)
    use_gpu, ahead = ray.cluster_resources().get("GPU", 0) > 0, EncodeAhead()
    course = Course(
        plan,
        folder,
        tracker,
        use_gpu,
        Limits(settings.min_stay, settings.leave_before, settings.hang_after),
        Keep(settings.keep_last, settings.keep_every),
        settings.checkpoints,
        settings.pack_latents,
        beside=ahead,
    )
    hosts = Hosts()
    tracker.event("run_start", reason=f"process {os.getpid()}", gpus=use_gpu)
    failure: list[BaseException] = []

    def body() -> None:
        try:
            work(course)
        except BaseException as error:  # raised again in the main thread
            failure.append(error)

    thread = threading.Thread(target=body, name="course", daemon=True)
    thread.start()
    reason = "interrupted"
    line = ProgressLine(budgets)
    try:
        while thread.is_alive():
            if course.trains.is_set():
                hosts.keep()
            latest = tracker.latest()
            line.show(latest)
            if watch is not None:
                watch(course, latest)
            thread.join(_LOOK_EVERY_S)
        reason = f"failed: {failure[0]}" if failure else "finished"
    finally:
        line.end()
        ahead.close()
        tracker.event("run_end", reason=reason)
        problem = tracker.close()
        if problem and settings.aim:
            log.warning("Aim shows nothing of this run: %s", problem)
    if failure:
        raise failure[0]
