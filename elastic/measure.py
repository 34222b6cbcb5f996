"""Which micro-batch is fastest on this device: real rounds of growing size on made-up samples.

One device and one rank, whatever the number of workers: what they exchange is not in the times, and
the model lies there whole. What is found is printed, and kept beside the runs; it is never used
before somebody has written it into the stage file, which stays the only truth.
"""

import gc
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn

from elastic.data.deal import num_rounds, round_sizes
from elastic.data.load import Micro, Round, Samples
from elastic.data.order import Layout
from elastic.data.permutation import Indices
from elastic.exact import reproducible
from elastic.files import write_atomic
from elastic.fit import local_device_bytes, sample_layers
from elastic.inputs import Inputs, on_device
from elastic.kernels import attention, attention_order, compile_blocks, compiles
from elastic.loop import build_optimizer, clip_gradients
from elastic.memory import HEADROOM, peak_memory
from elastic.objective import FlowMatching, Objective, Reconstructing
from elastic.shard import initialise, shard
from elastic.world import World
from models.text import TextBatch
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage, Stage

_ROUNDS = 3  # timed, after one that compiles and warms up
_LEAST_GAIN = 0.03  # of throughput; twice in a row less, and no larger size is tried
SCHEMA = 2


class Tried(NamedTuple):
    """One size of micro-batch: seconds of a round, memory, or why there are none."""

    micro: int
    round_s: float | None
    peak: int | None  # bytes of tensors on a GPU; nothing on a CPU counts them
    said: float  # bytes on each worker, by arithmetic
    problem: str | None = None


class Found(NamedTuple):
    """What was tried for one bucket, on so many workers."""

    bucket: str
    workers: int
    update_s: float  # clipping and the optimizer's step, once an update
    tried: tuple[Tried, ...]


class Machine(NamedTuple):
    """What times depend on besides the stage."""

    device: str
    memory: int
    torch: str

    @classmethod
    def here(cls) -> "Machine":
        """This machine's GPU, or its processor's memory."""
        if torch.cuda.is_available():
            return cls(torch.cuda.get_device_name(), int(local_device_bytes()), torch.__version__)
        memory = int(psutil.virtual_memory().total)
        return cls(f"cpu, {torch.get_num_threads()} threads", memory, torch.__version__)


def seconds_of(found: Found, tried: Tried, batch: int) -> float | None:
    """Seconds of an update with this micro-batch; None where it does not fit."""
    if tried.round_s is None:
        return None
    return found.update_s + num_rounds(batch, tried.micro, found.workers) * tried.round_s


def fastest(found: Found, batch: int) -> Tried | None:
    """The size with the shortest update, the smaller of equals; None where none fits."""
    timed = [
        (seconds, tried.micro, tried)
        for tried in found.tried
        if (seconds := seconds_of(found, tried, batch)) is not None
    ]
    return min(timed)[2] if timed else None


def sizes(bucket: Bucket, workers: int, exact: bool) -> list[int]:
    """Sizes to try: powers of two, the stage file's own, and the largest that leaves none idle.

    Of each the size of round that it comes to.
    """
    most = -(-bucket.batch // workers)
    asked = {*(2**power for power in range(most.bit_length())), most, min(bucket.micro, most)}
    return sorted({dealt(bucket, micro, workers, exact) for micro in asked})


def dealt(bucket: Bucket, micro: int, workers: int, exact: bool) -> int:
    """Samples of the largest round, where rounds may have so many."""
    return max(round_sizes(bucket.batch, micro, workers, exact))


class _Nothing:
    """A source that nobody reads from."""

    def counts(self) -> dict[str, int]:
        return {}

    def layouts(self) -> dict[str, Layout]:
        return {}

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        return indices

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        return np.zeros_like(indices)

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        return iter(())


def made_up(stage: Stage, bucket: Bucket, micro: int) -> Micro:
    """A micro-batch of noise of the stage's shapes, each text as long as it may be."""
    ids = np.arange(micro)
    if isinstance(stage, AutoencoderStage):
        shape = (3, bucket.frames, bucket.height, bucket.width)
        samples = Samples(torch.rand(micro, *shape) * 2 - 1, None, ids, torch.ones(micro))
        return Micro(0, bucket, samples, np.zeros_like(ids), True, micro)
    codec, text, length = stage.codec, stage.text, stage.text.most_tokens(())
    grid = codec.grid(bucket.frames, bucket.height, bucket.width)
    ends_BCTHW = None
    if stage.gives(bucket):
        ends_BCTHW = torch.randn(micro, codec.channels, 2, *grid[1:])
    samples = Samples(
        torch.randn(micro, codec.stored_channels, *grid),
        TextBatch(
            torch.randn(micro, length, text.width), None, torch.randn(micro, text.pooled_width)
        ),
        ids,
        torch.ones(micro),
        ends_BCTHW,
    )
    return Micro(0, bucket, samples, np.zeros_like(ids), True, micro, length)


def objective_of(stage: Stage, device: torch.device) -> Objective:
    """What the stage minimises, without data."""
    if isinstance(stage, AutoencoderStage):
        return Reconstructing(stage, _Nothing(), _Nothing(), device)
    return FlowMatching(
        stage, _Nothing(), _Nothing(), stage.text.null(), stage.text.most_tokens(())
    )


@contextmanager
def alone() -> Iterator[World]:
    """A world of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=0,
            world_size=1,
        )
        try:
            yield World.current()
        finally:
            dist.destroy_process_group()


class Trainer:
    """A stage's model and optimizer on one device, without data, average or checkpoints."""

    def __init__(self, stage: Stage, world: World) -> None:
        self._stage = stage
        self._world = world
        self._objective = objective_of(stage, world.device)
        self._model, self._optimizer = self._built()

    def _built(self) -> tuple[nn.Module, torch.optim.AdamW]:
        stage, world = self._stage, self._world
        precision = stage.precision if isinstance(stage, DiffusionStage) else "fp32"
        model = shard(self._objective.build(), world, precision)
        initialise(model, 0, stage.name)
        if compiles(stage, world.device):
            compile_blocks(model)
        return model, build_optimizer(stage.optimizer, model)

    def renew(self) -> None:
        """Another model in its place: where a pass was cut short, FSDP goes on as if inside it.

        It would gather and sum nothing from then on, without a word.
        """
        del self._model, self._optimizer  # there may be no room for two
        gc.collect()  # modules and hooks know each other
        self.drop_cached()
        self._model, self._optimizer = self._built()

    def drop_cached(self) -> None:
        """Give back memory that is free, so that the next size finds it in one piece."""
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()

    def inputs(self, micro: Micro) -> Inputs:
        """What training would read ahead, on the device."""
        device = self._world.device
        (inputs,) = on_device([self._objective.inputs(micro, device)], device)
        return inputs

    def round(self, inputs: Inputs) -> None:
        """Forward and backward of one micro-batch."""
        self._objective.losses(self._model, inputs).both_B.mean().backward()

    def update(self) -> None:
        """What ends an update; it drops the gradients."""
        clip_gradients(self._model, self._stage.optimizer.max_norm, self._world)
        self._optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def seconds(self, act: Callable[[], None]) -> float:
        """Seconds of one call, the device's work included."""
        self._wait()
        began = time.perf_counter()
        act()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()


def measure_stage(
    stage: Stage, workers: int, room: float, tell: Callable[[str], None] = lambda text: None
) -> list[Found]:
    """Try sizes for every bucket of a stage; `room` is the memory that a device has.

    Not for a stage whose workers share the tokens of a sample: one device computes no such share.
    """
    assert stage.context == 1, f"stage {stage.name}: context {stage.context}"
    order = attention_order(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with alone() as world, reproducible(stage.exact), attention(order):
        trainer = Trainer(stage, world)
        found = []
        for bucket in stage.buckets:
            tell(f"{stage.name}  {bucket.name}")
            found.append(_measure_bucket(trainer, stage, bucket, workers, room))
    return found


def _measure_bucket(
    trainer: Trainer, stage: Stage, bucket: Bucket, workers: int, room: float
) -> Found:
    module = stage.build()
    layers = sample_layers(stage, module, bucket, stage.recompute)
    tried: list[Tried] = []
    for micro in sizes(bucket, workers, stage.exact):
        said = peak_memory(stage, module, bucket.replace(micro=micro), workers, layers).total
        if said > HEADROOM * room:
            tried.append(Tried(micro, None, None, said, "more than the device has"))
            break
        tried.append(_try(trainer, stage, bucket, micro, said))
        if tried[-1].problem:
            trainer.renew()
            break
        if _has_stopped_growing(tried):
            break
    update_s = 0.0
    if any(one.round_s is not None for one in tried):
        first = trainer.inputs(made_up(stage, bucket, 1))
        trainer.round(first)
        trainer.update()  # makes the moments
        trainer.round(first)
        update_s = trainer.seconds(trainer.update)
    return Found(bucket.name, workers, update_s, tuple(tried))


def _try(trainer: Trainer, stage: Stage, bucket: Bucket, micro: int, said: float) -> Tried:
    cuda = torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        made = trainer.inputs(made_up(stage, bucket, micro))
        trainer.round(made)  # compiles, and finds the kernels
        seconds = [trainer.seconds(lambda: trainer.round(made)) for _ in range(_ROUNDS)]
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return Tried(micro, statistics.median(seconds), peak, said)
    except torch.OutOfMemoryError:
        return Tried(micro, None, None, said, "out of memory")
    finally:
        trainer.forget()
        trainer.drop_cached()


def _has_stopped_growing(tried: list[Tried]) -> bool:
    """Whether the last two sizes were each hardly faster than the one before."""
    rates = [one.micro / one.round_s for one in tried if one.round_s]
    gains = [after / before - 1 for before, after in zip(rates[-3:], rates[-2:], strict=False)]
    return len(rates) >= 3 and all(gain < _LEAST_GAIN for gain in gains)


def digest_of(stage: Stage, workers: int, machine: Machine) -> str:
    """What the times depend on: another digest has to be measured again."""
    names = (
        *("model", "text", "given", "precision", "compile"),
        *("perceptual", "adversarial", "kl_weight"),
        *("recompute", "exact", "optimizer"),
    )
    fields = stage.model_dump(mode="json")
    told = {name: fields[name] for name in names if name in fields}
    buckets = [bucket.model_dump(mode="json") for bucket in stage.buckets]
    codec = stage.codec.model_dump(mode="json")
    everything = [SCHEMA, type(stage).__name__, told, codec, buckets, workers, *machine]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def measured(
    stage: Stage,
    workers: int,
    folder: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[Found], Path, bool]:
    """What was found for a stage, the file that keeps it, and whether it was there already."""
    machine = Machine.here()
    path = folder / f"{stage.name}-{digest_of(stage, workers, machine)}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        found = [
            Found(**{**one, "tried": tuple(Tried(**each) for each in one["tried"])})
            for one in kept["found"]
        ]
        return found, path, True
    found = measure_stage(stage, workers, machine.memory, tell)
    kept = {
        "schema": SCHEMA,
        "machine": machine._asdict(),
        "found": [
            {**one._asdict(), "tried": [each._asdict() for each in one.tried]} for one in found
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(kept, indent=1).encode())
    return found, path, False
