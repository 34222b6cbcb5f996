"""Deals the global batch to the ranks in micro-batches of fixed shape, a step ahead of training."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elastic.data.order import BatchPlan, Layout, batch_at, first_of
from elastic.data.permutation import Indices
from elastic.world import World
from models.text import TextBatch
from stages.schedule import Bucket
from stages.stage import Stage


@dataclass(frozen=True)
class Samples:
    """Tensors of some samples: pixels (B 3 T H W in [-1, 1]) or latents (B C t h w), and text.

    `given_BCTHW` are the stills (B C 2 h w) of their first and last frames, where those are given.
    A sample that could not be read has weight 0 and a reason.
    """

    x_BCTHW: Tensor
    text: TextBatch | None
    ids: Indices
    weight_B: Tensor
    given_BCTHW: Tensor | None = None


@dataclass(frozen=True)
class Micro:
    """One micro-batch of a step; `batch` is the global batch that its weights refer to."""

    position: int
    bucket: Bucket
    samples: Samples
    epochs: Indices
    is_last: bool
    batch: int


class Source(Protocol):
    """Where samples are read from, by bucket and index."""

    def counts(self) -> dict[str, int]:
        """Samples of each bucket, by its name."""
        ...

    def layouts(self) -> dict[str, Layout]:
        """Where the samples of each source of the stage lie in each bucket, by its name."""
        ...

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        """The ids of the samples at these indices."""
        ...

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        """Read these samples."""
        ...


def deal(plan_size: int, micro: int, rank: int, world: int) -> list[tuple[list[int], int]]:
    """This rank's rounds: offsets into the batch, always `micro` of them, and how many count.

    Micro-batches are cut from the batch without regard to the world and dealt in turn; every rank
    has the same number of rounds. A round with nothing left repeats sample 0 with weight 0.
    """
    cuts = [
        list(range(first, min(first + micro, plan_size))) for first in range(0, plan_size, micro)
    ]
    num_rounds = -(-len(cuts) // world)
    rounds = []
    for turn in range(num_rounds):
        mine = turn * world + rank
        cut = cuts[mine] if mine < len(cuts) else []
        rounds.append((cut + [0] * (micro - len(cut)), len(cut)))
    return rounds


def rounds_of(plan: BatchPlan, source: Source, rank: int, world: int) -> Iterator[Micro]:
    """This rank's micro-batches of one global batch."""
    dealt = deal(len(plan.indices), plan.bucket.micro, rank, world)
    for turn, (offsets, num_real) in enumerate(dealt):
        samples = source.fetch(plan.bucket, plan.indices[offsets])
        real_B = torch.arange(len(offsets)) < num_real
        weighted = replace(samples, weight_B=samples.weight_B * real_B.float())
        yield Micro(
            position=plan.position,
            bucket=plan.bucket,
            samples=weighted,
            epochs=plan.epochs[offsets],
            is_last=turn == len(dealt) - 1,
            batch=len(plan.indices),
        )


@dataclass(frozen=True)
class Step:
    """The batch of one update: what this rank computes, and the ids of all of it."""

    plan: BatchPlan
    sample_ids: Indices
    micros: list[Micro]


class Stream:
    """Steps from a position on, read by a thread ahead of the training.

    What has been read but not trained on carries no state: after a restart it is read again.
    """

    _DEPTH = 2

    def __init__(self, stage: Stage, source: Source, world: World, position: int) -> None:
        self._stage = stage
        self._source = source
        self._world = world
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(self._DEPTH)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(position,), name="stream", daemon=True
        )
        self._thread.start()

    def step(self, position: int) -> Step:
        """The step at this position; positions must follow one another."""
        step = self._ready.get()
        if isinstance(step, BaseException):
            raise step
        assert step.plan.position == position, f"asked {position}, read {step.plan.position}"
        return step

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _read_ahead(self, position: int) -> None:
        try:
            layouts = self._source.layouts()
            while position < self._stage.budget and not self._closing.is_set():
                step = self._read(batch_at(self._stage, position, layouts))
                self._put(step)
                position += step.plan.bucket.batch
        except BaseException as error:
            # Handed to the training thread, which raises it: a thread's own error is lost.
            self._put(error)
            if not isinstance(error, Exception):
                raise

    def _read(self, plan: BatchPlan) -> Step:
        micros = list(rounds_of(plan, self._source, self._world.rank, self._world.size))
        return Step(plan, self._source.sample_ids(plan.bucket, plan.indices), micros)

    def _put(self, item: Step | BaseException) -> None:
        while not self._closing.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


def held_out_rounds(source: Source, stage: Stage, bucket: Bucket, world: World) -> Iterator[Micro]:
    """This rank's micro-batches of a fixed set of held-out samples, from each source its share."""
    indices = first_of(stage.data.shares, source.layouts()[bucket.name], stage.held_out)
    plan = BatchPlan(0, bucket, indices, np.zeros_like(indices))
    return rounds_of(plan, source, world.rank, world.size)
