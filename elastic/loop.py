"""The training loop: one stage, to its sample budget, on whatever world this attempt has."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from elastic.checkpoint import Checkpoints
from elastic.data.load import Step, Stream
from elastic.data.order import chain_digest, samples_carried
from elastic.ema import EmaWeights, local
from elastic.exact import OrderedGradients, reproducible, square_sum
from elastic.inputs import Inputs, on_device
from elastic.kernels import attention, attention_order, compile_blocks, compiles
from elastic.meter import Meter, is_due
from elastic.muon import MuonAdamW
from elastic.objective import Graph, Objective
from elastic.preview import Previews, Teller
from elastic.shard import each_round, shard
from elastic.spike import watch
from elastic.start import NOWHERE, Origin, begin, publish_table
from elastic.state import Progress, TrainState
from elastic.weights import export
from elastic.world import World
from stages.init import Switch, is_held
from stages.optimizer import AdamW, Muon, learning_rate
from stages.stage import DiffusionStage, Stage

log = logging.getLogger(__name__)

_SAVE, _STOP = 1, 2  # what a rank may ask for; the ranks agree on the larger


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
    origin: Origin = NOWHERE
    save_wanted: Callable[[], bool] = lambda: False  # as stop_wanted, but the loop goes on
    beat: Callable[[str, int], None] = lambda phase, position: None  # a sign of life
    previews: Previews | None = None  # None: there are samples only at the stage's end
    # Times the parts of a start, by name.
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()


def train_stage(stage: Stage, objective: Objective, run: Run) -> Outcome:
    """Train one stage to its sample budget.

    Safe to call again from the top after any failure: everything that survives is in the
    checkpoint.
    """
    order = attention_order(run.world.device)
    with reproducible(stage.exact), attention(order):
        return _train(stage, objective, run)


def _train(stage: Stage, objective: Objective, run: Run) -> Outcome:
    world = run.world.arranged(stage.context, stage.shard_within)
    precision = stage.precision if isinstance(stage, DiffusionStage) else "fp32"
    with run.phase("build"):
        model = shard(objective.build(), world, precision)
    assert isinstance(model, FSDPModule), f"not sharded: {type(model)}"
    compiled = compiles(stage, world.device)
    if compiled:
        compile_blocks(model)
    fused = not (stage.exact and world.device.type == "cpu")
    optimizer = build_optimizer(stage.optimizer, model, held_by(stage), fused)
    ordered = OrderedGradients(model, world) if stage.exact else None
    exchanges = each_round(sum(parameter.numel() for parameter in model.parameters()))
    ema = EmaWeights(model, stage.ema, samples_carried(stage))
    progress = Progress(stage=stage.name)
    critic = objective.critic  # of an adversarial stage
    state = TrainState(stage, model, optimizer, ema, progress, critic)

    with run.phase("restore"):
        has_restored = run.checkpoints.restore_latest(state)
    if not has_restored:
        table = begin(state, run.origin, world)
        run.event("init", 0, table.policy, table=list(table.lines()))
        if world.is_first:
            publish_table(table, run.folder)
    run.event(
        "start",
        progress.samples,
        "resumed" if progress.samples else "first start",
        restored_from=run.checkpoints.restored_from._asdict(),
        compiled=compiled,
    )
    run.meter.begin(progress.samples)
    previews = run.previews
    if previews is not None:
        previews.begin(world, progress.samples)

    ready = partial(objective.inputs, device=world.device)
    stream = Stream(stage, objective.source, world, progress.samples, ready)
    compiled_for: set[Graph] = set()

    def compiles_now(step: Step[Inputs] | None) -> bool:
        return compiled and step is not None and not objective.graphs(step) <= compiled_for

    saved_at = progress.samples
    evaluated_at = progress.samples or -1  # a fresh stage is measured before its first update
    while True:
        run.checkpoints.poll()  # of the save that goes on beside the updates
        # Report, save and stop before training, so a resumed run and a finished one use one door.
        finished = progress.samples >= stage.budget
        step = None
        if not finished and stream.is_ready():
            step = run.meter.waiting(stream.step, progress.samples)
        asked = _STOP if run.stop_wanted() else _SAVE if run.save_wanted() else 0
        # One agreement: what is asked, whether somebody has to wait for storage, or to compile.
        agreed = world.most(4 * asked + 2 * (step is None) + compiles_now(step))
        asked, rest = divmod(agreed, 4)
        stopping = asked == _STOP
        if is_due(stage.evaluate_every, progress.samples, evaluated_at) or finished:
            run.beat("evaluate", progress.samples)
            with ema.in_place():
                run.meter.evaluated(progress, lambda: objective.evaluate(model, world))
            evaluated_at = progress.samples
        if finished or asked or is_due(stage.save_every, progress.samples, saved_at):
            run.beat("save", progress.samples)
            watch(stage, progress, run.meter.flush(progress), False, run.event)
            run.checkpoints.save(state, reason_to_save(finished, asked))
            saved_at = progress.samples
        if finished or stopping:
            break
        if previews is not None and previews.is_due(progress.samples):
            # After the save: whatever becomes of them, no update has to be done again.
            tell = Teller(run.beat, run.event, run.stop_wanted)
            previews.make(model, ema, world, progress.samples, tell)

        if asked or rest > 1:  # what the others have said beside it is not known
            run.beat("read", progress.samples)  # storage may be slow without being dead
            if step is None:
                step = run.meter.waiting(stream.step, progress.samples)
            # Who trains may not be silent for long, and would be while another rank still reads.
            rest = world.most(compiles_now(step))
        assert step is not None, "it was there, or has been waited for"
        # Whoever compiles keeps the others waiting.
        phase = "compile" if rest else "train"
        run.beat(phase, progress.samples)
        if compiled:
            compiled_for |= objective.graphs(step)
        batch = step.plan.bucket.batch
        rate = rate_at(stage, progress.samples + batch)
        held_rate = rate_at(stage, progress.samples + batch, held=True)
        for group in optimizer.param_groups:
            group["lr"] = held_rate if group["held"] else rate

        # The same number of rounds on every rank; a rank with nothing left computes weight 0.
        for inputs in on_device(step.micros, world.device):
            micro, weight_B = inputs.micro, inputs.weight_B
            if ordered is None:
                model.set_requires_gradient_sync(micro.is_last or exchanges)
                model.set_requires_all_reduce(micro.is_last)  # replicas' sums wait as shards
            else:
                ordered.begin_round(micro.is_last)
            losses = objective.losses(model, inputs)
            # FSDP averages over ranks; undo that, so the step is a mean over the global batch.
            share = (1 if stage.exact else world.size) / micro.batch
            ((losses.both_B * weight_B).sum() * share).backward()
            if critic is not None:
                critic.end_round(micro.position, world)
            run.meter.add_losses(micro, losses, weight_B)  # stays on the device
            run.beat(phase, progress.samples)
        if ordered is not None:
            ordered.finish()

        held = None if held_rate else held_by(stage)
        norm = clip_gradients(model, stage.optimizer.max_norm, world, held, stage.exact)
        norms = {"grad_norm": norm}
        if critic is not None:
            norms |= critic.clip_gradients(progress.samples, world)
        run.meter.require_finite(norms, progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if critic is not None:
            critic.step()

        progress.samples += batch
        progress.order_digest = chain_digest(progress.order_digest, step.sample_ids)
        ema.update(progress.samples, batch)
        logged = run.meter.stepped(progress, step, rate, norms)
        watch(stage, progress, logged, bool(logged), run.event)

    stream.close()
    run.beat("export", progress.samples)
    if finished:
        with ema.in_place():
            run.checkpoints.require_current()
            export(model, run.folder, progress, world)
    return Outcome.FINISHED if finished else Outcome.STOPPED


def reason_to_save(finished: bool, asked: int) -> str:
    """Why a checkpoint is written, for the journal."""
    if finished:
        return "finished"
    return {_STOP: "stop", _SAVE: "asked"}.get(asked, "due")


def rate_at(stage: Stage, samples: int, held: bool = False) -> float:
    """Learning rate of the update that reaches `samples`; 0 while the init policy holds the rest.

    What was held warms up as the optimizer says, from where it is let go.
    """
    waited = stage.init.warmup_samples if held and isinstance(stage.init, Switch) else 0
    if samples <= waited:
        return 0.0
    return learning_rate(stage.optimizer, samples - waited, stage.budget - waited)


def held_by(stage: Stage) -> Callable[[str], bool]:
    """Whether a parameter is one of those that the init policy's warm-up holds."""
    return lambda name: is_held(stage.init, name)


def build_optimizer(
    settings: AdamW,
    model: nn.Module,
    waits: Callable[[str], bool] = lambda name: False,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW in one fused call: the plain loop over sharded tensors costs more than a small step.

    On a CPU the fused call rounds the last few values of a tensor, which fill no vector, unlike
    the others: which values those are follows from the shards, so an exact stage does without it.
    Two groups, `held` or not, so that an init policy can hold what it kept.
    """
    named = list(model.named_parameters())
    parts = {held: [p for name, p in named if waits(name) is held] for held in (False, True)}
    groups = [{"params": part, "held": held} for held, part in parts.items() if part]
    if isinstance(settings, Muon):
        return MuonAdamW(settings, groups, fused)
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused,
        foreach=not fused,
    )


@torch.no_grad()
def clip_gradients(
    model: nn.Module,
    max_norm: float,
    world: World,
    without: Callable[[str], bool] | None = None,
    exact: bool = False,
) -> Tensor:
    """Scale the gradients so that their norm over all ranks is at most `max_norm`; the old norm.

    Gradients of parameters `without` an update are scaled too, and not counted. An `exact` norm
    has the same bits on any world.
    """
    named = [(n, local(p.grad)) for n, p in model.named_parameters() if p.grad is not None]
    # In a world larger than a parameter has rows, some ranks hold none of it, or nothing at all.
    gradients = [gradient for _, gradient in named if gradient.numel()]
    counted = [g for name, g in named if g.numel() and not (without and without(name))]
    norm = (square_sum(counted, world) if exact else _square_sum(counted, world)).sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
    return norm


def _square_sum(gradients: list[Tensor], world: World) -> Tensor:
    squares = torch.zeros((), dtype=torch.float64, device=world.device)
    if gradients:
        norms = torch._foreach_norm(gradients, dtype=torch.float64)
        squares = torch.stack(norms).square().sum()
    return world.sum(squares) / world.replicas
