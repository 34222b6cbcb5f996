"""What the workers of a DiT stage send one another in an update, from arithmetic alone.

Bytes that leave all workers together, by the least that each exchange needs: of a tensor that n
hold together and gather, or scatter, each sends n - 1 of n parts; a sum that all of them get takes
twice that. What is a few numbers is left out. tests/bench/parallel.py counts it.
"""

from dataclasses import dataclass

from torch import nn

from elastic.data.deal import round_sizes
from elastic.memory import precision_bytes
from elastic.moments import FP32
from elastic.muon import is_matrix
from elastic.shard import each_round, gathered_apart
from models.dit import DiT
from stages.optimizer import Muon
from stages.schedule import Bucket
from stages.stage import DiffusionStage


@dataclass(frozen=True)
class Traffic:
    """Bytes of one update, of all workers together."""

    parameters: float
    """Gathered for each round: of blocks once more for the backward pass."""
    gradients: float
    """Scattered, and summed over the replicas."""
    matrices: float
    """Whole matrices for Muon, and what it makes of them."""
    tokens: float
    """Exchanged around attention, and the velocity, gathered; both ways."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def update_traffic(
    stage: DiffusionStage, module: nn.Module, bucket: Bucket, text_tokens: int, workers: int
) -> Traffic:
    """What an update of a bucket takes on so many workers; parameters are those of the module."""
    holders = stage.holders(workers)
    replicas, readers = workers // holders, workers // stage.context
    sizes = round_sizes(bucket.batch, bucket.micro, readers, stage.exact)
    rounds = len(sizes)
    width, count = precision_bytes(stage), _count(module)
    apart = sum(map(_count, gathered_apart(module)))
    whole = replicas * (holders - 1)  # what leaves the workers, of what each replica gathers
    scatters = rounds if each_round(count, stage.exact) else 1
    matrices = sum(p.numel() for p in module.parameters() if is_matrix(p))
    return Traffic(
        parameters=rounds * whole * width * (count + apart),
        gradients=(scatters * whole + 2 * (replicas - 1)) * FP32 * count,
        matrices=2 * whole * FP32 * matrices if isinstance(stage.optimizer, Muon) else 0.0,
        tokens=sum(sizes) * readers * width * _tokens(stage, bucket, text_tokens),
    )


def _tokens(stage: DiffusionStage, bucket: Bucket, text_tokens: int) -> float:
    """Values of one sample that the workers of a context send, forward and backward."""
    video = stage.model.tokens(stage.codec.grid(bucket.frames, bucket.height, bucket.width))
    share, passes = 1 / stage.context, 2 if stage.recompute == "none" else 3
    # Queries, keys, values and what attention gives: all but the own share of each leaves.
    around = 4 * (video + text_tokens) * stage.model.width * (1 - share)
    velocity = 2 * video * stage.codec.channels * stage.model.patch**2 * (stage.context - 1)
    return passes * _num_blocks(stage.model) * around + velocity


def _num_blocks(model: DiT) -> int:
    return model.depth + model.depth_single


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
