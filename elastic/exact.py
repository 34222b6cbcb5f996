"""Sums whose bits do not depend on the world: what a stage with `exact=True` is trained with.

A batch is cut into micro-batches without regard to the world (elastic.data.deal), and what a
rank computes of one of them does not depend on the rank. What is left is how results are added up:

- gradients in the order of the batch: ((g0 + g1) + g2) + ..., in fp32, whoever computed which;
- squares of gradients, for the norm, as integers of one scale, which any order adds up alike;
- losses, few as they are, gathered and added with a single rounding (math.fsum).
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# Behind FSDPModule.set_custom_reduce_scatter, which is public; its base class is not exported.
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.nn import functional

from elastic.ema import local
from elastic.errors import StageBlocked
from elastic.world import World

# Two integers a sum, so many bits each: up to 2^36 squares cannot overflow 63 bits.
_BITS = 26
MOST_VALUES = 2**36
# Squares made at once: for the cache of a CPU, for the memory of a GPU. Sums of so many numbers of
# _BITS bits are whole numbers below 2^53, so fp64 adds them without rounding in any order.
_MOST_ON_CPU = 2**16
MOST_AT_ONCE = 2**22
BYTES_A_SQUARE = 28  # the values side by side, and in fp64 three times over


_LAYOUT = (
    "every micro-batch of an update must have a gradient for the same parameters, as the sums of "
    "one are kept side by side; use all of them in each forward pass, or exact=False"
)


class ChangedLayout(StageBlocked):
    """Micro-batches of one update have gradients for other parameters."""


class InOrder:
    """The running sum of one flat gradient, in the order of the batch; this rank's part of it."""

    def __init__(self) -> None:
        self.total_N: Tensor | None = None

    def add_flat(self, mine_N: Tensor, world: World) -> None:
        """Add one round of gradients of any length, which `take_whole` puts together."""
        padding = -len(mine_N) % world.size
        mine_WN = functional.pad(mine_N, (0, padding)).view(world.size, -1)
        self.add(mine_WN, None, torch.empty_like(mine_WN[0]))

    def take_whole(self, length: int, world: World) -> Tensor:
        """The whole sum on every rank; the next one begins."""
        assert self.total_N is not None, "nothing has been added"
        total_N, self.total_N = self.total_N, None
        return world.stack(total_N).flatten()[:length]

    def add(self, mine_WN: Tensor, group: dist.ProcessGroup | None, into_N: Tensor) -> None:
        """Add one round: the gradients of as many micro-batches as there are ranks.

        A row of `mine` goes to each rank, and as many come back: this rank's part of the gradient
        of every rank, in the order of the ranks, which is that of the batch. The sum is put into
        `into`, which must stay as it is until the next round.
        """
        if self.total_N is not None and self.total_N.shape != into_N.shape:
            raise ChangedLayout(
                f"exact=True: a gradient of {into_N.numel():,} values a rank follows one of "
                f"{self.total_N.numel():,}: {_LAYOUT}"
            )
        theirs_WN = mine_WN
        if len(mine_WN) > 1:
            theirs_WN = torch.empty_like(mine_WN)
            dist.all_to_all_single(theirs_WN, mine_WN, group=group)
        fold(self.total_N, theirs_WN, into_N)
        self.total_N = into_N


def fold(total_N: Tensor | None, rows_WN: Tensor, into_N: Tensor) -> None:
    """Put ((total + row 0) + row 1) + ... into a tensor.

    It begins with +0, so that no sum is -0: a rank that has nothing left may add zeros of any sign.
    """
    if total_N is None:
        into_N.zero_()
    else:
        into_N.copy_(total_N)
    for row_N in rows_WN:
        into_N += row_N


class _OrderedReduceScatter(ReduceScatter):
    """Takes the place of FSDP's own in one group of parameters; the result carries all rounds.

    Called in FSDP's stream of reductions, and only where there are several ranks.
    """

    def __init__(self) -> None:
        self.sum = InOrder()

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        assert not async_op, "the sum is made here and now"
        assert input_tensor.dtype == torch.float32, f"sums are fp32, not {input_tensor.dtype}"
        self.sum.add(input_tensor.view(group.size(), -1), group, output_tensor)


class OrderedGradients:
    """Adds up the gradients of the micro-batches of an update in the order of the batch.

    Each round exchanges its gradients, where a plain stage exchanges once an update. In return no
    rank keeps whole gradients between rounds. A world of one adds up in that order by itself.
    Losses are weighted by 1 / batch: nothing is averaged over ranks.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count <= MOST_VALUES, f"{count:,} parameters: the norm's sums could overflow"
        assert isinstance(model, FSDPModule), f"not sharded: {type(model)}"
        self._model = model
        self._alone = world.size == 1
        self._scatters: list[_OrderedReduceScatter] = []
        self._moved: set[str] | None = None  # parameters with a gradient in the rounds so far
        for module in model.modules():
            if isinstance(module, FSDPModule) and not self._alone:
                self._scatters.append(_OrderedReduceScatter())
                module.set_custom_reduce_scatter(self._scatters[-1])
                # Sums, not means: to divide by the ranks rounds otherwise on each world.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def begin_round(self, is_last: bool) -> None:
        """Called before every backward pass of an update, its `last` one too."""
        self._model.set_requires_gradient_sync(is_last or not self._alone)
        if any(scatter.sum.total_N is not None for scatter in self._scatters):
            self._require_layout()
            for parameter in self._model.parameters():
                parameter.grad = None  # FSDP would add it to the sum, which holds it already

    def finish(self) -> None:
        """Called after the last backward pass: the sums are in place."""
        if not self._alone:
            self._require_layout()
            self._moved = None
        for scatter in self._scatters:
            scatter.sum.total_N = None
        if self._alone:
            # Other worlds begin with +0, and have no -0 in their sums.
            gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
            torch._foreach_add_([local(gradient) for gradient in gradients], 0.0)

    def _require_layout(self) -> None:
        """Raise ChangedLayout unless the round before gave what the rounds before it did.

        Of equal length, gradients of other parameters would be added up without a word.
        """
        moved = {name for name, p in self._model.named_parameters() if p.grad is not None}
        if self._moved is not None and moved != self._moved:
            names = ", ".join(sorted(moved ^ self._moved))
            raise ChangedLayout(f"exact=True: only some rounds move {names}: {_LAYOUT}")
        self._moved = moved


@torch.no_grad()
def square_sum(tensors: list[Tensor], world: World) -> Tensor:
    """The sum of the squares of all values of all ranks, fp64; NaN if any of them is not finite.

    Squares are counted in units of 2^-52 of a power of four just above the largest square, so
    each is off by half of that at most, and their sum by as much for each value. Integers add up
    alike in any order: the bits depend on the values alone, not on how they lie on the ranks.
    Every rank calls it; nothing waits for the device.
    """
    largest = torch.zeros((), dtype=torch.float64, device=world.device)
    if tensors:
        largest = torch.stack(torch._foreach_norm(tensors, math.inf)).max().double()
    # The maximum of NaN and a number may be either.
    largest = world.max(torch.where(largest.isfinite(), largest, math.inf))
    unit = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0)
    high, low = torch.zeros(2, dtype=torch.int64, device=world.device)
    scale = _two_to(_BITS // 2 - unit)
    for piece in _pieces(tensors, _MOST_ON_CPU if world.device.type == "cpu" else MOST_AT_ONCE):
        # By a power of two: the square of an fp32 value has 48 bits, all kept.
        scaled = piece.double().mul_(scale).square_()
        whole = scaled.floor()
        high += whole.sum().long()
        low += scaled.sub_(whole).mul_(2.0**_BITS).round_().sum().long()
    high, low = world.sum(torch.stack([high, low]))
    total = high.double() * 2.0**-_BITS + low.double() * 2.0 ** (-2 * _BITS)
    return torch.where(largest.isfinite(), total * _two_to(2 * unit), math.nan)


def _two_to(exponent: Tensor) -> Tensor:
    """The power of two, put together from its bits: pow and ldexp may be off, or fp32."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _pieces(tensors: list[Tensor], most: int) -> Iterator[Tensor]:
    """All values, some at a time: a call for each small tensor would cost more than its sum."""
    waiting: list[Tensor] = []
    for tensor in tensors:
        for part in tensor.flatten().split(most):
            if waiting and sum(map(len, waiting)) + len(part) > most:
                yield torch.cat(waiting)
                waiting = []
            waiting.append(part)
    if waiting:
        yield torch.cat(waiting)


def totals(values: Sequence[Sequence[Tensor]], world: World) -> list[float]:
    """The sum of each list of scalars, those of all ranks together, rounded once.

    Every rank calls it with lists of equal lengths; waits for the device.
    """
    counts = [len(each) for each in values]
    if not any(counts):
        return [0.0 for _ in values]
    mine_N = torch.stack([value for each in values for value in each]).double()
    parts = world.stack(mine_N).split(counts, dim=1)
    return [_rounded_once(part.flatten().tolist()) for part in parts]


def column_totals(rows_NK: Tensor, world: World) -> list[float]:
    """The sum of each column over the rows of all ranks together, rounded once.

    Every rank calls it with as many rows; waits for the device.
    """
    columns = world.stack(rows_NK.double()).flatten(0, 1).T.tolist()
    return [_rounded_once(column) for column in columns]


def _rounded_once(values: list[float]) -> float:
    # fsum refuses inf - inf; in plain sums inf and NaN come out alike in any order.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Inside this block an operation gives the same bits each time, or raises; if it is `wanted`.

    One thread computes on the CPU, as another count would sum up otherwise; beside a GPU too, where
    an init policy solves for weights on the CPU.
    """
    if not wanted:
        yield
        return
    # Read when cuBLAS starts: without it torch refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic  # Any: torch sets its attributes at run time
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a help in finding mistakes, and slow
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
        torch.set_num_threads(threads)
