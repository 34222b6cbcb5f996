"""One stage as one Ray Train run: elastic between the stage's fewest and most workers."""

import logging
import pickle
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.exceptions import ActorDiedError, RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from elastic.attempt import WorkerJob
from elastic.errors import InputError, StageBlocked, StageFailed, last_line
from elastic.journal import EVENTS
from elastic.ray_gain import Gain, Position
from elastic.ray_policy import (
    CapacityPolicy,
    CrashPolicy,
    ResizeCallback,
    Teller,
    cause_of,
    errors_of,
)
from elastic.ray_worker import Work, train_worker
from elastic.stop import is_to_save

log = logging.getLogger(__name__)

MAX_LOST = 4  # controllers, in one call
_ASK_S = 10.0
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Limits:
    """Seconds that elasticity goes by; from the settings."""

    min_stay: float
    leave_before: float
    hang_after: float


class StageTrainer(DataParallelTrainer):  # type: ignore[misc]  # Ray has no types
    """Ray Train's trainer with our policies in its controller."""

    def __init__(self, policies: dict[str, Any], **settings: Any) -> None:
        super().__init__(train_worker, **settings)
        self._policies = policies

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, **self._policies})

    def outcome(self) -> BaseException | None:
        """Train; what it failed with, or None."""
        try:
            error: BaseException | None = self.fit().error
        except Exception as raised:  # Ray raises many kinds; all of them end the run
            error = raised
        if isinstance(error, ActorDiedError):
            self.give_back()
        return error

    def give_back(self) -> None:
        """Give back what a controller holds that has died, or is about to with its driver.

        Ray Train's own cleaner needs a dashboard. Without this its workers keep their CPUs, and
        its reservation stands for three minutes.
        """
        asker = f"train-{self.train_run_context.run_id}"
        job = ray.get_runtime_context().get_job_id()
        try:
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.cancel_request.remote(requester_id=asker), timeout=_ASK_S)
            for hex_id in placement_group_table():
                if hex_id.endswith(job):  # the id carries the job, which has one group at a time
                    group = PlacementGroupID(bytes.fromhex(hex_id))
                    remove_placement_group(PlacementGroup(group))
        except (RayError, ValueError) as error:  # then the next controller waits for it
            log.warning("what a lost controller held could not be given back: %s", error)


class Claim:
    """What a stage that trains holds of the cluster; a driver that ends before it gives it back."""

    def __init__(self) -> None:
        self._trainer: StageTrainer | None = None

    @property
    def is_held(self) -> bool:
        """Whether a stage trains."""
        return self._trainer is not None

    def outcome(self, trainer: StageTrainer) -> BaseException | None:
        """Train; what it failed with, or None."""
        self._trainer = trainer
        try:
            return trainer.outcome()
        finally:
            self._trainer = None

    def give_back(self) -> None:
        """Leave nothing reserved for a stage that trains no more."""
        if self._trainer is not None:
            self._trainer.give_back()


def fit_stage(
    job: WorkerJob, run: Path, tracker: str, limits: Limits, use_gpu: bool, claim: Claim
) -> None:
    """Train one stage to its budget on this cluster.

    StageFailed after too many crashes; StageBlocked or InputError for what another try would only
    repeat. Progress and state live in the stage's folder, Ray Train's own folder is scratch: a new
    driver, or a new controller, starts a new Ray run from the stage's newest checkpoint.
    """
    stage, tell = job.stage, Teller(job.stage.name, tracker)
    work = Work(stage.name, tracker, pickle.dumps(job), use_gpu, limits.hang_after)
    scaling = ScalingConfig(
        num_workers=stage.workers,
        use_gpu=use_gpu,
        elastic_resize_monitor_interval_s=_LOOK_EVERY_S,
    )
    phases = [(p.until, [(b.batch, b.micro) for b in p.buckets]) for p in stage.schedule]
    capacity = CapacityPolicy(
        scaling,
        limits.min_stay,
        limits.leave_before,
        tell,
        lambda: is_to_save(run),
        stage.multiple,
        Gain(phases, stage.context, stage.exact, Position(stage.name, tracker)),
    )
    policies = {
        "scaling_policy": capacity,
        "failure_policy": CrashPolicy(run, stage.name, tell),
    }
    failure: BaseException | None = None
    for num_lost in range(MAX_LOST + 1):
        trainer = StageTrainer(
            policies,
            train_loop_config={"work": work},
            scaling_config=scaling,
            run_config=RunConfig(
                name=f"{stage.name}-{uuid.uuid4().hex[:8]}",
                storage_path=str(run / ".ray"),
                # Internal callbacks are accepted here; Ray is pinned exactly for their sake.
                callbacks=[ResizeCallback(tell)],
            ),
        )
        failure = claim.outcome(trainer)
        if failure is None:
            return
        if not isinstance(failure, ActorDiedError) or num_lost == MAX_LOST:
            break
        tell("crash", f"Ray Train's controller was lost: {last_line(failure)}")
    assert failure is not None, "left by a failure alone"
    for error in errors_of(failure):
        if isinstance(error, StageBlocked | InputError):
            raise error
    raise StageFailed(
        f"stage {stage.name!r} failed: {cause_of(errors_of(failure))}; its journal "
        f"({run / EVENTS}) has what led there"
    ) from failure
