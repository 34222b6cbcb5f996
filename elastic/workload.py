"""What training costs, counted on the host: tokens, those of use among them, and model FLOPs.

Model FLOPs are those of one forward pass and of a backward pass of twice as many, over real tokens
of samples that count: padding, filler rounds and what `recompute` computes again are not in them.
So they say how fast the model is trained, not how busy the device is.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from elastic.data.load import Micro
from models.text import TextBatch
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage, Stage

TRAINING = 3  # passes: forward, and backward for twice as much


class Workload(NamedTuple):
    """Of one micro-batch: tokens that were computed, and the text tokens of each real sample."""

    computed: int
    lengths: tuple[int, ...]


def workload(stage: Stage, micro: Micro, text: TextBatch | None = None) -> Workload:
    """The workload of a micro-batch, with its text as the model gets it; all lies on the CPU."""
    count, length = len(micro.samples.ids), 0 if text is None else text.text_BLD.shape[1]
    lengths_B = [length] * count
    if text is not None and text.mask_BL is not None:
        lengths_B = text.mask_BL.sum(1).tolist()
    real_B = (micro.samples.weight_B > 0).tolist()
    return Workload(
        count * (video_tokens(stage, micro.bucket) + length),
        tuple(length for length, is_real in zip(lengths_B, real_B, strict=True) if is_real),
    )


def useful_tokens(stage: Stage, bucket: Bucket, lengths: Mapping[int, int]) -> int:
    """Real tokens of samples of a bucket, given how many have so many text tokens."""
    video = video_tokens(stage, bucket)
    return sum(count * (video + length) for length, count in lengths.items())


def model_flops(stage: Stage, bucket: Bucket, lengths: Mapping[int, int]) -> float:
    """FLOPs of training on samples of a bucket, given how many have so many text tokens."""
    if isinstance(stage, AutoencoderStage):
        return sum(lengths.values()) * codec_flops(stage, bucket)
    return float(sum(count * dit_flops(stage, bucket, length) for length, count in lengths.items()))


def video_tokens(stage: Stage, bucket: Bucket) -> int:
    """Video tokens of one sample; of an autoencoder, the cells of its latents."""
    patch = stage.model.patch if isinstance(stage, DiffusionStage) else 1
    t, h, w = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    return t * (h // patch) * (w // patch)


def dit_flops(stage: DiffusionStage, bucket: Bucket, text_tokens: int) -> int:
    """FLOPs of training on one sample with so many tokens of text."""
    return TRAINING * stage.model.forward_flops(
        video_tokens(stage, bucket),
        text_tokens,
        stage.codec.channels,
        stage.text.width,
        stage.text.pooled_width,
    )


@lru_cache(maxsize=256)
def codec_flops(stage: AutoencoderStage, bucket: Bucket) -> float:
    """FLOPs of training the codec on one clip, without a perceptual loss and a discriminator.

    Torch counts them on the meta device: a second or so. The backward pass is taken for two forward
    ones, because torch counts that of grouped convolutions several times over.
    """
    x_BCTHW = torch.empty((1, 3, bucket.frames, bucket.height, bucket.width), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage.build()(x_BCTHW)
    return float(TRAINING * counter.get_total_flops())
