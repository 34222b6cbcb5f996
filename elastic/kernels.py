"""Which kernels run on this device: the attention backend, and what is compiled.

Torch tries its attention backends in an order that depends on its version, so the order is said
here. On Hopper cuDNN's kernel comes first (tests/bench/mfu.py measures both).
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import backend_of
from models.blocks import Block
from models.codec import CodecModule
from stages.schedule import Bucket
from stages.stage import DiffusionStage, Stage

Backend = Literal["cudnn", "flash", "efficient", "math"]
_BACKENDS: dict[Backend, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_HOPPER = (9, 0)  # measured; what came later has the same kernels or newer ones
# Of one class of blocks: a graph for each bucket, length of text and size of round (there are two),
# with gradients and without.
# More than torch's limit is an error with fullgraph=True.
_MOST_GRAPHS = 4096
# Every process compiles an encoder for every bucket, for half a minute or more. From so many pixels
# on, an hour of one GPU with DC-AE (0.4 TFLOP a megapixel), that is made up for on a dozen of them.
_WORTH_PIXELS = 1 << 36
# Compiling a training step of 2.2 B parameters takes 21 s on an H200, and makes it 1.25 times as
# fast (tests/bench/README.md): that is made up for in two minutes, at 400 TFLOP/s.
_WORTH_FLOPS = 5e16


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


def attention_of(stage: Stage, device: torch.device) -> Backend | None:
    """The backend that attention of this stage runs on, in the order that is set now.

    None for an autoencoder, whose attention is the codec's own matter.
    """
    if not isinstance(stage, DiffusionStage):
        return None
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    found = backend_of(dtype, device, stage.model.head_width)
    return next(name for name, backend in _BACKENDS.items() if backend.value == found)


def num_graphs() -> int:
    """How many graphs this process has compiled so far: more each update is a size too many."""
    compiler = sys.modules.get("torch._dynamo.utils")  # asking for it would take a second
    return 0 if compiler is None else int(compiler.counters["stats"]["unique_graphs"])


def compiles(stage: Stage, device: torch.device) -> bool:
    """Whether the blocks of this stage are compiled on this device."""
    if not isinstance(stage, DiffusionStage):
        return False
    if stage.compile is None:
        return device.type == "cuda" and not stage.exact
    return stage.compile


def text_room(longest: int, video_tokens: int, most: int) -> int:
    """Text tokens that compiled blocks compute for texts of up to `longest`, of at most `most`.

    One of few lengths, since each is compiled for: steps of a 25th of the video's tokens, or of 16,
    so that little of what is computed is padding.
    """
    step = max(16, 1 << int(math.log2(max(1.0, video_tokens / 25))))
    return max(longest, min(most, -(-longest // step) * step))


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of a model, sharded or not; it happens when the first batch comes."""
    _allow_graphs()
    for module in model.modules():
        if isinstance(module, Block):
            module.compile_inside()


@contextmanager
def eager() -> Iterator[None]:
    """Inside this block nothing is compiled: for sizes that come too seldom to pay for it."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiles_walks(stage: DiffusionStage, flops: float, device: torch.device) -> bool:
    """Whether the blocks are compiled for a process that samples, with so many FLOPs before it."""
    return compiles(stage, device) and (bool(stage.compile) or flops >= _WORTH_FLOPS)


def compiles_encoder(
    stage: DiffusionStage, bucket: Bucket, num_clips: int, device: torch.device
) -> bool:
    """Whether the codec's encoder is compiled for so many clips of a bucket.

    The same on every machine of one kind, as what is compiled rounds differently: so a shard that
    is encoded again has the same bits.
    """
    if not stage.codec.can_compile or not compiles(stage, device):
        return False
    pixels = num_clips * bucket.frames * bucket.height * bucket.width
    return bool(stage.compile) or pixels >= _WORTH_PIXELS


@functools.lru_cache(maxsize=1)
def compiled_encoder(module: CodecModule) -> Callable[[Tensor], Tensor]:
    """`module.encode`, compiled for each size on its own when that comes first."""
    _allow_graphs()
    whole = torch.compile(
        module.encode_whole,
        fullgraph=True,
        dynamic=False,
        # Otherwise kernels are chosen by timing them, and the bits depend on the moment.
        options={"deterministic": True},
    )
    return functools.partial(module.encode, whole=whole)


def _allow_graphs() -> None:
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = _MOST_GRAPHS
