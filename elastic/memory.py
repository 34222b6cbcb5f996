"""What one worker needs of its device's memory, from arithmetic alone.

Shards follow from the count of parameters. What blocks keep for the backward pass is counted in
bytes for each token and channel; a test compares that with what autograd keeps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic.exact import BYTES_A_SQUARE, MOST_AT_ONCE
from elastic.muon import is_matrix
from models.blocks import Block
from models.codec import CodecModule
from models.dit import DiT
from models.perceptual import Lpips, LpipsModule
from models.recompute import Recompute
from stages.optimizer import Muon
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage, Stage

FP32 = 4
# Values kept for each token and channel: in the block's own precision, the MLP at its ratio of 4,
# and in fp32 whatever the precision is.
_KEPT_DOUBLE, _KEPT_SINGLE = 23, 15
_FP32_DOUBLE, _FP32_SINGLE = 3, 6  # as rotary turns and norms keep theirs
_MUON_COPIES = 6  # measured on 2 ranks: 5.6
# Of a block whose inner values are computed again: its input; and with "selective" what attention
# gives, and what the two products after it give.
_INPUTS, _SAVED_DOUBLE, _SAVED_SINGLE = 1, 3, 2
HEADROOM = 0.9  # share of a device's memory that can be planned for: the rest is the allocator's


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker: its shards, what is gathered whole at a time, what is kept."""

    parameters: float
    gradients: float
    optimizer: float
    average: float
    critic: float
    gathered: float
    muon: float
    exact: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def state_memory(stage: Stage, module: nn.Module, workers: int) -> Memory:
    """Everything but activations, on each of some workers, as the stage has them sharded."""
    count = sum(parameter.numel() for parameter in module.parameters())
    holders = stage.holders(workers)
    shard = FP32 * count / holders
    moments = 2  # Muon keeps one for matrices; the larger need is planned for
    return Memory(
        parameters=shard,
        gradients=shard,
        optimizer=moments * shard,
        average=shard,
        critic=_critic(stage),
        # One worker gathers nothing, but computes with copies in bf16.
        gathered=_gathered(stage, module) if holders > 1 or precision_bytes(stage) < FP32 else 0.0,
        muon=_muon(stage, module),
        exact=_exact(stage, module, workers) if stage.exact else 0.0,
        activations=0.0,
    )


def _critic(stage: Stage) -> float:
    """The discriminator, whole on every worker: value, gradient and two moments."""
    if not isinstance(stage, AutoencoderStage) or stage.adversarial is None:
        return 0.0
    return float(4 * FP32 * sum(p.numel() for p in stage.adversarial.build("meta").parameters()))


def _muon(stage: Stage, module: nn.Module) -> float:
    """Copies of every matrix, whole, while Muon makes them orthogonal."""
    if not isinstance(stage.optimizer, Muon):
        return 0.0
    return float(_MUON_COPIES * FP32 * sum(p.numel() for p in module.parameters() if is_matrix(p)))


def _exact(stage: Stage, module: nn.Module, workers: int) -> float:
    """What reproducible sums take: gradients of all ranks for a shard of one group, and the norm.

    The critic's come as a list and are put together.
    """
    largest, outer = _groups(module)
    received = FP32 * max(largest, outer) if workers > 1 else 0
    shard = sum(parameter.numel() for parameter in module.parameters()) / workers
    norm = BYTES_A_SQUARE * min(shard, MOST_AT_ONCE)
    return received + norm + _critic(stage) / 2


def _groups(module: nn.Module) -> tuple[int, int]:
    """Parameters of the largest block, and of all outside of blocks."""
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return max(sizes, default=0), sum(p.numel() for p in module.parameters()) - sum(sizes)


def _gathered(stage: Stage, module: nn.Module) -> float:
    """The block that computes and the next one, with the gradients of one, and the outer layers."""
    largest, outer = _groups(module)
    if not largest:
        return float(2 * FP32 * outer)  # one group: all parameters and all gradients
    width = precision_bytes(stage)
    return float(2 * width * largest + (width + FP32) * largest + 2 * width * outer)


def precision_bytes(stage: Stage) -> int:
    """Bytes of a value that blocks compute with."""
    return 2 if isinstance(stage, DiffusionStage) and stage.precision == "bf16" else FP32


def activations(
    stage: DiffusionStage, bucket: Bucket, text_tokens: int, recompute: Recompute
) -> float:
    """Bytes kept for one micro-batch of a bucket, by each worker of a context."""
    tokens = text_tokens + stage.model.tokens(
        stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    )
    own = -(-tokens // stage.context)
    return bucket.micro * own * kept_per_token(stage.model, precision_bytes(stage), recompute)


def kept_per_token(model: DiT, width_bytes: int, recompute: Recompute) -> float:
    """Bytes kept for one token of text or video in all blocks."""
    wider = 2 * (model.mlp_ratio - 4)
    double = (_KEPT_DOUBLE + wider) * width_bytes + _FP32_DOUBLE * FP32
    single = (_KEPT_SINGLE + wider) * width_bytes + _FP32_SINGLE * FP32
    if recompute == "none":
        return model.width * (model.depth * double + model.depth_single * single)
    kept = _INPUTS * (model.depth + model.depth_single)
    if recompute == "selective":
        kept += _SAVED_DOUBLE * model.depth + _SAVED_SINGLE * model.depth_single
    return model.width * (kept * width_bytes + max(double if model.depth else 0, single))


def kept_by_autograd(
    compute: Callable[..., object], *inputs: Tensor, parameters: Iterable[Tensor] = ()
) -> float:
    """Bytes that a computation keeps for the backward pass, its parameters left out; on meta."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute(*inputs)
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def kept_by_codec(module: CodecModule, x_BCTHW: Tensor, recompute: Recompute) -> float:
    """Bytes that training keeps of a codec for these clips; module and clips are on meta."""
    if recompute == "none":
        module.recompute(False)
        return kept_by_autograd(module, x_BCTHW, parameters=module.parameters())
    layers, inputs = module.recomputed(), []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0].shape)))
        for layer in layers
    ]
    with torch.no_grad():
        module(x_BCTHW)
    for hook in hooks:
        hook.remove()
    one_by_one = [
        kept_by_autograd(
            layer,
            torch.empty(shape, device="meta", requires_grad=True),
            parameters=layer.parameters(),
        )
        for layer, shape in inputs
    ]
    return float(FP32 * sum(math.prod(shape) for _, shape in inputs)) + max(one_by_one)


def kept_by_judges(stage: AutoencoderStage, x_BCTHW: Tensor) -> float:
    """Bytes that the perceptual loss and the discriminator keep for these clips, on meta."""
    decoded_BCTHW = torch.empty_like(x_BCTHW, requires_grad=True)
    kept = 0.0
    if stage.perceptual is not None:
        with torch.device("meta"):  # the values in the file do not matter
            asked = stage.perceptual
            loss = LpipsModule() if isinstance(asked, Lpips) else asked.build()
        kept += kept_by_autograd(loss, x_BCTHW, decoded_BCTHW, parameters=loss.parameters())
    if stage.adversarial is not None:
        critic = stage.adversarial.build("meta")
        # It sees the decoded clip for the codec's sake, then both clips for its own.
        kept += 3 * kept_by_autograd(critic, decoded_BCTHW, parameters=critic.parameters())
    return kept
