"""The training loop: one stage, to its sample budget, on whatever world this attempt has."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from elastic.checkpoint import Checkpoints
from elastic.data.load import Stream
from elastic.data.order import chain_digest
from elastic.ema import EmaWeights, local
from elastic.meter import Meter, is_due
from elastic.muon import MuonAdamW
from elastic.objective import Objective
from elastic.shard import initialise, shard
from elastic.state import Progress, TrainState
from elastic.weights import export
from elastic.world import World
from stages.optimizer import AdamW, Muon, learning_rate
from stages.stage import Stage

log = logging.getLogger(__name__)


class Outcome(Enum):
    """How an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Run:
    """What the loop needs from outside: made by the Ray driver, or by a test."""

    folder: Path  # of this stage
    world: World
    checkpoints: Checkpoints
    meter: Meter
    stop_wanted: Callable[[], bool]  # this rank's view; the ranks agree on it in the loop
    event: Callable[..., None]


def train_stage(stage: Stage, objective: Objective, run: Run) -> Outcome:
    """Train one stage to its sample budget.

    Safe to call again from the top after any failure: everything that survives is in the
    checkpoint.
    """
    world = run.world
    model = shard(objective.build(), world)
    assert isinstance(model, FSDPModule), f"not sharded: {type(model)}"
    optimizer = build_optimizer(stage.optimizer, model)
    ema = EmaWeights(model, stage.ema)
    progress = Progress(stage=stage.name)
    critic = objective.critic  # of an adversarial stage
    state = TrainState(stage, model, optimizer, ema, progress, critic)

    if not run.checkpoints.restore_latest(state):
        initialise(model, stage.init.seed, stage.name)
        ema.reset()
    run.event("start", progress.samples, "resumed" if progress.samples else "fresh parameters")
    run.meter.begin(progress.samples)

    stream = Stream(stage, objective.source, world, progress.samples)
    saved_at = progress.samples
    evaluated_at = progress.samples or -1  # a fresh stage is measured before its first update
    while True:
        # Report, save and stop before training, so a resumed run and a finished one use one door.
        finished = progress.samples >= stage.budget
        stopping = world.any(run.stop_wanted())
        if is_due(stage.evaluate_every, progress.samples, evaluated_at) or finished:
            with ema.in_place():
                run.meter.evaluated(progress, objective.evaluate(model, world))
            evaluated_at = progress.samples
        if finished or stopping or is_due(stage.save_every, progress.samples, saved_at):
            run.meter.flush(progress)
            run.checkpoints.save(state, "stop" if stopping else "finished" if finished else "due")
            saved_at = progress.samples
        if finished or stopping:
            break

        step = run.meter.waiting(stream.step, progress.samples)
        batch = step.plan.bucket.batch
        rate = learning_rate(stage.optimizer, progress.samples + batch, stage.budget)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # The same number of rounds on every rank; a rank with nothing left computes weight 0.
        for micro in step.micros:
            model.set_requires_gradient_sync(micro.is_last)
            losses = objective.losses(model, micro)
            weight_B = micro.samples.weight_B.to(world.device)
            # FSDP averages over ranks; undo that, so the step is a mean over the global batch.
            ((losses.both_B * weight_B).sum() * (world.size / micro.batch)).backward()
            run.meter.add_losses(micro, losses, weight_B)  # stays on the device

        norms = {"grad_norm": clip_gradients(model, stage.optimizer.max_norm, world)}
        if critic is not None:
            norms |= critic.clip_gradients(progress.samples, world)
        run.meter.require_finite(norms, progress)  # before a change; waits for the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if critic is not None:
            critic.step()

        progress.samples += batch
        progress.order_digest = chain_digest(progress.order_digest, step.sample_ids)
        ema.update(progress.samples, batch)
        run.meter.stepped(progress, step, rate, norms)

    stream.close()
    if finished:
        with ema.in_place():
            run.checkpoints.require_current()
            export(model, run.folder, progress, world)
    return Outcome.FINISHED if finished else Outcome.STOPPED


def build_optimizer(settings: AdamW, model: nn.Module) -> torch.optim.AdamW:
    """AdamW in one fused call: the plain loop over sharded tensors costs more than a small step."""
    if isinstance(settings, Muon):
        return MuonAdamW(settings, model)
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale the gradients so that their norm over all ranks is at most `max_norm`; the old norm."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    # In a world larger than a parameter has rows, some ranks hold none of it, or nothing at all.
    gradients = [gradient for gradient in gradients if gradient.numel()]
    squares = torch.zeros((), dtype=torch.float64, device=world.device)
    if gradients:
        norms = torch._foreach_norm(gradients, dtype=torch.float64)
        squares = torch.stack(norms).square().sum()
    norm = world.sum(squares).sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
    return norm
