"""One stage as one Ray Train run: elastic between the stage's fewest and most workers."""

import logging
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from elastic.errors import InputError, StageBlocked
from elastic.ray_tracker import TrackerHandle
from elastic.ray_worker import WorkerJob, has_stopped, request_stop, train_worker

log = logging.getLogger(__name__)

MAX_CRASHES = 8
_SAVE_DEADLINE_S = 600.0  # of a large model; a rank that hangs is ended by the collectives' own
_LOOK_EVERY_S = 2.0


class StageFailed(RuntimeError):
    """A stage crashed more often than it may; its state is in its last checkpoint."""


class ElasticCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]  # Ray has no types
    """Makes the group save before a planned resize, and shows the controller fresh capacity.

    Ray Train by itself ends the workers without a word, which loses every step since the last
    checkpoint, and looks at the nodes every 20 s only. Runs in the controller's process.
    """

    def __init__(self, job: WorkerJob) -> None:
        self._job = job
        self._group: Any = None  # Ray's WorkerGroup while one is up
        self._run_id = ""
        self._looked = 0.0
        self._cause = "unknown"

    def after_controller_start(self, train_run_context: Any) -> None:
        """Remember under which name this run holds its resources."""
        self._run_id = f"train-{train_run_context.run_id}"

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the workers."""
        self._group = worker_group

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forget the workers."""
        self._group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Keep the reason of a failure, and look at the nodes again every two seconds.

        What another try would only repeat is raised here, which Ray Train does not retry.
        """
        errors = worker_group_status.errors
        if errors:
            # A process that died comes first: what the others raise is that they lost it.
            rank = min(errors, key=lambda rank: (hasattr(errors[rank], "_base_exc"), rank))
            self._cause = f"rank {rank}: {str(errors[rank]).strip().splitlines()[-1]}"
        for error in errors.values():
            blocked = getattr(error, "_base_exc", error)  # as the training function raised it
            if isinstance(blocked, StageBlocked | InputError):
                self._tell("blocked", str(blocked))
                raise blocked
        if time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._refresh_capacity()

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Report the crash, and look at the nodes before the next size is chosen."""
        self._group = None  # broken, though it is shut down only later: nobody can be asked to save
        self._tell("crash", self._cause)
        self._refresh_capacity()

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the workers save and stop; nothing is lost by the resize that follows."""
        if self._group is None:
            return  # a start, or a restart after a crash: there is nobody to ask
        now = len(self._group.get_workers())
        self._tell(
            "resize_requested", f"{now} -> {resize_decision.num_workers} workers",
            world_from=now, world_to=resize_decision.num_workers,
        )  # fmt: skip
        try:
            self._save(self._group)
        except RayError as error:
            # A worker died while it was asked; the resize goes on, from the last checkpoint.
            self._tell("crash", f"the workers could not save before the resize: {error}")

    def _save(self, group: Any) -> None:
        group.execute(request_stop)
        deadline = time.monotonic() + _SAVE_DEADLINE_S
        while time.monotonic() < deadline:
            status = group.poll_status(timeout=1)
            if status.errors:
                self._tell("crash", self._cause)
                return
            if status.finished or all(group.execute(has_stopped)):
                return
            time.sleep(0.05)
        self._tell("crash", f"the workers did not save within {_SAVE_DEADLINE_S:.0f} s")

    def _refresh_capacity(self) -> None:
        self._looked = time.monotonic()
        try:
            actor = coordinator.get_or_create_autoscaling_coordinator()
            ray.get(actor.get_reserved_resources.remote(self._run_id, recompute=True), timeout=5)
        except RayError as error:
            # Only the view of the nodes stays old; raised here it would end a healthy stage.
            log.warning("the capacity of the cluster is not known just now: %s", error)

    def _tell(self, kind: str, reason: str, **more: Any) -> None:
        try:
            tracker = TrackerHandle(self._job.tracker)
        except ValueError as error:  # the actor is gone; training goes on without it
            log.warning("%s could not be told: %s", kind, error)
            return
        tracker.event(kind, self._job.stage.name, None, reason, **more)


def fit_stage(job: WorkerJob, scratch: Path, use_gpu: bool) -> None:
    """Train one stage to its budget on this cluster; StageFailed after too many crashes.

    Progress and state live in the stage's folder. Ray Train's own folder is scratch: a new driver
    starts a new Ray run, which continues from the stage's newest checkpoint.
    """
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        # Far below the default half hour: a rank that hangs must not hold the others for long.
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=120),
        scaling_config=ScalingConfig(
            num_workers=job.stage.workers,
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=_LOOK_EVERY_S,
        ),
        run_config=RunConfig(
            name=f"{job.stage.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=MAX_CRASHES),
            # Internal callbacks are accepted here; Ray is pinned exactly for their sake.
            callbacks=[ElasticCallback(job)],
        ),
    )
    try:
        failure = trainer.fit().error
    except Exception as error:  # Ray raises many kinds; all of them end the stage
        failure = error
    if failure is None:
        return
    blocked = getattr(failure, "controller_failure", None)
    if isinstance(blocked, StageBlocked | InputError):
        raise blocked
    raise StageFailed(f"stage {job.stage.name!r} failed: {failure}") from failure
