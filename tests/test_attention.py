"""Attention without a mask is attention with one, whatever the padding holds."""

# B sample, A attention head, S token, E channel of a head

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dit import SMALL, inputs, shaken
from torch import Tensor
from torch.nn import functional

from elastic.kernels import attention as attention_by
from models import attention as attention_module
from models.attention import Kernel, Padding, attention, maskless_kernel
from models.recompute import RECOMPUTE, Recompute

HEADS = 3
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative, of a norm


class Case(NamedTuple):
    """Queries, keys, values, the gradient of the result, all fp64; which tokens are real."""

    q_BASE: Tensor
    k_BASE: Tensor
    v_BASE: Tensor
    grad_BASE: Tensor
    real_BS: Tensor

    @classmethod
    def drawn(
        cls, lengths: list[int], text: int, video: int, offset: float, seed: int, width: int = 16
    ) -> "Case":
        """So many real text tokens a sample, keys around a common point of this size."""
        made = torch.Generator().manual_seed(seed)
        shape = (len(lengths), HEADS, text + video, width)
        q, k, v, grad = (
            torch.randn(shape, generator=made, dtype=torch.float64).bfloat16().double()
            for _ in range(4)
        )
        around = torch.randn(1, HEADS, 1, width, generator=made, dtype=torch.float64)
        real_BS = torch.arange(text + video) < torch.tensor(lengths)[:, None]
        real_BS[:, text:] = True
        return cls(
            q,
            (k + offset * around).bfloat16().double(),
            v,
            grad * real_BS[:, None, :, None],
            real_BS,
        )

    def padding(self, kernel: Kernel | None) -> Padding:
        """As the model makes it."""
        return Padding(self.real_BS, (~self.real_BS).sum(1).float(), kernel)


def ran(case: Case, dtype: torch.dtype, kernel: Kernel | None) -> list[Tensor]:
    """What the real tokens get, and all gradients, as fp64."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in case[:3]]
    out_BASE = attention(leaves[0], leaves[1], leaves[2], case.padding(kernel))
    out_BASE.backward(case.grad_BASE.to(dtype))
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    seen = (out_BASE * case.real_BS[:, None, :, None]).detach()
    return [each.double() for each in (seen, *gradients)]


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the norm."""
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", CLOSE)
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    more=st.integers(0, 8),
    video=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_padding_costs_nothing_but_rounding(
    dtype: torch.dtype, lengths: list[int], more: int, video: int, seed: int
) -> None:
    case = Case.drawn(lengths, max(lengths) + more, video, 0.0, seed)
    exact = ran(case, torch.float64, None)
    for found, right in zip(ran(case, dtype, "cpu"), exact, strict=True):
        assert torch.isfinite(found).all()
        # Of a single real token the exact gradients are zero.
        size = right.norm() + case.grad_BASE.norm()
        assert (found - right).norm() <= CLOSE[dtype] * size


@pytest.mark.parametrize("offset", [1.0, 10.0, 100.0])
def test_keys_far_from_zero_lose_nothing_to_the_padding(offset: float) -> None:
    """A query may then find all real logits far below those of zero keys."""
    case = Case.drawn([3, 40], 40, 60, offset, seed=1)
    exact = ran(case, torch.float64, None)
    found, masked = ran(case, torch.float32, "cpu"), ran(case, torch.float32, None)
    for ours, theirs, right in zip(found, masked, exact, strict=True):
        assert error(ours, right) < max(CLOSE[torch.float32], 2 * error(theirs, right))


def test_where_keys_share_a_direction_bf16_gradients_are_better_than_with_a_mask() -> None:
    case = Case.drawn([3, 40], 40, 60, 10.0, seed=1)
    exact_q = ran(case, torch.float64, None)[1]
    ours = error(ran(case, torch.bfloat16, "cpu")[1], exact_q)
    assert ours < 0.5 * error(ran(case, torch.bfloat16, None)[1], exact_q)


def test_what_padded_tokens_hold_changes_no_bit_and_gets_no_gradient() -> None:
    case = Case.drawn([2, 7], 9, 20, 0.0, seed=2)
    padded_B1S1 = ~case.real_BS[:, None, :, None]
    noisy = case._replace(
        k_BASE=case.k_BASE + 50 * padded_B1S1, v_BASE=case.v_BASE - 1e4 * padded_B1S1
    )
    one, other = ran(case, torch.float32, "cpu"), ran(noisy, torch.float32, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for gradient in one[2:]:
        assert not (gradient * padded_B1S1).any()
        assert gradient.any()


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_the_kernels_of_a_gpu_take_what_they_are_given(kernel: Kernel) -> None:
    """Their schemas and shapes, on tensors without values: their numbers are tested on a GPU."""
    q, k, v = (
        torch.empty(2, 4, 256, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    real_BS = torch.ones(2, 256, dtype=torch.bool, device="meta")
    out_BASE = attention(q, k, v, Padding(real_BS, (~real_BS).sum(1).float(), kernel))
    assert (out_BASE.shape, out_BASE.dtype) == (q.shape, torch.bfloat16)
    out_BASE.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_on_a_gpu_padding_costs_nothing_but_rounding(kernel: Kernel, width: int) -> None:
    case = Case.drawn([3, 250], 256, 1000, 1.0, seed=1, width=width)
    exact = ran(case, torch.float64, None)
    on_gpu = Case(*(tensor.cuda() for tensor in case))
    with attention_by((kernel, "math")):
        assert maskless_kernel(on_gpu.q_BASE.bfloat16(), width) == kernel
    for found, right in zip(ran(on_gpu, torch.bfloat16, kernel), exact, strict=True):
        assert error(found.cpu(), right) < CLOSE[torch.bfloat16]


def test_a_cpu_keeps_the_mask_which_costs_it_nothing() -> None:
    assert maskless_kernel(torch.empty(1), 128) is None


# Tracing looks at `.grad` of everything that goes in, and makes an object of a Function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("recompute", "compiled"), [*((policy, False) for policy in RECOMPUTE), ("selective", True)]
)
def test_a_dit_computes_the_same_without_a_mask(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute, compiled: bool
) -> None:
    def gradients(kernel: Kernel | None) -> list[Tensor]:
        monkeypatch.setattr(attention_module, "maskless_kernel", lambda like, width: kernel)
        model = shaken(SMALL).recompute(recompute)
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks():
                block.compile(backend="aot_eager", fullgraph=True)
        z, t, text, mask, pooled = inputs(6)
        mask[0, 2:] = False
        mask[1, 5:] = False
        out = model(z, t, text, mask, pooled)
        functional.mse_loss(out, torch.ones_like(out)).backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with_mask, without = gradients(None), gradients("cpu")
    assert len(with_mask) > 20
    for one, other in zip(with_mask, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
