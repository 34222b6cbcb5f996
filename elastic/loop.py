"""The training loop: one stage, to its sample budget, on whatever world this attempt has."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from elastic.checkpoint import Checkpoints
from elastic.data.load import Step, Stream
from elastic.data.order import chain_digest, samples_carried
from elastic.ema import EmaWeights, local
from elastic.exact import OrderedGradients, reproducible, square_sum
from elastic.inputs import Inputs, on_device
from elastic.kernels import (
    attention,
    attention_of,
    attention_order,
    compile_blocks,
    compiles,
)
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
    training = _Training(stage, objective, run)
    while True:
        run.checkpoints.poll()  # of the save that goes on beside the updates
        # Report, save and stop before training, so a resumed run and a finished one use one door.
        finished = training.samples >= stage.budget
        step = None if finished else training.next_step()
        agreed = training.agree(step)
        training.evaluate(finished)
        training.save(finished, agreed.asked)
        if finished or agreed.asked == _STOP:
            break
        training.preview()  # after the save: whatever becomes of it, no update is done again
        if agreed.asked or agreed.waits:  # what the others have said beside it is not known
            step, agreed = training.wait_for(step)
        assert step is not None, "it was there, or has been waited for"
        training.update(step, agreed.compiles)
    training.end(finished)
    return Outcome.FINISHED if finished else Outcome.STOPPED


class _Agreed(NamedTuple):
    """What the ranks agree on before an update, in one exchange: the most that any of them says."""

    asked: int  # 0, _SAVE or _STOP
    waits: bool  # for storage, on some rank
    compiles: bool

    @classmethod
    def by(cls, world: World, said: "_Agreed") -> "_Agreed":
        """The largest number that a rank makes of it: of fields after the first, those of one."""
        most = world.most(4 * said.asked + 2 * said.waits + said.compiles)
        return cls(most // 4, most % 4 >= 2, bool(most % 2))


class _Training:
    """A stage in this process: what is trained, how far it has come, and the steps of the loop."""

    def __init__(self, stage: Stage, objective: Objective, run: Run) -> None:
        self._stage, self._objective, self._run = stage, objective, run
        self._world = world = run.world.arranged(stage.context, stage.shard_within)
        precision = stage.precision if isinstance(stage, DiffusionStage) else "fp32"
        with run.phase("build"):
            self._model = model = shard(objective.build(), world, precision)
        self._compiled = compiles(stage, world.device)
        if self._compiled:
            compile_blocks(model)
        self._compiled_for: set[Graph] = set()
        fused = not (stage.exact and world.device.type == "cpu")
        self._optimizer = build_optimizer(stage.optimizer, model, held_by(stage), fused)
        self._ordered = OrderedGradients(model, world) if stage.exact else None
        self._exchanges = each_round(sum(parameter.numel() for parameter in model.parameters()))
        self._ema = EmaWeights(model, stage.ema, samples_carried(stage))
        self._critic = objective.critic  # of an adversarial stage
        self._progress = Progress(stage=stage.name)
        self._state = TrainState(
            stage, model, self._optimizer, self._ema, self._progress, self._critic
        )
        self._restore()
        ready = partial(objective.inputs, device=world.device)
        self._stream = Stream(stage, objective.source, world, self.samples, ready)
        self._saved_at = self.samples
        self._evaluated_at = self.samples or -1  # a fresh stage is measured before its first update

    @property
    def samples(self) -> int:
        """Those that the stage has seen."""
        return self._progress.samples

    def _restore(self) -> None:
        """The newest checkpoint, or the start that the init policy says."""
        run = self._run
        with run.phase("restore"):
            has_restored = run.checkpoints.restore_latest(self._state)
        if not has_restored:
            table = begin(self._state, run.origin, self._world)
            run.event("init", 0, table.policy, table=list(table.lines()))
            if self._world.is_first:
                publish_table(table, run.folder)
        run.event(
            "start",
            self.samples,
            "resumed" if self.samples else "first start",
            restored_from=run.checkpoints.restored_from._asdict(),
            attention=attention_of(self._stage, self._world.device),
            compiled=self._compiled,
        )
        run.meter.begin(self.samples)
        if run.previews is not None:
            run.previews.begin(self._world, self.samples)

    def next_step(self) -> Step[Inputs] | None:
        """The batch that comes next, if it has been read."""
        if not self._stream.is_ready():
            return None
        return self._run.meter.waiting(self._stream.step, self.samples)

    def agree(self, step: Step[Inputs] | None) -> _Agreed:
        """What is asked for, whether somebody has to wait for storage, or to compile."""
        asked = _STOP if self._run.stop_wanted() else _SAVE if self._run.save_wanted() else 0
        return _Agreed.by(self._world, _Agreed(asked, step is None, self._compiles_now(step)))

    def wait_for(self, step: Step[Inputs] | None) -> tuple[Step[Inputs], _Agreed]:
        """The step when all ranks have theirs, and whether one of them will compile.

        Who trains may not be silent for long, and would be while another rank still reads.
        """
        self._run.beat("read", self.samples)  # storage may be slow without being dead
        if step is None:
            step = self._run.meter.waiting(self._stream.step, self.samples)
        return step, _Agreed.by(self._world, _Agreed(0, False, self._compiles_now(step)))

    def _compiles_now(self, step: Step[Inputs] | None) -> bool:
        if not self._compiled or step is None:
            return False
        return not self._objective.graphs(step) <= self._compiled_for

    def evaluate(self, finished: bool) -> None:
        """Measure the averaged weights on what is held out, when it is due."""
        if not (finished or is_due(self._stage.evaluate_every, self.samples, self._evaluated_at)):
            return
        self._run.beat("evaluate", self.samples)
        with self._ema.in_place():
            self._run.meter.evaluated(
                self._progress, lambda: self._objective.evaluate(self._model, self._world)
            )
        self._evaluated_at = self.samples

    def save(self, finished: bool, asked: int) -> None:
        """Begin a checkpoint, when one is due or asked for."""
        due = is_due(self._stage.save_every, self.samples, self._saved_at)
        if not (finished or asked or due):
            return
        run = self._run
        run.beat("save", self.samples)
        watch(self._stage, self._progress, run.meter.flush(self._progress), False, run.event)
        run.checkpoints.save(self._state, reason_to_save(finished, asked))
        self._saved_at = self.samples

    def preview(self) -> None:
        """Films of what the model makes now, when they are due."""
        run, previews = self._run, self._run.previews
        if previews is not None and previews.is_due(self.samples):
            tell = Teller(run.beat, run.event, run.stop_wanted)
            previews.make(self._model, self._ema, self._world, self.samples, tell)

    def update(self, step: Step[Inputs], compiles: bool) -> None:
        """Train on one global batch."""
        run, stage, progress = self._run, self._stage, self._progress
        # Whoever compiles keeps the others waiting.
        phase = "compile" if compiles else "train"
        run.beat(phase, progress.samples)
        if self._compiled:
            self._compiled_for |= self._objective.graphs(step)
        batch = step.plan.bucket.batch
        rate = rate_at(stage, progress.samples + batch)
        held_rate = rate_at(stage, progress.samples + batch, held=True)
        for group in self._optimizer.param_groups:
            group["lr"] = held_rate if group["held"] else rate

        self._add_gradients(step, phase)
        norms = self._clip_gradients(None if held_rate else held_by(stage))
        run.meter.require_finite(norms, progress)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._critic is not None:
            self._critic.step()

        progress.samples += batch
        progress.order_digest = chain_digest(progress.order_digest, step.sample_ids)
        self._ema.update(progress.samples, batch)
        logged = run.meter.stepped(progress, step, rate, norms)
        watch(stage, progress, logged, bool(logged), run.event)

    def _add_gradients(self, step: Step[Inputs], phase: str) -> None:
        """Of all rounds: there are as many on every rank, and what fills them up has weight 0."""
        model, ordered, world = self._model, self._ordered, self._world
        assert isinstance(model, FSDPModule), f"not sharded: {type(model)}"
        # FSDP averages over ranks; undo that, so the step is a mean over the global batch.
        ranks = 1 if self._stage.exact else world.size
        for inputs in on_device(step.micros, world.device):
            micro, weight_B = inputs.micro, inputs.weight_B
            if ordered is None:
                model.set_requires_gradient_sync(micro.is_last or self._exchanges)
                model.set_requires_all_reduce(micro.is_last)  # replicas' sums wait as shards
            else:
                ordered.begin_round(micro.is_last)
            losses = self._objective.losses(model, inputs)
            ((losses.both_B * weight_B).sum() * (ranks / micro.batch)).backward()
            if self._critic is not None:
                self._critic.end_round(micro.position, world)
            self._run.meter.add_losses(micro, losses, weight_B)  # stays on the device
            self._run.beat(phase, self.samples)
        if ordered is not None:
            ordered.finish()

    def _clip_gradients(self, held: Callable[[str], bool] | None) -> dict[str, Tensor]:
        """Norms before; that of parameters which are `held` does not count."""
        most = self._stage.optimizer.max_norm
        norm = clip_gradients(self._model, most, self._world, held, self._stage.exact)
        norms = {"grad_norm": norm}
        if self._critic is not None:
            norms |= self._critic.clip_gradients(self.samples, self._world)
        return norms

    def end(self, finished: bool) -> None:
        """Stop reading; of a finished stage, publish the averaged weights."""
        self._stream.close()
        self._run.beat("export", self.samples)
        if finished:
            with self._ema.in_place():
                self._run.checkpoints.require_current()
                export(self._model, self._run.folder, self._progress, self._world)


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
