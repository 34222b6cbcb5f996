"""Counts what a rank sends to others, by the operations that torch is told to carry out."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny import DrawnLatents
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.data.load import Samples
from elastic.data.order import Indices
from models.text import pad
from stages import Bucket


class SameCaption(DrawnLatents):
    """As many tokens of text in every sample, so that all updates of a bucket send alike."""

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        return np.full_like(indices, 3)

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        text = pad(self._stage.text.encode(["a moving shape"] * len(indices)))
        return replace(super().fetch(bucket, indices), text=text)


class Wire(TorchDispatchMode):
    """Bytes sent inside of this block, and how many there were at the beginning of each update.

    Of a gathered or scattered tensor each of n ranks sends n - 1 of n parts, of one that is summed
    twice that: the least there can be, whatever the algorithm of the backend is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0
        self.at_updates: list[float] = []
        self.unknown: set[str] = set()  # operations of an update that are not counted
        self._updates = False
        self._begun: set[int] = set()  # positions

    def beat(self, phase: str, position: int) -> None:
        """For the loop, which says what it does; an update begins with its first sign of life."""
        self._updates = phase in ("read", "compile", "train")
        if self._updates and position not in self._begun:
            self._begun.add(position)
            self.at_updates.append(self.sent)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own
        if self._updates and func.namespace in ("c10d", "_c10d_functional"):
            self.sent += self._sent_by(func.name().partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _sent_by(self, name: str, args: Any) -> float:
        match name.partition(".")[0]:
            case "_allgather_base_":
                return float(args[0].nbytes - args[1].nbytes)
            case "_reduce_scatter_base_":
                return float(args[1].nbytes - args[0].nbytes)
            case "allreduce_":
                size = dist.ProcessGroup.unbox(args[1]).size()
                return 2 * (size - 1) / size * _bytes(args[0])
            case "allgather_":
                size = len(args[0][0])
                return float((size - 1) * _bytes(args[1]))
            case "alltoall_base_":
                size = dist.ProcessGroup.unbox(args[2]).size()
                return args[1].nbytes * (size - 1) / size  # in even parts, as we ask for them
            case "all_to_all_single":
                group = _resolve_process_group(args[3])
                own = args[2][group.rank()] / max(1, sum(args[2]))
                return float(args[0].nbytes * (1 - own))
            case "wait_tensor" | "_wrap_tensor_autograd":
                return 0.0
        self.unknown.add(name)
        return 0.0


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def total(sent: float) -> float:
    """What all ranks together sent; every rank calls it."""
    sums = torch.tensor(sent, dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums)
