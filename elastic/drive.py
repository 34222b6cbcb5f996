"""A driver: cluster and tracker up, the course in a thread, the main thread watching over it.

The main thread owns the cluster's processes (they end with the thread that started them), shows
the progress, takes Ctrl-C, and runs whatever should happen while the course goes on.
"""

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import AuthenticationError, RpcError

from cluster.local import LocalCluster, join, prepare_environment
from cluster.token import advice, asks_for_token
from elastic.branch import keep_for_branches
from elastic.checkpoint_store import Keep
from elastic.course import Course
from elastic.errors import InputError, RunStopped
from elastic.folders import RunFolder
from elastic.latent_place import settle_latents
from elastic.progress import ProgressLine
from elastic.ray_ahead import EncodeAhead
from elastic.ray_host import Hosts
from elastic.ray_tracker import TrackerHandle
from elastic.ray_train import Limits
from elastic.record import check_unchanged, write_record
from elastic.settings import Settings
from elastic.stop import StopWatch, driven
from stages.plan import Plan

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_ANSWER_S = 5.0  # for a TCP connection to the head
# Called twice a second with the course and what the tracker knows last.
Watch = Callable[[Course, dict[str, Any]], None]
Work = Callable[[Course], None]


def run_course(
    plan: Plan,
    settings: Settings,
    work: Work,
    cluster: LocalCluster | None = None,
    watch: Watch | None = None,
) -> RunFolder:
    """Run `work` for a plan on the cluster of the settings, or on the given one.

    Raises what the work raises. Everything that was told to the tracker is on disk at the end.
    """
    folder = RunFolder.of(settings.storage_path, plan)
    if cluster is None:
        check_address(settings)
    with driven(folder.root):
        check_unchanged(folder, plan)
        keep_for_branches(plan, folder)
        write_record(folder, plan)
        settle_latents(folder, settings.latents)
        own = None if cluster or _attached(settings) else start_cluster(settings)
        try:
            connect(settings, cluster or own)
            ahead = EncodeAhead()
            course = _make_course(plan, settings, folder, ahead)
            _supervise(course, ahead, settings.aim, work, watch)
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
    address = str(_attached(settings))
    try:
        if address == "auto":
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            return
        if asks_for_token(address) is False:
            log.warning("%s", advice(address))
        join(address)
    except AuthenticationError:
        raise InputError(
            f"Ray address {address!r}: the cluster asks for its token; give RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN_PATH=FILE with it"
        ) from None
    except (ConnectionError, RpcError, RuntimeError, ValueError) as error:
        raise InputError(
            f"Ray address {address!r}: no cluster answers there ({error}); start one "
            "with ray start --head, or leave --ray-address out"
        ) from None


def _make_course(plan: Plan, settings: Settings, folder: RunFolder, ahead: EncodeAhead) -> Course:
    budgets = {stage.name: stage.budget for stage in plan.stages}
    name = f"tracker-{uuid.uuid4().hex[:12]}"
    return Course(
        plan,
        folder,
        TrackerHandle.launch(name, folder.root, plan.name, budgets, settings.aim),
        ray.cluster_resources().get("GPU", 0) > 0,
        Limits(settings.min_stay, settings.leave_before, settings.hang_after),
        Keep(settings.keep_last, settings.keep_every),
        settings.checkpoints,
        settings.pack_latents,
        beside=ahead,
    )


def _supervise(
    course: Course, ahead: EncodeAhead, use_aim: bool, work: Work, watch: Watch | None
) -> None:
    tracker = course.tracker
    hosts = Hosts()
    stop = StopWatch(course.folder.root, tracker.event)
    tracker.event("run_start", reason=f"process {os.getpid()}", gpus=course.use_gpu)
    failure: list[BaseException] = []

    def body() -> None:
        try:
            work(course)
        except BaseException as error:  # raised again in the main thread
            failure.append(error)

    thread = threading.Thread(target=body, name="course", daemon=True)
    thread.start()
    reason = "interrupted"
    line = ProgressLine({stage.name: stage.budget for stage in course.plan.stages})
    try:
        while thread.is_alive():
            if course.trains.is_set():
                hosts.keep()
            latest = tracker.latest()
            line.show(latest)
            if watch is not None:
                watch(course, latest)
            is_saved = bool(latest.get("is_saved"))
            stop.look(latest.get("stage"), course.claim.is_held, is_saved)
            thread.join(_LOOK_EVERY_S)
        reason = f"failed: {failure[0]}" if failure else "finished"
    except RunStopped as asked:
        reason = str(asked)
        raise
    finally:
        line.end()
        if thread.is_alive():
            course.showing.leave()
        ahead.close()
        tracker.event("run_end", reason=reason)
        problem = tracker.close()
        if problem and use_aim:
            log.warning("Aim shows nothing of this run: %s", problem)
        course.claim.give_back()
    if failure:
        raise failure[0]
