"""Video DC-AE: a deep-compression autoencoder, 4x32x32 (arXiv 2410.10733; video: 2503.09642)."""

from typing import ClassVar, Literal, Self

import torch
from einops import rearrange, reduce, repeat
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.codec import Codec, CodecModule, Reconstruction, Statistics

# B sample, C channel, T frame, H, W grid, N head, D width of a head, L token.
# Module names and nesting give the keys of the published file, as `...main.conv1.conv.weight`.

STAGES = 6
RES_STAGES = 3  # the others are EfficientViT blocks
TEMPORAL_STAGES = (3, 4)  # on leaving these the encoder halves T; the decoder doubles it on entry
EXPANSION = 4
AGGREGATION = 5

Six = tuple[int, int, int, int, int, int]


class DCAE(Codec):
    """Video DC-AE: 4k frames, no posterior; the default fields are the published f32t4c128.

    `DCAE(channels=256)` is the published variant with twice the channels. Clips of over 256 px or
    32 frames were encoded with `Tiling(frames=32, pixels=256)` (arXiv 2503.09642).
    """

    stride: ClassVar[tuple[int, int, int]] = (4, 32, 32)
    lead: ClassVar[int] = 0
    can_recompute: ClassVar[bool] = True
    can_compile: ClassVar[bool] = True
    # The published scale is a divisor, the deviation itself: z / 0.493.
    published: ClassVar[Statistics] = Statistics((0.0,) * 128, (0.493,) * 128)

    kind: Literal["dc-ae"] = "dc-ae"
    channels: int = Field(default=128, ge=1)
    widths: Six = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: Six = (2, 2, 2, 3, 3, 3)
    decoder_depths: Six = (3, 3, 3, 3, 3, 3)
    head_width: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        for width in self.widths[RES_STAGES:]:
            if width < self.head_width or width % self.head_width:
                raise ValueError(
                    f"DCAE: a width of {width} in {self.widths} does not fit; the last three are "
                    f"multiples of head_width={self.head_width}"
                )
        for depths in (self.encoder_depths, self.decoder_depths):
            if depths[0] < 0 or min(depths[1:]) < 1:
                raise ValueError(
                    f"DCAE: depths {depths} do not fit; every stage has a block at least, and only "
                    f"the first may have 0"
                )
        if (self.encoder_depths[0] == 0) != (self.decoder_depths[0] == 0):
            raise ValueError(
                f"DCAE: depths {self.encoder_depths} and {self.decoder_depths} do not fit; the "
                f"first is 0 in both or in neither"
            )
        return self._shortcuts_fit()

    def _shortcuts_fit(self) -> Self:
        first = 0 if self.encoder_depths[0] else 1
        pairs = [
            (self.widths[i] * _volume(i), self.widths[i + 1]) for i in range(first, STAGES - 1)
        ]
        for wide, narrow in [*pairs, (self.widths[-1], self.channels)]:
            if wide % narrow:
                raise ValueError(
                    f"DCAE: widths {self.widths} and channels {self.channels} do not fit; a "
                    f"shortcut averages {wide} channels into {narrow}, which must divide them"
                )
        return self

    def build(self, device: torch.device | str = "cpu") -> CodecModule:
        """The module, its keys and shapes those of the published file."""
        with torch.device(device):
            return DCAEModule(self)


class DCAEModule(CodecModule):
    """Encoder and decoder."""

    def __init__(self, codec: DCAE) -> None:
        super().__init__(codec)
        self.pixel_centre = codec.pixel_centre
        self.encoder = _Encoder(codec)
        self.decoder = _Decoder(codec)

    def recompute(self, whether: bool) -> Self:
        """Keep only the inputs of each layer for the backward pass, or everything."""
        for module in self.modules():
            if isinstance(module, _Ops):
                module.recompute = whether
        return self

    def recomputed(self) -> list[nn.Module]:
        """The layers that are computed again one by one."""
        return [op for ops in self.modules() if isinstance(ops, _Ops) for op in ops.op_list]

    def encode_whole(self, x_BCTHW: Tensor) -> Tensor:
        """The latent itself: there is no posterior."""
        z_BCTHW: Tensor = self.encoder(x_BCTHW - self.pixel_centre)
        return z_BCTHW

    def decode_whole(self, z_BCTHW: Tensor) -> Tensor:
        """Clips of 4t frames from t latent frames."""
        x_BCTHW: Tensor = self.decoder(z_BCTHW)
        return x_BCTHW + self.pixel_centre

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> Reconstruction:
        """Encode and decode; the noise is not used and the KL is zero, as nothing is sampled."""
        decoded_BCTHW = self.decode_whole(self.encode_whole(x_BCTHW))
        return Reconstruction(decoded_BCTHW, decoded_BCTHW.new_zeros(len(x_BCTHW)).float())


def _factors(stage: int) -> tuple[int, int, int]:
    """How the grid shrinks along T, H, W between `stage` and the next one."""
    return (2 if stage in TEMPORAL_STAGES else 1, 2, 2)


def _volume(stage: int) -> int:
    t, h, w = _factors(stage)
    return t * h * w


class _Encoder(nn.Module):
    def __init__(self, codec: DCAE) -> None:
        super().__init__()
        widths, depths = codec.widths, codec.encoder_depths
        # Without blocks at full resolution (the 2D f32 models) the first conv halves the grid.
        self.project_in = (
            _Conv(3, widths[0]) if depths[0] else _Conv(3, widths[1], stride=(1, 2, 2))
        )
        stages = []
        for i in range(STAGES):
            ops: list[nn.Module] = [_block(codec, i) for _ in range(depths[i])]
            if depths[i] and i < STAGES - 1:
                down = _Conv(widths[i], widths[i + 1], stride=_factors(i))
                ops.append(_Residual(down, _Average(widths[i + 1], _factors(i))))
            stages.append(_Ops(ops))
        self.stages = nn.ModuleList(stages)
        self.project_out = _Residual(
            _Ops([_Conv(widths[-1], codec.channels)]), _Average(codec.channels, (1, 1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        z: Tensor = self.project_out(x)
        return z


class _Decoder(nn.Module):
    def __init__(self, codec: DCAE) -> None:
        super().__init__()
        widths, depths = codec.widths, codec.decoder_depths
        self.project_in = _Residual(
            _Conv(codec.channels, widths[-1]), _Duplicate(codec.channels, widths[-1], (1, 1, 1))
        )
        stages = []
        for i in range(STAGES):
            ops: list[nn.Module] = []
            if depths[i] and i < STAGES - 1:
                up = _Upsample(widths[i + 1], widths[i], _factors(i))
                ops.append(_Residual(up, _Duplicate(widths[i + 1], widths[i], _factors(i))))
            ops += [_block(codec, i) for _ in range(depths[i])]
            stages.append(_Ops(ops))
        self.stages = nn.ModuleList(stages)
        last = widths[0] if depths[0] else widths[1]
        to_pixels = _Conv(last, 3) if depths[0] else _Upsample(last, 3, (1, 2, 2))
        self.project_out = _Ops([_RMSNorm(last), nn.ReLU(), to_pixels])

    def forward(self, z: Tensor) -> Tensor:
        z = self.project_in(z)
        for stage in reversed(self.stages):
            z = stage(z)
        x: Tensor = self.project_out(z)
        return x


def _block(codec: DCAE, stage: int) -> nn.Module:
    width = codec.widths[stage]
    if stage < RES_STAGES:
        return _Residual(_ResBlock(width))
    return _EfficientViTBlock(width, codec.head_width)


class _Ops(nn.Module):
    def __init__(self, ops: list[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        again = self.recompute and torch.is_grad_enabled()
        for op in self.op_list:
            x = checkpoint(op, x, use_reentrant=False) if again else op(x)
        return x


class _Residual(nn.Module):
    def __init__(self, main: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x) + self.shortcut(x)
        return y


class _RMSNorm(nn.Module):
    """RMS norm over the channels of B C T H W, with scale and shift."""

    def __init__(self, width: int, scale: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.full((width,), scale))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def fresh(self, leaf: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The starting scale, and shift 0."""
        return torch.full(shape, self.scale if leaf == "weight" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        scale_B1THW = torch.rsqrt(x.float().square().mean(1, keepdim=True) + self.eps)
        weight, bias = self.weight.view(-1, 1, 1, 1), self.bias.view(-1, 1, 1, 1)
        return x * scale_B1THW.to(x.dtype) * weight + bias


class _Conv(nn.Module):
    """A 3D convolution with `same` padding and, where asked, a norm after it."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int = 3,
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        groups: int = 1,
        has_bias: bool = True,
        has_norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            inside, outside, kernel, stride, kernel // 2, groups=groups, bias=has_bias
        )
        # Only residual branches end in a norm. They start at zero: random ones drown the colours.
        self.norm = _RMSNorm(outside, scale=0.0) if has_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


class _Upsample(nn.Module):
    """Nearest-neighbour interpolation, then a convolution."""

    def __init__(self, inside: int, outside: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = tuple(float(factor) for factor in factors)
        self.conv = _Conv(inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(functional.interpolate(x, scale_factor=self.factors, mode="nearest"))
        return y


class _Average(nn.Module):
    """Shortcut down: pixels go to channels, then neighbouring channels are averaged."""

    def __init__(self, outside: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.outside = outside
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.factors
        x = rearrange(x, "b c (t r) (h p) (w q) -> b (c r p q) t h w", r=t, p=h, q=w)
        return reduce(x, "b (c g) t h w -> b c t h w", "mean", c=self.outside)


class _Duplicate(nn.Module):
    """Shortcut up: every channel is repeated, then channels go to pixels."""

    def __init__(self, inside: int, outside: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        t, h, w = factors
        self.repeats = outside * t * h * w // inside
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.factors
        x = repeat(x, "b c t h w -> b (c g) t h w", g=self.repeats)
        return rearrange(x, "b (c r p q) t h w -> b c (t r) (h p) (w q)", r=t, p=h, q=w)


class _ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _Conv(width, width)
        self.conv2 = _Conv(width, width, has_bias=False, has_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(functional.silu(self.conv1(x)))
        return y


class _EfficientViTBlock(nn.Module):
    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.context_module = _Residual(_LiteMLA(width, head_width))
        self.local_module = _Residual(_GLUMBConv(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.local_module(self.context_module(x))
        return y


class _LiteMLA(nn.Module):
    """ReLU linear attention over all of T, H, W, at the token's own scale and a 5x5x5 one."""

    def __init__(self, width: int, head_width: int, eps: float = 1e-15) -> None:
        super().__init__()
        heads = width // head_width
        self.head_width = head_width
        self.eps = eps
        self.qkv = _Conv(width, 3 * width, 1, has_bias=False)
        around = nn.Conv3d(
            3 * width,
            3 * width,
            AGGREGATION,
            padding=AGGREGATION // 2,
            groups=3 * width,
            bias=False,
        )
        mixed = nn.Conv3d(3 * width, 3 * width, 1, groups=3 * heads, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(around, mixed)])
        self.proj = _Conv(2 * width, width, 1, has_bias=False, has_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        _, _, t, h, w = x.shape
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *[aggregate(qkv) for aggregate in self.aggreg]], dim=1)
        # In fp32: the sums run over every token of the clip.
        q_BNLD, k_BNLD, v_BNLD = rearrange(
            scales.float(), "b (n p d) t h w -> p b n (t h w) d", p=3, d=self.head_width
        )
        q_BNLD, k_BNLD = q_BNLD.relu(), k_BNLD.relu()
        mixed_BNLD = q_BNLD @ (k_BNLD.transpose(-1, -2) @ v_BNLD)
        weight_BNL1 = q_BNLD @ k_BNLD.sum(-2).unsqueeze(-1)
        y_BNLD = mixed_BNLD / (weight_BNL1 + self.eps)
        y = rearrange(y_BNLD, "b n (t h w) d -> b (n d) t h w", t=t, h=h, w=w)
        z: Tensor = self.proj(y.to(x.dtype))
        return z


class _GLUMBConv(nn.Module):
    """Inverted bottleneck whose depthwise output is gated by its other half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        middle = EXPANSION * width
        self.inverted_conv = _Conv(width, 2 * middle, 1)
        self.depth_conv = _Conv(2 * middle, 2 * middle, groups=2 * middle)
        self.point_conv = _Conv(middle, width, 1, has_bias=False, has_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth_conv(functional.silu(self.inverted_conv(x)))
        value, gate = x.chunk(2, dim=1)
        y: Tensor = self.point_conv(value * functional.silu(gate))
        return y
