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

from models.record import Record
from models.rotary import Grid, Rotation, Spacing, rotation

TIME_WIDTH = 256
CODEC_SHAPED = ("img_in.", "cond_in.", "final_layer.linear.")
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
    """Whether the strength of guidance is an input (`guidance_in`), as in FLUX.1-dev."""
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


def sinusoid(t_B: Tensor) -> Tensor:
    """Cosines and sines of 1000 t at TIME_WIDTH / 2 rates, (B, TIME_WIDTH), fp32."""
    half = TIME_WIDTH // 2
    rate = torch.exp(torch.arange(half, device=t_B.device) * (-math.log(10_000) / half))
    angle = 1000 * t_B.float()[:, None] * rate
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    zero_init = True

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class HeadNorm(nn.Module):
    """RMSNorm over the channels of a head; `scale` is the published parameter name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), eps=1e-6)

    def fresh(self, leaf: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """`scale` starts at one."""
        assert leaf == "scale", f"HeadNorm has only scale, asked for {leaf}"
        return torch.ones(shape)


class QKNorm(nn.Module):
    """Normalises queries and keys of shape (B, A, S, E)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = HeadNorm(width)
        self.key_norm = HeadNorm(width)

    def forward(self, q_BASE: Tensor, k_BASE: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q_BASE), self.key_norm(k_BASE)


class Embedder(nn.Module):
    """Two linears around a SiLU, for the timestep and for the pooled text."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width_in, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.silu(self.in_layer(x.to(self.in_layer.weight.dtype)))
        embedded: Tensor = self.out_layer(hidden)
        return embedded


class Modulation(nn.Module):
    """`parts` vectors of shape (B, 1, D) from the condition: shift, scale and gate, repeated."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = ZeroLinear(width, parts * width)

    def forward(self, condition_BD: Tensor) -> tuple[Tensor, ...]:
        parts: Tensor = self.lin(functional.silu(condition_BD))[:, None]
        return parts.chunk(self.parts, dim=-1)


class Attention(nn.Module):
    """The projections of one stream; the attention itself is joint."""

    def __init__(self, shape: DiT) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=shape.qkv_bias)
        self.norm = QKNorm(shape.head_width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values, each (B, A, L, E)."""
        q, k, v = rearrange(self.qkv(x_BLD), "b l (k a e) -> k b a l e", k=3, a=self.heads)
        q, k = self.norm(q, k)
        return q, k, v


def attend(
    q_BASE: Tensor, k_BASE: Tensor, v_BASE: Tensor, turn: Rotation, mask_B11S: Tensor | None
) -> Tensor:
    """Attention over the joint sequence, (B, S, D)."""
    out_BASE = functional.scaled_dot_product_attention(
        turn(q_BASE), turn(k_BASE), v_BASE, attn_mask=mask_B11S
    )
    return rearrange(out_BASE, "b a s e -> b s (a e)")


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _mlp(shape: DiT) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(shape.width, shape.mlp_width),
        nn.GELU(approximate="tanh"),
        nn.Linear(shape.mlp_width, shape.width),
    )


class DoubleBlock(nn.Module):
    """Text and video with their own weights, attending to each other."""

    def __init__(self, shape: DiT) -> None:
        super().__init__()
        self.img_mod = Modulation(shape.width, parts=6)
        self.img_attn = Attention(shape)
        self.img_mlp = _mlp(shape)
        self.txt_mod = Modulation(shape.width, parts=6)
        self.txt_attn = Attention(shape)
        self.txt_mlp = _mlp(shape)

    def forward(
        self,
        video_BND: Tensor,
        text_BLD: Tensor,
        condition_BD: Tensor,
        turn: Rotation,
        mask_B11S: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        v_shift, v_scale, v_gate, v_shift2, v_scale2, v_gate2 = self.img_mod(condition_BD)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.txt_mod(condition_BD)
        video_qkv = self.img_attn(_norm(video_BND) * (1 + v_scale) + v_shift)
        text_qkv = self.txt_attn(_norm(text_BLD) * (1 + t_scale) + t_shift)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, video_qkv, strict=True))
        joint_BSD = attend(q, k, v, turn, mask_B11S)
        length = text_BLD.shape[1]

        video_BND = video_BND + v_gate * self.img_attn.proj(joint_BSD[:, length:])
        video_BND = video_BND + v_gate2 * self.img_mlp(_norm(video_BND) * (1 + v_scale2) + v_shift2)
        text_BLD = text_BLD + t_gate * self.txt_attn.proj(joint_BSD[:, :length])
        text_BLD = text_BLD + t_gate2 * self.txt_mlp(_norm(text_BLD) * (1 + t_scale2) + t_shift2)
        return video_BND, text_BLD


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence."""

    def __init__(self, shape: DiT) -> None:
        super().__init__()
        self.heads = shape.heads
        self.widths = (3 * shape.width, shape.mlp_width)
        self.modulation = Modulation(shape.width, parts=3)
        self.linear1 = nn.Linear(shape.width, sum(self.widths))
        self.linear2 = nn.Linear(shape.width + shape.mlp_width, shape.width)
        self.norm = QKNorm(shape.head_width)

    def forward(
        self, x_BSD: Tensor, condition_BD: Tensor, turn: Rotation, mask_B11S: Tensor | None
    ) -> Tensor:
        shift, scale, gate = self.modulation(condition_BD)
        qkv, hidden = self.linear1(_norm(x_BSD) * (1 + scale) + shift).split(self.widths, dim=-1)
        q, k, v = rearrange(qkv, "b s (k a e) -> k b a s e", k=3, a=self.heads)
        q, k = self.norm(q, k)
        attended_BSD = attend(q, k, v, turn, mask_B11S)
        hidden = functional.gelu(hidden, approximate="tanh")
        x_BSD = x_BSD + gate * self.linear2(torch.cat((attended_BSD, hidden), dim=-1))
        return x_BSD


class FinalLayer(nn.Module):
    """Modulated norm and projection back to the cells of a patch."""

    def __init__(self, width: int, cells: int) -> None:
        super().__init__()
        self.linear = ZeroLinear(width, cells)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 2 * width))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_BD)[:, None].chunk(2, dim=-1)
        cells_BNC: Tensor = self.linear(_norm(x_BND) * (1 + scale) + shift)
        return cells_BNC


class MMDiT(nn.Module):
    """Predicts the flow's velocity; made by `DiT.build`. Shard it block by block.

    Under mixed precision, leave the inputs of the root uncast: the timestep must reach `sinusoid`
    in fp32, and everything else is cast here to the dtype of the layer that takes it.
    """

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
        patch, length = self.shape.patch, text_BLD.shape[1]
        video_BND = self.img_in(self._cells(z_BCTHW))
        if self.shape.image_condition:
            if given_BCTHW is None:
                given_BCTHW = functional.pad(torch.zeros_like(z_BCTHW), (0, 0, 0, 0, 0, 0, 1, 0))
            video_BND = video_BND + self.cond_in(self._cells(given_BCTHW))
        text_BLD = self.txt_in(text_BLD.to(self.txt_in.weight.dtype))
        condition_BD = self.time_in(sinusoid(t_B)) + self.vector_in(pooled_BD)
        if self.shape.guidance:
            if guidance_B is None:
                raise ValueError("this DiT takes the strength of guidance (guidance=True): give it")
            condition_BD = condition_BD + self.guidance_in(sinusoid(guidance_B))
        pairs, theta = self.shape.rotary_pairs, self.shape.theta
        turn = rotation(pairs, theta, (t, h, w), length, z_BCTHW.device, self.spacing)
        mask_B11S = _joint_mask(text_mask_BL, video_BND.shape[1])

        for block in self.double_blocks:
            video_BND, text_BLD = block(video_BND, text_BLD, condition_BD, turn, mask_B11S)
        joint_BSD = torch.cat((text_BLD, video_BND), dim=1)
        for block in self.single_blocks:
            joint_BSD = block(joint_BSD, condition_BD, turn, mask_B11S)
        out_BNC: Tensor = self.final_layer(joint_BSD[:, length:], condition_BD)
        velocity_BCTHW = rearrange(
            out_BNC, "b (t h w) (c p q) -> b c t (h p) (w q)", t=t, h=h, p=patch, q=patch
        )
        # FSDP2 hangs the next gather on this tensor, which a view of another would lose.
        return velocity_BCTHW.clone(memory_format=torch.contiguous_format)

    def _cells(self, x_BCTHW: Tensor) -> Tensor:
        """The values of each patch, in the dtype of the layers that take them."""
        return patches(x_BCTHW, self.shape.patch).to(self.img_in.weight.dtype)


def patches(x_BCTHW: Tensor, patch: int) -> Tensor:
    """The cells of every patch, (B, N, C * patch^2)."""
    return rearrange(x_BCTHW, "b c t (h p) (w q) -> b (t h w) (c p q)", p=patch, q=patch)


def _joint_mask(text_mask_BL: Tensor | None, tokens: int) -> Tensor | None:
    if text_mask_BL is None:
        return None
    return functional.pad(text_mask_BL, (0, tokens), value=True)[:, None, None, :]
