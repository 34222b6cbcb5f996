"""Deals the global batch to the ranks in micro-batches, a step ahead of training."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from elastic.data.deal import deal
from elastic.data.order import BatchPlan, Layout, batch_at, first_of
from elastic.data.permutation import Indices
from elastic.world import World
from models.text import TextBatch
from stages.schedule import Bucket
from stages.stage import Stage

_CLOSE_S = 10.0  # for the thread of a stream to end
Ready = TypeVar("Ready")


@dataclass(frozen=True)
class Samples:
    """Tensors of some samples: pixels (B 3 T H W in [-1, 1]) or latents (B C t h w), and text.

    Latents, stills and text may be bf16, as they are stored.
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
    """One micro-batch of a step; `batch` is the global batch that its weights refer to.

    `text_tokens` are those of its longest text.
    """

    position: int
    bucket: Bucket
    samples: Samples
    epochs: Indices
    is_last: bool
    batch: int
    text_tokens: int = 0


Round = tuple[Bucket, Indices]


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

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        """Text tokens of the samples at these indices; zeros where there is no text."""
        ...

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        """Read the samples of each round; a source may ask for rounds before they are wanted."""
        ...


class _Turn(NamedTuple):
    """One of this rank's rounds of a batch, whose samples are in the order of their texts."""

    plan: BatchPlan
    offsets: list[int]
    num_real: int
    is_last: bool
    text_tokens: int


def by_text(plan: BatchPlan, lengths: Indices) -> tuple[BatchPlan, Indices]:
    """The batch from its longest text to its shortest, and the lengths: what is padded together is
    alike, and what is not full is short.

    An update is a sum over its batch, which no order changes but in the rounding.
    """
    order = np.argsort(-lengths, kind="stable")
    sorted_plan = plan._replace(indices=plan.indices[order], epochs=plan.epochs[order])
    return sorted_plan, lengths[order]


def _turns(
    plans: Iterable[BatchPlan], source: Source, rank: int, world: int, exact: bool
) -> Iterator[_Turn]:
    for given in plans:
        if not len(given.indices):
            continue  # a bucket may have lost all of its held-out clips
        plan, lengths = by_text(given, source.text_lengths(given.bucket, given.indices))
        dealt = deal(len(plan.indices), plan.bucket.micro, rank, world, exact)
        for turn, (offsets, num_real) in enumerate(dealt):
            yield _Turn(
                plan, offsets, num_real, turn == len(dealt) - 1, int(lengths[offsets].max())
            )


def rounds_of(
    plans: Iterable[BatchPlan], source: Source, rank: int, world: int, exact: bool = False
) -> Iterator[Micro]:
    """This rank's micro-batches of global batches."""
    turns, asked = itertools.tee(_turns(plans, source, rank, world, exact))
    found = source.fetch_all((turn.plan.bucket, turn.plan.indices[turn.offsets]) for turn in asked)
    for turn, samples in zip(turns, found, strict=True):
        plan, offsets, num_real, is_last, text_tokens = turn
        real_B = torch.arange(len(offsets)) < num_real
        weighted = replace(samples, weight_B=samples.weight_B * real_B.float())
        yield Micro(
            position=plan.position,
            bucket=plan.bucket,
            samples=weighted,
            epochs=plan.epochs[offsets],
            is_last=is_last,
            batch=len(plan.indices),
            text_tokens=text_tokens,
        )


def own_rounds(
    plans: Iterable[BatchPlan], source: Source, world: World, exact: bool
) -> Iterator[Micro]:
    """This rank's micro-batches; what others of its context count as well has weight 0 here."""
    for micro in rounds_of(plans, source, world.reader, world.readers, exact):
        if world.counts:
            yield micro
        else:
            samples = replace(micro.samples, weight_B=torch.zeros_like(micro.samples.weight_B))
            yield replace(micro, samples=samples)


@dataclass(frozen=True)
class Step(Generic[Ready]):
    """The batch of one update: what this rank computes, and the ids of all of it."""

    plan: BatchPlan
    sample_ids: Indices
    micros: list[Ready]


class Stream(Generic[Ready]):
    """Steps from a position on, read by a thread ahead of the training, and made `ready` for it.

    What has been read but not trained on carries no state: after a restart it is read again.
    """

    _DEPTH = 2

    def __init__(
        self,
        stage: Stage,
        source: Source,
        world: World,
        position: int,
        ready: Callable[[Micro], Ready],
    ) -> None:
        self._stage = stage
        self._make_ready = ready
        self._source = source
        self._world = world
        self._ready: queue.Queue[Step[Ready] | BaseException] = queue.Queue(self._DEPTH)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(position,), name="stream", daemon=True
        )
        self._thread.start()

    def is_ready(self) -> bool:
        """Whether the next step is there already."""
        return not self._ready.empty()

    def step(self, position: int) -> Step[Ready]:
        """The step at this position; positions must follow one another."""
        step = self._ready.get()
        if isinstance(step, BaseException):
            raise step
        assert step.plan.position == position, f"asked {position}, read {step.plan.position}"
        return step

    def close(self) -> None:
        """Stop reading and wait for the thread; not for long where a disk stands still."""
        self._closing.set()
        deadline = time.monotonic() + _CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _read_ahead(self, position: int) -> None:
        try:
            shown, planned = itertools.tee(self._plans(position))
            micros = own_rounds(planned, self._source, self._world, self._stage.exact)
            for plan in shown:
                if self._closing.is_set():
                    break
                self._put(self._read(plan, micros))
        except BaseException as error:
            # Handed to the training thread, which raises it: a thread's own error is lost.
            self._put(error)
            if not isinstance(error, Exception):
                raise

    def _plans(self, position: int) -> Iterator[BatchPlan]:
        layouts = self._source.layouts()
        while position < self._stage.budget:
            plan = batch_at(self._stage, position, layouts)
            yield plan
            position += plan.bucket.batch

    def _read(self, plan: BatchPlan, micros: Iterator[Micro]) -> Step[Ready]:
        mine, is_last = [], False
        while not is_last:
            micro = next(micros)
            mine.append(self._make_ready(micro))
            is_last = micro.is_last
        return Step(plan, self._source.sample_ids(plan.bucket, plan.indices), mine)

    def _put(self, item: Step[Ready] | BaseException) -> None:
        while not self._closing.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


def held_out_rounds(source: Source, stage: Stage, bucket: Bucket, world: World) -> Iterator[Micro]:
    """This rank's micro-batches of a fixed set of held-out samples, from each source its share."""
    indices = first_of(stage.data.shares, source.layouts()[bucket.name], stage.held_out)
    plan = BatchPlan(0, bucket, indices, np.zeros_like(indices))
    return own_rounds([plan], source, world, stage.exact)
