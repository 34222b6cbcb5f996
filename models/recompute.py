"""What a block keeps for the backward pass, and what it computes again there."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "selective", "full"]
"""Nothing; all but attention and every second matrix product; all but the block's inputs."""
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)

_ATEN = torch.ops.aten
_ATTENTION = frozenset(
    op.default
    for op in (
        _ATEN._scaled_dot_product_cudnn_attention,
        _ATEN._scaled_dot_product_flash_attention,
        _ATEN._scaled_dot_product_efficient_attention,
        _ATEN._scaled_dot_product_flash_attention_for_cpu,
    )
)
_PRODUCTS = frozenset((_ATEN.mm.default, _ATEN.addmm.default))


def run_block(policy: Recompute, compute: Callable[..., Any], *inputs: Any) -> Any:
    """What `compute` gives for the inputs, keeping for its backward pass what the policy says.

    Nothing in `compute` may be random: its state is not kept.
    """
    if policy == "none" or not torch.is_grad_enabled():
        return compute(*inputs)
    # Captured, not passed: torch.compile takes only tensors as a checkpoint's inputs.
    tensors = [value for value in inputs if isinstance(value, Tensor)]

    def captured(*again: Tensor) -> Any:
        fresh = iter(again)
        return compute(*(next(fresh) if isinstance(v, Tensor) else v for v in inputs))

    if policy == "full":
        return checkpoint(captured, *tensors, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(
        captured,
        *tensors,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )


def _policy(context: Any, op: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    return is_kept(op, *inputs)


def is_kept(op: Any, *inputs: Any) -> CheckpointPolicy:  # Any: whatever an operation takes
    """Attention, the dearest for its bytes, and products that give no more values than they take.

    Of a block's products those are every second one: the projection after attention, and the way
    back from the MLP. What they give is a fraction of what queries, keys, values and the MLP take.
    """
    if op in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if op in _PRODUCTS:
        taken, given = inputs[-1].shape  # of the weight, the last input
        if taken >= given:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
