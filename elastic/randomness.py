"""Noise and choices addressed by (seed, stage, epoch, sample): the same on any world."""

import torch
from torch import Tensor

from models.fresh import named_seed


def sample_generator(
    seed: int, stage: str, use: str, epoch: int, sample_id: int
) -> torch.Generator:
    """The generator of one sample's randomness in one epoch, for one use ('train', 'held-out')."""
    return torch.Generator().manual_seed(named_seed("draw", seed, stage, use, epoch, sample_id))


def normals(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal values, one generator for each row of the result."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def uniforms(generators: list[torch.Generator]) -> Tensor:
    """One uniform value in [0, 1) from each generator."""
    return torch.stack([torch.rand((), generator=g) for g in generators])
