"""A tiny stage, latents made up in memory, and worlds in turn: training tests in seconds."""

# B sample, C channel, T frame, H, W latent grid

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elastic.checkpoint import Checkpoints, Fence
from elastic.data.load import Micro, Round, Samples
from elastic.data.order import Layout, layout_of
from elastic.data.permutation import Indices
from elastic.ema import EmaWeights
from elastic.loop import Outcome, Run, build_optimizer, held_by, train_stage
from elastic.meter import Meter
from elastic.objective import FlowMatching, Losses, Objective
from elastic.preview import Previews
from elastic.randomness import normals, sample_generator
from elastic.shard import shard
from elastic.start import NOWHERE, Origin
from elastic.state import Progress, TrainState
from elastic.world import World
from models import DiT, HunyuanVAE, WordHash
from models.text import pad
from stages import AdamW, Bucket, DiffusionStage, Ema, Phase, Stage, Videos

CLIP, STILL = "32px-5f", "32px-1f"
NUM_UPDATES = 50
HALF, HALF_UPDATES = 110, 20  # a position at which a save is due, and the updates before it
ODD, ODD_UPDATES = 72, 13  # a position at which nothing is due

# Batches of 5, 6 and 7 in micro-batches of 2, 4 and 3: no world of 2 or 3 divides all of them.
STAGE = DiffusionStage(
    name="tiny",
    data=Videos("none.csv"),
    vae=HunyuanVAE(channels=4, weights="none.safetensors"),
    model=DiT(depth=1, depth_single=1, width=24, heads=2, patch=2),
    text=WordHash(width=8),
    schedule=(
        Phase(
            until=165,
            buckets=(
                Bucket("32px", frames=5, batch=5, micro=2),
                Bucket("32px", frames=1, batch=6, micro=4),
            ),
        ),
        Phase(until=305, buckets=(Bucket("32px", frames=5, batch=7, micro=3),)),
    ),
    optimizer=AdamW(lr=3e-3, warmup=40, decay=100, weight_decay=0.01),
    ema=Ema(halflife=60),
    save_every=HALF,
    log_every=22,
    evaluate_every=150,
)


class DrawnLatents:
    """Latents that are a function of the sample's id; one id may be given an infinite one."""

    def __init__(
        self, stage: DiffusionStage, counts: dict[str, int], first_id: int, poisoned: int = -1
    ) -> None:
        self._stage = stage
        self._counts = counts
        self._first_id = first_id
        self._poisoned = poisoned

    def counts(self) -> dict[str, int]:
        return self._counts

    def layouts(self) -> dict[str, Layout]:
        return {name: layout_of([count]) for name, count in self.counts().items()}

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        return indices + self._first_id + (1000 if bucket.name == STILL else 0)

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        ids = self.sample_ids(bucket, indices).tolist()
        texts = self._stage.text.encode([_caption(number) for number in ids])
        return np.array([len(text.embedding_LD) for text in texts])

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        return (self.fetch(bucket, indices) for bucket, indices in rounds)

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        ids, codec = self.sample_ids(bucket, indices), self._stage.codec
        shape = (codec.stored_channels, *codec.grid(bucket.frames, bucket.height, bucket.width))
        draws = [sample_generator(0, "drawn", "latent", "", 0, int(number)) for number in ids]
        # Near one pattern of four, so that there is something to learn.
        kinds = [sample_generator(0, "drawn", "kind", "", 0, int(number) % 4) for number in ids]
        x_BCTHW = 0.1 * normals(draws, shape) + normals(kinds, (shape[0], 1, 1, 1))
        x_BCTHW[torch.from_numpy(ids == self._poisoned)] = torch.inf
        # Captions of different lengths, so that padding matters.
        text = pad(self._stage.text.encode([_caption(int(number)) for number in ids]))
        ends_BCTHW = None
        if self._stage.gives(bucket):
            draws = [sample_generator(0, "drawn", "ends", "", 0, int(number)) for number in ids]
            ends_BCTHW = normals(draws, (codec.channels, 2, *shape[2:]))
        return Samples(x_BCTHW, text, ids, torch.ones(len(ids)), ends_BCTHW)


def _caption(number: int) -> str:
    return "a moving shape"[: 1 + number % 14]


def objective(stage: DiffusionStage = STAGE, poisoned: int = -1) -> FlowMatching:
    """Flow matching on 23 clips and 17 stills, measured on 5 of each."""
    counts = {bucket.name: 17 if bucket.name == STILL else 23 for bucket in stage.buckets}
    return FlowMatching(
        stage,
        DrawnLatents(stage, counts, 100, poisoned),
        DrawnLatents(stage, dict.fromkeys(counts, 5), 5000),
        stage.text.null(),
    )


def losses_of(goal: Objective, model: nn.Module, micro: Micro) -> Losses:
    """The losses of a micro-batch, its inputs made here and now."""
    return goal.losses(model, goal.inputs(micro, torch.device("cpu")))


class Attempt(NamedTuple):
    """What one attempt left behind: how it ended, its metric lines, its events."""

    outcome: Outcome
    lines: list[dict[str, Any]]
    events: list[tuple[str, int, str]]


def train(
    world: World,
    folder: Path,
    stop_after: int | None = None,
    stage: DiffusionStage = STAGE,
    poisoned: int = -1,
    origin: Origin = NOWHERE,
) -> Attempt:
    """One attempt at the stage on made-up latents."""
    return attempt(world, folder, stage, objective(stage, poisoned), stop_after, origin)


def attempt(
    world: World,
    folder: Path,
    stage: Stage,
    goal: Objective,
    stop_after: int | None = None,
    origin: Origin = NOWHERE,
    beat: Callable[[str, int], None] = lambda phase, position: None,
    previews: Previews | None = None,
) -> Attempt:
    """One attempt at a stage; only the last rank is told to stop, after `stop_after` updates."""
    fence = world.from_first(Fence.take(folder) if world.is_first else None)
    lines: list[dict[str, Any]] = []
    events: list[tuple[str, int, str]] = []
    updated: set[int] = set()  # at these positions

    def beaten(phase: str, position: int) -> None:
        if phase in ("train", "compile"):
            updated.add(position)
        beat(phase, position)

    def stop_wanted() -> bool:
        return len(updated) == stop_after and world.rank == world.size - 1

    def event(kind: str, position: int, reason: str, **more: Any) -> None:
        events.append((kind, position, reason))

    run = Run(
        folder=folder,
        world=world,
        checkpoints=Checkpoints(folder, world, fence, event),
        meter=Meter(stage, world, fence.attempt, lines.append),
        stop_wanted=stop_wanted,
        event=event,
        origin=origin,
        beat=beaten,
        previews=previews,
    )
    return Attempt(train_stage(stage, goal, run), lines, events)


def blank_state(world: World, stage: Stage = STAGE, goal: Objective | None = None) -> TrainState:
    """A sharded state whose tensors hold NaN until something fills them."""
    if goal is None:
        assert isinstance(stage, DiffusionStage), "made up here are latents alone"
        goal = objective(stage)
    model = shard(goal.build(), world)
    optimizer = build_optimizer(stage.optimizer, model, held_by(stage))
    progress = Progress(stage=stage.name)
    average = EmaWeights(model, stage.ema)
    state = TrainState(stage, model, optimizer, average, progress, goal.critic)
    for tensor in state.tensors().values():
        tensor.fill_(torch.nan)
    return state


def restored(
    world: World, folder: Path, stage: Stage = STAGE, goal: Objective | None = None
) -> TrainState:
    """The state in the newest checkpoint of a stage's folder."""
    state = blank_state(world, stage, goal)
    fence = Fence.take(folder)
    assert Checkpoints(folder, world, fence, lambda *a, **k: None).restore_latest(state)
    return state


class Turn(NamedTuple):
    """A module-level function, the size of its world, and what it is called with."""

    size: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def in_turn(world: World, folder: Path, turns: list[Turn]) -> list[Any]:
    """Play worlds of different sizes one after another in the same ranks; this rank's results.

    Starting a process costs seconds and starting a group milliseconds. A rank that is not in a
    world's turn has None there.
    """
    results = []
    for number, turn in enumerate(turns):
        result = None
        if world.rank < turn.size:
            if dist.is_initialized():
                dist.destroy_process_group()
            _join(folder / f"turn-{number}", world.rank, turn.size)
            result = turn.function(World.current(), *turn.arguments)
            dist.destroy_process_group()
        results.append(result)
    _join(folder / "last", world.rank, world.size)
    return results


@contextmanager
def world_of_one() -> Iterator[World]:
    """A world of one rank in this very process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _join(Path(folder) / "rendezvous", 0, 1)
        try:
            yield World.current()
        finally:
            dist.destroy_process_group()
            torch.set_num_threads(threads)


def _join(rendezvous: Path, rank: int, size: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    dist.barrier()  # one that left at once would break the connections that others still make


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything that lies in a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def whole_bytes(state: TrainState) -> dict[str, bytes]:
    """Every tensor of a state in full, whatever the world; every rank calls it."""
    assert isinstance(state.model, FSDPModule)
    state.model.reshard()  # the last forward leaves whole parameters in place of the sharded ones
    whole = {}
    for name, tensor in state.tensors().items():
        if not name.startswith("critic"):  # which every rank holds
            assert isinstance(tensor, DTensor), f"{name} is not sharded"
            tensor = tensor.full_tensor()
        whole[name] = tensor.clone().numpy().tobytes()
    return whole
