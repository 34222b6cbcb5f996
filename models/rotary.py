"""Rotary positions on three axes: neighbouring channels of a head are turned by their position."""

# B sample, A attention head, S token of the joint sequence, E channel of a head, P rotary pair

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every token's rotary angles, (S, P), fp32.

    Not a tuple of tensors: FSDP casts tensor arguments of a block to bf16, and angles must not be.
    """

    cos_SP: Tensor
    sin_SP: Tensor

    def __call__(self, x_BASE: Tensor) -> Tensor:
        """Turn each pair of neighbouring channels by its angle; fp32 inside, dtype kept."""
        even_BASP, odd_BASP = rearrange(x_BASE.float(), "b a s (p two) -> two b a s p", two=2)
        turned = torch.stack(
            (
                even_BASP * self.cos_SP - odd_BASP * self.sin_SP,
                even_BASP * self.sin_SP + odd_BASP * self.cos_SP,
            ),
            dim=-1,
        )
        return rearrange(turned, "b a s p two -> b a s (p two)").to(x_BASE.dtype)

    def of(self, tokens: slice) -> "Rotation":
        """That of some tokens."""
        return Rotation(self.cos_SP[tokens], self.sin_SP[tokens])


def rotation(
    pairs: Grid,
    theta: float,
    token_grid: Grid,
    text_tokens: int,
    device: torch.device,
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> Rotation:
    """Rotary angles of the joint sequence: text at position 0, video at its T, H, W positions.

    With a spacing of 1 a token lies at its index; otherwise where its centre lies between those.
    Made anew in every forward: the cost is nothing beside one block, and a table that is kept
    would have to survive `to_empty`, device moves and inference mode.
    """
    angles: list[Tensor] = []
    axes = [
        (torch.arange(size, dtype=torch.float32, device=device) + 0.5) * step - 0.5
        for size, step in zip(token_grid, spacing, strict=True)
    ]
    positions = torch.meshgrid(*axes, indexing="ij")
    for position_THW, count in zip(positions, pairs, strict=True):
        exponent_P = torch.arange(count, dtype=torch.float32, device=device) / count
        angles.append(position_THW.reshape(-1, 1) * theta**-exponent_P)
    angle_SP = functional.pad(torch.cat(angles, dim=1), (0, 0, text_tokens, 0))
    return Rotation(angle_SP.cos(), angle_SP.sin())
