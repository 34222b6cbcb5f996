"""Muon on sharded parameters, with AdamW for what is no matrix."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from elastic.ema import local
from elastic.shard import own_part
from stages.optimizer import Muon

# Quintic whose five iterations bring singular values of (0, 1] near 1 (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_SIDE = 4  # an output layer to RGB has rank 3: nothing there to make orthogonal


def is_matrix(parameter: Tensor) -> bool:
    """Whether the parameter, its input dimensions flattened, is a matrix that Muon may move.

    Depthwise convolutions are not: their rows belong to different channels.
    """
    shape = parameter.shape
    depthwise = len(shape) > 2 and shape[1] == 1
    return len(shape) >= 2 and not depthwise and min(shape[0], shape[1:].numel()) >= _SMALLEST_SIDE


def orthogonalise(update_RC: Tensor) -> Tensor:
    """The nearest matrix with singular values of about 1, by Newton-Schulz, in fp32."""
    rows, columns = update_RC.shape
    x: Tensor = update_RC.T if rows > columns else update_RC
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if rows > columns else x


def gather(parts: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The whole tensors of which every rank holds its rows, in one message for all of them.

    A message for each would cost more than the step of a small model.
    """
    if not like:
        return []  # a model of narrow layers has none
    group = _group(like[0])
    if group is None:
        return list(parts)
    size = dist.get_world_size(group)
    counts = [[_count(t.shape, r, size) for t in like] for r in range(size)]
    streams = _exchange(parts, counts, group)
    return [torch.cat(rows).view(t.shape) for t, *rows in zip(like, *streams, strict=True)]


def orthogonalise_all(updates: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Each whole update made orthogonal, on every rank; each rank computes a share of them.

    Whichever rank it is, it computes the same numbers, so the world leaves no trace in them.
    """
    if not updates:
        return []
    group = _group(like[0])
    if group is None:
        return [orthogonalise(update.flatten(1)).view_as(update) for update in updates]
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owners = shares([update.flatten(1).shape for update in updates], size)
    mine = [
        orthogonalise(update.flatten(1))
        for update, owner in zip(updates, owners, strict=True)
        if owner == rank
    ]
    counts = [
        [update.numel() for update, owner in zip(updates, owners, strict=True) if owner == r]
        for r in range(size)
    ]
    streams = [iter(stream) for stream in _exchange(mine or [updates[0][:0]], counts, group)]
    return [
        next(streams[owner]).view_as(update) for update, owner in zip(updates, owners, strict=True)
    ]


def shares(shapes: Sequence[torch.Size], size: int) -> list[int]:
    """Which rank orthogonalises which matrix: the dearest first, each to the rank with least."""
    cost = [min(shape) ** 2 * max(shape) for shape in shapes]
    owners, load = [0] * len(shapes), [0] * size
    for index in sorted(range(len(shapes)), key=lambda i: (-cost[i], i)):
        owners[index] = load.index(min(load))
        load[owners[index]] += cost[index]
    return owners


def _group(like: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold a tensor together: each replica moves it by itself, and alike."""
    if not isinstance(like, DTensor):
        return None
    return like.device_mesh.get_group(like.device_mesh.ndim - 1)


def _exchange(
    parts: Sequence[Tensor], counts: list[list[int]], group: dist.ProcessGroup
) -> list[Sequence[Tensor]]:
    """Every rank's parts, flat; `counts` says how many values each part of each rank has."""
    most = max(map(sum, counts))  # every rank sends a message of one length
    flat = torch.cat([part.flatten() for part in parts])
    everyone = [flat.new_empty(most) for _ in counts]
    dist.all_gather(everyone, torch.nn.functional.pad(flat, (0, most - len(flat))), group=group)
    return [s[: sum(own)].split(own) for s, own in zip(everyone, counts, strict=True)]


def _count(shape: torch.Size, rank: int, size: int) -> int:
    """How many values FSDP2 gives to a rank: rows as torch.chunk cuts them."""
    most = -(-shape[0] // size)
    return max(0, min(most, shape[0] - rank * most)) * shape[1:].numel()


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose matrices are moved by Muon; momentum is kept sharded like the parameter.

    Every rank calls `step`: the matrices are gathered, and each is orthogonalised by one rank.
    """

    def __init__(
        self, settings: Muon, groups: Sequence[dict[str, Any]], fused: bool = True
    ) -> None:  # Any: torch's
        matrices = [
            (p, n) for n, group in enumerate(groups) for p in group["params"] if is_matrix(p)
        ]
        self.matrices = [parameter for parameter, _ in matrices]
        self._group_of = [number for _, number in matrices]
        chosen = {id(parameter) for parameter in self.matrices}
        others = [
            {**group, "params": [p for p in group["params"] if id(p) not in chosen]}
            for group in groups
        ]
        super().__init__(
            others,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=fused,
            foreach=not fused,
        )
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
        """One update of all parameters; the rate of a matrix follows that of its group."""
        super().step()
        settings = self._settings
        ahead = [self._nesterov(parameter) for parameter in self.matrices]
        directions = orthogonalise_all(gather(ahead, self.matrices), self.matrices)
        for parameter, direction, number in zip(
            self.matrices, directions, self._group_of, strict=True
        ):
            rate = settings.matrix_lr * self.param_groups[number]["lr"] / settings.lr
            # Tall matrices take longer steps, so that outputs of any width change alike.
            longer = max(1.0, direction.shape[0] / direction[0].numel()) ** 0.5
            local(parameter).mul_(1 - rate * settings.weight_decay)
            local(parameter).sub_(own_part(direction, parameter), alpha=rate * longer)

    def _nesterov(self, parameter: Tensor) -> Tensor:
        """This rank's part of the update, before it is made orthogonal."""
        assert parameter.grad is not None, "every matrix takes part in every step"
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum, beta, gradient = state["exp_avg"], self._settings.momentum, local(parameter.grad)
        local(momentum).lerp_(gradient, 1 - beta)
        return gradient.lerp(local(momentum), beta)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        super().zero_grad(set_to_none)
        for parameter in self.matrices:
            parameter.grad = None
