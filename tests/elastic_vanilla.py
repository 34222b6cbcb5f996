"""The peer: plain elastic Ray Train as its own guides describe it, on the same model and data.

`num_workers=(fewest, most)` with `max_failures`, an FSDP2 model, each interval a DCP checkpoint in
a temporary folder given to `ray.train.report`, resumed from `ray.train.get_checkpoint`, one more
checkpoint when `get_preemption_info` announces a loss. Ray's own defaults for everything else but
the interval at which it looks for new nodes (60 s), which would only make it wait longer here.

Model, optimizer, average, sample order and loss are ours, so an update costs what ours costs. Lines
of metrics and events have our form, so one analysis reads both. bench/resize.py and bench/trace.py
run it, through elastic_driver.py.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.distributed.fsdp import FSDPModule

from cluster.local import LocalCluster
from elastic.data.load import Stream
from elastic.data.order import chain_digest, samples_carried
from elastic.data.sealed import SealedStore
from elastic.data.sources import LatentSource
from elastic.ema import EmaWeights
from elastic.folders import RunFolder
from elastic.journal import EVENTS, METRICS, Journal, read_events
from elastic.loop import build_optimizer, clip_gradients, rate_at
from elastic.meter import is_due
from elastic.objective import FlowMatching
from elastic.shard import initialise, shard
from elastic.state import Progress, TrainState
from elastic.world import World
from stages.init import seed_of
from stages.stage import DiffusionStage, Stage

MAX_FAILURES = 100
LOOK_FOR_NODES_S = 5.0
# get_preemption_info is a barrier through an actor: in each update it would cost a few percent.
LOOK_FOR_NOTICE_UPDATES = 8
_PROGRESS = "progress.json"


def fit(stage: Stage, folder: RunFolder, cluster: LocalCluster, serve: Callable[[], None]) -> None:
    """Train a stage whose latents are sealed in `folder`, calling `serve` in between."""
    cluster.connect()
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"stage": stage, "root": str(folder.root)},
        scaling_config=ScalingConfig(
            num_workers=stage.workers, elastic_resize_monitor_interval_s=LOOK_FOR_NODES_S
        ),
        run_config=RunConfig(
            name="vanilla",
            storage_path=str(folder.root / ".ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    failure: list[BaseException] = []

    def body() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised again in the main thread
            failure.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    while thread.is_alive():
        serve()
        thread.join(0.2)
    ray.shutdown()
    if failure:
        raise failure[0]


def train_func(config: dict[str, Any]) -> None:
    """The training function that every worker runs."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stage, root = config["stage"], Path(config["root"])
    world = World.current()
    state, objective = build(stage, root, world)
    restore(state, world)
    progress, optimizer, model = state.progress, state.optimizer, state.model
    assert isinstance(model, FSDPModule), "FSDP2 has wrapped it"
    tell = Lines(stage, root, world)
    tell.start(progress)
    ready = partial(objective.inputs, device=world.device)
    stream = Stream(stage, objective.source, world, progress.samples, ready)
    is_saved_for_notice = False
    while progress.samples < stage.budget:
        before = progress.samples
        step = stream.step(before)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(stage, before + step.plan.bucket.batch)
        loss = torch.zeros(())
        for inputs in step.micros:
            micro = inputs.micro
            model.set_requires_gradient_sync(micro.is_last)
            weighted = (objective.losses(model, inputs).model_B * inputs.weight_B).sum()
            (weighted * (world.size / micro.batch)).backward()
            loss += weighted.detach()
        clip_gradients(model, stage.optimizer.max_norm, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.samples += step.plan.bucket.batch
        progress.order_digest = chain_digest(progress.order_digest, step.sample_ids)
        state.ema.update(progress.samples, step.plan.bucket.batch)
        tell.metric(progress, float(world.sum(loss)) / step.plan.bucket.batch)

        noticed = False
        if (progress.samples // step.plan.bucket.batch) % LOOK_FOR_NOTICE_UPDATES == 0:
            noticed = ray.train.get_preemption_info() is not None and not is_saved_for_notice
        is_saved_for_notice |= noticed
        if noticed or is_due(stage.save_every, progress.samples, before):
            seconds = save(state, world)
            tell.publish(progress, "asked" if noticed else "due", seconds)
    stream.close()


def build(stage: DiffusionStage, root: Path, world: World) -> tuple[TrainState, FlowMatching]:
    """The same model, optimizer and average as ours, from the same fresh parameters."""
    pinned = json.loads((root / "stages" / stage.name / "latents.json").read_text())
    store = SealedStore.open(root / "latents" / pinned["fingerprint"], pinned["fingerprint"])
    source = LatentSource(stage, store, held_out=False)
    held_out = LatentSource(stage, store, held_out=True)
    objective = FlowMatching(stage, source, held_out, source.null_text())
    model = shard(objective.build(), world)
    initialise(model, seed_of(stage.init), stage.name)
    ema = EmaWeights(model, stage.ema, samples_carried(stage))
    ema.reset()
    optimizer = build_optimizer(stage.optimizer, model)
    return TrainState(stage, model, optimizer, ema, Progress(stage=stage.name)), objective


def save(state: TrainState, world: World) -> float:
    """Report a DCP checkpoint: every rank writes and uploads its own part; seconds it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state.tensors(), checkpoint_id=folder)
        if world.is_first:
            Path(folder, _PROGRESS).write_text(json.dumps(state.progress.as_json()))
        ray.train.report({}, checkpoint=Checkpoint.from_directory(folder))
    return time.monotonic() - began


def restore(state: TrainState, world: World) -> None:
    """Load the latest checkpoint that was reported, if there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        dcp.load(state.tensors(), checkpoint_id=folder)
        state.restored(Progress(**json.loads(Path(folder, _PROGRESS).read_text())))


class Lines:
    """Our lines of metrics and events, written by the first rank straight into the run folder."""

    def __init__(self, stage: DiffusionStage, root: Path, world: World) -> None:
        self._stage = stage.name
        self._world = world
        starts = [event for event in read_events(root) if event["kind"] == "start"]
        self._attempt = len(starts) + 1
        self._pids = world.gather(os.getpid())
        self._metrics = Journal(root / METRICS) if world.is_first else None
        self._events = Journal(root / EVENTS, durable=True) if world.is_first else None

    def metric(self, progress: Progress, loss: float) -> None:
        """One line an update."""
        if self._metrics is not None:
            self._metrics.append(
                **self._common(progress.samples),
                context={},
                values={"loss": loss},
                order_digest=progress.order_digest,
            )

    def start(self, progress: Progress) -> None:
        """A new group trains."""
        self._event("start", progress.samples, "", pids=self._pids)

    def publish(self, progress: Progress, reason: str, seconds: float) -> None:
        """A checkpoint is reported; the loop stood still for all of it."""
        self._event("publish", progress.samples, reason, seconds=round(seconds, 3), background=0.0)

    def _event(self, kind: str, position: int, reason: str, **more: Any) -> None:
        if self._events is not None:
            self._events.append(**self._common(position), kind=kind, reason=reason, **more)

    def _common(self, position: int) -> dict[str, Any]:
        return {
            "wall": time.time(),
            "stage": self._stage,
            "attempt": self._attempt,
            "position": position,
            "world": self._world.size,
        }
