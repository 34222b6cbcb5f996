"""Which kernels a step runs on this device: the attention backend, and whether blocks are compiled.

Torch tries its attention backends in an order that depends on its version, so the order is said
here. On Hopper cuDNN's kernel comes first (tests/bench/mfu.py measures both).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.blocks import Block
from stages.stage import DiffusionStage, Stage

Backend = Literal["cudnn", "flash", "efficient", "math"]
_BACKENDS: dict[Backend, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_HOPPER = (9, 0)
# Of one class of blocks: a graph for each bucket, length of text, mask or none, gradients or none.
# More than torch's limit is an error with fullgraph=True.
_MOST_GRAPHS = 2048


def attention_order(device: torch.device) -> tuple[Backend, ...]:
    """The backends for attention on this device, the one to be tried first at the front."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER:
        return ("cudnn", "flash", "efficient", "math")
    return ("flash", "cudnn", "efficient", "math")


@contextmanager
def attention(order: tuple[Backend, ...]) -> Iterator[None]:
    """Inside this block, attention takes the first backend of the order that can do it."""
    with sdpa_kernel([_BACKENDS[name] for name in order], set_priority=True):
        yield


def attention_backend(
    q_BASE: Tensor, k_BASE: Tensor, v_BASE: Tensor, mask_B11S: Tensor | None
) -> Backend:
    """The backend that attention takes for such inputs on a GPU, inside or outside `attention`."""
    asked = torch.backends.cuda.SDPAParams(q_BASE, k_BASE, v_BASE, mask_B11S, 0.0, False, False)
    able = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    for number in torch._C._get_sdp_priority_order():
        for name, backend in _BACKENDS.items():
            is_next = int(backend) == number  # type: ignore[call-overload]  # an enum of C++
            if is_next and (name == "math" or able[name](asked)):
                return name
    return "math"


def compiles(stage: Stage, device: torch.device) -> bool:
    """Whether the blocks of this stage are compiled on this device."""
    if not isinstance(stage, DiffusionStage):
        return False
    if stage.compile is None:
        return device.type == "cuda" and not stage.exact
    return stage.compile


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of a model, sharded or not; it happens when the first batch comes."""
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = _MOST_GRAPHS
    for module in model.modules():
        if isinstance(module, Block):
            module.compile_inside()
