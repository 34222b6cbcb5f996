"""What one worker needs of its device's memory, from arithmetic alone.

Shards follow from the count of parameters. What blocks keep for the backward pass is counted in
bytes for each token and channel; a test compares that with what autograd keeps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks import Block
from models.dit import DiT
from stages.schedule import Bucket
from stages.stage import DiffusionStage, Stage

FP32 = 4
Recompute = Literal["none", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
# Values kept for each token and channel: in the block's own precision, the MLP at its ratio of 4,
# and in fp32 whatever the precision is.
_KEPT_DOUBLE, _KEPT_SINGLE = 23, 15
_FP32_DOUBLE, _FP32_SINGLE = 3, 6  # as rotary turns and norms keep theirs
_INPUTS = 1  # of a block whose inner values are computed again
HEADROOM = 0.9  # share of a device's memory that can be planned for: the rest is the allocator's


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker: its shards, what is gathered whole at a time, what is kept."""

    parameters: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def state_memory(stage: Stage, module: nn.Module, workers: int) -> Memory:
    """Everything but activations, on each of some workers; parameters are sharded over all."""
    count = sum(parameter.numel() for parameter in module.parameters())
    shard = FP32 * count / workers
    moments = 2  # Muon keeps one for matrices; the larger need is planned for
    return Memory(
        parameters=shard,
        gradients=shard,
        optimizer=moments * shard,
        average=shard,
        gathered=_gathered(stage, module) if workers > 1 else 0.0,
        activations=0.0,
    )


def _gathered(stage: Stage, module: nn.Module) -> float:
    """The block that computes and the next one, with the gradients of one, and the outer layers."""
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    outer = sum(p.numel() for p in module.parameters()) - sum(sizes)
    if not sizes:
        return float(2 * FP32 * outer)  # one group: all parameters and all gradients
    width = precision_bytes(stage)
    largest = max(sizes)
    return float(2 * width * largest + (width + FP32) * largest + 2 * width * outer)


def precision_bytes(stage: Stage) -> int:
    """Bytes of a value that blocks compute with."""
    return 2 if isinstance(stage, DiffusionStage) and stage.precision == "bf16" else FP32


def activations(
    stage: DiffusionStage, bucket: Bucket, text_tokens: int, recompute: Recompute
) -> float:
    """Bytes kept for one micro-batch of a bucket."""
    tokens = text_tokens + stage.model.tokens(
        stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    )
    return bucket.micro * tokens * kept_per_token(stage.model, precision_bytes(stage), recompute)


def kept_per_token(model: DiT, width_bytes: int, recompute: Recompute) -> float:
    """Bytes kept for one token of text or video in all blocks."""
    wider = 2 * (model.mlp_ratio - 4)
    double = (_KEPT_DOUBLE + wider) * width_bytes + _FP32_DOUBLE * FP32
    single = (_KEPT_SINGLE + wider) * width_bytes + _FP32_SINGLE * FP32
    if recompute == "none":
        return model.width * (model.depth * double + model.depth_single * single)
    inputs = _INPUTS * width_bytes * (model.depth + model.depth_single)
    return model.width * (inputs + max(double if model.depth else 0, single))


def kept_by_autograd(module: nn.Module, x_BCTHW: Tensor) -> float:
    """Bytes that a module keeps for the backward pass of this input; both may be on meta."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x_BCTHW)
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
