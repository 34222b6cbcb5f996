"""Attention over a joint sequence of which some tokens are padding, without a mask.

FlashAttention takes no mask, and cuDNN's kernel is an eighth of a training step slower with one.
So padding is made to cost a constant instead, which is taken off again. Attention does not change
when the same vector is taken from all keys of a sample; so real keys are centred, padded ones are
zero, and each of those adds exp(0) to the sum under the softmax and, its value being zero, nothing
above. The kernel gives the logarithm of that sum, so the number of padded tokens is subtracted. The
mean of centred logits is zero: by Jensen the real part is at least the number of real tokens, so
nothing is lost in the difference. A kernel's backward pass takes output and logarithm: given the
corrected ones its gradients are those of real tokens, since a zero key adds nothing to a query's.
"""

# B sample, S token, A attention head, E channel of a head

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

Kernel = Literal["cudnn", "flash", "cpu"]
_ATEN = torch.ops.aten
_BY_BACKEND: dict[int, Kernel] = {
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    SDPBackend.FLASH_ATTENTION.value: "flash",
}


class _Ran(NamedTuple):
    """What a kernel gave: values, the logarithm of the sum of each query, and its own matters."""

    out_BASE: Tensor
    sum_log: Tensor  # (B, A, S) or, of cuDNN, (B, A, S, 1)
    tensors: tuple[Tensor | None, ...] = ()
    lengths: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Padding:
    """Which tokens are real; not a tuple of tensors, which FSDP would look into."""

    real_BS: Tensor
    num_padded_B: Tensor
    kernel: Kernel | None
    """The kernel that goes without a mask; None: a mask costs nothing here, or none can."""

    @classmethod
    def of(cls, real_BS: Tensor, like: Tensor, head_width: int) -> Self:
        """For heads of this width, computed in the type and on the device of `like`."""
        num_padded_B = (~real_BS).sum(1).float()
        return cls(real_BS, num_padded_B, maskless_kernel(like, head_width))


def maskless_kernel(like: Tensor, head_width: int) -> Kernel | None:
    """The kernel that attention without a mask takes now, where a mask would be dear for it."""
    if like.device.type != "cuda" or head_width % 8:
        return None  # a CPU's kernel takes masks; other widths have to be padded themselves
    some_BASE = torch.empty(
        1, 1, 128, head_width, dtype=like.dtype, device=like.device, requires_grad=True
    )
    return _BY_BACKEND.get(torch._fused_sdp_choice(some_BASE, some_BASE, some_BASE))


def attention(q_BASE: Tensor, k_BASE: Tensor, v_BASE: Tensor, padding: Padding | None) -> Tensor:
    """Softmax attention to all real tokens, (B, A, S, E); what padded tokens get is arbitrary."""
    if padding is None:
        return functional.scaled_dot_product_attention(q_BASE, k_BASE, v_BASE)
    if padding.kernel is None:
        mask_B11S = padding.real_BS[:, None, None]
        return functional.scaled_dot_product_attention(q_BASE, k_BASE, v_BASE, attn_mask=mask_B11S)
    real_B1S1 = padding.real_BS[:, None, :, None]
    k_BASE = _centred(k_BASE, real_B1S1)
    v_BASE = torch.where(real_B1S1, v_BASE, 0)
    out_BASE: Tensor = _Maskless.apply(  # type: ignore[no-untyped-call]
        q_BASE, k_BASE, v_BASE, padding.num_padded_B, padding.kernel
    )
    return out_BASE


def _centred(k_BASE: Tensor, real_B1S1: Tensor) -> Tensor:
    """Keys less the mean of the real ones; zeros where there is padding."""
    # The result of attention does not depend on the mean, so no gradient goes through it.
    real_BASE = torch.where(real_B1S1, k_BASE.detach().float(), 0)
    mean_BA1E = real_BASE.sum(2, keepdim=True) / real_B1S1.sum(2, keepdim=True)
    return torch.where(real_B1S1, k_BASE.float() - mean_BA1E, 0).to(k_BASE.dtype)


class _Maskless(torch.autograd.Function):
    """A kernel over zero keys for padding, and what they add taken off."""

    @staticmethod
    def forward(  # Any: autograd's context
        ctx: Any,
        q_BASE: Tensor,
        k_BASE: Tensor,
        v_BASE: Tensor,
        num_padded_B: Tensor,
        kernel: Kernel,
    ) -> Tensor:
        ran = _FORWARD[kernel](q_BASE, k_BASE, v_BASE)
        shape = (-1, *[1] * (ran.sum_log.ndim - 1))
        padded = num_padded_B.view(shape) * torch.exp(-ran.sum_log)  # their share of the sum
        sum_log = ran.sum_log + torch.log1p(-padded)
        scale_BAS1 = 1 / (1 - padded.reshape(*q_BASE.shape[:3], 1))
        out_BASE = ran.out_BASE * scale_BAS1
        if out_BASE.dtype != q_BASE.dtype:
            # Only then: of a conversion that does nothing, torch 2.11 compiles a gradient of zero.
            out_BASE = out_BASE.to(q_BASE.dtype)
        ctx.save_for_backward(q_BASE, k_BASE, v_BASE, out_BASE, sum_log, *ran.tensors)
        ctx.kernel, ctx.lengths = kernel, ran.lengths
        return out_BASE

    @staticmethod
    def backward(  # Any: autograd's context
        ctx: Any, grad_BASE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BASE, k_BASE, v_BASE, out_BASE, sum_log, *tensors = ctx.saved_tensors
        ran = _Ran(out_BASE, sum_log, tuple(tensors), ctx.lengths)
        gradients = _BACKWARD[ctx.kernel](grad_BASE, q_BASE, k_BASE, v_BASE, ran)
        return *gradients, None, None


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> _Ran:
    out, sum_log, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
        _ATEN._scaled_dot_product_cudnn_attention.default(q, k, v, None, True)
    )
    return _Ran(out, sum_log, (seed, offset, cum_q, cum_k), (max_q, max_k))


def _cudnn_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ran: _Ran) -> Any:
    seed, offset, cum_q, cum_k = ran.tensors
    return _ATEN._scaled_dot_product_cudnn_attention_backward.default(
        *(grad, q, k, v, ran.out_BASE, ran.sum_log),
        *(seed, offset, None, cum_q, cum_k, *ran.lengths, 0.0, False),
    )


def _flash(q: Tensor, k: Tensor, v: Tensor) -> _Ran:
    out, sum_log, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
        _ATEN._scaled_dot_product_flash_attention.default(q, k, v)
    )
    return _Ran(out, sum_log, (seed, offset, cum_q, cum_k), (max_q, max_k))


def _flash_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ran: _Ran) -> Any:
    seed, offset, cum_q, cum_k = ran.tensors
    return _ATEN._scaled_dot_product_flash_attention_backward.default(
        *(grad, q, k, v, ran.out_BASE, ran.sum_log),
        *(cum_q, cum_k, *ran.lengths, 0.0, False, seed, offset),
    )


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> _Ran:
    return _Ran(*_ATEN._scaled_dot_product_flash_attention_for_cpu.default(q, k, v))


def _cpu_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ran: _Ran) -> Any:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad, q, k, v, ran.out_BASE, ran.sum_log, 0.0, False
    )


_FORWARD: dict[Kernel, Callable[[Tensor, Tensor, Tensor], _Ran]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "cpu": _cpu,
}
_BACKWARD: dict[Kernel, Callable[[Tensor, Tensor, Tensor, Tensor, _Ran], Any]] = {
    "cudnn": _cudnn_gradients,
    "flash": _flash_gradients,
    "cpu": _cpu_gradients,
}
