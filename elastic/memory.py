"""What one worker needs of its device's memory, from arithmetic alone.

Shards follow from the count of parameters. What blocks keep for the backward pass is counted in
bytes for each token and channel; a test compares that with what autograd keeps. What is there at
once is in elastic.moments.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from elastic.data.deal import num_rounds
from elastic.exact import BYTES_A_SQUARE, MOST_AT_ONCE
from elastic.moments import FP32, Layer, Sums, most
from elastic.muon import is_matrix
from elastic.shard import each_round, gathered_apart
from models.codec import CodecModule
from models.dit import DiT, MMDiT
from models.perceptual import Lpips, LpipsModule
from models.recompute import Recompute
from stages.optimizer import Muon
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage, Stage

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
    """Bytes of one worker: what is always there, and the rest at the moment that takes most."""

    parameters: float
    optimizer: float
    average: float
    critic: float = 0.0
    gathered: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    update: float = 0.0  # what clipping and the optimizer's step take
    inputs: float = 0.0  # of the round that is computed, and of the next one

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def state_memory(stage: Stage, module: nn.Module, workers: int) -> Memory:
    """What is always there on each of some workers, as the stage has it sharded."""
    shard = _shard(stage, module, workers)
    moments = 2  # Muon keeps one for matrices; the larger need is planned for
    return Memory(parameters=shard, optimizer=moments * shard, average=shard, critic=_critic(stage))


def peak_memory(
    stage: Stage, module: nn.Module, bucket: Bucket, workers: int, sample: Sequence[Layer]
) -> Memory:
    """The most that is there at once in an update of a bucket; `sample` is what one takes.

    Activations are there before gradients have been summed, and both before the update.
    """
    state, shard = state_memory(stage, module, workers), _shard(stage, module, workers)
    bucket = as_dealt(stage, bucket, workers)
    state = replace(state, inputs=input_bytes(stage, bucket))
    sums = Sums(
        width=precision_bytes(stage),
        holders=stage.holders(workers),
        rounds=num_rounds(bucket.batch, bucket.micro, workers // stage.context),
        each_round=each_round(_count(module), stage.exact and workers > 1),
        is_ordered=stage.exact and workers > 1,
    )
    layers = [layer.of(bucket.micro) for layer in sample]
    apart = sum(layer.parameters for layer in layers if layer.is_apart)
    passes = most(layers, _count(module) - apart, sums)
    update = _update(stage, module, workers)
    if shard + update > passes.total:
        return replace(state, gradients=shard, update=update)
    return replace(state, **passes._asdict())


def as_dealt(stage: Stage, bucket: Bucket, workers: int) -> Bucket:
    """With the most samples for its `micro` that a round has on so many workers, or on more."""
    if stage.exact:  # always `micro`
        return bucket
    most = -(-bucket.batch // (workers // stage.context))
    return bucket.replace(micro=min(bucket.micro, most))


def input_bytes(stage: Stage, bucket: Bucket) -> float:
    """Bytes that the model is given for a micro-batch, and those of the next one on its way.

    Latents and text arrive as bf16 and are computed with as fp32; pixels and noise are fp32.
    """
    pixels = 3 * bucket.frames * bucket.height * bucket.width
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    latents = stage.codec.channels * math.prod(grid)
    if isinstance(stage, AutoencoderStage):
        return float(bucket.micro * 2 * FP32 * (pixels + (latents if stage.kl_weight else 0)))
    given = (1 + stage.codec.channels) * math.prod(grid) if stage.gives(bucket) else 0
    arriving = latents + given + stage.text.most_tokens(()) * stage.text.width
    both = FP32 + torch.bfloat16.itemsize
    return float(bucket.micro * (both * arriving + 2 * FP32 * latents))


def _shard(stage: Stage, module: nn.Module, workers: int) -> float:
    """One fp32 value for each parameter of a worker's part."""
    return FP32 * _count(module) / stage.holders(workers)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _critic(stage: Stage) -> float:
    """The discriminator, whole on every worker: value, gradient and two moments."""
    if not isinstance(stage, AutoencoderStage) or stage.adversarial is None:
        return 0.0
    return float(4 * FP32 * _count(stage.adversarial.build("meta")))


def _update(stage: Stage, module: nn.Module, workers: int) -> float:
    """What the end of an update takes: one after the other, so the larger of them."""
    return max(_muon(stage, module), _exact(stage, module, workers) if stage.exact else 0.0)


def _muon(stage: Stage, module: nn.Module) -> float:
    """Copies of every matrix, whole, while Muon makes them orthogonal."""
    if not isinstance(stage.optimizer, Muon):
        return 0.0
    return float(_MUON_COPIES * FP32 * sum(p.numel() for p in module.parameters() if is_matrix(p)))


def _exact(stage: Stage, module: nn.Module, workers: int) -> float:
    """A reproducible norm, and the critic's gradients: they come as a list and are put together."""
    return BYTES_A_SQUARE * min(_count(module) / workers, MOST_AT_ONCE) + _critic(stage) / 2


def precision_bytes(stage: Stage) -> int:
    """Bytes of a value that blocks compute with."""
    return 2 if isinstance(stage, DiffusionStage) and stage.precision == "bf16" else FP32


def dit_layers(
    stage: DiffusionStage,
    module: MMDiT,
    bucket: Bucket,
    text_tokens: int,
    recompute: Recompute,
) -> list[Layer]:
    """The blocks of a DiT, and what one sample takes there of each worker of a context."""
    apart = set(map(id, gathered_apart(module)))
    values = _own_tokens(stage, bucket, text_tokens) * stage.model.width
    width = precision_bytes(stage)
    layers = []
    for number, block in enumerate(module.blocks()):
        is_double = number < stage.model.depth
        whole = values * _whole(stage.model, width, is_double)
        kept = values * _kept(stage.model, width, is_double, recompute)
        # The stream's, and those of the MLP before and after its activation function.
        backward = values * width * (1 + 2 * stage.model.mlp_ratio)
        layers.append(Layer(_count(block), id(block) in apart, kept, whole - kept, backward))
    return layers


def codec_layers(module: CodecModule, kept: float) -> list[Layer]:
    """The layers of a codec that are gathered apart, and what all of it keeps of one sample.

    Which layer keeps how much is not counted: all of it is taken to be there at every moment.
    """
    counts: list[int] = []
    taken: set[int] = set()
    for block in reversed(gathered_apart(module)):  # one may lie in another, which has the rest
        own = {id(p): p.numel() for p in block.parameters() if id(p) not in taken}
        taken |= own.keys()
        counts.append(sum(own.values()))
    layers = [Layer(count, True, 0.0, 0.0, 0.0) for count in reversed(counts)]
    return [Layer(0, False, kept, 0.0, 0.0), *layers]


def activations(
    stage: DiffusionStage, bucket: Bucket, text_tokens: int, recompute: Recompute
) -> float:
    """Bytes kept for one micro-batch of a bucket, by each worker of a context."""
    own = _own_tokens(stage, bucket, text_tokens)
    return bucket.micro * own * kept_per_token(stage.model, precision_bytes(stage), recompute)


def _own_tokens(stage: DiffusionStage, bucket: Bucket, text_tokens: int) -> int:
    """Tokens of a sample that one worker of a context has."""
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    return -(-(text_tokens + stage.model.tokens(grid)) // stage.context)


def kept_per_token(model: DiT, width_bytes: int, recompute: Recompute) -> float:
    """Bytes kept for one token of text or video in all blocks."""
    double = _kept(model, width_bytes, True, recompute)
    single = _kept(model, width_bytes, False, recompute)
    return model.width * (model.depth * double + model.depth_single * single)


def _whole(model: DiT, width_bytes: int, is_double: bool) -> float:
    """Bytes for each token and channel of all that a block computes."""
    values, in_fp32 = (_KEPT_DOUBLE, _FP32_DOUBLE) if is_double else (_KEPT_SINGLE, _FP32_SINGLE)
    return (values + 2 * (model.mlp_ratio - 4)) * width_bytes + in_fp32 * FP32


def _kept(model: DiT, width_bytes: int, is_double: bool, recompute: Recompute) -> float:
    """Bytes for each token and channel of what a block keeps."""
    if recompute == "none":
        return _whole(model, width_bytes, is_double)
    saved = _SAVED_DOUBLE if is_double else _SAVED_SINGLE
    return (_INPUTS + (saved if recompute == "selective" else 0)) * width_bytes


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
