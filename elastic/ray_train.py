"""One stage as one Ray Train run: elastic between the stage's fewest and most workers."""

import pickle
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from elastic.attempt import WorkerJob
from elastic.errors import InputError, StageBlocked, StageFailed, last_line
from elastic.ray_policy import CapacityPolicy, CrashPolicy, ResizeCallback, Teller, errors_of
from elastic.ray_worker import Work, train_worker

MAX_CONTROLLERS = 4  # that may be lost in one call
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Limits:
    """Seconds that elasticity goes by; from the settings."""

    min_stay: float
    hang_after: float


class StageTrainer(DataParallelTrainer):  # type: ignore[misc]  # Ray has no types
    """Ray Train's trainer with our policies in its controller."""

    def __init__(self, policies: dict[str, Any], **settings: Any) -> None:
        super().__init__(train_worker, **settings)
        self._policies = policies

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, **self._policies})


def fit_stage(
    job: WorkerJob, run: Path, tracker: str, scratch: Path, limits: Limits, use_gpu: bool
) -> None:
    """Train one stage to its budget on this cluster.

    StageFailed after too many crashes; StageBlocked or InputError for what another try would only
    repeat. Progress and state live in the stage's folder, Ray Train's own folder is scratch: a new
    driver, or a new controller, starts a new Ray run from the stage's newest checkpoint.
    """
    tell = Teller(job.stage.name, tracker)
    failure = _fit(job, run, tracker, scratch, limits, use_gpu)
    for _ in range(MAX_CONTROLLERS):
        if not isinstance(failure, RayActorError):
            break
        tell("crash", f"Ray Train's controller was lost: {last_line(failure)}")
        failure = _fit(job, run, tracker, scratch, limits, use_gpu)
    if failure is None:
        return
    for error in errors_of(failure):
        if isinstance(error, StageBlocked | InputError):
            raise error
    raise StageFailed(f"stage {job.stage.name!r} failed: {last_line(failure)}") from failure


def _fit(
    job: WorkerJob, run: Path, tracker: str, scratch: Path, limits: Limits, use_gpu: bool
) -> BaseException | None:
    stage, tell = job.stage, Teller(job.stage.name, tracker)
    scaling = ScalingConfig(
        num_workers=stage.workers,
        use_gpu=use_gpu,
        elastic_resize_monitor_interval_s=_LOOK_EVERY_S,
    )
    policies = {
        "scaling_policy": CapacityPolicy(scaling, limits.min_stay, tell),
        "failure_policy": CrashPolicy(run, stage.name, tell),
    }
    work = Work(stage.name, tracker, pickle.dumps(job), use_gpu, limits.hang_after)
    trainer = StageTrainer(
        policies,
        train_loop_config={"work": work},
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"{stage.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            # Internal callbacks are accepted here; Ray is pinned exactly for their sake.
            callbacks=[ResizeCallback(tell)],
        ),
    )
    try:
        error: BaseException | None = trainer.fit().error
    except Exception as raised:  # Ray raises many kinds; all of them end the run
        error = raised
    return error
