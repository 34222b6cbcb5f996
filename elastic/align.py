"""Solving for a new patch embedding from the latents of both autoencoders of the same clips."""

from dataclasses import dataclass

import numpy as np
from einops import rearrange
from torch import Tensor

from elastic.data.load import Source
from elastic.data.permutation import Indices, Permutation
from elastic.data.rows import DamagedStore
from elastic.errors import InputError
from elastic.world import World
from models.align import PairSums, complete, overlap, paired_cells, solve_embedding
from models.dit import patches
from stages.init import Align
from stages.schedule import Bucket
from stages.stage import DiffusionStage

_CHUNK = 8  # clips read at once; part of the result, since sums are rounded
_SAME_SHAPE = 0.02  # how much the buckets may differ in height over width


@dataclass(frozen=True)
class Pairs:
    """The latents of a stage and of its parent: of the same clips, by sample id."""

    parent: DiffusionStage
    old: Source
    new: Source


def solve_patch_embedding(
    stage: DiffusionStage,
    pairs: Pairs,
    old: tuple[Tensor, Tensor],
    fresh_DC: Tensor,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of `img_in` that imitate the parent's, the same bits on any world.

    `old` are the parent's, `fresh` is the weight of a fresh start. Every rank calls it; InputError
    where the two stores have no clip in common.
    """
    init = stage.init
    assert isinstance(init, Align), f"{type(init).__name__} solves nothing"
    new_bucket = max(stage.buckets, key=lambda b: (b.frames, b.height * b.width))
    old_bucket = _bucket_like(pairs.parent, new_bucket, stage.name)
    ids = _common(stage, pairs, new_bucket, old_bucket, init.clips)
    chunks = np.array_split(ids, range(_CHUNK, len(ids), _CHUNK))
    sums: PairSums | None = None
    for first in range(0, len(chunks), world.size):
        own = first + world.rank
        chunk = chunks[own] if own < len(chunks) else None
        told = world.gather(_told(stage, pairs, new_bucket, old_bucket, chunk))
        for part, fault in told:  # in the order of the chunks, whoever read them
            if fault is not None:
                raise InputError(f"stage {stage.name!r}: init: Align: {fault}")
            if part is not None:
                sums = part if sums is None else sums + part
    assert sums is not None, "at least one chunk"
    if not sums.count:
        raise InputError(
            f"stage {stage.name!r}: init: Align: no token of bucket {new_bucket.name!r} lies "
            f"within the clips of {old_bucket.name!r} of {pairs.parent.name!r}; give the parent "
            "longer clips, or use KeepTrunk"
        )
    times = stage.times(new_bucket)
    solved = None
    if world.is_first:
        weight, bias = solve_embedding(sums, *old, times, init.ridge)
        solved = complete(weight, fresh_DC), bias
    return world.from_first(solved)  # type: ignore[no-any-return]  # whatever was sent


def _told(
    stage: DiffusionStage, pairs: Pairs, new: Bucket, old: Bucket, ids: Indices | None
) -> tuple[PairSums | None, str | None]:
    """This rank's sums, or what is wrong with its data: raised by all ranks, or by none."""
    try:
        return (None if ids is None else _sums(stage, pairs, new, old, ids)), None
    except (DamagedStore, OSError) as error:
        return None, str(error)


def _sums(
    stage: DiffusionStage, pairs: Pairs, new_bucket: Bucket, old_bucket: Bucket, ids: Indices
) -> PairSums:
    parent = pairs.parent
    shares = tuple(
        overlap(new, old)
        for new, old in zip(_edges(stage, new_bucket), _edges(parent, old_bucket), strict=True)
    )
    new = _cells(stage, pairs.new, new_bucket, ids)
    old = _cells(parent, pairs.old, old_bucket, ids)
    return PairSums.of(*paired_cells(new, old, shares))  # type: ignore[arg-type]  # three axes


def _cells(stage: DiffusionStage, source: Source, bucket: Bucket, ids: Indices) -> Tensor:
    """Cells of every token of these samples, (B, T, H, W, cells)."""
    every = source.sample_ids(bucket, np.arange(source.counts()[bucket.name]))
    place = np.argsort(every)
    indices = place[np.searchsorted(every, ids, sorter=place)]
    # A store of means and deviations holds the means first.
    (samples,) = source.fetch_all([(bucket, indices)])
    z_BCTHW = samples.x_BCTHW[:, : stage.codec.channels].float()
    t, h, w = stage.model.token_grid(_grid(stage, bucket))
    cells_BNC = patches(z_BCTHW, stage.model.patch)
    return rearrange(cells_BNC, "b (t h w) c -> b t h w c", t=t, h=h, w=w)


def _edges(stage: DiffusionStage, bucket: Bucket) -> tuple[list[float], list[float], list[float]]:
    """Where the tokens of a bucket begin and end: in seconds, and in shares of the picture."""
    t, h, w = stage.model.token_grid(_grid(stage, bucket))
    seconds = [edge / stage.rate for edge in stage.codec.frame_edges(t)]
    return seconds, [i / h for i in range(h + 1)], [i / w for i in range(w + 1)]


def _grid(stage: DiffusionStage, bucket: Bucket) -> tuple[int, int, int]:
    return stage.codec.grid(bucket.frames, bucket.height, bucket.width)


def _bucket_like(parent: DiffusionStage, bucket: Bucket, name: str) -> Bucket:
    """The parent's bucket of the same picture: its longest clips of that height over width."""
    wanted = bucket.height / bucket.width
    fitting = [b for b in parent.buckets if abs(b.height / b.width / wanted - 1) < _SAME_SHAPE]
    if not fitting:
        raise InputError(
            f"stage {name!r}: init: Align: the parent {parent.name!r} has no bucket with the "
            f"proportions of {bucket.name!r}, only {', '.join(b.name for b in parent.buckets)}; "
            "crops of other proportions show other pixels: use KeepTrunk"
        )
    return max(fitting, key=lambda b: (b.frames, b.height * b.width))


def _common(
    stage: DiffusionStage, pairs: Pairs, new_bucket: Bucket, old_bucket: Bucket, most: int
) -> Indices:
    """Ids of up to `most` clips that both stores have, in an order of the stage's own."""
    new = pairs.new.sample_ids(new_bucket, np.arange(pairs.new.counts()[new_bucket.name]))
    old = pairs.old.sample_ids(old_bucket, np.arange(pairs.old.counts()[old_bucket.name]))
    both = np.intersect1d(new, old)
    if not len(both):
        raise InputError(
            f"stage {stage.name!r}: init: Align: no clip is both in bucket {new_bucket.name!r} and "
            f"in {old_bucket.name!r} of its parent {pairs.parent.name!r}; train both on the same "
            "videos, or use KeepTrunk"
        )
    order = Permutation(len(both), "align", stage.init.seed if isinstance(stage.init, Align) else 0)
    return both[order(np.arange(min(most, len(both))))]
