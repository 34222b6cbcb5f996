"""A video diffusion transformer of the FLUX shape, in Open-Sora 2.0's layout and names.

Blocks with separate weights for text and video, then blocks that share them; both attend over the
joint sequence, text first. Parameter names, fused projections and interleaved rotary pairs are
those of the published FLUX files. Differences from Open-Sora 2.0: padded text is never attended;
modulations and the last linear start at zero (adaLN-zero, arXiv 2212.09748), so that a fresh model
starts as the zero function and its blocks as identities.
"""

# B sample, C channel, T frame, H, W latent grid, L text token, N video token, S = L + N,
# D width, A attention head, E channel of a head, P rotary pair of a head

import math
from typing import Literal, Self

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from models.attention import Padding
from models.blocks import (
    TIME_WIDTH,
    Block,
    DoubleBlock,
    Embedder,
    FinalLayer,
    SingleBlock,
    ZeroLinear,
    sinusoid,
)
from models.context import Context
from models.recompute import Recompute
from models.record import Record
from models.rotary import Grid, Spacing, rotation

_ALL = slice(None)
CODEC_SHAPED = ("img_in.", "cond_in.", "final_layer.linear.")
GUIDANCE_LAYERS = tuple(
    f"guidance_in.{layer}.{leaf}"
    for layer in ("in_layer", "out_layer")
    for leaf in ("weight", "bias")
)
"""The parameters that take the strength of guidance."""
ROPE_PIXELS = (4, 16, 16)
"""One step of position under rope_unit="pixel": a HunyuanVAE token of patch 2."""


def codec_shaped(name: str) -> bool:
    """Whether the shape of this MMDiT parameter depends on the autoencoder or the patch."""
    return name.startswith(CODEC_SHAPED)


class DiT(Record):
    """The shape of an MMDiT: `depth` two-stream blocks, `depth_single` shared ones."""

    depth: int = Field(ge=0)
    depth_single: int = Field(ge=0)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    patch: int = Field(default=2, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    qkv_bias: bool = True
    theta: float = Field(default=10_000.0, gt=1, allow_inf_nan=False)
    rope_unit: Literal["token", "pixel"] = "token"
    """What a step of position is: one token, or 4 frames x 16 x 16 pixels whatever the token is.

    With "pixel" a distance keeps its meaning when the autoencoder or the patch changes.
    """
    guidance: bool = False
    """Whether the strength of guidance is an input (`guidance_in`), as in FLUX.1-dev.

    For models from such a file alone: training shows it the strength 1, and teaches no other.
    """
    image_condition: bool = False
    """Whether latents of given frames and their mask are an input (`cond_in`, zero at first)."""

    @model_validator(mode="after")
    def _is_buildable(self) -> Self:
        if self.depth + self.depth_single == 0:
            raise ValueError("depth=0 and depth_single=0: a DiT needs at least one block")
        rule = "heads must divide width into an even number of channels, 6 or more"
        fitting = [w for w in range(6, self.width + 1, 2) if self.width % w == 0]
        if not fitting:
            raise ValueError(f"width={self.width}: no number of heads fits; {rule}")
        if self.width % self.heads or self.head_width not in fitting:
            nearest = min((self.width // w for w in fitting), key=lambda n: abs(n - self.heads))
            raise ValueError(
                f"width={self.width}, heads={self.heads}: {rule}; nearest: heads={nearest}"
            )
        return self

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLPs."""
        return int(self.width * self.mlp_ratio)

    @property
    def rotary_pairs(self) -> Grid:
        """Channel pairs that encode the position along T, H and W: 16:56:56 of 128 channels."""
        pairs = self.head_width // 2
        spatial = pairs * 7 // 16
        return pairs - 2 * spatial, spatial, spatial

    def token_grid(self, grid: Grid) -> Grid:
        """Tokens along T, H and W for a latent grid; ValueError where the patch does not fit."""
        frames, height, width = grid
        if frames < 1 or height < 1 or width < 1 or height % self.patch or width % self.patch:
            fitting = [max(1, round(side / self.patch)) * self.patch for side in (height, width)]
            raise ValueError(
                f"latent grid {frames}x{height}x{width} (T, H, W): H and W must be multiples of "
                f"patch={self.patch}; nearest: {max(1, frames)}x{fitting[0]}x{fitting[1]}"
            )
        return frames, height // self.patch, width // self.patch

    def tokens(self, grid: Grid) -> int:
        """Video tokens of one sample with this latent grid (T, H, W)."""
        return math.prod(self.token_grid(grid))

    def forward_flops(
        self, tokens: int, text_tokens: int, channels: int, text_width: int, pooled_width: int
    ) -> int:
        """FLOPs of one sample's forward pass: matrix products and attention, 2 a multiply-add."""
        width, joint, cells = self.width, tokens + text_tokens, channels * self.patch**2
        attention = 2 * joint * joint * width
        double = joint * width * (4 * width + 2 * self.mlp_width) + attention + 12 * width**2
        single = joint * width * (4 * width + 2 * self.mlp_width) + attention + 3 * width**2
        ends = tokens * 2 * cells * width + text_tokens * text_width * width
        once = width * (TIME_WIDTH + pooled_width + 2 * width) + 2 * width**2
        return 2 * (self.depth * double + self.depth_single * single + ends + once)

    def build(
        self,
        channels: int = 16,
        text_width: int = 4096,
        pooled_width: int = 768,
        device: torch.device | str = "cpu",
        stride: Grid = (4, 8, 8),
    ) -> "MMDiT":
        """The module, for a codec of `channels` and `stride` and a text encoder of these widths."""
        with torch.device(device):
            return MMDiT(self, channels, text_width, pooled_width, self.spacing(stride))

    def spacing(self, stride: Grid) -> Spacing:
        """Steps of position from one token to the next along T, H and W."""
        if self.rope_unit == "token":
            return 1.0, 1.0, 1.0
        t, h, w = stride
        frames, rows, columns = ROPE_PIXELS
        return t / frames, h * self.patch / rows, w * self.patch / columns


class MMDiT(nn.Module):
    """Predicts the flow's velocity; made by `DiT.build`. Shard it block by block.

    Under mixed precision, leave the inputs of the root uncast: the timestep must reach `sinusoid`
    in fp32, and everything else is cast here to the dtype of the layer that takes it.
    """

    context: Context | None = None
    """Ranks that share the tokens: all of them give and get whole tensors, the same ones."""

    def __init__(
        self, shape: DiT, channels: int, text_width: int, pooled_width: int, spacing: Spacing
    ) -> None:
        super().__init__()
        self.shape = shape
        self.spacing = spacing
        cells = channels * shape.patch**2
        self.img_in = nn.Linear(cells, shape.width)
        if shape.image_condition:
            self.cond_in = ZeroLinear(cells + shape.patch**2, shape.width)
        self.txt_in = nn.Linear(text_width, shape.width)
        self.time_in = Embedder(TIME_WIDTH, shape.width)
        self.vector_in = Embedder(pooled_width, shape.width)
        if shape.guidance:
            self.guidance_in = Embedder(TIME_WIDTH, shape.width)
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(shape) for _ in range(shape.depth_single))
        self.final_layer = FinalLayer(shape.width, cells)

    def forward(
        self,
        z_BCTHW: Tensor,
        t_B: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor | None,
        pooled_BD: Tensor,
        guidance_B: Tensor | None = None,
        given_BCTHW: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, T, H, W); `text_mask_BL` is True on text to attend, None means all.

        `guidance_B` is needed where the shape has it. `given_BCTHW` holds a mask (1 where a frame
        is given) and then the given latents, (B, 1 + C, T, H, W); None gives nothing.
        """
        t, h, w = self.shape.token_grid((z_BCTHW.shape[2], z_BCTHW.shape[3], z_BCTHW.shape[4]))
        patch, length, tokens = self.shape.patch, text_BLD.shape[1], t * h * w
        share = None if self.context is None else self.context.share(length, tokens)
        own = (_ALL, _ALL, _ALL) if share is None else (share.text, share.video, share.joint)
        own_text, own_video, own_joint = own
        video_BND = self.img_in(self._cells(z_BCTHW)[:, own_video])
        if self.shape.image_condition:
            if given_BCTHW is None:
                given_BCTHW = functional.pad(torch.zeros_like(z_BCTHW), (0, 0, 0, 0, 0, 0, 1, 0))
            video_BND = video_BND + self.cond_in(self._cells(given_BCTHW)[:, own_video])
        text_BLD = self.txt_in(text_BLD[:, own_text].to(self.txt_in.weight.dtype))
        condition_BD = self.time_in(sinusoid(t_B)) + self.vector_in(pooled_BD)
        if self.shape.guidance:
            if guidance_B is None:
                raise ValueError("this DiT takes the strength of guidance (guidance=True): give it")
            condition_BD = condition_BD + self.guidance_in(sinusoid(guidance_B))
        pairs, theta = self.shape.rotary_pairs, self.shape.theta
        turn = rotation(pairs, theta, (t, h, w), length, z_BCTHW.device, self.spacing)
        padding = self._padding(text_mask_BL, tokens)
        inputs = (condition_BD, turn.of(own_joint), padding, share)

        for block in self.double_blocks:
            video_BND, text_BLD = block(video_BND, text_BLD, *inputs)
        joint_BSD = torch.cat((text_BLD, video_BND), dim=1)
        for block in self.single_blocks:
            joint_BSD = block(joint_BSD, *inputs)
        out_BNC: Tensor = self.final_layer(joint_BSD[:, text_BLD.shape[1] :], condition_BD)
        if share is not None:
            out_BNC = share.whole_video(out_BNC)
        velocity_BCTHW = rearrange(
            out_BNC, "b (t h w) (c p q) -> b c t (h p) (w q)", t=t, h=h, p=patch, q=patch
        )
        # FSDP2 hangs the next gather on this tensor, which a view of another would lose.
        return velocity_BCTHW.clone(memory_format=torch.contiguous_format)

    def recompute(self, policy: Recompute) -> Self:
        """What each block keeps for the backward pass."""
        for block in self.blocks():
            block.recompute = policy
        return self

    def blocks(self) -> list[Block]:
        """All blocks, in the order in which they compute."""
        blocks = [*self.double_blocks, *self.single_blocks]
        found = [block for block in blocks if isinstance(block, Block)]
        assert len(found) == len(blocks), "every block can be compiled and computed again"
        return found

    def _padding(self, text_mask_BL: Tensor | None, tokens: int) -> Padding | None:
        """Which tokens of the joint sequence are only there to fill it; None: there are none."""
        if text_mask_BL is None:
            return None
        real_BS = functional.pad(text_mask_BL, (0, tokens), value=True)
        return Padding.of(real_BS, self.img_in.weight, self.shape.head_width)

    def _cells(self, x_BCTHW: Tensor) -> Tensor:
        """The values of each patch, in the dtype of the layers that take them."""
        return patches(x_BCTHW, self.shape.patch).to(self.img_in.weight.dtype)


def patches(x_BCTHW: Tensor, patch: int) -> Tensor:
    """The cells of every patch, (B, N, C * patch^2)."""
    return rearrange(x_BCTHW, "b c t (h p) (w q) -> b (t h w) (c p q)", p=patch, q=patch)
