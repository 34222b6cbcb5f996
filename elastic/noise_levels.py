"""Losses by level of noise: where on the path a model, a shift or an autoencoder is bad.

The mean over all times hides that: another shift, or latents of another codec, puts other times
into it. In training a sample counts for the level that its own time lies in. Held-out clips are
measured at the middle of each level, the same for every codec, bucket and shift.
"""

# B sample, N samples, L level, K losses by level and then weights by level

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from elastic.data.load import Micro, Source, own_rounds
from elastic.data.order import BatchPlan, first_of
from elastic.level_names import CENTRES, NUM_LEVELS
from elastic.world import World
from stages.schedule import Bucket
from stages.stage import DiffusionStage

_ONE_IN = 4  # held-out clips: what is measured once more costs that share of the measurement


def by_level(t_N: Tensor, loss_N: Tensor, weight_N: Tensor) -> Tensor:
    """Each sample's weighted loss and its weight, both in the column of its level, fp64 (N, K)."""
    level_N = (t_N * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1)
    is_here_NL = level_N[:, None] == torch.arange(NUM_LEVELS, device=t_N.device)
    # Chosen, not multiplied: a loss that is no number stays in its own level.
    parts = [
        torch.where(is_here_NL, x_N.double()[:, None], 0.0) for x_N in (loss_N * weight_N, weight_N)
    ]
    return torch.cat(parts, dim=1)


def times_of(micro: Micro) -> Tensor:
    """The times of samples that `level_rounds` has dealt."""
    return torch.tensor(CENTRES)[torch.from_numpy(micro.epochs)]


def level_rounds(
    source: Source, stage: DiffusionStage, bucket: Bucket, world: World
) -> Iterator[Micro]:
    """This rank's micro-batches of held-out clips, each at one level: that is its epoch.

    As many clips at every level, spread evenly over those that are measured otherwise, one in four
    of them. Where there are fewer than eight, a clip is measured at several levels.
    """
    indices = first_of(stage.data.shares, source.layouts()[bucket.name], stage.held_out)
    count = NUM_LEVELS * max(1, len(indices) // (NUM_LEVELS * _ONE_IN)) if len(indices) else 0
    turns = np.arange(count)
    chosen = indices[turns * len(indices) // max(1, count)]
    plan = BatchPlan(0, bucket, chosen, turns % NUM_LEVELS)
    return own_rounds([plan], source, world, stage.exact)
