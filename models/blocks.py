"""The layers of the diffusion transformer, under the names of the published FLUX files."""

# B sample, L text token, N video token, S = L + N, D width, A attention head, E channel of a head

import math
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from models.attention import Padding, attention
from models.context import Share
from models.recompute import Recompute, run_block
from models.rotary import Rotation

if TYPE_CHECKING:  # the record builds these layers
    from models.dit import DiT

TIME_WIDTH = 256


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

    def __init__(self, shape: "DiT") -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=shape.qkv_bias)
        self.norm = QKNorm(shape.head_width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values, each (B, A, L, E)."""
        q, k, v = _heads(self.qkv(x_BLD), self.heads)
        q, k = self.norm(q, k)
        return q, k, v


def _heads(qkv_BLD: Tensor, heads: int) -> tuple[Tensor, ...]:
    # Unbound, not unpacked: compiled, an unpacked tensor is three selections, whose gradients are
    # three tensors of the size of all, added up.
    return rearrange(qkv_BLD, "b l (k a e) -> k b a l e", k=3, a=heads).unbind(0)


def attend(
    q_BASE: Tensor,
    k_BASE: Tensor,
    v_BASE: Tensor,
    turn: Rotation,
    padding: Padding | None,
    share: Share | None = None,
) -> Tensor:
    """Attention over the joint sequence, (B, S, D); of a `share`, tokens come and go as its run.

    The padding is always that of all tokens.
    """
    q_BASE, k_BASE = turn(q_BASE), turn(k_BASE)
    if share is not None:
        q_BASE, k_BASE, v_BASE = share.to_heads(q_BASE, k_BASE, v_BASE)
    out_BASE = attention(q_BASE, k_BASE, v_BASE, padding)
    if share is not None:
        return share.to_tokens(out_BASE)
    return rearrange(out_BASE, "b a s e -> b s (a e)")


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _mlp(shape: "DiT") -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(shape.width, shape.mlp_width),
        nn.GELU(approximate="tanh"),
        nn.Linear(shape.mlp_width, shape.width),
    )


class Block(nn.Module):
    """A block that may compute inner values again in the backward pass, and may be compiled."""

    recompute: Recompute = "none"

    def forward(self, *inputs: Any) -> Any:  # Any: whatever `compute` of the block takes and gives
        """What `compute` gives."""
        return self._run(*inputs)

    def compute(self, *inputs: Any) -> Any:  # Any: as above
        """The block itself."""
        raise NotImplementedError

    def _run(self, *inputs: Any) -> Any:  # Any: as above
        return run_block(self.recompute, self.compute, *inputs)

    def compile_inside(self) -> None:
        """Compile what happens inside of the block, and leave what FSDP hangs around it alone.

        Blocks of one class share what is compiled. Each size of a batch is compiled for on its own:
        kernels of any size need 1.35 times as long for a step, and 3.5 times to compile (H200).
        """
        self._run = torch.compile(self._run, fullgraph=True, dynamic=False)  # type: ignore[method-assign]


class DoubleBlock(Block):
    """Text and video with their own weights, attending to each other."""

    def __init__(self, shape: "DiT") -> None:
        super().__init__()
        self.img_mod = Modulation(shape.width, parts=6)
        self.img_attn = Attention(shape)
        self.img_mlp = _mlp(shape)
        self.txt_mod = Modulation(shape.width, parts=6)
        self.txt_attn = Attention(shape)
        self.txt_mlp = _mlp(shape)

    def compute(
        self,
        video_BND: Tensor,
        text_BLD: Tensor,
        condition_BD: Tensor,
        turn: Rotation,
        padding: Padding | None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor]:
        v_shift, v_scale, v_gate, v_shift2, v_scale2, v_gate2 = self.img_mod(condition_BD)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.txt_mod(condition_BD)
        video_qkv = self.img_attn(_norm(video_BND) * (1 + v_scale) + v_shift)
        text_qkv = self.txt_attn(_norm(text_BLD) * (1 + t_scale) + t_shift)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, video_qkv, strict=True))
        joint_BSD = attend(q, k, v, turn, padding, share)
        length = text_BLD.shape[1]

        video_BND = video_BND + v_gate * self.img_attn.proj(joint_BSD[:, length:])
        video_BND = video_BND + v_gate2 * self.img_mlp(_norm(video_BND) * (1 + v_scale2) + v_shift2)
        text_BLD = text_BLD + t_gate * self.txt_attn.proj(joint_BSD[:, :length])
        text_BLD = text_BLD + t_gate2 * self.txt_mlp(_norm(text_BLD) * (1 + t_scale2) + t_shift2)
        return video_BND, text_BLD


class SingleBlock(Block):
    """Attention and MLP side by side on the joint sequence."""

    def __init__(self, shape: "DiT") -> None:
        super().__init__()
        self.heads = shape.heads
        self.widths = (3 * shape.width, shape.mlp_width)
        self.modulation = Modulation(shape.width, parts=3)
        self.linear1 = nn.Linear(shape.width, sum(self.widths))
        self.linear2 = nn.Linear(shape.width + shape.mlp_width, shape.width)
        self.norm = QKNorm(shape.head_width)

    def compute(
        self,
        x_BSD: Tensor,
        condition_BD: Tensor,
        turn: Rotation,
        padding: Padding | None,
        share: Share | None = None,
    ) -> Tensor:
        shift, scale, gate = self.modulation(condition_BD)
        qkv, hidden = self.linear1(_norm(x_BSD) * (1 + scale) + shift).split(self.widths, dim=-1)
        q, k, v = _heads(qkv, self.heads)
        q, k = self.norm(q, k)
        attended_BSD = attend(q, k, v, turn, padding, share)
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
