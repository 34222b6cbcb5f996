"""Building a model sharded over the world, and filling it with fresh parameters."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from elastic.ema import local
from elastic.world import World
from models.dit import MMDiT
from models.fresh import fresh_parameters, named_generator

# Each group of fully_shard costs a gather and a few milliseconds of bookkeeping a step, so small
# blocks are left to their parent.
SMALLEST_GROUP = 5_000_000
# Between the rounds of an update FSDP2 keeps gradients whole on every rank: 4 bytes a parameter,
# 44 GiB of 11.9 B. A model with more parameters than this exchanges them in each round instead.
MOST_WHOLE = 250_000_000


def shard(model: nn.Module, world: World, precision: Literal["fp32", "bf16"] = "fp32") -> nn.Module:
    """Shard a model built on the meta device and give it memory; values are undefined.

    A DiT shares its tokens as the world says. With bf16 the gathered parameters are bf16; the
    shards, and gradients once summed, stay fp32.
    """
    if isinstance(model, MMDiT):
        model.context = world.context
    # Inputs are left as they are: a timestep or a rotary angle in bf16 would be another one.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # Innermost first: FSDP2 gives to a module what its inner groups have left.
    for block in reversed(gathered_apart(model)):
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    return model.to_empty(device=world.device)


def gathered_apart(model: nn.Module) -> list[nn.Module]:
    """The blocks whose parameters are gathered when they compute, and again for the way back."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks]
    return [b for b in blocks if sum(p.numel() for p in b.parameters()) >= SMALLEST_GROUP]


def each_round(parameters: int, is_ordered: bool = False) -> bool:
    """Whether gradients are exchanged in each round of an update, and not only in the last."""
    return is_ordered or parameters > MOST_WHOLE


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this rank holds of `like`."""
    return full[own_slices(like)]


def own_slices(like: Tensor) -> tuple[slice, ...]:
    """Which part of `like` this rank holds, along each of its dimensions."""
    if not isinstance(like, DTensor):
        return tuple(slice(0, n) for n in like.shape)
    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def generators(seed: int, stage: str) -> Callable[[str], torch.Generator]:
    """The generator of each parameter of a stage, by its name."""
    return lambda name: named_generator("fresh", seed, stage, name)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, stage: str, only: frozenset[str] | None = None) -> int:
    """Fill parameters, all or `only` these, from (seed, stage, name); how many values were drawn.

    Each rank draws each parameter in full and keeps its part: no messages, no rank in the result,
    one parameter of memory at a time.
    """
    parameters = dict(model.named_parameters())
    drawn = 0
    for name, full in fresh_parameters(model, generators(seed, stage), only):
        parameter = parameters.pop(name)
        local(parameter).copy_(own_part(full, parameter))
        drawn += full.numel()
    assert only is not None or not parameters, f"no rule gave values to {sorted(parameters)}"
    return drawn
