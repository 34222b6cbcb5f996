"""Loops that others write around the same model, batches and update: what bench/overhead.py times.

Each does what a training needs and nothing more: draw noise, times and dropped text for the batch
at once, forward, backward, clip, AdamW, average, and every so often the loss on all ranks. What
differs is who wraps the model and the optimizer.
"""

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import losses_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from elastic.data.load import Micro
from elastic.data.order import samples_carried
from elastic.ema import EmaWeights
from elastic.objective import FlowMatching
from elastic.shard import generators
from elastic.world import World
from models.flow import Times, flow_loss_B, time_shift, timesteps
from models.fresh import fresh_parameters
from models.text import TextBatch, trimmed, without_text
from stages.init import seed_of
from stages.stage import DiffusionStage


class Turn(NamedTuple):
    """What one turn of a loop took: seconds and processor seconds of each update, and losses."""

    wall_s: list[float]
    cpu_s: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Task:
    """The same for every loop: the stage, and this rank's micro-batches of each update."""

    stage: DiffusionStage
    objective: FlowMatching
    updates: list[list[Micro]]
    log_updates: int
    is_check: bool = False
    """Whether noise and times are those that our loop would draw, so that losses agree."""

    def build(self) -> nn.Module:
        """The model in full, with the values that our loop starts from."""
        model = self.stage.build().to_empty(device="cpu")
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            drawn = generators(seed_of(self.stage.init), self.stage.name)
            for name, value in fresh_parameters(model, drawn):
                parameters[name].copy_(value)
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW as the stage says."""
        asked = self.stage.optimizer
        return torch.optim.AdamW(
            model.parameters(),
            lr=asked.lr,
            betas=asked.betas,
            eps=asked.eps,
            weight_decay=asked.weight_decay,
            fused=True,
        )

    def losses_B(self, model: nn.Module, micro: Micro) -> Tensor:
        """The loss of each sample."""
        if self.is_check:
            return losses_of(self.objective, model, micro).model_B
        z_BCTHW, text, stage = micro.samples.x_BCTHW, micro.samples.text, self.stage
        assert text is not None, "latents have text"
        count = len(z_BCTHW)
        t, h, w = stage.model.token_grid((z_BCTHW.shape[2], z_BCTHW.shape[3], z_BCTHW.shape[4]))
        t_B = timesteps(torch.randn(count), Times(time_shift(h * w, t)))
        dropped_B = torch.rand(count) < stage.text_dropout
        kept: TextBatch = trimmed(without_text(text, stage.text.null(), dropped_B, dropped_B))
        return flow_loss_B(model, z_BCTHW, torch.randn_like(z_BCTHW), t_B, kept)


Wrapped = tuple[nn.Module, Any, Callable[[Tensor], object], Callable[[], object]]


def loop(
    task: Task, world: World, wrapped: Wrapped, report: Callable[[float], object] | None = None
) -> Turn:
    """Train on every update of the task; `report` is given the loss now and then."""
    model, optimizer, backward, clip = wrapped
    ema = EmaWeights(model, task.stage.ema, samples_carried(task.stage))
    walls, cpus, losses, seen = [], [], [], 0
    for number, micros in enumerate(task.updates, 1):
        wall, cpu = time.perf_counter(), time.process_time()
        total = torch.zeros(())
        for micro in micros:
            loss_B = task.losses_B(model, micro) * micro.samples.weight_B
            backward(loss_B.sum() * (world.size / micro.batch))
            total += loss_B.detach().sum()
        clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += micros[0].batch
        ema.update(seen, micros[0].batch)
        if number % task.log_updates == 0:
            losses.append(float(world.sum(total)) / micros[0].batch)
            if report is not None:
                report(losses[-1])
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Turn(walls, cpus, losses)


def bare(task: Task, world: World) -> Turn:
    """FSDP2 alone."""
    model = task.build()
    # In one group, as our loop shards so small a model: groups of their own would cost more.
    fully_shard(model, mesh=world.mesh, reshard_after_forward=False)

    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), task.stage.optimizer.max_norm)

    return loop(task, world, (model, task.optimizer(model), lambda loss: loss.backward(), clip))


def fabric(task: Task, world: World) -> Turn:
    """Lightning Fabric with its strategy for FSDP2."""
    lightning: Any = importlib.import_module("lightning_fabric")
    strategies: Any = importlib.import_module("lightning_fabric.strategies")

    def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=False)
        return model

    strategy = strategies.ModelParallelStrategy(
        parallelize, data_parallel_size=world.size, tensor_parallel_size=1
    )
    one = lightning.Fabric(accelerator="cpu", devices=world.size, strategy=strategy)
    one.launch()
    model = one.setup_module(task.build())
    optimizer = one.setup_optimizers(task.optimizer(model))

    def clip() -> None:
        one.clip_gradients(model, optimizer, max_norm=task.stage.optimizer.max_norm)

    return loop(task, world, (model, optimizer, one.backward, clip))


def accelerate(task: Task, world: World) -> Turn:
    """Accelerate, which trains with DDP on CPUs whatever FSDP plugin it is given."""
    module: Any = importlib.import_module("accelerate")
    one = module.Accelerator(cpu=True)
    built = task.build()
    model, optimizer = one.prepare(built, task.optimizer(built))

    def clip() -> None:
        one.clip_grad_norm_(model.parameters(), task.stage.optimizer.max_norm)

    return loop(task, world, (model, optimizer, one.backward, clip))


PEERS: dict[str, Callable[[Task, World], Turn]] = {
    "bare": bare,
    "fabric": fabric,
    "accelerate (DDP)": accelerate,
}


def ray_function(config: dict[str, Any]) -> None:
    """What a worker of Ray Train runs: the bare loop, reporting its loss to Ray."""
    from ray import train

    torch.set_num_threads(1)
    world, make = World.current(), config["make"]
    task: Task = make(world, config["updates"])
    model = task.build()
    fully_shard(model, mesh=world.mesh, reshard_after_forward=False)

    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), task.stage.optimizer.max_norm)

    wrapped = (model, task.optimizer(model), lambda loss: loss.backward(), clip)
    turn = loop(task, world, wrapped, lambda loss: train.report({"loss": loss}))
    everyone = world.gather(turn)
    if world.is_first:
        Path(config["told"]).write_text(json.dumps(everyone))
