"""Muon on sharded parameters, with AdamW for what is no matrix."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
    first = like[0]
    if not isinstance(first, DTensor):
        return list(parts)
    group = first.device_mesh.get_group()
    size = dist.get_world_size(group)
    counts = [[_count(t.shape, r, size) for t in like] for r in range(size)]
    most = max(map(sum, counts))  # every rank sends a message of one length
    flat = torch.cat([part.flatten() for part in parts])
    everyone = [flat.new_empty(most) for _ in range(size)]
    dist.all_gather(everyone, torch.nn.functional.pad(flat, (0, most - len(flat))), group=group)
    streams = [s[: sum(own)].split(own) for s, own in zip(everyone, counts, strict=True)]
    return [torch.cat(rows).view(t.shape) for t, *rows in zip(like, *streams, strict=True)]


def _count(shape: torch.Size, rank: int, size: int) -> int:
    """How many values FSDP2 gives to a rank: rows as torch.chunk cuts them."""
    most = -(-shape[0] // size)
    return max(0, min(most, shape[0] - rank * most)) * shape[1:].numel()


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose matrices are moved by Muon; momentum is kept sharded like the parameter.

    Every rank calls `step`: the matrices are gathered, and orthogonalised on every rank alike, so
    the result does not depend on how many ranks there are.
    """

    def __init__(self, settings: Muon, model: nn.Module) -> None:
        self.matrices = [p for p in model.parameters() if is_matrix(p)]
        chosen = {id(parameter) for parameter in self.matrices}
        super().__init__(
            [p for p in model.parameters() if id(p) not in chosen],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
        """One update of all parameters; the rate of the matrices follows that of the group."""
        super().step()
        settings = self._settings
        rate = settings.matrix_lr * self.param_groups[0]["lr"] / settings.lr
        ahead = [self._nesterov(parameter) for parameter in self.matrices]
        for parameter, update in zip(self.matrices, gather(ahead, self.matrices), strict=True):
            direction = orthogonalise(update.flatten(1)).view_as(update)
            # Tall matrices take longer steps, so that outputs of any width change alike.
            longer = max(1.0, update.shape[0] / update[0].numel()) ** 0.5
            local(parameter).mul_(1 - rate * settings.weight_decay)
            local(parameter).sub_(own_part(direction, parameter), alpha=rate * longer)

    def _nesterov(self, parameter: Tensor) -> Tensor:
        """This rank's part of the update, before it is made orthogonal."""
        assert parameter.grad is not None, "every matrix takes part in every step"
        momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
        beta, gradient = self._settings.momentum, local(parameter.grad)
        local(momentum).lerp_(gradient, 1 - beta)
        return gradient.lerp(local(momentum), beta)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        super().zero_grad(set_to_none)
        for parameter in self.matrices:
            parameter.grad = None
