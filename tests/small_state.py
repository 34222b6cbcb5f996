"""A state of a few values, and stores that refuse or wait: what tests of checkpoints save."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from elastic.checkpoint import Checkpoints, Fence
from elastic.checkpoint_store import Draft, LocalStorage, Sink
from elastic.state import Progress, TrainState
from elastic.world import World
from models.fresh import named_generator

# Rows that no world divides, fewer rows than ranks, one value alone.
SHAPES = {
    "model/a": (7, 5), "ema/a": (7, 5), "exp_avg/a": (7, 5), "exp_avg_sq/a": (7, 5),
    "model/b": (2, 3), "model/c": (1,),
}  # fmt: skip
WHOLE = {"critic/w": (3, 2), "critic/n": ()}  # the same on every rank
DEADLINE_S = 60.0


class SmallState:
    """As much of a TrainState as checkpoints use: named tensors and a progress."""

    def __init__(self, world: World, samples: int) -> None:
        """Every tensor has values of its own, the same on any world."""
        self.progress = Progress("small", samples)
        self.live: dict[str, Tensor] = {
            name: distribute_tensor(_values(name, samples, shape), world.mesh, [Shard(0)])
            for name, shape in SHAPES.items()
        }
        self.live |= {name: _values(name, samples, shape) for name, shape in WHOLE.items()}

    def tensors(self) -> dict[str, Tensor]:
        return self.live

    def restored(self, progress: Progress) -> None:
        self.progress = progress

    def whole(self) -> dict[str, bytes]:
        """Every tensor in full; every rank calls it."""
        full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in self.live.items()}
        return {name: tensor.numpy().tobytes() for name, tensor in full.items()}


def small(world: World, samples: int) -> TrainState:
    """A small state where a TrainState is asked for."""
    return cast(TrainState, SmallState(world, samples))


def whole(state: TrainState) -> dict[str, bytes]:
    """Every tensor of a small state in full; every rank calls it."""
    return cast(SmallState, state).whole()


def expected(samples: int) -> dict[str, bytes]:
    """What `whole` gives for the state that was made at a position."""
    shapes = SHAPES | WHOLE
    return {name: _values(name, samples, shape).numpy().tobytes() for name, shape in shapes.items()}


def _values(name: str, samples: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=named_generator("small", name, samples))


class Store(NamedTuple):
    """The checkpoints of one attempt, and the events that it sent."""

    checkpoints: Checkpoints
    events: list[tuple[str, int, str]]
    folder: Path
    times: list[dict[str, Any]]  # what else came with the events


def begin(world: World, folder: Path, **settings: Any) -> Store:
    """Begin an attempt at the stage in a folder; its checkpoints lie one folder below."""
    fence = world.from_first(Fence.take(folder) if world.is_first else None)
    events: list[tuple[str, int, str]] = []
    times: list[dict[str, Any]] = []

    def event(kind: str, position: int, reason: str, **more: Any) -> None:
        assert threading.current_thread() is threading.main_thread(), "an event of another thread"
        events.append((kind, position, reason))
        times.append(more)

    checkpoints = Checkpoints(folder, world, fence, event, **settings)
    return Store(checkpoints, events, folder / "checkpoints", times)


def restored(world: World, folder: Path, **settings: Any) -> tuple[TrainState, Store]:
    """A small state filled from the newest checkpoint of a stage's folder."""
    state, store = small(world, 1), begin(world, folder, **settings)
    assert store.checkpoints.restore_latest(state)
    return state, store


class Gated(LocalStorage):
    """Writes nothing before the gate is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.entered = threading.Event()

    @contextmanager
    def create(self, draft: Draft, name: str) -> Iterator[Sink]:
        self.entered.set()
        assert self.gate.wait(DEADLINE_S), "nobody opened the gate"
        with super().create(draft, name) as sink:
            yield sink


class Refusing(LocalStorage):
    """Refuses to write while `refuses` says so, after having taken some bytes."""

    def __init__(self, folder: Path, refuses: Callable[[], OSError | None]) -> None:
        super().__init__(folder)
        self._refuses = refuses

    @contextmanager
    def create(self, draft: Draft, name: str) -> Iterator[Sink]:
        with super().create(draft, name) as sink:
            error = self._refuses()
            if error is not None:
                sink.write(memoryview(b"half"))
                raise error
            yield sink
