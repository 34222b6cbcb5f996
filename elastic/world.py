"""The ranks of this attempt, and the few things that they agree on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from elastic.errors import InputError
from models.context import Context

T = TypeVar("T")
# A rank that is lost is noticed by its supervisor; this is for what nobody can see.
COLLECTIVE = timedelta(seconds=600)


@dataclass(frozen=True)
class World:
    """Who takes part in this attempt. Says who does something, never what is computed."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """What models are sharded over: the axis `shard`, behind `replicate` if each is held twice."""
    control: dist.ProcessGroup | None = None
    """A gloo group beside NCCL's, for what the host asks every update; None is the default one."""
    context: Context | None = None
    """Of neighbouring ranks, those that share the tokens of their samples; None: nobody does."""

    @classmethod
    def current(cls) -> "World":
        """The world of the process group that is already initialised."""
        device = torch.device("cuda", torch.cuda.current_device()) if _has_gpu() else _CPU
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        control = None
        if device.type == "cuda":
            control = dist.new_group(backend="gloo", timeout=COLLECTIVE)
        return cls(dist.get_rank(), dist.get_world_size(), device, mesh, control)

    def arranged(self, context: int, shard_within: int | None) -> "World":
        """The same ranks as a stage wants them; every rank calls it. InputError if they cannot be.

        So many neighbours share tokens, and each `shard_within` neighbours hold a whole model.
        """
        within = shard_within or self.size
        for field, count in (("context", context), ("shard_within", within)):
            if self.size % count:
                low = self.size - self.size % count
                raise InputError(
                    f"a world of {self.size} with {field}={count}: it must be a multiple of that; "
                    f"nearest: {low or count}"
                )
        mesh, sharing = self.mesh, None
        if within < self.size:
            shape, axes = (self.size // within, within), ("replicate", "shard")
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=axes)
        if context > 1:
            shape, axes = (self.size // context, context), ("read", "context")
            group = init_device_mesh(self.device.type, shape, mesh_dim_names=axes)["context"]
            sharing = Context(group.get_group(), self.rank % context, context)
        return replace(self, mesh=mesh, context=sharing)

    @property
    def reader(self) -> int:
        """Which of the `readers` this rank is: those of one context read the same samples."""
        return self.rank // self._sharing

    @property
    def readers(self) -> int:
        """Into how many parts a batch is dealt."""
        return self.size // self._sharing

    @property
    def counts(self) -> bool:
        """Whether this rank's losses count: those of one context have the same ones."""
        return self.rank % self._sharing == 0

    @property
    def _sharing(self) -> int:
        return 1 if self.context is None else self.context.size

    @property
    def replicas(self) -> int:
        """How many times the ranks together hold a model."""
        return self.size // self.mesh.size(self.mesh.ndim - 1)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def most(self, here: int) -> int:
        """The largest of the ranks' numbers; the same answer on every rank.

        It does not wait for what the device has been given to do.
        """
        most = torch.tensor(here)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.control)
        return int(most.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the ranks, in place."""
        dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over the ranks, in place; what it makes of NaN is not said."""
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def stack(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all ranks, of one shape, in the order of the ranks: a dimension more."""
        everyone = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(everyone, values)
        return torch.stack(everyone)

    def from_first(self, value: Any) -> Any:  # Any: whatever the first rank decided
        """The first rank's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """What the first rank's call returns, or raises, on every rank."""
        result: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = function()
            except Exception as raised:  # told to the ranks that wait, and raised on all of them
                error = raised
        result, error = self.from_first((result, error))
        if error is not None:
            raise error
        return cast(T, result)

    def gather(self, value: Any) -> list[Any]:  # Any: whatever each rank has to say
        """Every rank's value, in the order of the ranks."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Return when every rank has come here."""
        dist.barrier()


_CPU = torch.device("cpu")


def _has_gpu() -> bool:
    return torch.cuda.is_available() and dist.get_backend() != "gloo"
