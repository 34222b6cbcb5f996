"""Noise and choices addressed by (seed, stage, bucket, epoch, sample): the same on any world."""

import torch
from torch import Tensor

from models.fresh import named_seed


def sample_generator(
    seed: int, stage: str, use: str, bucket: str, epoch: int, sample_id: int
) -> torch.Generator:
    """One sample's randomness in one epoch of its bucket, for one use.

    Uses: 'train' and 'held-out' (time, dropped text, noise), 'level' (noise at a fixed time, which
    stands in place of the epoch), 'time' (whose time is uniform), 'pooled' (dropped pooled vector),
    'posterior' (the latent, where it is a sample), 'given' (which frames are given).
    Each has a stream of its own, so that what one of them draws does not move the others.
    Bucket and epoch follow from the position, and stay right where a clip is in several buckets.
    """
    return torch.Generator().manual_seed(
        named_seed("draw", seed, stage, use, bucket, epoch, sample_id)
    )


def normals(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal values, one generator for each row of the result."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def uniforms(generators: list[torch.Generator]) -> Tensor:
    """One uniform value in [0, 1) from each generator."""
    return torch.stack([torch.rand((), generator=g) for g in generators])
